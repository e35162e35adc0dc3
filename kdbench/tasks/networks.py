"""Building a task's network and checking that what it gives fits the data, before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.data.columns import Columns, mapped, tensors
from kdbench.data.loader import in_order
from kdbench.data.sources import Source
from kdbench.errors import TooMuch, UserError, in_one_line, shown
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.inputs import InputSpec
from kdbench.models.outputs import predicted
from kdbench.models.taps import probe
from kdbench.models.trace import Example
from kdbench.tasks.base import Role, Task
from kdbench.tasks.build import TaskSpec, task_facts


def rebuilt(task: Task, spec: ModelSpec, weights: Path, role: Role) -> nn.Module:
    """A trained network from the file of its weights.

    Args:
        task: what it was trained for.
        spec: how it is built.
        weights: its state_dict.
        role: of the network, which decides the inputs that it sees.

    Raises:
        UserError: the weights don't fit, or the network's predictions depend on something that is drawn when it is built and that its
            state_dict does not hold. Only networks of the user's own code are built twice to find that out.
    """
    spec = spec.model_copy(update={"weights": weights})
    network = task.build_model(spec)
    if ":" not in spec.name:
        return network
    test = task.splits().test
    inputs = task.inputs_for(role, next(in_order(test.select(torch.arange(min(2, len(test)))), 2)).inputs)
    first, same, other = (_evaluated(one, inputs) for one in (network, network, task.build_model(spec)))
    if _equal(first, same) and not _equal(first, other):  # one that draws in evaluation too can't be told apart
        raise UserError(
            f"model {shown(spec.name)}: two networks with the same weights give different predictions, so its state_dict does not hold all "
            "that decides them; register tensors with register_buffer, and draw nothing else when it is built"
        )
    return network


def outlined(task: Task, spec: ModelSpec, real: Callable[[], nn.Module]) -> nn.Module:
    """A network without memory for its weights, to be looked at; what `real` makes where its code needs numbers to build or run.

    Raises TooMuch where it has too many parts, UserError where it can't be built at all.
    """
    try:
        with torch.device("meta"):
            return task.build_model(spec)
    except TooMuch:
        raise
    except (UserError, RuntimeError, NotImplementedError):  # what is really wrong with it shows when it is built for real
        return real()


def _fits(given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int | None, ...]]) -> bool:
    """Whether the shapes are those that are expected, with any number where that is None."""
    return given.keys() == expected.keys() and all(
        len(shape) == len(expected[name]) and all(want in (None, number) for number, want in zip(shape, expected[name], strict=True))
        for name, shape in given.items()
    )


def _listed(shapes: tuple[int, ...] | Mapping[str, tuple[int | None, ...]]) -> str:
    if not isinstance(shapes, Mapping):
        return str(list(shapes))
    sizes = {name: ", ".join("any" if number is None else str(number) for number in shape) for name, shape in shapes.items()}
    return ", ".join(f"{name} [{size}]" for name, size in sizes.items())


@torch.no_grad()
def _evaluated(network: nn.Module, inputs: Columns) -> Columns:
    """Of nan, of which none is equal to another, numbers."""
    training = network.training
    prediction = predicted(network.eval(), inputs)
    network.train(training)
    return mapped(prediction, Tensor.nan_to_num)


def _equal(one: Columns, other: Columns) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def seen_by_roles(task: Task) -> tuple[Example, ...]:
    """What a network of the task is shown of a sample: one example, or the student's and the teacher's where they see different inputs."""
    if type(task).inputs_for is Task.inputs_for:
        return (task.example(),)
    return task.example("student"), task.example("teacher")


def network_for(
    spec: ModelSpec,
    source: Source,
    expected: tuple[int, ...] | dict[str, tuple[int | None, ...]],
    examples: Sequence[Example] = (),
) -> nn.Module:
    """The model of `spec` for the samples of `source`.

    expected: the prediction's shape for one sample, its classes first; or the shapes of several tensors by name, which the model gives in
    a dictionary; None for a length that is the model's own. examples: what networks are shown, `seen_by_roles`; by default all inputs. The
    model has to work on one of them. Raises UserError where one forward pass fails or gives something else.
    """
    model = build_model(spec, **source.network_facts)
    if isinstance(expected, dict):
        model.prediction_names = tuple(expected)  # type: ignore[assignment]
    return checked_network(model, source, expected, f"model {spec.name!r}", examples)


def checked_network(
    model: nn.Module,
    source: Source,
    expected: tuple[int, ...] | dict[str, tuple[int | None, ...]],
    who: str,
    examples: Sequence[Example] = (),
) -> nn.Module:
    """The model, after one forward pass on samples of `source`. expected, examples: as in `network_for`. who: what errors call it.

    Raises UserError where the pass fails or gives something else.
    """
    given, failure = None, None
    for example in examples or (source.example,):
        try:
            given = probe(model, example).prediction
            break
        except Exception as error:  # whatever a user's own class may raise
            failure = failure or error
    if given is None:
        reason = failure if isinstance(failure, UserError) or failure is None else in_one_line(failure)
        raise UserError(f"{who} doesn't work on {source.in_words} of data {source.name!r}: {reason}") from failure
    if given == expected or (isinstance(given, dict) and isinstance(expected, dict) and _fits(given, expected)):
        return model
    if isinstance(given, dict) or isinstance(expected, dict):
        raise UserError(f"{who} gives {_listed(given)} for a sample, the task needs {_listed(expected)}")
    if len(given) == len(expected) == 1:
        raise UserError(f"{who} gives {given[0]} outputs, data {source.name!r} has {expected[0]} classes")
    raise UserError(f"{who} gives {list(given)} for an image, data {source.name!r} needs {list(expected)}")


def as_teacher(network: nn.Module, own: Task, task: Task) -> nn.Module:
    """A network of the task `own` as batches of `task` go into it: the same weights, at the image size that `own` shows it.

    Raises UserError where `task` has no use for it.
    """
    return task.as_teacher(_at_own_size(network, own.source))


def _at_own_size(network: nn.Module, source: Source | None) -> nn.Module:
    """The network that resizes whatever images it is given to those of `source`, where it says how its images are normalised."""
    spec = getattr(network, "input_spec", None)
    if source is None or source.image is None or not isinstance(spec, InputSpec) or spec.size is not None:
        return network
    _, height, width = source.image_shape
    if height != width:
        return network
    resizing = copy.copy(network)  # on the same modules and weights, so that the network itself stays as it is
    resizing.input_spec = replace(spec, size=height)  # type: ignore[assignment]
    return resizing


def outputs_facts(own: Task, spec: TaskSpec) -> dict[str, Any]:
    """What of a network's task decides its outputs beside its weights: what its builder is told of the data."""
    facts = own.source.network_facts if own.source is not None else task_facts(spec, "teacher")
    return {"name": own.name, "version": own.version, "data": facts}
