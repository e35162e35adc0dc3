"""The interface of a task: its data splits, its models, its loss and its metrics. Nothing outside `tasks/` knows a task's name."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from kdbench.data.batch import Batch, Part
from kdbench.data.columns import Columns
from kdbench.data.options import StrictOptions
from kdbench.data.sources import Source
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Outputs, predicted
from kdbench.models.trace import Example

# Plain distillation on a task, which the control `kd` adds: of student, teacher, batch and temperature, a scalar, float32 or wider; a mean
# over what the task's `weight` counts. A function of a module, or a partial of one: methods keep it, and are copied.
Imitation = Callable[[Outputs, Outputs, Batch, float], Tensor]


@dataclass(frozen=True)
class TaskInfo:
    """What a method's `build` may need to know: the task, its classes and samples to run a network on.

    imitation: None where networks give logits of classes or of classes a pixel, which are imitated as Hinton et al. do.
    """

    name: str
    num_classes: int
    example: Example
    class_names: tuple[str, ...] = ()
    imitation: Imitation | None = None


Role = Literal["teacher", "student"]


@dataclass(frozen=True)
class Splits:
    """train: the samples that training has. transfer: what students learn from, `train` or a part of it. val: what choices are made on.

    test: touched once per final run. source: what the parts are cut from; None where a task makes its parts otherwise.
    teacher: the part of `train` that a teacher learns from; None for all of it. apart: what `transfer` is or is cut from, where that is no
    part of `train`: made images, or a further part of the source.
    The hashes are of content and are computed when they are first asked for: of images in files that means reading them, once.
    """

    train: Part
    transfer: Part
    val: Part
    test: Part
    source: Source | None = None
    teacher: Part | None = None
    apart: Part | None = None

    def learned_by(self, role: Role) -> Part:
        """What a teacher or a student learns from."""
        if role == "student":
            return self.transfer
        return self.train if self.teacher is None else self.teacher

    @cached_property
    def data_hash(self) -> str:
        """Of the whole data set, however it is cut."""
        if self.source is not None:
            return self.source.sha256
        return _digest("", *((part.sha256(), None) for part in (self.train, self.transfer, self.val, self.test)))

    @cached_property
    def hash(self) -> str:
        """Of the data set and of how the four parts are cut from it."""
        transfer = (self._apart_sha256, self.transfer.index)
        return _digest(self.data_hash, ("", self.train.index), transfer, *(("", part.index) for part in (self.val, self.test)))

    @cached_property
    def _apart_sha256(self) -> str:
        return "" if self.apart is None else self.apart.sha256()

    @cached_property
    def learned_hash(self) -> str:
        """Of train, transfer and val: of all data that decide a student's training. The test part is left out."""
        return self._learned_hash(self.train, self.transfer)

    def learned_hash_of(self, role: Role) -> str:
        """`learned_hash`; of a teacher with what it learns from in the place of train, and nothing of samples that students alone see."""
        if role == "student" or (self.teacher is None and self.apart is None):
            return self.learned_hash
        return self._learned_hash(self.learned_by(role), self.transfer if self.apart is None else self.train)

    def _learned_hash(self, train: Part, transfer: Part) -> str:
        if self.source is not None:  # whose training images are read once, however many parts show them
            apart = self._apart_sha256 if transfer is self.transfer else ""
            val = self.source.val_sha256, self.val.index
            return _digest(self.source.facts + self.source.train_sha256, ("", train.index), (apart, transfer.index), val)
        return _digest("", *((part.sha256(), None) for part in (train, transfer, self.val)))

    @cached_property
    def test_hash(self) -> str:
        """Of the test part, which decides what is measured of a finished network."""
        if self.source is not None:
            return _digest(self.source.facts + self.source.test_sha256, ("", self.test.index))
        return _digest("", (self.test.sha256(), None))


def _digest(first: str, *parts: tuple[str, Tensor | None]) -> str:
    """SHA-256 of a text, then of each part's text and positions."""
    digest = hashlib.sha256(first.encode())
    for text, index in parts:
        digest.update(text.encode())
        if index is not None:
            digest.update(len(index).to_bytes(8, "little") + index.numpy().tobytes())
    return digest.hexdigest()


def role_of(role: str) -> Role:
    """What a unit or record of this role trains: a teacher, or in a trial, check or final a student."""
    return "teacher" if role == "teacher" else "student"


class Task(ABC):
    """One kind of problem on one data set."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    # What its networks predict, in words that methods `read`: "class logits", "pixel logits", "boxes", "embedding", ...;
    # "imitation" where `TaskInfo.imitation` says what plain distillation is on this task.
    gives: ClassVar[frozenset[str]] = frozenset()
    primary: str  # the key of `metrics` that runs are chosen and ranked by
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float | None, float | None]] = (None, None)  # of the primary metric; None where there is none
    smallest_gap: ClassVar[float] = 0.5  # in its unit: a lead of the teacher below it is not shared out among methods
    batch_coupled: ClassVar[bool] = False  # its loss compares samples: the frame gathers the batch of all workers first
    kept_exactly: ClassVar[bool] = False  # whether predictions are stored in float32, where half precision would move what is measured

    class Options(StrictOptions):
        """The keys that `task:` takes in an experiment beside `name`."""

        def facts_of(self, role: Role) -> dict[str, Any]:
            """The options that decide a teacher's or a student's training, as plain values: all by default."""
            return self.model_dump(mode="json")

    source: Source | None = None  # the data set, where the task has one
    info: TaskInfo
    data_name: str  # what records and boards call the data set

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    def as_teacher(self, network: nn.Module) -> nn.Module:
        """A trained network of another task (`teacher.task`) as this task's batches go into it, giving what this task's teachers give.

        Args:
            network: resizes and normalises images as it was trained to see them.

        Returns:
            The network itself or one around it, on the same weights.

        Raises:
            UserError: this task has no use for such a network. By default it has none.
        """
        raise UserError(f"teacher.task: task {self.name} takes no teacher of another task; leave teacher.task out")

    @abstractmethod
    def splits(self) -> Splits:
        """The same parts in every process that asks."""

    @abstractmethod
    def build_model(self, spec: ModelSpec) -> nn.Module:
        """A model of this task's output shape. Raises UserError where the model can't have it."""

    def inputs_for(self, role: Role, inputs: Columns) -> Columns:
        """What a teacher or a student is shown of a batch's inputs: all of them by default."""
        return inputs

    def example(self, role: Role = "student") -> Example:
        """Samples to look at, time and export such a network with: two real ones, or an image's shape where it is shown no more."""
        example = self.info.example
        return example if isinstance(example, tuple) else self.inputs_for(role, example)

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The undistilled loss by name, float32 or wider. A term is a mean over what `weight` counts, S / max(1, w).

        Not called where the batch has no target: the task adds nothing to the loss then.
        """

    @property
    def counts_samples(self) -> bool:
        """Whether `weight` is the number of samples, which is known without asking other workers."""
        return type(self).weight is Task.weight

    def weight(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """How much each term of `loss` is a mean of, w: one number for all terms, or one by name for each; the samples by default.

        A batch that several workers or micro-batches share then has the loss of the whole: the sum of max(1, w) times the term, over
        max(1, the sum of w). Must add up: the weight of a batch is the sum of the weights of its parts. By name, `imitation` stands for
        the terms that a method `weighs_as_task`.
        """
        return torch.tensor(len(batch))

    def truth(self, batch: Batch) -> dict[str, Tensor]:
        """What the network that learns is handed of the target in training, as keyword arguments of its `forward`: nothing by default.

        For networks whose later part learns at places that the target names, such as the second stage of a detector.
        """
        return {}

    def reading(self, spec: ModelSpec) -> Any:
        """How such a network's prediction is read, where a task has networks of several families; nothing by default.

        It is what the network says in its attribute `reading`, found without its weights: a teacher's outputs may come from a cache.
        """
        return None

    def learned_by(self, network: nn.Module) -> Task:
        """The task as it counts for a network that learns it: itself by default.

        Where `weight` or `truth` depend on how the network's prediction is read, it is a copy that knows. Called once a stage.
        """
        return self

    def predict(self, model: nn.Module, inputs: Columns) -> Columns:
        """What is measured of a network in evaluation: what it gives, unless the task asks for more, such as to write a sentence."""
        return predicted(model, inputs)

    def kept(self, prediction: Columns) -> Columns:
        """What is stored and measured of a batch's prediction: all of it, or less, such as the best boxes of an image."""
        return prediction

    @abstractmethod
    def metrics(self, prediction: Columns, target: Columns) -> dict[str, float]:
        """All metrics of stored predictions, a pure function: the same call re-derives a record's numbers. Must hold `primary`.

        prediction: as `kept` gives it, numbers in float32 or wider.
        """

    def step(self, target: Columns) -> float:
        """The smallest difference that the primary metric can show on these samples; 0 where nobody knows."""
        return 0.0

    def right(self, prediction: Columns, target: Columns) -> Tensor | None:
        """Whether each sample is predicted right, bool [N], where the primary metric is their share in percent; None where it is not."""
        return None

    def chance(self, target: Columns) -> float | None:
        """The primary metric up to which a network is no better than one that always answers with the commonest class of `target`.

        None where the task has no such answer.
        """
        return None

    def agreement_tolerance(self, found: dict[str, float], teacher: Columns) -> dict[str, float]:
        """How far each number of `agreement` may be off where the teacher's predictions were rounded otherwise; 0 for those left out."""
        return {}

    @abstractmethod
    def agreement(self, prediction: Columns, teacher: Columns) -> dict[str, float]:
        """How alike student and teacher are on the same samples, both as `kept` gives them; empty where the task has no measure of it.

        `agreement`: the share of answers that are equal. `teacher_kl`: the divergence of what they say, in nats.
        """
