"""The networks of an experiment before it is trained: built once, looked at once, rehearsed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from torch import nn

from kdbench.benchmark.checks import check_images, searched_recipes
from kdbench.benchmark.ledger import Ledger
from kdbench.benchmark.watch import Watch
from kdbench.data.near_duplicates import counted_once
from kdbench.distributed.cluster import device_here
from kdbench.errors import KDBenchError
from kdbench.experiment import Experiment, Recipe, content_hash
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Shapes
from kdbench.models.taps import tap_shapes
from kdbench.tasks.base import Task
from kdbench.tasks.build import TaskSpec, task_facts
from kdbench.tasks.networks import as_teacher
from kdbench.training.precision import Memo, question
from kdbench.training.rehearsal import Rehearsal


class Networks:
    """The networks of an experiment, each built once. They are let go of when all that is trained has been rehearsed."""

    def __init__(self, experiment: Experiment, task: Task, own: Task, students: Sequence[nn.Module], teacher: nn.Module | None) -> None:
        """own: the teacher's task, `task` itself or another. teacher: the network of that task."""
        self.experiment, self.task, self.own = experiment, task, own
        self.students, self.network = students, teacher
        self.done = self.looked = False

    @cached_property
    def theirs(self) -> Shapes | None:
        """Every place of the teacher that a method can look at; None where there is no teacher."""
        return tap_shapes(self.as_teacher(self.network), self.task.example("teacher")) if self.network is not None else None

    @cached_property
    def ours(self) -> tuple[Shapes, ...]:
        """Every place of each student."""
        return tuple(tap_shapes(student, self.task.example()) for student in self.students)

    def check_images(self, watch: Watch) -> None:
        """Look at the images the first time that it is asked for, and say what of them is not shown. Raises UserError for a broken one."""
        if not self.looked:
            self.looked = True
            for task in dict.fromkeys((self.task, self.own)):
                if unseen := check_images(task):
                    watch.note(unseen)

    @cached_property
    def near_duplicates(self) -> int | None:
        """How many test images the training images nearly equal; None where that is not known."""
        splits = self.task.splits()
        source = splits.source
        train, test = (splits.train, splits.test) if source is None else (source.train, source.test)
        return counted_once(train, test, splits.data_hash)

    def as_teacher(self, network: nn.Module) -> nn.Module:
        """The teacher's network as the students' batches go into it."""
        return network if self.own is self.task else as_teacher(network, self.own, self.task)

    def rehearse(self, teacher_too: bool = False) -> None:
        """Rehearse all that the experiment trains, the first time that it is asked for.

        teacher_too: whether the teacher is trained here and now. Raises UserError for what can't work.
        """
        if self.done:
            return
        device = device_here(self.experiment.runtime)
        if self.network is not None and teacher_too:
            Rehearsal(self.experiment, self.own, [], device).teacher(self.network, tap_shapes(self.network, self.own.example("teacher")))
        rehearsal = Rehearsal(self.experiment, self.task, [self.experiment.recipe, *searched_recipes(self.experiment)], device)
        network = self.as_teacher(self.network) if self.network is not None else None
        for spec, model, ours in zip(self.experiment.students, self.students, self.ours, strict=True):
            rehearsal.student(spec, model, ours, self.theirs, network)
        self.done, self.students, self.network = True, (), None

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Where a measurement inside fails, the rehearsal says what is wrong with the network."""
        try:
            yield
        except KDBenchError:
            raise
        except Exception:
            self.rehearse(teacher_too=True)
            raise


def memo_of(ledger: Ledger, task: TaskSpec, experiment: Experiment, model: ModelSpec, recipe: Recipe) -> Memo:
    """Where the choices are kept that were measured for this model on this task and device, for what the recipe asks."""
    device = str(device_here(experiment.runtime))
    earlier = [model.model_dump(mode="json"), task.model_dump(mode="json"), device]
    place = [model.model_dump(mode="json", exclude={"weights"}), task_facts(task), device]
    return Memo(ledger.layout.choice(content_hash([*place, question(recipe)])), earlier=ledger.layout.choice(content_hash(earlier)))
