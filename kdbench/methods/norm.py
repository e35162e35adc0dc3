"""N-to-one representation matching, NORM (Liu, Li, Li & Yao, ICLR 2023, OpenReview CRNwGauQpb6)."""

from __future__ import annotations

import copy
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names
from kdbench.methods.kd import softened_divergence
from kdbench.methods.logits import require_same_classes
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.models.tail import Tail
from kdbench.models.taps import Tap, locate, tap_shapes
from kdbench.models.trace import Example
from kdbench.search.space import Choice, Range
from kdbench.tasks.base import TaskInfo

Schedule = Literal["cifar", "imagenet", "constant"]
# Until which share of the training the matching has which strength: in the authors' code, of 240 and of 100 epochs.
_STRENGTHS: dict[str, tuple[tuple[float, float], ...]] = {
    "cifar": ((10 / 240, 0.1), (20 / 240, 0.5), (180 / 240, 1.0), (210 / 240, 0.5), (1.0, 0.1)),
    "imagenet": ((5 / 100, 0.1), (15 / 100, 0.5), (60 / 100, 0.9), (80 / 100, 0.5), (1.0, 0.1)),
    "constant": ((1.0, 1.0),),
}
_EXPANDED = "expand"
_EPSILON = 1e-7
_AGREES = 1e-8  # in float64, relative to the largest logit


def matching_distance(expanded: Tensor, teacher: Tensor) -> Tensor:
    """Sum over the N segments of `expanded` of their mean squared difference to the one teacher's map.

    expanded: [B, N D, H, W], channel j meets the teacher's j mod D; teacher: [B, D, h, w]. The larger map is max-pooled to the smaller's
    size. Returns a scalar, float32 or wider.
    """
    expanded, teacher = loss_precision(expanded, teacher)
    size = min(expanded.shape[-2], teacher.shape[-2]), min(expanded.shape[-1], teacher.shape[-1])
    expanded, teacher = (x if x.shape[-2:] == size else F.adaptive_max_pool2d(x, size) for x in (expanded, teacher))
    segments = expanded.unflatten(1, (-1, teacher.shape[1]))
    distance: Tensor = segments.shape[1] * (segments - teacher.unsqueeze(1)).square().mean()
    return distance


def normalised_logits(logits: Tensor, scale: float) -> Tensor:
    """Logits [B, C] with mean 0 and deviation `scale` over the classes of each sample, float32 or wider."""
    (logits,) = loss_precision(logits)
    return scale * F.layer_norm(logits, logits.shape[1:], eps=_EPSILON)


class ExpandedStudent(nn.Module):
    """A student that makes of its last map x the wide u = BN(conv1x1(x)), which is matched, and goes on with x + BN(conv1x1(u))."""

    def __init__(self, network: nn.Module, place: Tap, head: Tap, width: int) -> None:
        """place: where the map is; head: the linear layer behind its average; width: channels of u."""
        super().__init__()
        channels = place.shape.channels
        self.network = network
        self.expand = _pointwise(channels, width)
        self.contract = _pointwise(width, channels)
        self.input_spec = getattr(network, "input_spec", None)
        self._place = place
        self._head = head.path

    def forward(self, images: Tensor) -> Tensor:
        with self._place.change(lambda x: x + self.contract(self.expand(x))):
            prediction: Tensor = self.network(images)
        return prediction

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The network alone, which predicts in eval mode what this one does: both convolutions and batch norms went into its head."""
        network = copy.deepcopy(self.network)
        head = network.get_submodule(self._head)
        assert isinstance(head, nn.Linear)
        widen, shift = _as_linear(self.expand)
        narrow, offset = _as_linear(self.contract)
        weight = head.weight.double()
        head.bias.copy_(head.bias.double() + weight @ (narrow @ shift + offset))
        head.weight.copy_(weight + weight @ narrow @ widen)
        return network


def _pointwise(channels: int, wanted: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, wanted, kernel_size=1, bias=False), nn.BatchNorm2d(wanted))


def _as_linear(layers: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] in float64 of what 1x1 convolution and batch norm do together in eval mode."""
    convolution, norm = layers
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return factor[:, None] * convolution.weight.double().flatten(1), norm.bias.double() - factor * norm.running_mean.double()


class NORM(FeatureMethod):
    """Match the teacher's last map N times over, in a layer that the student has while it learns and that is folded away afterwards.

    As in the authors' code and unlike their text, cross-entropy and KL read logits that are normalised over the classes and scaled,
    and the matching has a strength that depends on the epoch: here, on the share of the training. They normalise the logits when they
    test as well, which moves no prediction; the student that is kept gives them plain, so of its metrics accuracy is theirs, but
    not those of its confidence. The code calls the paper's alpha beta and its beta alpha; the names here are the code's.
    """

    paper = Paper(
        "NORM: Knowledge Distillation via N-to-One Representation Matching",
        arxiv="2305.13803",
        venue="ICLR 2023",
        formula="L = gamma CE(ln(z_s), y) + alpha T^2 KL(ln(z_t) || ln(z_s)) + beta b(progress) sum_n mean (u_n - f_t)^2;  "
        "u = BN(conv1x1(x)), x' = x + BN(conv1x1(u)), ln(z) = scale layer_norm(z)",
        checked_against="OSVAI/NORM@c6dfc39",
    )
    needs_labels = True

    class Params(FeatureMethod.Params):
        """segments: N; with 1 the student stays as it is, and both maps need one width. task_weight: gamma stands in its place.

        The matching is a mean over channels and positions, times N, so beta holds at any map size.
        """

        task_weight: Annotated[float, Field(ge=0)] = 0.0
        gamma: Annotated[float, Range(0.05, 1.0, log=True), Field(ge=0)] = 0.1
        alpha: Annotated[float, Range(0.0, 1.0), Field(ge=0)] = 0.0
        beta: Annotated[float, Range(0.3, 3.0, log=True), Field(ge=0)] = 1.0
        segments: Annotated[int, Choice((2, 4, 8, 16)), Field(ge=1, le=1024)] = 8
        temperature: Annotated[float, Field(gt=0)] = 4.0
        logit_scale: Annotated[float, Field(gt=0)] = 2.5
        schedule: Schedule = "cifar"

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """What the student averages in front of its classifier, as far as shapes tell, and the teacher's last stage."""
        stage, pooled = student.taps["stage:-1"], student.taps.get("pooled")
        alike: list[str] = []
        if pooled is not None and stage.kind == "map":
            averaged = TapShape("map", (pooled.channels, *stage.shape[1:]))
            alike = [name for name, shape in student.taps.items() if shape == averaged and not name.startswith("before:")]
        return (alike[-1] if alike else "stage:-1",), ("stage:-1",)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        require_same_classes(self.name, student, teacher)
        self._example: Example = task.example
        for position, (ours, theirs) in enumerate(self.map_pairs(student, teacher)):
            if self.params.segments == 1 and ours[0] != theirs[0]:
                raise self.unfit(
                    position, *self.pairs(student, teacher)[position], "with `segments: 1` both need the same number of channels"
                )
            self._width = self.params.segments * theirs[0]

    def adapt_student(self, student: nn.Module) -> nn.Module:
        if self.params.segments == 1:
            return student
        if len(self.student_taps) != 1:
            raise UserError(f"method {self.name} expands one map of the student; name one of student_taps and one of teacher_taps")
        (tap,) = self.student_taps
        if not _averages(student, tap, self._example):
            raise UserError(
                f"method {self.name} folds what it adds to the student into its classifier, so between the student's {tap!r} and its "
                "prediction there may be the mean over space and one linear layer with a bias, nothing else; name such a map as "
                "student_taps if there is one, or leave the student as it is with `segments: 1`"
            )
        place, head = (locate(student, self._example, name) for name in (tap, "pooled"))
        self.student_taps = (_EXPANDED,)
        return ExpandedStudent(student, place, head, self._width)

    def export_student(self, student: nn.Module) -> nn.Module:
        return student.folded() if isinstance(student, ExpandedStudent) else student

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        params = self.params
        student, teacher = normalised_logits(s.logits, params.logit_scale), normalised_logits(t.logits, params.logit_scale)
        distances = [matching_distance(ours, theirs) for ours, theirs in self.read_maps(s, t)]
        return {
            "ce": params.gamma * F.cross_entropy(student, batch.labels),
            "kl": params.alpha * softened_divergence(student, teacher, params.temperature),
            "norm": params.beta * _strength(params.schedule, at) * torch.stack(distances).sum(),
        }

    def warmup_epochs(self, total_epochs: float) -> float:
        """Until the matching is at its strongest."""
        phases = _STRENGTHS[self.params.schedule]
        strongest = max(range(len(phases)), key=lambda phase: phases[phase][1])
        return phases[strongest - 1][0] * total_epochs if strongest else 0.0


def _strength(schedule: Schedule, at: Progress) -> float:
    phases = _STRENGTHS[schedule]
    return next((strength for end, strength in phases if at.step / at.total_steps < end), phases[-1][1])


def _averages(student: nn.Module, tap: str, example: Example) -> bool:
    """Whether all that the network makes of the map at `tap` is its mean over space, and of that one linear layer with a bias."""
    network = copy.deepcopy(student).double().eval().requires_grad_(False)
    if "pooled" not in tap_shapes(network, example).taps:
        return False
    place, head = locate(network, example, tap), locate(network, example, "pooled").module
    if place.shape.kind != "map" or not isinstance(head, nn.Linear) or head.bias is None or head.in_features != place.shape.channels:
        return False
    features = torch.randn(2, *place.shape.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(head.weight.device)
    expected, found = head(features.mean((2, 3))), Tail(network, tap, example)(features)
    return bool((expected - found).abs().max() <= _AGREES * expected.abs().max())
