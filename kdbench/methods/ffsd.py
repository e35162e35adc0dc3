"""Feature fusion and self-distillation, FFSD: online distillation without a teacher (Li et al., 2021, arXiv 2103.14473)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.catalogue import nearest
from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.at import attention_loss, attention_map
from kdbench.methods.base import Method, OwnOptimizer, Paper, Progress, loss_precision
from kdbench.methods.features import stages
from kdbench.methods.kd import softened_divergence
from kdbench.models.adapters import as_map, map_shape, shape_of
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_STAGES = 3  # the authors' networks have as many
_FEWEST_POSITIONS = 3  # of the last map: the least attended third of them is one position at least
_FUSION_WEIGHT_DECAY = 1e-5
_KERNEL = 3


def attention(features: Tensor) -> Tensor:
    """Mean of f^2 over channels, float32 or wider: [B, H * W] of features [B, D, H, W]."""
    (features,) = loss_precision(features)
    return features.square().mean(dim=1).flatten(1)


def other_places(features: Tensor) -> Tensor:
    """Where another network should look, given one's features [B, D, H, W]: the target of the other's attention map, [B, H * W].

    With the length l of the attention a and n = a / l: l - n where n is above its floor(H W / 3)-th smallest value, l / 2 there, n below.
    (The authors mix l, which has the features' unit squared, with n, which has none, so the loss is as large as l^2: hence its weight.)
    """
    seen = attention(features)
    half, seen = seen.norm(dim=1, keepdim=True) / 2, F.normalize(seen, dim=1)
    threshold = seen.kthvalue(seen.shape[1] // 3, dim=1, keepdim=True).values
    wanted: Tensor = (half - seen) * (seen - threshold).sign() + half
    return wanted


def diversity_loss(student: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference between the student's attention map and `other_places` of the other student, who gets no gradient.

    student, other: last maps of the two, [B, D, H, W]. Returns a scalar, float32 or wider.
    """
    (student,) = loss_precision(student)
    return (attention_map(student) - other_places(other.detach())).square().mean()


def redirected(features: Tensor) -> Tensor:
    """Features [B, D, H, W] moved, in all channels alike, by what their attention lacks of `other_places`; float32 or wider."""
    (features,) = loss_precision(features)
    seen = attention(features)
    missing = (other_places(features) - F.normalize(seen, dim=1)) * seen.norm(dim=1, keepdim=True) / features.shape[1]
    moved: Tensor = features + missing.reshape(-1, 1, *features.shape[2:])
    return moved


def direction_loss(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference of two feature maps [B, D, H, W], each brought to length 1 over all of a sample's numbers."""
    first, second = loss_precision(first, second)
    return (F.normalize(first.flatten(1), dim=1) - F.normalize(second.flatten(1), dim=1)).square().mean()


class Mixing(nn.Sequential):
    """From one number of channels to another: a 3x3 convolution in each channel, then a 1x1 one, each with batch norm and ReLU."""

    def __init__(self, channels: int, wanted: int) -> None:
        depthwise = nn.Conv2d(channels, channels, _KERNEL, padding=1, groups=channels, bias=False)
        pointwise = nn.Conv2d(channels, wanted, kernel_size=1, bias=False)
        super().__init__(depthwise, nn.BatchNorm2d(channels), nn.ReLU(), pointwise, nn.BatchNorm2d(wanted), nn.ReLU())


class Upsampler(nn.Module):
    """What the shallower stages should be, guessed from the last map: one transposed convolution, batch norm and ReLU a stage."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """shapes: [D, H, W] of the stages, from fine to coarse. Raises UserError where a stage can't be reached from the next one."""
        super().__init__()
        deepest_first = list(reversed(shapes))
        self.sizes = [list(shape[1:]) for shape in deepest_first[1:]]
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for coarse, fine in pairwise(deepest_first):
            stride = math.ceil(fine[1] / coarse[1]), math.ceil(fine[2] / coarse[2])
            if any(math.ceil(wide / s) != narrow for wide, narrow, s in zip(fine[1:], coarse[1:], stride, strict=True)):
                raise UserError(f"a map {list(fine)} is no whole number of times as high and wide as the next one, {list(coarse)}")
            self.convolutions.append(nn.ConvTranspose2d(coarse[0], fine[0], _KERNEL, stride=stride, padding=1, bias=False))
            self.norms.append(nn.BatchNorm2d(fine[0]))

    def forward(self, last: Tensor) -> list[Tensor]:
        """The other stages, from fine to coarse, of the last one, [B, D, H, W]."""
        guesses = [last]
        for convolution, norm, size in zip(self.convolutions, self.norms, self.sizes, strict=True):
            guesses.append(F.relu(norm(convolution(guesses[-1], output_size=size))))
        return guesses[:0:-1]

    @torch.no_grad()
    def settled(self, last: Tensor) -> list[Tensor]:
        """The same in eval mode, as a target: with the statistics of the batches before, which stay as they are."""
        training = self.training
        guesses: list[Tensor] = self.eval()(last)
        self.train(training)
        return guesses


@dataclass(frozen=True)
class Seen:
    """What one of the networks gave: logits [B, C] and its stages' maps [B, D, H, W], from fine to coarse, float32 or wider."""

    logits: Tensor
    maps: list[Tensor]

    @property
    def last(self) -> Tensor:
        return self.maps[-1]


class FFSD(Method):
    """Let students learn from each other, a fusion of them learn from them all, and a leader, which is what is kept, from the fusion.

    The student of the experiment is the leader; the others are networks like it, with first weights of their own. Of the students, each
    but the first is kept from looking where the one before it looks. Every such student and the leader have an upsampler that learns to
    guess their shallower stages from their last map, and then, shown another last map, says what these should be.
    What one learns from is a fixed target: no gradient passes from a network's losses into another one. All step at the same time.
    Optimizers are the recipe's but for weight decay of the fusion (1e-5, as the authors) and Adam for the upsamplers.

    As in the authors' code, the students' shallower stages are weighted by `diversity_weight` and the leader's by `fusion_weight`, while
    `upsampler_weight` trains the upsamplers alone. A student that begins with given weights is joined by others that do so too.
    """

    paper = Paper(
        "Distilling a Powerful Student Model via Online Knowledge Distillation",
        arxiv="2103.14473",
        formula="L_k = CE + T^2 / (K - 1) sum_j KL(z_j || z_k) + w_div (diversity + shallower stages);  "
        "L_fusion = CE + T^2 KL(mean z || z_f);  "
        "L_leader = CE + T^2 KL(z_f || z) + w_fus (attention of the fusion + of the students + shallower stages)",
        checked_against="SJLeo/FFSD@d5cfda9",
    )
    needs_teacher = False

    class Params(Method.Params):
        """task_weight: of the labels, for every network. Defaults are those of CIFAR-100 and ImageNet.

        diversity_weight: of a loss that grows with the fourth power of the features. upsampler_lr: Adam's, before the schedule; it is
        torch's default. student_taps: the stages, from fine to coarse, two or more; empty: the student's last three.
        """

        task_weight: Annotated[float, Field(ge=0)] = 1.0  # no Range: without labels there is nobody to learn from
        students: Annotated[int, Field(ge=2, le=64)] = 2
        temperature: Annotated[float, Range(1.0, 5.0), Field(gt=0)] = 2.0
        diversity_weight: Annotated[float, Range(1e-6, 1e-3, log=True), Field(ge=0)] = 1e-5
        fusion_weight: Annotated[float, Range(1.0, 50.0, log=True), Field(ge=0)] = 10.0
        upsampler_weight: Annotated[float, Range(10.0, 3000.0, log=True), Field(ge=0)] = 1000.0
        upsampler_lr: Annotated[float, Field(gt=0)] = 1e-3
        warmup_share: Annotated[float, Field(ge=0, le=1)] = 5 / 300
        student_taps: tuple[str, ...] = ()

    params: Params

    def __init__(self, params: Method.Params | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__(params, generator)
        self.student_taps = self.params.student_taps

    @property
    def taps_chosen(self) -> bool:
        return bool(self.params.student_taps)

    @property
    def peer_count(self) -> int:
        return self.params.students

    def choose_taps(self, student: Shapes, teacher: Shapes | None) -> Method.Params:
        named = self.params.student_taps or tuple(stages(student)[-_STAGES:])
        if unknown := [name for name in named if name not in student.taps]:
            raise UserError(f"method ffsd: student_taps: there is no tap {unknown[0]!r}{nearest(unknown[0], student.taps)}")
        return self.params.model_copy(update={"student_taps": named})

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        if len(student.logits) != 1 or student.logits[0] < 2:
            raise UserError(f"method ffsd needs logits of at least two classes, the student gives {list(student.logits)}")
        shapes = self._map_shapes(student)
        channels, count = shapes[-1][0], self.params.students
        self.fusion, self.fusion_head = Mixing(count * channels, channels), nn.Linear(channels, student.logits[0])
        self.trans_fusion = Mixing(channels, count * channels)
        try:
            self.upsamplers = nn.ModuleList(Upsampler(shapes) for _ in range(count - 1))
            self.leader_upsampler = Upsampler(shapes)
        except UserError as error:
            raise UserError(f"method ffsd: student_taps {', '.join(self.student_taps)}: {error}") from error

    def _map_shapes(self, student: Shapes) -> list[tuple[int, int, int]]:
        """[D, H, W] at each tap. Raises UserError where they are too few, no maps, or the last one too small."""
        if len(self.student_taps) < 2:
            raise UserError(f"method ffsd needs two stages or more, from fine to coarse; student_taps: {', '.join(self.student_taps)}")
        found = []
        for name in self.student_taps:
            try:
                found.append(map_shape(student.taps[name]))
            except UserError as error:
                raise UserError(f"method ffsd can't read the student's {name!r}: {error}") from error
        if found[-1][1] * found[-1][2] < _FEWEST_POSITIONS:
            raise UserError(
                f"method ffsd parts the positions of the student's {self.student_taps[-1]!r} into thirds, but that is a map "
                f"{list(found[-1])}; name student_taps nearer to the image, or use larger images"
            )
        return found

    def own_optimizers(self) -> tuple[OwnOptimizer, ...]:
        adam = {"optimizer": "adam", "lr": self.params.upsampler_lr, "weight_decay": 0.0}
        return (
            OwnOptimizer(nn.ModuleList([self.fusion, self.fusion_head]), {"weight_decay": _FUSION_WEIGHT_DECAY}),
            OwnOptimizer(nn.ModuleList([*self.upsamplers, self.leader_upsampler]), adam),
        )

    def strength(self, at: Progress) -> float:
        """What the three weights are multiplied by: exp(-5 (1 - x)^2), as x goes from 0 to 1 over the warm-up."""
        return math.exp(-5 * (1 - at.ramp(self.params.warmup_share)) ** 2)

    def warmup_epochs(self, total_epochs: float) -> float:
        return self.params.warmup_share * total_epochs

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        leader, students, strength = self._seen(s), [self._seen(peer) for peer in s.peers], self.strength(at)
        together = torch.cat([student.last.detach() for student in students], dim=1)
        feature = self.fusion(together)
        logits = self.fusion_head(feature.mean((2, 3)))
        terms = self._of_students(students, batch.labels, strength)
        terms |= self._of_fusion(logits, students, batch.labels)
        terms |= self._of_leader(leader, logits.detach(), feature.detach(), together, strength)
        # Last, as they move the statistics that the terms above have read.
        for name, network, upsampler in [
            *((f"upsampler{k}", students[k], self.upsamplers[k - 1]) for k in range(1, len(students))),
            ("leader_upsampler", leader, self.leader_upsampler),
        ]:
            terms |= self._of_upsampler(name, upsampler, network, strength)
        return terms

    def _seen(self, outputs: Outputs) -> Seen:
        maps = [as_map(outputs.maps[name], shape_of(outputs.maps[name])) for name in self.student_taps]
        logits, *maps = loss_precision(outputs.logits, *maps)
        return Seen(logits, maps)

    def _of_students(self, students: list[Seen], target: Tensor, strength: float) -> dict[str, Tensor]:
        terms = {}
        for k, student in enumerate(students):
            others = [other.logits.detach() for other in students if other is not student]
            terms[f"student{k}_labels"] = self._label_loss(student.logits, target)
            terms[f"student{k}_mutual"] = torch.stack([self._divergence(student.logits, other) for other in others]).mean()
            if k == 0:
                continue
            other, weight = students[k - 1].last, strength * self.params.diversity_weight
            terms[f"student{k}_diversity"] = weight * diversity_loss(student.last, other)
            terms[f"student{k}_shallow"] = weight * _shallow_loss(student, self.upsamplers[k - 1], redirected(other))
        return terms

    def _of_fusion(self, logits: Tensor, students: list[Seen], target: Tensor) -> dict[str, Tensor]:
        ensemble = torch.stack([student.logits.detach() for student in students]).mean(0)
        return {"fusion_labels": self._label_loss(logits, target), "fusion_ensemble": self._divergence(logits, ensemble)}

    def _of_leader(self, leader: Seen, logits: Tensor, feature: Tensor, together: Tensor, strength: float) -> dict[str, Tensor]:
        """The labels' part is the frame's. logits, feature: the fusion's; together: the students' last maps, as channels of one."""
        weight = strength * self.params.fusion_weight
        return {
            "leader_fusion": self._divergence(leader.logits, logits),
            "leader_attention": weight * attention_loss(leader.last, feature),
            "leader_students": weight * attention_loss(self.trans_fusion(leader.last), together),
            "leader_shallow": weight * _shallow_loss(leader, self.leader_upsampler, feature),
        }

    def _of_upsampler(self, name: str, upsampler: nn.Module, network: Seen, strength: float) -> dict[str, Tensor]:
        guesses, maps = upsampler(network.last.detach()), [stage.detach() for stage in network.maps[:-1]]
        weight = strength * self.params.upsampler_weight
        losses = {
            name: torch.stack([loss(guess, stage) for guess, stage in zip(guesses, maps, strict=True)]).sum()
            for name, loss in ((f"{name}_features", direction_loss), (f"{name}_attention", attention_loss))
        }
        return {name: weight * loss for name, loss in losses.items()}

    def _label_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        labels = target.to(logits.dtype) if target.is_floating_point() else target
        return self.params.task_weight * F.cross_entropy(logits, labels)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return softened_divergence(student, teacher, self.params.temperature)


def _shallow_loss(network: Seen, upsampler: nn.Module, last: Tensor) -> Tensor:
    """Attention of the network's shallower stages against those that its upsampler guesses from another last map."""
    assert isinstance(upsampler, Upsampler)
    guesses = upsampler.settled(last)
    return torch.stack([attention_loss(stage, guess) for stage, guess in zip(network.maps[:-1], guesses, strict=True)]).sum()
