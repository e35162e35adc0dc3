"""The one place that puts task, networks, method, taps, teacher and samples together: for the loop, its rehearsal and the dry run."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kdbench.data.batch import Part
from kdbench.data.loader import Loader
from kdbench.errors import UserError
from kdbench.experiment import Recipe, TeacherRef, Unit
from kdbench.methods.base import Method, Progress
from kdbench.methods.build import build_method, fitted, method_class
from kdbench.models.outputs import Shapes
from kdbench.models.taps import probe, tap_shapes
from kdbench.models.weights import tensors_sha256
from kdbench.tasks.base import Role, Splits, Task, role_of
from kdbench.tasks.build import build_task
from kdbench.training.cache.outputs import TeacherCache
from kdbench.training.distiller import Distiller
from kdbench.training.optimization import Schedule, handed_over, make_average, make_optimizers, make_schedule
from kdbench.training.precision import compiled_call, to_device
from kdbench.training.randomness import begin_streams, restore_streams, stage_streams, streams
from kdbench.training.session import Session
from kdbench.training.stages import epochs_of, recipe_of
from kdbench.training.teacher import LiveTeacher, Teacher, load_teacher, open_teacher, tensors_for


@dataclass
class Training:
    """All that a training consists of while it runs; what `state` returns is all that is needed to go on."""

    unit: Unit
    session: Session
    task: Task
    splits: Splits
    distiller: Distiller
    wrapped: nn.Module  # the distiller, with gradient exchange where there are several workers
    teacher: Teacher | None
    optimizers: tuple[torch.optim.Optimizer, ...]  # the recipe's, then those of the method's parts
    stepped: tuple[torch.optim.Optimizer, ...]  # of these, the ones that the loop steps and not the method
    schedule: Schedule  # of the present stage, by its steps
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    loader: Loader
    generator: torch.Generator
    stages: tuple[range, ...]  # the epochs of each
    left: list[dict[str, Tensor]] = field(default_factory=list)  # the distiller's state at the end of each stage that is over
    epoch: int = 0
    step: int = 0  # inside the epoch
    sums: Tensor | None = None  # of each loss term since the epoch began, on the device, in the order of `terms`
    terms: tuple[str, ...] = ()
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_value: float = -math.inf
    seconds: float = 0.0  # spent on this training, by all processes that worked on it one after the other
    device_seconds: float = 0.0  # the same, times the workers there were
    worker_counts: list[int] = field(default_factory=list)  # how many workers took part, one number after the other
    kept_at: float = 0.0  # `seconds` when the last checkpoint was asked for
    kept_step: int = 0  # and `total_steps`
    ask_at: int = 0  # `total_steps` at which the workers compare their clocks next

    @property
    def evaluated(self) -> nn.Module:
        """The network that is measured and kept: the moving average where there is one."""
        return self.average.module if self.average is not None else self.distiller.student

    @property
    def total_steps(self) -> int:
        """Optimizer steps since the training began."""
        return self.epoch * self.loader.steps_per_epoch + self.step

    @property
    def stage(self) -> range:
        """The epochs of the present stage."""
        return self.stages[len(self.left)]

    @property
    def stage_steps(self) -> int:
        """Optimizer steps since the present stage began."""
        return self.total_steps - self.stage.start * self.loader.steps_per_epoch

    @property
    def progress(self) -> Progress:
        per_epoch = self.loader.steps_per_epoch
        return Progress(
            epoch=self.epoch + self.step / per_epoch,
            step=self.total_steps,
            total_steps=self.unit.recipe.epochs * per_epoch,
            stage=len(self.left),
            stage_done=self.stage_steps / (len(self.stage) * per_epoch),
        )

    def passed(self, seconds: float) -> None:
        self.seconds += seconds
        self.device_seconds += seconds * self.session.world_size

    def state(self) -> dict[str, Any]:
        """Tensors and plain values: the whole of a training at this moment, to be gone on with by any number of workers."""
        return {
            "unit": self.unit.key,
            "distiller": self.distiller.state_dict(),
            "left": self.left,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            **streams(self.session.device, self.generator),
            "progress": {name: getattr(self, name) for name in _PROGRESS},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was. Each stage is begun again, from what the one before left, so that the networks are those of then."""
        for left in state.get("left", ()):  # a checkpoint of an older version has none
            self.begin_next_stage(left)
        self.distiller.load_state_dict(state["distiller"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        restore_streams(state, self.session.device, self.generator)
        for name, value in state["progress"].items():
            setattr(self, name, value)
        self.kept_step = self.ask_at = self.total_steps

    def begin_next_stage(self, left: dict[str, Tensor] | None = None) -> None:
        """Go on with the student that the method makes of the present one, with a new optimizer, schedule and moving average.

        left: what the present stage left, where a training that was killed goes on; all workers call together.
        """
        left = self._left_now() if left is None else left
        old, unit, device = self.distiller, self.unit, self.session.device
        old.load_state_dict(left)
        self.left.append(left)
        with stage_streams(unit.seed, len(self.left), old.method.generator, device):
            student: Any = old.method.begin(len(self.left), old.student)
        who = f"method {unit.method.name}: `begin` of the stage {old.method.stages()[len(self.left)].name!r}"
        if not isinstance(student, nn.Module):
            raise UserError(f"{who} returned a {type(student).__name__}; return the student")
        if not any(parameter.requires_grad for module in (student, old.method) for parameter in module.parameters()):
            raise UserError(f"{who} leaves nothing that learns: no parameter of student or method requires a gradient")
        recipe = recipe_of(unit.recipe, old.method.stages(), len(self.left), unit.method.name)
        self.wrapped = self.distiller = make_distiller(
            student, old.method, self.task, recipe, device, list(old.peers), unit.method.name, old.role
        )
        del old
        gc.collect()  # gradients of the former wrapping would still be exchanged
        method = self.distiller.method
        self.optimizers = make_optimizers(self.distiller, method.own_optimizers(), recipe)
        self.stepped = handed_over(self.optimizers, method)
        self.schedule = make_schedule(recipe, self.loader.steps_per_epoch, self.optimizers[0])
        self.average = make_average(self.distiller.student, recipe)
        self.wrapped = self.session.prepare(self.distiller)
        self.best, self.best_value, self.terms = None, -math.inf, ()

    def _left_now(self) -> dict[str, Tensor]:
        """A copy of the distiller's state, the student's being that which would be kept, and batch statistics the first worker's."""
        share_buffers(self.distiller, self.session)
        state = self.distiller.state_dict()
        if self.average is not None:
            state |= {f"student.{name}": tensor for name, tensor in self.average.module.state_dict().items()}
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def share_buffers(module: nn.Module, session: Session) -> None:
    """Give every worker the first one's buffers, such as batch statistics. All workers call together."""
    if session.world_size > 1:
        for buffer in module.buffers():
            buffer.copy_(session.gather(buffer[None])[0])


_PROGRESS = (
    "epoch",
    "step",
    "sums",
    "terms",
    "curve",
    "best",
    "best_value",
    "seconds",
    "device_seconds",
    "worker_counts",
    "kept_at",
)


def assemble(unit: Unit, session: Session) -> Training:
    """Build everything that a training needs, at its very beginning. The unit's files are where it says.

    Raises UserError where the pair can't work, or where data, code or weights are others here than where the unit was made.
    """
    recipe = unit.recipe
    task = build_task(unit.task)
    splits = task.splits()
    check_content(unit, task, splits)
    generator = begin_streams(unit.seed)

    def fresh() -> nn.Module:
        model = task.build_model(unit.student)
        taken = _from_teacher(model, unit, task) if unit.student.weights == "teacher" else None
        if unit.student_init is not None and tensors_sha256(taken or model.state_dict()) != unit.student_init:
            weights = unit.student.weights
            raise UserError(f"the weights that {unit.student.label} begins with, {weights}, are others here than where the run began")
        return to_device(model, recipe.precision, recipe.memory_format, session.device)

    role = role_of(unit.role)
    student = fresh()
    method = _fitting_method(unit, student, task, session, generator)
    peers = [fresh() for _ in range(method.peer_count)]
    check_uncut(unit.method.name, method, task, recipe)
    teacher = _teacher_of(unit, method, task, session)
    network = _network_of(teacher, unit, task, session) if method.needs_teacher_network else None
    samples = splits.learned_by(role)
    # Else nobody asks for shapes, and probing both networks takes forward passes.
    looked_at = method.student_taps or type(method).build is not Method.build
    adapted = fit_method(
        method,
        student,
        probe(student, task.example(role), method.student_taps) if looked_at else None,
        _shapes_of(teacher, network, method, task) if looked_at else None,
        task,
        samples,
        network,
    )
    distiller = make_distiller(adapted, method, task, recipe, session.device, peers, unit.method.name, role)
    loader = Loader(
        samples,
        recipe.batch_size,
        augment=recipe.augment,
        views=None if unit.role == "teacher" else recipe.views,
        data_seed=unit.data_seed,
        order_seed=unit.seed,
        rank=session.rank,
        world_size=session.world_size,
        even=isinstance(unit.workers, int),
        device=session.device,
    )
    return make_training(unit, session, task, splits, distiller, teacher, loader, generator)


def fit_method(
    method: Method,
    student: nn.Module,
    ours: Shapes | None,
    theirs: Shapes | None,
    task: Task,
    samples: Part,
    teacher: nn.Module | None,
) -> nn.Module:
    """Make a method ready for a pair, and the student ready for the method.

    Args:
        method: its taps are chosen.
        student: the network; it may be changed.
        ours: what the student gives at these taps, and as its prediction; None for a method that looks at nothing and builds nothing.
        theirs: what the teacher gives; None where there is none.
        task: what both are trained for.
        samples: what the student learns from.
        teacher: its network, frozen, for a method that works with the network itself; None where that is not here.

    Returns:
        The student as it is trained.
    """
    if ours is not None:
        method.build(ours, theirs if method.needs_teacher or method.needs_teacher_network else None, task.info)
    if method.needs_teacher_network and teacher is not None:
        method.use_teacher(teacher, task.example("teacher"))
    method.use_samples(samples)
    return method.adapt_student(student)


def make_distiller(
    student: nn.Module,
    method: Method,
    task: Task,
    recipe: Recipe,
    device: torch.device,
    peers: Sequence[nn.Module],
    name: str,
    role: Role = "student",
) -> Distiller:
    """Student, method and peers as one module on the device, in the recipe's precision; `name` is the method's, for errors."""
    student = to_device(student, recipe.precision, recipe.memory_format, device)
    method = method.to(device, dtype=torch.float64 if recipe.precision == "fp64" else torch.float32)
    compiled = compiled_call(student, device) if recipe.compile is True else None
    return Distiller(student, method, task.learned_by(student), compiled, peers, name, role)


def make_training(
    unit: Unit,
    session: Session,
    task: Task,
    splits: Splits,
    distiller: Distiller,
    teacher: Teacher | None,
    loader: Loader,
    generator: torch.Generator,
) -> Training:
    """A training before its first step: optimizers, schedule, scaler and moving average are the recipe's, in its first stage."""
    stages = distiller.method.stages()
    epochs = epochs_of(stages, unit.recipe.epochs, unit.method.name)
    recipe = recipe_of(unit.recipe, stages, 0, unit.method.name)
    optimizers = make_optimizers(distiller, distiller.method.own_optimizers(), recipe)
    return Training(
        unit=unit,
        session=session,
        task=task,
        splits=splits,
        distiller=distiller,
        wrapped=session.prepare(distiller),
        teacher=teacher,
        optimizers=optimizers,
        stepped=handed_over(optimizers, distiller.method),
        schedule=make_schedule(recipe, loader.steps_per_epoch, optimizers[0]),
        scaler=torch.amp.GradScaler(session.device.type, enabled=recipe.precision == "fp16"),
        average=make_average(distiller.student, recipe),
        loader=loader,
        generator=generator,
        stages=epochs,
    )


def check_uncut(name: str, method: Method, task: Task, recipe: Recipe) -> None:
    """Raise UserError where micro-batches would keep the task, or the method called `name`, from its whole batch."""
    if recipe.accumulate > 1 and (method.batch_coupled or task.batch_coupled):
        who = f"method {name}" if method.batch_coupled else f"task {task.name}"
        raise UserError(f"{who}: its loss compares the samples of a batch, which recipe.accumulate cuts up; use accumulate: 1")


def check_content(unit: Unit, task: Task, splits: Splits) -> None:
    """Raise UserError where this process has other data or other code than the one that described the unit: its key would lie."""
    version = method_class(unit.method).version
    if unit.task_version is not None and task.version != unit.task_version:
        raise UserError(f"task {task.name} has version {task.version} here and {unit.task_version} where the run began: update its code")
    if unit.task_version is not None and version != unit.method_version:
        raise UserError(
            f"method {unit.method.name} has version {version} here and {unit.method_version} where the run began: update its code"
        )
    if unit.data_hash is not None and (learned := splits.learned_hash_of(role_of(unit.role))) != unit.data_hash:
        raise UserError(
            f"the training data of {task.data_name} have other content here than where the run began ({learned[:12]}..., "
            f"expected {unit.data_hash[:12]}...): give all machines the same files, and change none while a run is under way"
        )


def _from_teacher(student: nn.Module, unit: Unit, task: Task) -> dict[str, Tensor]:
    """Fill the student with the teacher's tensors, whatever the method, also one that has no teacher. Returns what was filled in."""
    if unit.teacher is None:
        raise UserError(f"student {unit.student.label}: weights: teacher needs a teacher, and this training has none")
    taken = tensors_for(student, unit.student.label, unit.teacher, task)
    student.load_state_dict(taken, strict=False)
    return taken


def _fitting_method(unit: Unit, student: nn.Module, task: Task, session: Session, generator: torch.Generator) -> Method:
    """The method, its taps chosen: a benchmark's units name them; for one that does not, both networks are asked here."""
    method = build_method(unit.method, generator)
    if method.taps_chosen:
        return method
    teacher = load_teacher(unit.teacher, task, session.device) if unit.teacher is not None else None
    theirs = tap_shapes(teacher, task.example("teacher")) if teacher is not None else None
    return fitted(unit.method, tap_shapes(student, task.example()), theirs, generator, gives=task.gives)


def _network_of(teacher: Teacher | None, unit: Unit, task: Task, session: Session) -> nn.Module:
    """The frozen network that a live teacher runs anyway, or that is loaded beside cached outputs."""
    if isinstance(teacher, LiveTeacher):
        return teacher.model
    return load_teacher(_given_teacher(unit), task, session.device)


def _teacher_of(unit: Unit, method: Method, task: Task, session: Session) -> Teacher | None:
    if not method.needs_teacher:
        return None
    return open_teacher(_given_teacher(unit), task, method.teacher_taps, session.device, unit.recipe, unit.data_seed)


def _given_teacher(unit: Unit) -> TeacherRef:
    """Raises UserError where there is none."""
    if unit.teacher is None:
        raise UserError(f"method {unit.method.name} learns from a teacher, and the experiment names none; add `teacher: {{model: ...}}`")
    return unit.teacher


def _shapes_of(teacher: Teacher | None, network: nn.Module | None, method: Method, task: Task) -> Shapes | None:
    """What the teacher gives; network: the frozen one that the method works with, be it that it sees no outputs."""
    if isinstance(teacher, TeacherCache):
        return teacher.shapes
    model = teacher.model if teacher is not None else network
    return probe(model, task.example("teacher"), method.teacher_taps) if model is not None else None
