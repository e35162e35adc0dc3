"""The interface of a task: its data splits, its models, its loss and its metrics. Nothing outside `tasks/` knows a task's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from kdbench.data.batch import Batch, Part
from kdbench.data.options import StrictOptions
from kdbench.data.sources import Source
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Outputs


@dataclass(frozen=True)
class TaskInfo:
    """What a method's `build` may need to know: the task, its classes and one image's shape [C, H, W]."""

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splits:
    """train: what a teacher learns from. transfer: what students learn from, `train` or a part of it. val: what choices are made on.

    test: touched once per final run. `hash` names the content and the cut; `data_hash` the source.
    """

    train: Part
    transfer: Part
    val: Part
    test: Part
    hash: str
    data_hash: str


class Task(ABC):
    """One kind of problem on one data set."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    primary: ClassVar[str]  # the key of `metrics` that runs are chosen and ranked by
    higher_is_better: ClassVar[bool] = True

    class Options(StrictOptions):
        """The keys that `task:` takes in an experiment beside `name`."""

    source: Source | None = None  # the data set, where the task has one
    info: TaskInfo
    data_name: str  # what records and boards call the data set

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    @abstractmethod
    def splits(self) -> Splits:
        """The same four parts in every process that asks."""

    @abstractmethod
    def build_model(self, spec: ModelSpec) -> nn.Module:
        """A model of this task's output shape. Raises UserError where the model can't have it."""

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The undistilled loss by name, float32 or wider. A term is a mean over what `weight` counts, S / max(1, w)."""

    def weight(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """How much each term of `loss` is a mean of, w: one number for all terms, or one by name for each; the samples by default.

        A batch that several workers or micro-batches share then has the loss of the whole: the sum of max(1, w) times the term, over
        max(1, the sum of w). Must add up: the weight of a batch is the sum of the weights of its parts. By name, `imitation` stands for
        the terms that a method `weighs_as_task`.
        """
        return torch.tensor(len(batch))

    @abstractmethod
    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """All metrics of stored predictions, a pure function: the same call re-derives a record's numbers. Must hold `primary`."""

    @abstractmethod
    def agreement(self, prediction: Tensor, teacher: Tensor) -> dict[str, float]:
        """How alike student and teacher are on the same samples: `agreement` (argmax equal, a share) and `teacher_kl` (nats)."""
