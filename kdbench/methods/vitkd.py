"""ViTKD: imitate a transformer's first blocks, generate its last features (Yang et al., 2022, arXiv 2209.02432)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, output_place
from kdbench.models.adapters import as_tokens
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_LOW_BLOCKS = ("block:0", "block:1")


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared differences of tokens [B, N, D], summed over tokens and channels, averaged over samples; a scalar, float32 or wider."""
    student, teacher = loss_precision(student, teacher)
    return (student - teacher).square().sum() / len(student)


def removed_tokens(noise: Tensor, share: float) -> Tensor:
    """Boolean [B, N]: all but the int(N (1 - share)) tokens of least noise [B, N], so the same number in every sample."""
    rank = noise.argsort(dim=1).argsort(dim=1)
    return rank >= int(noise.shape[1] * (1 - share))


def generation_loss(generated: Tensor, teacher: Tensor, removed: Tensor, share: float) -> Tensor:
    """`squared_distance` of the removed tokens alone, over the share of them: what the student has to guess from its neighbours.

    generated, teacher: [B, N, D]; removed: boolean [B, N]; share: in (0, 1]. Returns a scalar, float32 or wider.
    """
    generated, teacher = loss_precision(generated, teacher)
    return ((generated - teacher).square().sum(2) * removed).sum() / len(generated) / share


class ViTKD(FeatureMethod):
    """Imitate the outputs of the teacher's first two blocks, and generate its last features from a part of the student's.

    For two transformers with one grid of patches. The last features are behind the final norm, those of the blocks are as they are;
    class tokens are left out of both.
    """

    paper = Paper(
        "ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation",
        arxiv="2209.02432",
        venue="CVPR 2024 workshops",
        formula="L = w_task CE + alpha sum_{l=0,1} |W_l s_l - t_l|^2 + beta / lambda |M (G(mask(W s)) - t)|^2, |.|^2 summed",
        checked_against="yzd-v/cls_KD@1e5d48f",
    )

    class Params(FeatureMethod.Params):
        """alpha, beta: weights of sums over all tokens and channels of the teacher. The defaults are for 196 tokens of 384
        channels or more; for other sizes, times 196 * 384 / (tokens * channels) they mean the same.

        removed: share of the student's tokens that are hidden from the generator. The taps are in pairs, the last features last.
        """

        alpha: Annotated[float, Range(1e-6, 1e-2, log=True), Field(ge=0)] = 3e-5
        beta: Annotated[float, Range(1e-7, 1e-3, log=True), Field(ge=0)] = 3e-6
        removed: Annotated[float, Range(0.2, 0.8), Field(gt=0, le=1)] = 0.5

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """The first two blocks, and the place behind the final norm."""
        for name, shapes in (("student", student), ("teacher", teacher)):
            if not shapes.taps.keys() >= set(_LOW_BLOCKS):
                raise UserError(f"it imitates the first two blocks of a transformer, and the {name} has fewer")
        return (*_LOW_BLOCKS, output_place(student)), (*_LOW_BLOCKS, output_place(teacher))

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self._shapes: list[tuple[TapShape, TapShape]] = self.pairs(student, teacher)
        maps = self.map_pairs(student, teacher)
        for position, ((_, *ours), (_, *theirs)) in enumerate(maps):
            if ours != theirs:
                way_out = "it compares token by token; use a student and a teacher with patches of one size"
                raise self.unfit(position, *self._shapes[position], way_out)
        widths = [(ours[0], theirs[0]) for ours, theirs in maps]
        self._grid = maps[-1][1][1:]
        self.low_align = nn.ModuleList(_linear(*pair) for pair in widths[:-1])
        self.high_align = _linear(*widths[-1])
        width = widths[-1][1]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        convolutions = [nn.Conv2d(width, width, kernel_size=3, padding=1) for _ in range(2)]
        self.generation = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1])

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        tokens = []
        for ours, theirs, (shape_s, shape_t) in zip(self.student_taps, self.teacher_taps, self._shapes, strict=True):
            tokens.append(loss_precision(as_tokens(s.maps[ours], shape_s), as_tokens(t.maps[theirs], shape_t)))
        *low, (high_s, high_t) = tokens
        params = self.params
        terms = {}
        if low:
            distances = [squared_distance(align(ours), theirs) for align, (ours, theirs) in zip(self.low_align, low, strict=True)]
            terms["mimicking"] = params.alpha * torch.stack(distances).sum()
        removed = removed_tokens(self.noise(high_s), params.removed)
        terms["generation"] = params.beta * generation_loss(self.generate(high_s, removed), high_t, removed, params.removed)
        return terms

    def noise(self, tokens: Tensor) -> Tensor:
        """Uniform [B, N] for tokens [B, N, D]: drawn on the CPU, so that every device hides the same ones."""
        return torch.rand(tokens.shape[:2], generator=self.generator).to(tokens.device)

    def generate(self, student: Tensor, removed: Tensor) -> Tensor:
        """The teacher's last tokens [B, N, D_t], guessed from those of the student's [B, N, D_s] that are not removed, boolean [B, N]."""
        visible = torch.where(removed[..., None], self.mask_token, self.high_align(student))
        grid = visible.transpose(1, 2).unflatten(2, self._grid)
        generated: Tensor = self.generation(grid)
        return generated.flatten(2).transpose(1, 2)


def _linear(student: int, teacher: int) -> nn.Module:
    """From the student's width to the teacher's, if they differ."""
    return nn.Identity() if student == teacher else nn.Linear(student, teacher)
