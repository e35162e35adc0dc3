"""Methods of somebody's own that train in stages, or show the student further batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, OwnOptimizer, Paper, Progress, Stage
from kdbench.methods.kd import softened_divergence
from kdbench.models.outputs import Outputs, Shapes, predicted
from kdbench.models.trace import Example
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo


class PlainNet(nn.Module):
    """Takes images of any size, and has no batch statistics."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, 6, 5, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(24, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


class NormedNet(nn.Module):
    """The same with batch statistics and dropout."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head = nn.Linear(24, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


class FreshHead(Method):
    """kd; then a fresh head on the frozen body, taught by a copy of what the student was, through an adapter of its own."""

    paper = Paper("test")

    class Params(Method.Params):
        share: Annotated[float, Range(0.25, 0.75), Field(gt=0, lt=1)] = 0.5
        changes: dict[str, Any] = Field(default_factory=lambda: {"lr": 0.02})

    params: Params

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.adapter = nn.Linear(task.num_classes, task.num_classes)
        self.seen: list[Progress] = []

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("distil", self.params.share), Stage("head", 1 - self.params.share, self.params.changes))

    def begin(self, stage: int, student: nn.Module) -> nn.Module:
        assert stage == 1
        self._own = [copy.deepcopy(student).eval().requires_grad_(False)]
        head = student.head
        assert isinstance(head, nn.Linear)
        student.requires_grad_(False)
        fresh = nn.Linear(head.in_features, head.out_features)  # from the process's stream
        with torch.no_grad():
            fresh.bias.copy_(torch.rand(head.out_features, generator=self.generator))
        student.head = fresh
        self.adapter = nn.Linear(head.out_features, 2 * head.out_features)  # another structure than that of the first stage
        return student

    def task_weight(self, at: Progress) -> float:
        return self.params.task_weight if at.stage == 0 else 0.0

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        self.seen.append(at)
        if at.stage == 0:
            assert t is not None
            return {"kd": softened_divergence(self.adapter(s.logits), t.logits, 4.0)}
        own = predicted(self._own[0], batch.inputs)
        assert isinstance(own, Tensor)
        return {"itself": softened_divergence(s.logits, own, 4.0), "wide": 0.1 * self.adapter(s.logits).square().mean()}


class Zooming(Method):
    """The student is shown half of each image beside it, and gives there what it gives for the whole."""

    paper = Paper("test")
    needs_teacher = False

    def shown(self, batch: Batch, at: Progress) -> Batch:
        assert isinstance(batch.inputs, Tensor)
        return replace(batch, others={**batch.others, "part": Batch(batch.inputs[..., :14, :14], None, batch.index)})

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        return {"alike": (s.others["part"].logits - s.logits).square().mean()}


class Imagined(Method):
    """A small network makes images of which the teacher is sure, with an optimizer of its own; the student imitates the teacher there."""

    paper = Paper("test")
    needs_teacher = False
    needs_teacher_network = True
    batch_coupled = True

    class Params(Method.Params):
        instead: bool = False
        times: int = 2

    params: Params
    made: Tensor

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        assert teacher is not None, "the shapes of the network that it works with"
        self.classes = teacher.logits[0]
        self.maker = nn.Linear(4, 28 * 28)
        self.register_buffer("made", torch.zeros(()))

    def use_teacher(self, network: nn.Module, example: Example) -> None:
        self._teacher = [network]

    def own_optimizers(self) -> tuple[OwnOptimizer, ...]:
        return (OwnOptimizer(self.maker, {"optimizer": "adamw", "lr": 0.01}, by_method=True),)

    def use_optimizers(self, optimizers: tuple[Optimizer, ...]) -> None:
        (self._optimizer,) = optimizers

    def shown(self, batch: Batch, at: Progress) -> Batch:
        count = self.params.times * len(batch)
        noise = torch.randn(count, 4, generator=self.generator).to(self.maker.weight)
        self._optimizer.zero_grad()
        images = self.maker(noise).sigmoid().view(-1, 1, 28, 28)
        logits = predicted(self._teacher[0], images)
        assert isinstance(logits, Tensor)
        torch.special.entr(logits.softmax(1)).sum(1).mean().backward()
        self._optimizer.step()
        self.made += count
        made = Batch(images.detach(), None, batch.index.repeat(self.params.times))
        return made if self.params.instead else replace(batch, others={**batch.others, "made": made})

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        outputs, images = (s, batch.inputs) if self.params.instead else (s.others["made"], batch.others["made"].inputs)
        with torch.no_grad():
            logits = predicted(self._teacher[0], images)
        assert isinstance(logits, Tensor)
        return {"imagined": softened_divergence(outputs.logits, logits, 4.0)}


class Broken(FreshHead):
    """Fails in its second stage, in the way that `fault` names."""

    class Params(FreshHead.Params):
        fault: str = "raises"

    params: Params

    def begin(self, stage: int, student: nn.Module) -> nn.Module:
        if self.params.fault == "raises":
            raise ValueError("no such head")
        student = super().begin(stage, student)
        if self.params.fault == "frozen":
            student.requires_grad_(False)
            self.adapter.requires_grad_(False)
        return student

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        terms = super().forward(s, t, batch, at)
        return terms if at.stage == 0 or self.params.fault != "nan" else {name: term * float("nan") for name, term in terms.items()}


class Hiding(Method):
    """The student is shown the image without the labels of its left half, and a few images more than it was given, of which nobody asks."""

    paper = Paper("test")
    needs_teacher = False

    class Params(Method.Params):
        more: int = 0

    params: Params

    def shown(self, batch: Batch, at: Progress) -> Batch:
        target = batch.target
        if isinstance(target, Tensor) and target.ndim == 3:
            target = torch.cat([torch.full_like(target[..., :20], 255), target[..., 20:]], -1)
        more = {"more": batch.changed(lambda tensor: tensor[: self.params.more])} if self.params.more else {}
        return replace(batch, target=target, others=more)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        return {}


NAMES: Mapping[str, str] = {
    kind.__name__: f"tests.training.own_methods:{kind.__name__}" for kind in (FreshHead, Zooming, Imagined, Hiding, Broken)
}
