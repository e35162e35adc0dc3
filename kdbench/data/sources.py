"""Any data set by name: kdbench's own, or a user's function by dotted path; made once a process and checked before it is used."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, validate_call
from torch import Tensor

from kdbench.catalogue import resolve
from kdbench.data import DATA
from kdbench.data.batch import INPUTS, TARGET, Part
from kdbench.data.columns import Columns, described, named
from kdbench.data.encoded import EncodedImages
from kdbench.data.encoded_targets import EncodedLabels
from kdbench.data.loader import in_order
from kdbench.data.options import NamedSpec
from kdbench.data.samples import UNLABELLED, unfit
from kdbench.data.views import Augment
from kdbench.data.vocabulary import Vocabulary
from kdbench.errors import KDBenchError, UserError, explain, in_one_line
from kdbench.own_code import check_maker

TRAIN, NOISE = "train", "noise"  # what `transfer:` of a task can name with every data set
_KEPT_OPEN = 4  # sources that a process holds on to; one can be hundreds of megabytes


@dataclass(frozen=True)
class Source:
    """A data set, in memory or in files.

    train, test: images uint8 [N, C, H, W], or `EncodedImages` that stand for them; targets int64 [N], or uint8 or int64 [N, H, W], or
    `EncodedLabels` that stand for the latter; positions int64 [N], no two alike in the source.
    mean, std: one number a channel, of images in [0, 1]. ignore_index: the label of pixels that don't count, None where all do.
    more: further parts by name, from which students can learn (`transfer:` of a task). Their samples may have no labels.
    val: what choices are made on, where the data set itself says so, as its samples differ in kind from those for training.
    class_ids: the data set's own numbers of the classes, where it has some, such as COCO's 1 .. 90.
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
    vocabulary: Vocabulary | None = None  # of the tokens among the inputs or targets, None where there is no text
    more: Mapping[str, Part] = field(default_factory=dict)
    val: Part | None = None  # of a data set that sets samples apart for validation; None where a task cuts them from `train`
    class_ids: tuple[int, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: all parts and the facts beside them. The name is left out: a copy of a data set is the same data."""
        more = [[name, part.sha256()] for name, part in sorted(self.more.items())]
        apart = [["val", self.val_sha256]] if self.val is not None else []
        contents = [self.train_sha256, self.test_sha256, *self._facts, *([more] if more else []), *apart]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    @cached_property
    def train_sha256(self) -> str:
        """Hash of the training images, their targets and positions."""
        return self.train.sha256()

    @cached_property
    def test_sha256(self) -> str:
        """Hash of the test images, their targets and positions."""
        return self.test.sha256()

    @cached_property
    def val_sha256(self) -> str:
        """Hash of the images that are set apart for validation, their targets and positions; empty where none are."""
        return self.val.sha256() if self.val is not None else ""

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts that there are."""
        return (self.train, self.test, *((self.val,) if self.val is not None else ()), *self.more.values())

    @property
    def facts(self) -> str:
        """What is said of the samples beside their content, as JSON.

        Number and names of classes, mean, deviation, the label that is ignored, and the words of the vocabulary if the source has one.
        """
        return json.dumps(self._facts)

    @property
    def _facts(self) -> list[Any]:
        facts = [self.num_classes, self.class_names, self.mean, self.std, self.ignore_index]
        return facts if self.vocabulary is None else [*facts, self.vocabulary.words]

    @property
    def turned(self) -> int:
        """How many images in files are shown turned, see `encoded.turned`."""
        return sum(part.encoded_images.turned for part in self.parts if part.encoded is not None)

    @property
    def reading(self) -> str:
        """What was read, what was left out, and how many images are turned, in one line. Empty for a source that is not in files."""
        return self.read + (f"; turned upright by their EXIF tag: {self.turned}" if self.turned else "")

    @property
    def image(self) -> str | None:
        """The name in `Part.columns` of the input that is an image, or a film of several; None where there is none."""
        return next((name for name, column in self.train.columns.items() if column.dtype == torch.uint8 and column.ndim in (4, 5)), None)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """One image's [C, H, W], of a source that has images; of a film, that of each of its pictures."""
        assert self.image is not None, "these samples have no image"
        channels, height, width = self.train.columns[self.image].shape[-3:]
        return channels, height, width

    @cached_property
    def example(self) -> tuple[int, int, int] | Columns:
        """Samples to run a network on: an image's shape where that is all there is of a sample, else the first two of the training part."""
        if self.image == INPUTS and self.train.columns[INPUTS].ndim == 4:
            return self.image_shape
        part = self.train.select(torch.arange(min(2, len(self.train))))
        return next(iter(in_order(part, 2))).inputs

    @property
    def network_facts(self) -> dict[str, Any]:
        """What the builder of a network is told of the data: see `models.build.build_model`."""
        facts: dict[str, Any] = {"num_classes": self.num_classes, "mean": self.mean, "std": self.std}
        if self.vocabulary is not None:
            tokens = self.train.columns.get("tokens", self.train.columns.get(INPUTS))
            facts |= {"vocabulary": len(self.vocabulary)} | ({"length": tokens.shape[1]} if tokens is not None else {})
        if self.image is not None:
            channels, *sides = self.image_shape
            facts |= {"in_channels": channels, "image_size": max(sides)} | ({"image": self.image} if self.image != INPUTS else {})
        return facts

    @property
    def in_words(self) -> str:
        """One sample's inputs in words, for errors."""
        if self.image == INPUTS:
            return f"images {list(self.image_shape)}"
        return described(self.train.values)


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
    if taken := sorted(source.more.keys() & {TRAIN, NOISE}):
        return f"a further part can't be called {taken[0]!r}, which has a meaning of its own; rename it"
    if wrong := [name for name, part in source.more.items() if not isinstance(part, Part)]:
        return f"the further part {wrong[0]!r} is a {type(source.more[wrong[0]]).__name__}; expected a Part"
    further = {"test": source.test, **({"val": source.val} if source.val is not None else {}), **source.more}
    for title, part in {"train": source.train, **further}.items():
        problem = _part_problem(part, source, title in source.more)
        if problem:
            return f"{title} {problem}"
    for title, part in further.items():
        for what, train, other in _pairs_of_columns(source.train, part):
            if train.shape[1:] != other.shape[1:]:
                return f"train {what} are {_shape(train)} and {title} {what} {_shape(other)}; their sizes must agree"
    positions = torch.cat([source.train.index, *(part.index for part in further.values())])
    if len(positions.unique()) != len(positions):
        return f"two samples have the same index; train and {' and '.join(further)} together must count every sample once"
    if source.class_ids and len(source.class_ids) != source.num_classes:
        return f"{len(source.class_ids)} class_ids for {source.num_classes} classes"
    if len(source.class_names) != source.num_classes:
        return f"{len(source.class_names)} class_names for {source.num_classes} classes"
    channels = source.image_shape[0] if source.image is not None else 0
    if len(source.mean) != channels or len(source.std) != channels or min(source.std, default=1) <= 0:
        return f"mean and std must hold one number for each of the {channels} channels, std above 0; got {source.mean} and {source.std}"
    return None


def _pairs_of_columns(one: Part, other: Part) -> Iterator[tuple[str, Tensor | EncodedImages, Tensor | EncodedImages]]:
    """What each input is called, with both parts' values."""
    for name, column in one.columns.items():
        yield "images" if name == INPUTS else name, column, other.columns[name]


def _part_problem(part: Part, source: Source, further: bool) -> str | None:
    """further: of `Source.more`, where a sample may have no label."""
    names, expected = sorted(part.columns), sorted(source.train.columns)
    if names != expected:
        return f"has the inputs {', '.join(names)}, the training part has {', '.join(expected)}"
    index = part.index
    if index.dtype != torch.int64 or index.ndim != 1:
        return f"index must be int64 [N], got {index.dtype} {_shape(index)}"
    targets = named(part.target, TARGET) if part.target is not None else {}
    counts = {name: len(column) for name, column in [*part.columns.items(), *targets.items()]}
    if not len(index) or set(counts.values()) != {len(index)}:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"must hold as many inputs and targets as indices, and at least one; got {len(index)} indices, {found}"
    try:
        kinds = part.kinds_of_inputs, part.kinds_of_target
    except UserError as error:
        return str(error)
    for columns, of_columns in zip((part.values, part.target), kinds, strict=True):
        if columns is not None and (problem := unfit(columns, of_columns, Augment(), part.image_size)):
            return problem
    if further and part.target is not None and described(part.target) != described(source.train.target):
        return f"has the target {described(part.target)}, the training part has {described(source.train.target)}"
    if isinstance(part.target, EncodedLabels) and len(part.target.label_map.classes) != source.num_classes:
        return f"has a label map of {len(part.target.label_map.classes)} classes, and the data has {source.num_classes}"
    if not isinstance(part.target, Tensor) or TARGET in part.kinds or part.target.dtype not in (torch.uint8, torch.int64):
        return None
    target = part.target[part.target != UNLABELLED] if further and part.one_label else part.target
    return None if target.ndim == 2 or not len(target) else _labels_problem(target, part.image_size, source)


def _labels_problem(target: Tensor, size: tuple[int, int] | None, source: Source) -> str | None:
    """What is wrong with labels of samples, or of the pixels of images of this size."""
    if target.ndim == 3 and target.shape[1:] != size:
        return f"targets [N, H, W] must be as large as the images; got {target.dtype} {_shape(target)}"
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
