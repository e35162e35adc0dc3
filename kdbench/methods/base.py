"""The interface of a distillation method: what it looks at, what it learns beside the student, and the loss terms it adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor, nn

from kdbench.data.batch import Batch, Part
from kdbench.data.options import StrictOptions
from kdbench.models.outputs import Outputs, Shapes
from kdbench.models.trace import Example
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

MAPS_ALONE: frozenset[str] = frozenset()  # what a method `reads` that looks at nothing else
SMALLEST, LARGEST = 1e-30, 1e30  # sizes of parameters: well inside what float32 holds


@dataclass(frozen=True)
class Paper:
    """Where a method comes from and what its code was checked against (`golden` vectors of that repository)."""

    title: str
    arxiv: str | None = None
    venue: str | None = None
    formula: str = ""
    checked_against: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a training is: epochs done (with the fraction of the present one), optimizer steps done and in all."""

    epoch: float
    step: int
    total_steps: int

    def ramp(self, share: float) -> float:
        """What a loss is multiplied by that rises from 0 to 1 over this share of the training: the same in a short run as in a long one."""
        steps = share * self.total_steps
        return min(1.0, self.step / steps) if steps > 0 else 1.0


@dataclass(frozen=True)
class OwnOptimizer:
    """A part of a method with an optimizer of its own: that of the recipe, with the `changes` to keys of the recipe.

    The recipe's schedule moves its learning rate too.
    """

    part: nn.Module
    changes: Mapping[str, Any]


class Method(nn.Module):
    """One way of training a student. Subclasses state their taps and `Params`, and return named, weighted float32 terms."""

    paper: ClassVar[Paper]
    version: ClassVar[int] = 1  # raised when the numbers of a method change; part of every unit's key
    # What it reads of predictions, any one of which a task's networks must give (`Task.gives`); MAPS_ALONE works on every task.
    reads: ClassVar[frozenset[str]] = frozenset({"class logits"})
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True  # whether its terms read the target; those that don't work on samples without labels too
    batch_coupled: ClassVar[bool] = False  # the loss looks across samples: the frame gathers the batch of all workers first
    # Terms that are means over what the task's loss counts (`Task.weight`), such as labelled pixels. All others are means over samples.
    weighs_as_task: ClassVar[frozenset[str]] = frozenset()
    needs_teacher_network: ClassVar[bool] = False  # beside its outputs, the frozen network itself: see `use_teacher`
    student_taps: tuple[str, ...] = ()  # of the class, or of the instance where `choose_taps` finds them for the pair
    teacher_taps: tuple[str, ...] = ()

    class Params(StrictOptions):
        """Defaults are the paper's; a Range says where to search, a pydantic Field what makes sense at all."""

        model_config = ConfigDict(validate_default=True, allow_inf_nan=False)

        task_weight: Annotated[float, Range(0.0, 2.0), Field(ge=0)] = 1.0

        @field_validator("*")
        @classmethod
        def _holds_in_float32(cls, value: Any) -> Any:
            """Losses are computed in float32, where a factor beyond these bounds gives 0 or infinity at the first step."""
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and number and not SMALLEST <= abs(number) <= LARGEST:
                    raise ValueError(f"expected 0 or a size from {SMALLEST:g} to {LARGEST:g}, which float32 can hold; got {number:g}")
                if isinstance(number, int) and abs(number) >= 2**63:
                    raise ValueError(f"expected a whole number of at most 64 bits, got {number!r:.80}")
            return value

    def __init__(self, params: Method.Params | None = None, generator: torch.Generator | None = None) -> None:
        """`generator` is the source of any randomness inside the loss: one per run, saved with the checkpoint."""
        super().__init__()
        self.params = params if params is not None else self.Params()
        self.generator = generator

    @property
    def taps_chosen(self) -> bool:
        """Whether `student_taps` and `teacher_taps` are known already; otherwise `choose_taps` says which fit the pair."""
        return True

    @property
    def peer_count(self) -> int:
        """How many networks like the student, with first weights of their own, learn beside it and are left behind when it is exported.

        The frame makes, runs and keeps them: what they give, at the student's taps too, is in `Outputs.peers` of the student.
        """
        return 0

    def choose_taps(self, student: Shapes, teacher: Shapes | None) -> Method.Params:
        """The parameters with this pair's taps written in. student, teacher: every place that can be tapped (`models.taps.places`).

        Raises UserError where the pair has no places that the method could compare.
        """
        return self.params

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        """Make the adapters, from the shapes at the taps. Raises UserError where the pair can't work."""

    def own_optimizers(self) -> tuple[OwnOptimizer, ...]:
        """The parts of the method that do not learn by the recipe alone, no two of which share a weight; asked after `build`."""
        return ()

    def use_teacher(self, network: nn.Module, example: Example) -> None:
        """Take what the method needs of the frozen teacher, where it says `needs_teacher_network`; called after `build`.

        What is kept must not become a submodule or a parameter: the teacher is neither trained nor saved with the student.
        """

    def use_samples(self, samples: Part) -> None:
        """Take what the method needs to know of the samples that the student learns from, such as how many; called after `build`.

        `Batch.index` holds positions in the source data set, of which these samples may be a few.
        """

    def adapt_student(self, student: nn.Module) -> nn.Module:
        """The student as it is trained: itself, or with layers that `export_student` folds away again. Called after `build`.

        What is tapped may be one of those layers: `student_taps` is then changed here, as shapes were asked of the plain student.
        Raises UserError where the student can't be changed so.
        """
        return student

    def export_student(self, student: nn.Module) -> nn.Module:
        """The student as it is deployed, from what `adapt_student` gave, trained: it keeps no trace of the method."""
        return student

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """Loss terms by name, weighted, float32 or wider. The task's own loss is added by the frame with `task_weight`.

        A term is a tensor without dimensions. Every step has the same terms, 0 where one does not count. No term has the name of one of the
        task's terms or is called `total`. A training ends with an error that names the term where one of these does not hold.
        """
        raise NotImplementedError

    def warmup_epochs(self, total_epochs: float) -> float:
        """Epochs, of a training of `total_epochs`, before the method's loss has its full weight: a search does not stop a trial earlier."""
        return 0.0

    @classmethod
    def supports(cls, gives: frozenset[str]) -> bool:
        """Whether the method works on a task whose networks give this."""
        return not cls.reads or bool(cls.reads & gives)


def loss_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32 or wider: loss arithmetic never runs in half precision."""
    return tuple(t if t.dtype in (torch.float32, torch.float64) or not t.is_floating_point() else t.float() for t in tensors)
