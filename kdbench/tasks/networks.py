"""Building a task's network and checking that what it gives fits the data, before anything is trained."""

from __future__ import annotations

from torch import nn

from kdbench.data.sources import Source
from kdbench.errors import UserError, in_one_line
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.taps import probe


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
