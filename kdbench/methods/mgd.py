"""Masked generative distillation, MGD (Yang et al., ECCV 2022, arXiv 2205.01529)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.cwd import channel_divergence, dense_logits
from kdbench.methods.features import FeatureMethod, Names, paired_levels
from kdbench.methods.presets import PerElement, Presets
from kdbench.models.adapters import to_smaller, to_width
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Choice, Range
from kdbench.tasks.base import TaskInfo

Mask = Literal["channel", "pixel"]

# Values of the authors' finest map: 256 channels at stride 8 of pictures of 800 x 1216 pixels in one-stage detectors, at stride 4 in
# two-stage ones; 2048 channels at stride 8 of 512 x 1024 pixels in segmentation.
_ONE_STAGE, _TWO_STAGE, _SEGMENTATION = 256 * 100 * 152, 256 * 200 * 304, 2048 * 64 * 128
_WITHIN = 30.0  # alpha is searched over three decades


def mask_from(noise: Tensor, share: float, mask: Mask) -> Tensor:
    """1 where a feature is kept, 0 where it is hidden: in a share `share` of uniform noise on [0, 1), of any shape.

    The authors hide channels below `share`, and pixels above 1 - share.
    """
    return (noise >= share if mask == "channel" else noise <= 1 - share).to(noise.dtype)


def generation_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference, summed over a sample's features, mean over samples: [B, D, H, W] both; a scalar, float32 or wider."""
    generated, teacher = loss_precision(generated, teacher)
    return (generated - teacher).square().sum() / len(generated)


class Generator(nn.Module):
    """Makes the teacher's features from a part of the student's: align widths, hide, 3x3 convolution, ReLU, 3x3 convolution."""

    def __init__(self, student: int, teacher: int) -> None:
        """student, teacher: channels."""
        super().__init__()
        self.align = to_width(student, teacher)
        self.generation = nn.Sequential(nn.Conv2d(teacher, teacher, 3, padding=1), nn.ReLU(), nn.Conv2d(teacher, teacher, 3, padding=1))

    def forward(self, student: Tensor, mask: Tensor) -> Tensor:
        """[B, D_t, H, W] from features [B, D_s, H, W] and a mask [B, D_t, 1, 1] or [B, 1, H, W]."""
        generated: Tensor = self.generation(self.align(student) * mask)
        return generated


class MGD(FeatureMethod):
    """Generate the teacher's last features from the student's, of which a random part is hidden at every step.

    Where both networks have a pyramid, it does so at every level. The paper writes of hidden pixels. The authors' code hides whole channels
    for classification, and pixels for detection and segmentation. It needs equal sizes; here the larger map is averaged down where they
    differ.
    """

    paper = Paper(
        "Masked Generative Distillation",
        arxiv="2205.01529",
        venue="ECCV 2022",
        formula="L = w_task L_task + alpha / B sum (G(mask * align(f_s)) - f_t)^2 + logit_weight CWD(logits)",
        checked_against="yzd-v/MGD@2c9da0b",
    )
    reads = MAPS_ALONE
    presets: ClassVar[Presets] = {
        "proposals": {"mask": "pixel", "masked": 0.45, "alpha": PerElement(5e-7, "values", of=_TWO_STAGE, within=_WITHIN)},
        "boxes": {"mask": "pixel", "masked": 0.65, "alpha": PerElement(2e-5, "values", of=_ONE_STAGE, within=_WITHIN)},
        "pixel logits": {
            "mask": "pixel",
            "masked": 0.75,
            "alpha": PerElement(2e-5, "values", of=_SEGMENTATION, within=_WITHIN),
            "logit_weight": 3.0,
        },
    }

    class Params(FeatureMethod.Params):
        """Defaults are those of ImageNet; the authors have alpha 1.2e-3 on CIFAR, and other defaults for dense predictions, see below.

        alpha: of a sum over channels and positions, so for the same effect it is halved where the teacher's map has twice as many values;
        7e-5 belongs to 25,088. For dense predictions the default follows the size of the teacher's finest map that is compared; all levels
        of a pyramid share one alpha. masked: share that is hidden.
        logit_weight: of CWD's loss on logits that are maps, at logit_temperature.
        """

        alpha: Annotated[float, Range(1e-5, 1e-2, log=True), Field(ge=0)] = 7e-5
        masked: Annotated[float, Range(0.1, 0.8), Field(ge=0, le=1)] = 0.15
        mask: Annotated[Mask, Choice(("channel", "pixel"))] = "channel"
        logit_weight: Annotated[float, Field(ge=0)] = 0.0
        logit_temperature: Annotated[float, Field(gt=0)] = 4.0

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """Every level that both pyramids have; the last stage of networks without a pyramid."""
        return paired_levels(student, teacher) or super().default_taps(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.generators = nn.ModuleList(Generator(ours[0], theirs[0]) for ours, theirs in self.map_pairs(student, teacher))
        if teacher is not None and self.params.logit_weight and not dense_logits(student, teacher):
            shapes = f"the student gives {list(student.logits)}, the teacher {list(teacher.logits)}"
            raise UserError(f"method {self.name}: logit_weight compares maps of logits of one shape: {shapes}; use logit_weight: 0")

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        params = self.params
        losses = []
        for generator, maps in zip(self.generators, self.read_maps(s, t), strict=True):
            ours, theirs = to_smaller(*maps)
            losses.append(generation_loss(generator(ours, mask_from(self._noise(theirs), params.masked, params.mask)), theirs))
        terms = {"mgd": params.alpha * torch.stack(losses).sum()}
        if params.logit_weight:
            terms["logits"] = params.logit_weight * channel_divergence(s.logits, t.logits, params.logit_temperature)
        return terms

    def _noise(self, features: Tensor) -> Tensor:
        """Uniform on [0, 1), one number for each channel or each pixel of features [B, D, H, W]; from the run's own source, on the CPU."""
        samples, channels, height, width = features.shape
        shape = (samples, channels, 1, 1) if self.params.mask == "channel" else (samples, 1, height, width)
        return torch.rand(shape, generator=self.generator).to(features)
