"""Any data set by name: kdbench's own, or a user's function by dotted path; made once a process and checked before it is used."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, validate_call
from torch import Tensor

from kdbench.catalogue import resolve
from kdbench.data import DATA
from kdbench.data.batch import Part
from kdbench.data.encoded import EncodedImages
from kdbench.data.options import NamedSpec
from kdbench.errors import KDBenchError, UserError, explain, in_one_line
from kdbench.own_code import check_maker

_KEPT_OPEN = 4  # sources that a process holds on to; one can be hundreds of megabytes


@dataclass(frozen=True)
class Source:
    """A data set, in memory or in files.

    train, test: images uint8 [N, C, H, W], or `EncodedImages` that stand for them; targets int64 [N], or uint8 or int64 [N, H, W];
    positions int64 [N], no two alike in the source.
    mean, std: one number a channel, of images in [0, 1]. ignore_index: the label of pixels that don't count, None where all do.
    """

    name: str
    train: Part
    test: Part
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ignore_index: int | None = None
    read: str = ""  # of a source in files: what was read of them and what was left out, in one line

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: both parts and the facts beside them. The name is left out: a copy of a data set is the same data."""
        return hashlib.sha256(json.dumps([self.train_sha256, self.test_sha256, *self._facts]).encode()).hexdigest()

    @cached_property
    def train_sha256(self) -> str:
        """Hash of the training images, their targets and positions."""
        return self.train.sha256()

    @cached_property
    def test_sha256(self) -> str:
        """Hash of the test images, their targets and positions."""
        return self.test.sha256()

    @property
    def facts(self) -> str:
        """What is said of the images beside their content: number and names of classes, mean, deviation, the label that is ignored."""
        return json.dumps(self._facts)

    @property
    def _facts(self) -> list[Any]:
        return [self.num_classes, self.class_names, self.mean, self.std, self.ignore_index]

    @property
    def turned(self) -> int:
        """How many images in files are shown turned, see `encoded.turned`."""
        return sum(part.inputs.store.turned for part in (self.train, self.test) if isinstance(part.inputs, EncodedImages))

    @property
    def reading(self) -> str:
        """What was read, what was left out, and how many images are turned, in one line. Empty for a source that is not in files."""
        return self.read + (f"; turned upright by their EXIF tag: {self.turned}" if self.turned else "")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """One image's [C, H, W]."""
        channels, height, width = self.train.inputs.shape[1:]
        return channels, height, width


class DataSpec(NamedSpec):
    """Which data set: `fashion_mnist`, or `{name: shapes, size: 64}`; keys beside `name` go to the function that makes the source."""


def open_source(spec: DataSpec) -> Source:
    """The source that `spec` names; the same object when the process asks again.

    Raises UserError for an unknown name or option (naming the nearest), an option of the wrong type, and a result that is no sound Source.
    """
    return _opened(spec.name, spec.options_json)


@lru_cache(maxsize=_KEPT_OPEN)
def _opened(name: str, options: str) -> Source:
    make = source_maker(name)
    try:
        source: Source = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(make)(**json.loads(options))
    except ValidationError as error:
        raise UserError(explain(error, f"data {name!r}", inspect.signature(make).parameters)) from error
    except KDBenchError:
        raise
    except Exception as error:  # whatever a user's own function may raise
        raise UserError(f"data {name!r}: {in_one_line(error)}") from error
    problem = _problem(source)
    if problem:
        raise UserError(f"data {name!r}: {problem}")
    return source


def source_maker(name: str) -> Callable[..., Source]:
    """The function that makes the source `name`; it is not called. Raises UserError where it does not say that it returns a Source."""
    make: Callable[..., Source] = resolve("data", name, DATA)
    if name not in DATA:
        check_maker("data", name, make, Source, "Source")
    return make


def _problem(source: Any) -> str | None:
    """What is wrong with what a data set's function returned, or None."""
    if not isinstance(source, Source):
        return f"the function must return a kdbench.data.sources.Source, got {type(source).__name__}"
    for title, part in (("train", source.train), ("test", source.test)):
        problem = _part_problem(part, source)
        if problem:
            return f"{title} {problem}"
    if source.train.inputs.shape[1:] != source.test.inputs.shape[1:]:
        return f"train images are {_shape(source.train.inputs)} and test images {_shape(source.test.inputs)}; their sizes must agree"
    positions = torch.cat([source.train.index, source.test.index])
    if len(positions.unique()) != len(positions):
        return "two samples have the same index; train and test together must count every sample once"
    if len(source.class_names) != source.num_classes:
        return f"{len(source.class_names)} class_names for {source.num_classes} classes"
    channels = source.image_shape[0]
    if len(source.mean) != channels or len(source.std) != channels or min(source.std) <= 0:
        return f"mean and std must hold one number for each of the {channels} channels, std above 0; got {source.mean} and {source.std}"
    return None


def _part_problem(part: Part, source: Source) -> str | None:
    images, target, index = part.inputs, part.target, part.index
    if images.dtype != torch.uint8 or images.ndim != 4:
        return f"images must be uint8 [N, C, H, W], got {images.dtype} {_shape(images)}"
    if not len(images) or not len(images) == len(target) == len(index):
        return f"must hold as many images as targets and indices, and at least one; got {len(images)}, {len(target)} and {len(index)}"
    if index.dtype != torch.int64 or index.ndim != 1:
        return f"index must be int64 [N], got {index.dtype} {_shape(index)}"
    per_image = target.ndim == 1 and target.dtype == torch.int64
    per_pixel = target.shape[1:] == images.shape[2:] and target.dtype in (torch.uint8, torch.int64)
    if not (per_image or per_pixel):
        return f"targets must be int64 [N], or uint8 or int64 [N, H, W] as large as the images; got {target.dtype} {_shape(target)}"
    stray = (target < 0) | (target >= source.num_classes)
    if source.ignore_index is not None:
        ignored = target == source.ignore_index
        if ignored.all():
            return f"targets are all {source.ignore_index}, the label that doesn't count"
        stray &= ~ignored
    if stray.any():
        return f"targets must be 0 .. {source.num_classes - 1} for {source.num_classes} classes, found {int(target[stray][0])}"
    return None


def _shape(images: Tensor | EncodedImages) -> str:
    return str(list(images.shape))
