"""The interface of a distillation method: what it looks at, what it learns beside the student, and the loss terms it adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor, nn

from kdbench.data.batch import Batch, Part
from kdbench.data.options import StrictOptions
from kdbench.methods.presets import Presets, placed, preset_for
from kdbench.models.outputs import Outputs, Shapes
from kdbench.models.trace import Example
from kdbench.search.space import Dimension, Range
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
    """How far a training is: epochs done (with the fraction of the present one), optimizer steps done and in all.

    stage: of the method's `stages`, the first one is 0. stage_done: the share of its steps that is done.
    """

    epoch: float
    step: int
    total_steps: int
    stage: int = 0
    stage_done: float = 0.0

    def ramp(self, share: float) -> float:
        """What a loss is multiplied by that rises from 0 to 1 over this share of the training: the same in a short run as in a long one."""
        steps = share * self.total_steps
        return min(1.0, self.step / steps) if steps > 0 else 1.0


@dataclass(frozen=True)
class Stage:
    """A part of a training that begins with another student, or in which other weights learn. Optimizer and schedule begin anew.

    name: for people. share: of the recipe's epochs; those of all stages add up to 1, so that two stages cost what one costs.
    changes: keys of the recipe that differ, of those that say how weights are moved: `training.stages.CHANGEABLE`.
    """

    name: str
    share: float
    changes: Mapping[str, Any] = field(default_factory=dict)


WHOLE = (Stage("training", 1.0),)  # the stages of a method that has none


@dataclass(frozen=True)
class OwnOptimizer:
    """A part of a method with an optimizer of its own: that of the recipe, with the `changes` to keys of the recipe.

    The recipe's schedule moves its learning rate too, and the frame keeps it in checkpoints. by_method: the method itself steps it, when it
    wants (see `Method.use_optimizers`); the method is then `batch_coupled`, as no gradients of the part are exchanged.
    """

    part: nn.Module
    changes: Mapping[str, Any]
    by_method: bool = False


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
    # Defaults that replace those of `Params` where a task's networks give this, such as {"boxes": {"weight": 10.0}}; the first key fits.
    presets: ClassVar[Presets] = MappingProxyType({})
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

    def suited(self, student: Shapes, teacher: Shapes | None, gives: frozenset[str]) -> tuple[Method.Params, dict[str, Dimension]]:
        """The parameters with the defaults that `presets` has for this pair, once its taps are chosen. What somebody set is kept.

        Args:
            student: every place of the student that can be tapped.
            teacher: the same of the teacher; None where there is none.
            gives: what the task's networks give (`Task.gives`).

        Returns:
            The parameters, and by parameter where a search looks in place of the Range in `Params`.
        """
        preset = preset_for(self.presets, gives, student)
        shapes = [teacher.taps[name] for name in self.teacher_taps] if teacher is not None else []
        values, ranges = placed({name: value for name, value in preset.items() if name not in self.params.model_fields_set}, shapes)
        return (self.params.model_copy(update=values) if values else self.params), ranges

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        """Make the adapters, from the shapes at the taps. Raises UserError where the pair can't work."""

    def own_optimizers(self) -> tuple[OwnOptimizer, ...]:
        """The parts of the method that do not learn by the recipe alone, no two of which share a weight.

        Asked after `build`, and after each `begin`.
        """
        return ()

    def use_optimizers(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        """Take the optimizers of the parts that are stepped `by_method`, in the order of `own_optimizers`; called in each stage.

        Kept to be stepped in `shown`. The method zeroes the gradients before it uses them. All workers must make the same steps.
        """

    def stages(self) -> tuple[Stage, ...]:
        """The stages of a training, at least one. They follow from the parameters alone."""
        return WHOLE

    def begin(self, stage: int, student: nn.Module) -> nn.Module:
        """The student of this stage: that of the stage before, changed or as it is, or another module made from it.

        Called at the beginning of each stage but the first, in each worker, with the student on its device, whose weights are those that
        would be kept: the moving average where the recipe has one. What is kept beside it, such as a frozen copy, must not become a
        submodule; parts of the method that learn may be made anew here. A training that goes on after a kill asks again, with the same
        weights: what is drawn comes from `generator` or the process's own streams, which the frame has begin anew for each stage.

        What `export_student` makes of the last stage's student must fit into the network that the experiment names.
        """
        return student

    def task_weight(self, at: Progress) -> float:
        """What the task's own loss is multiplied by."""
        return self.params.task_weight

    def shown(self, batch: Batch, at: Progress) -> Batch:
        """What the student is shown in this step: the loader's batch, with further ones in `others`, or another in its place.

        Called once a micro-batch, before the student runs and outside autocast, on the training's device, with gradients enabled. What it
        shows in the loader's place is what the task counts.
        What the student gives for `others` is in `Outputs.others`, under the same names; their batches may have other sizes and other
        numbers of samples. What the teacher gives (`t` of `forward`) is for the loader's batch: for others the method asks the frozen
        network (`use_teacher`). The task's own loss is of the batch alone, and is left out where that has no target.

        What is in `batch.others` already is another part's of a combination, and is kept.

        In training with several workers a `batch_coupled` method is given the joined batch, the same on all; the frame then cuts what it
        returns. So what such a method shows has a multiple of the batch's samples, on one worker too.
        """
        return batch

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

    @property
    def makes_batches(self) -> bool:
        """Whether `shown` may return anything but the loader's batch."""
        return type(self).shown is not Method.shown

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """Loss terms by name, weighted, float32 or wider. The task's own loss is added by the frame with `task_weight`.

        A term is a tensor without dimensions. Every step of a stage has the same terms, 0 where one does not count. No term has the name of
        one of the task's terms or is called `total`. A training ends with an error that names the term where one of these does not hold.
        """
        raise NotImplementedError

    def warmup_epochs(self, total_epochs: float) -> float:
        """Epochs, of a training of `total_epochs`, before the method's loss has its full weight: a search does not stop a trial earlier.

        Nor does it stop one before the last of its `stages` is under way.
        """
        return 0.0

    @classmethod
    def supports(cls, gives: frozenset[str]) -> bool:
        """Whether the method works on a task whose networks give this."""
        return not cls.reads or bool(cls.reads & gives)


def loss_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32 or wider: loss arithmetic never runs in half precision."""
    return tuple(t if t.dtype in (torch.float32, torch.float64) or not t.is_floating_point() else t.float() for t in tensors)
