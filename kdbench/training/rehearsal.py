"""A first training step of every network and method, on copies, before anything is trained: what can't work is known by then.

A rehearsal takes the real step (`loop.train_step`) at the smallest micro-batch that any worker gets, predicts two images, and saves and
loads the weights. The networks, their buffers and all random generators stay exactly as they were, so that no number moves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from kdbench.catalogue import nearest
from kdbench.data.batch import Batch, Part
from kdbench.data.columns import Columns, tensors
from kdbench.data.loader import Loader
from kdbench.errors import KDBenchError, UserError, in_one_line
from kdbench.experiment import Experiment, Recipe, Unit, WorkerRange, worker_bounds
from kdbench.methods.base import Method
from kdbench.methods.build import MethodSpec, fitted
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Outputs, Shapes
from kdbench.models.trace import Example, generators_kept, trace
from kdbench.models.weights import matched, portable
from kdbench.tasks.base import Role, Task
from kdbench.training.assembly import Training, check_uncut, fit_method, make_distiller, make_training
from kdbench.training.distiller import Distiller, check_counted
from kdbench.training.evaluate import predict, targets_of
from kdbench.training.loop import train_step
from kdbench.training.precision import to_device, unmeasured
from kdbench.training.session import LocalSession

MOST_IMAGES = 8  # of a rehearsed step: it stays cheap, and what fails with so few is tried again with as many as training has
_ALONE = MethodSpec(name="none")


class Rehearsal:
    """Rehearses the networks and methods of one experiment. Each failure is a UserError of one line that names the way out."""

    def __init__(self, experiment: Experiment, task: Task, recipes: Sequence[Recipe], device: torch.device) -> None:
        """recipes: the experiment's own, and those that its search may try."""
        self.experiment, self.task, self.device = experiment, task, device
        self.recipes = tuple(recipes)

    def teacher(self, model: nn.Module, shapes: Shapes) -> None:
        """Rehearse the teacher's training. shapes: of all of its places (`models.taps.tap_shapes`)."""
        spec = self.experiment.teacher
        assert spec is not None
        recipe, samples = self.experiment.teacher_recipe(), self.task.splits().learned_by("teacher")
        _Scene(self, f"teacher {spec.model.label!r}", spec.model, model, shapes, (recipe,), samples, role="teacher").network()

    def student(
        self, spec: ModelSpec, model: nn.Module, shapes: Shapes, teacher: Shapes | None, network: nn.Module | None
    ) -> tuple[str, ...]:
        """Rehearse a student alone, then with every method. Returns the labels of the methods that were left out.

        shapes: of all of its places (`models.taps.tap_shapes`). teacher: the teacher's; what it gives there is made up. network: the
        teacher itself, for methods that work with it; without it these are left out.
        """
        samples = self.task.splits().transfer
        scene = _Scene(self, f"student {spec.label!r}", spec, model, shapes, self.recipes, samples, teacher, network)
        scene.network()
        return tuple(method.label for method in self.experiment.methods if not scene.method(method))


class _Scene:
    """One network, and what its training is made of."""

    def __init__(
        self,
        rehearsal: Rehearsal,
        name: str,
        spec: ModelSpec,
        model: nn.Module,
        ours: Shapes,
        recipes: tuple[Recipe, ...],
        samples: Part,
        teacher: Shapes | None = None,
        teacher_network: nn.Module | None = None,
        role: Role = "student",
    ) -> None:
        self.role = role
        self.task, self.device, self.workers = rehearsal.task, rehearsal.device, rehearsal.experiment.runtime.workers
        self.experiment, self.name, self.spec, self.model = rehearsal.experiment, name, spec, model
        self.recipes, self.samples, self.teacher = recipes, samples, teacher
        self._given_network = teacher_network
        self._frozen: nn.Module | None = None
        val = self.task.splits().val
        self.few = val.select(torch.arange(min(2, len(val))))
        self.ours = ours

    # --- what is rehearsed -------------------------------------------------------------------------------------------

    def network(self) -> None:
        """The network without any method."""
        check_sees_all(self.name, self.model, self.task.example(self.role))
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError(f"{self.name}: no parameter requires a gradient, so nothing in it can learn; leave some of its layers unfrozen")
        self._at_smallest(self.name, _ALONE, self.smallest)

    def method(self, spec: MethodSpec) -> bool:
        """One method; False where it needs the teacher's network and there is none."""
        with generators_kept(self.device):  # adapters draw their first weights
            method = self._chosen(spec)
        if method.needs_teacher_network and self._given_network is None:
            return False
        for recipe in self.recipes:
            check_uncut(spec.name, method, self.task, recipe)
        size = min(recipe.batch_size for recipe in self.recipes) if method.batch_coupled or self.task.batch_coupled else self.smallest
        if size == self.smallest and (spec.name, spec.pinned) == (_ALONE.name, _ALONE.pinned):
            return True  # as the network without any method, which was rehearsed
        self._at_smallest(f"method {spec.label!r} with {self.name}", spec, size, method)
        return True

    @property
    def smallest(self) -> int:
        return smallest_micro_batch(self.recipes, self.workers, len(self.samples))

    def _at_smallest(self, who: str, spec: MethodSpec, smallest: int, method: Method | None = None) -> None:
        """Rehearse with `smallest` images, or with fewer where these do. Raises UserError where neither works.

        method: that of the spec, its taps chosen, where there is one that was not built yet: the first rehearsal takes it.
        """
        size = min(smallest, MOST_IMAGES)
        failure = self._failure(spec, size, method)
        if failure is not None and size < smallest:
            size, failure = smallest, self._failure(spec, smallest)
        if failure is not None:
            raise UserError(f"{who}: {failure}{self._way_out(spec, size)}")

    def _failure(self, spec: MethodSpec, images: int, method: Method | None = None) -> str | None:
        """Why a rehearsal with so many images fails; None where it works."""
        try:
            with generators_kept(self.device):
                self._rehearse(spec, images, method)
        except UserError as error:
            return str(error)
        return None

    def _way_out(self, spec: MethodSpec, failed: int) -> str:
        """What to change where a step with more images works."""
        recipe = self.recipes[0]
        more = min(max(2, *(recipe.batch_size for recipe in self.recipes)), MOST_IMAGES)
        if failed >= more or self._failure(spec, more) is not None:
            return ""
        what = f"batches of {failed} image{'s'[: failed > 1]} fail, batches of {more} work"
        if any(recipe.accumulate > 1 for recipe in self.recipes):
            return f"; {what}: lower recipe.accumulate, which cuts batches of {recipe.batch_size}, or raise recipe.batch_size"
        if worker_bounds(self.workers)[1] > 1:
            return f"; {what}: lower runtime.workers, which share batches of {recipe.batch_size}, or raise recipe.batch_size"
        return f"; {what}: raise recipe.batch_size"

    # --- one rehearsal -----------------------------------------------------------------------------------------------

    def _rehearse(self, spec: MethodSpec, images: int, method: Method | None) -> None:
        with _doing("its copy"):
            run = self.training(spec, images, method)
        batch = self._batch(run.unit.recipe, images)
        with _doing("predicting two images"):
            before = predict(run.evaluated, self.few, run.session, run.unit.recipe.precision, self.task, self.role)
        if any(bool(tensor.isnan().any()) for tensor in tensors(before)):
            raise UserError("its predictions are nan before it is trained; check its forward pass in evaluation, and its weights")
        self._step(run, batch)
        self._check_counted(run, batch)
        for stage, epochs in zip(run.distiller.method.stages()[1:], run.stages[1:], strict=True):
            run.epoch = epochs.start
            with _doing(f"beginning the stage {stage.name!r}"):
                run.begin_next_stage()
            self._step(run, batch, f" in the stage {stage.name!r}")
        with _doing("predicting two images"):
            prediction = predict(run.evaluated, self.few, run.session, run.unit.recipe.precision, self.task, self.role)
        self._check_objectives(prediction)
        with _doing("saving and loading its weights"):
            self._reload(run.distiller.method.export_student(run.evaluated))

    def _step(self, run: Training, batch: Batch, where: str = "") -> None:
        learns: set[int] = set()
        for parameter in run.distiller.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda parameter: learns.add(id(parameter)))
        run.wrapped.train()
        images = len(batch)
        with _doing(f"a training step on {images} image{'s'[: images > 1]}{where}"):
            losses = train_step(run, batch).tolist()
        self._check_gradients(run.distiller, learns, where)
        if broken := [f"{name} is {value}" for name, value in zip(run.terms, losses, strict=True) if not math.isfinite(value)]:
            raise UserError(f"in a first training step{where}, its loss {' and '.join(broken)}; check its forward pass, and its weights")

    def _check_counted(self, run: Training, batch: Batch) -> None:
        """Whether the task says how much each term counts, where micro-batches or workers are put together by that."""
        together = any(recipe.accumulate > 1 for recipe in self.recipes) or worker_bounds(self.workers)[1] > 1
        if self.task.counts_samples or not together or batch.target is None:
            return
        counted = run.distiller.task.weight(batch)
        if isinstance(counted, dict):
            check_counted(run.distiller.weighed, counted)

    def _check_gradients(self, distiller: Distiller, learns: set[int], where: str) -> None:
        """where: in which stage. In a later one the network may be frozen, and only a part of the method learns."""
        network = distiller if where else distiller.student
        if not any(id(parameter) in learns for parameter in network.parameters()):
            raise UserError(
                f"no parameter of the network gets a gradient from a training step{where}; check what its forward pass detaches"
            )
        apart = {id(p) for own in distiller.method.own_optimizers() if own.by_method for p in own.part.parameters()}
        idle = [
            name
            for name, parameter in distiller.named_parameters()
            if parameter.requires_grad and id(parameter) not in learns and id(parameter) not in apart
        ]
        if idle and worker_bounds(self.workers)[1] > 1:
            raise UserError(
                f"{len(idle)} of its parameters get no gradient, such as {idle[0].partition('.')[2]!r}, and several workers can't train it "
                "then; use runtime.workers: 1, or freeze these parameters"
            )

    def _check_objectives(self, prediction: Columns) -> None:
        search = self.experiment.search
        costs = set(search.objectives) - {"train_seconds"} if search is not None else set()
        if not costs:  # a segmentation's metrics take seconds to import, and matplotlib writes files then
            return
        with _doing("measuring two predictions"):
            measured = self.task.metrics(prediction, targets_of(self.few))
        for name in sorted(costs - measured.keys()):
            raise UserError(f"search.objectives: {self.task.name} is not measured by {name!r}{nearest(name, measured)}")

    def _reload(self, trained: nn.Module) -> None:
        """Save the trained copy's weights and load them as they would be loaded into the network as it is built."""
        stored = load_safetensors(save_safetensors(portable(trained.state_dict())))
        try:
            fitting = matched(stored, self.model, Path("saved"), name=self.spec.name, num_classes=self.task.info.num_classes)
        except UserError as error:
            raise UserError(f"training changes what its state_dict holds, so its weights can't be loaded again ({error})") from None
        trained.load_state_dict(fitting, strict=True)

    # --- what a training consists of ---------------------------------------------------------------------------------

    def training(self, spec: MethodSpec, images: int, method: Method | None) -> Training:
        """The training of a copy of the network with a method, at its very beginning, `images` images a step, on made teacher outputs."""
        asked = self.recipes[0]
        recipe = unmeasured(asked).model_copy(
            update={
                "batch_size": images,
                "accumulate": 1,
            }
        )
        torch.manual_seed(0)
        method = method or self._chosen(spec)
        network = self._frozen_network(recipe) if method.needs_teacher_network else None
        student = fit_method(method, self._placed(self.model, recipe), self.ours, self.teacher, self.task, self.samples, network)
        peers = [self._placed(self.model, recipe) for _ in range(method.peer_count)]
        unit = Unit(
            role="trial",
            experiment=self.experiment.name,
            protocol_hash="",
            task=self.experiment.task_of(self.role),
            student=self.spec,
            method=spec,
            recipe=recipe,
            seed=0,
        )
        return make_training(
            unit,
            LocalSession(device=self.device),
            self.task,
            self.task.splits(),
            make_distiller(student, method, self.task, recipe, self.device, peers, spec.name, self.role),
            self._made_teacher(method, recipe),  # type: ignore[arg-type]
            self._loader(recipe, images),
            torch.Generator(),
        )

    def _chosen(self, spec: MethodSpec) -> Method:
        """The method, its taps chosen for the pair. Raises UserError where it does not fit."""
        return fitted(spec, self.ours, self.teacher, torch.Generator().manual_seed(0), gives=self.task.gives)

    def _frozen_network(self, recipe: Recipe) -> nn.Module | None:
        """A copy of the teacher, the same for all methods; None where it is not here."""
        if self._given_network is not None and self._frozen is None:
            self._frozen = self._placed(self._given_network, recipe).eval().requires_grad_(False)
        return self._frozen

    def _placed(self, network: nn.Module, recipe: Recipe) -> nn.Module:
        return to_device(copy.deepcopy(network), recipe.precision, recipe.memory_format, self.device)

    def _loader(self, recipe: Recipe, images: int) -> Loader:
        few = self.samples.select(torch.arange(min(len(self.samples), max(2, images))))
        return Loader(few, images, augment=recipe.augment, views=recipe.views, data_seed=0, order_seed=0, device=self.device)

    def _batch(self, recipe: Recipe, images: int) -> Batch:
        """Real images, augmented and mixed as the recipe says."""
        return next(iter(self._loader(recipe, images).batches(0)))

    def _made_teacher(self, method: Method, recipe: Recipe) -> Callable[[Batch], Outputs] | None:
        """A teacher that gives noise in the shapes of the real one."""
        shapes = self.teacher
        if not method.needs_teacher or shapes is None:
            return None
        generator, dtype = torch.Generator().manual_seed(0), torch.float64 if recipe.precision == "fp64" else torch.float32

        def outputs(batch: Batch) -> Outputs:
            def draw(shape: tuple[int, ...]) -> Tensor:
                return torch.rand(len(batch), *shape, generator=generator, dtype=dtype).to(self.device)

            return shapes.made(draw, method.teacher_taps)

        return outputs


def smallest_micro_batch(recipes: Sequence[Recipe], workers: int | WorkerRange, images: int) -> int:
    """The fewest images that a worker takes at once: batches of 10 that 4 micro-batches cut have parts of 3, 3, 3 and 1."""
    sizes, cuts = {recipe.batch_size for recipe in recipes}, {recipe.accumulate for recipe in recipes}
    _, most = worker_bounds(workers)
    shares = {max(1, min(size, images) // most) for size in sizes}
    return min(len(torch.arange(share).chunk(cut)[-1]) for share, cut in product(shares, cuts))


def check_sees_all(name: str, model: nn.Module, example: Example) -> None:
    """Raise UserError where the model cuts images into patches and leaves a part of each image out."""
    seen = trace(model, example)
    if seen.patches is None or seen.input_size is None:
        return
    (height, width), (rows, columns) = seen.patches, (side % patch for side, patch in zip(seen.input_size, seen.patches, strict=True))
    if not rows and not columns:
        return
    side = seen.input_size[0]
    divisors = [size for size in range(2, side) if side % size == 0]
    smaller = f"patches of {' or '.join(map(str, divisors[:3]))} pixels (timm: patch_size)" if divisors else "another size of patches"
    raise UserError(
        f"{name}: patches of {height}x{width} pixels don't divide images of {seen.input_size[0]}x{seen.input_size[1]}, so that the model "
        f"never sees {rows} rows and {columns} columns of each; use {smaller}, "
        f"or have images resized to {height * (side // height + 1)} (timm: img_size)"
    )


@contextmanager
def _doing(what: str) -> Iterator[None]:
    """What foreign code raises inside becomes one line; a user's network may even leave the program."""
    try:
        yield
    except KDBenchError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} fails: {in_one_line(error)}") from error
