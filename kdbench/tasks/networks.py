"""Building a task's network and checking that what it gives fits the data, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench.data.loader import in_order
from kdbench.data.sources import Source
from kdbench.errors import TooMuch, UserError, in_one_line, shown
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.outputs import predicted
from kdbench.models.taps import probe
from kdbench.tasks.base import Task


def rebuilt(task: Task, spec: ModelSpec, weights: Path) -> nn.Module:
    """A trained network from the file of its weights.

    Args:
        task: what it was trained for.
        spec: how it is built.
        weights: its state_dict.

    Raises:
        UserError: the weights don't fit, or the network's predictions depend on something that is drawn when it is built and that its
            state_dict does not hold. Only networks of the user's own code are built twice to find that out.
    """
    spec = spec.model_copy(update={"weights": weights})
    network = task.build_model(spec)
    if ":" not in spec.name:
        return network
    test = task.splits().test
    images = next(in_order(test.select(torch.arange(min(2, len(test)))), 2)).inputs
    first, same, other = (_evaluated(one, images) for one in (network, network, task.build_model(spec)))
    if torch.equal(first, same) and not torch.equal(first, other):  # one that draws in evaluation too can't be told apart
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


@torch.no_grad()
def _evaluated(network: nn.Module, images: Tensor) -> Tensor:
    """Of nan, of which none is equal to another, numbers."""
    training = network.training
    prediction = predicted(network.eval(), images)
    network.train(training)
    return prediction.nan_to_num()


def network_for(spec: ModelSpec, source: Source, expected: tuple[int, ...]) -> nn.Module:
    """The model of `spec` for the images of `source`.

    expected: the prediction's shape for one image, its classes first. Raises UserError where one forward pass fails or gives another shape.
    """
    channels, *sides = source.image_shape
    model = build_model(spec, num_classes=source.num_classes, in_channels=channels, image_size=max(sides), mean=source.mean, std=source.std)
    try:
        given = probe(model, source.image_shape).prediction
    except Exception as error:  # whatever a user's own class may raise
        reason = error if isinstance(error, UserError) else in_one_line(error)
        raise UserError(
            f"model {spec.name!r} doesn't work on images {list(source.image_shape)} of data {source.name!r}: {reason}"
        ) from error
    if given == expected:
        return model
    if len(given) == len(expected) == 1:
        raise UserError(f"model {spec.name!r} gives {given[0]} outputs, data {source.name!r} has {expected[0]} classes")
    raise UserError(f"model {spec.name!r} gives {list(given)} for an image, data {source.name!r} needs {list(expected)}")
