"""Cutting a source into the parts that every task has: train, transfer, val and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field, StrictInt
from torch import Tensor

from kdbench.catalogue import nearest
from kdbench.data.batch import Part
from kdbench.data.hashing import hash64
from kdbench.data.noise import noise_part
from kdbench.data.options import LEFT_OUT_UNSET, Seed
from kdbench.data.samples import UNLABELLED
from kdbench.data.sources import NOISE, TRAIN, Source
from kdbench.data.splits import stratified
from kdbench.errors import UserError, shown
from kdbench.tasks.base import Role, Splits, Task

_TEACHER, _LABELLED = 1, 2  # choices that are drawn with a hash of their own


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number of samples or a share between 0 and 1")
    return value


def _count_or_share(value: int | float) -> int | float:
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError("a share must lie between 0 and 1; write a number of samples without a point")
    if isinstance(value, int) and value < 1:
        raise ValueError("expected at least one sample")
    return value


class SplitOptions(Task.Options):
    """How the samples are cut into parts.

    val_size: samples, or a share of the training part, that choices are made on; left out for a data set that has validation samples of
    its own. transfer_size: how many samples students learn from (the
    "transfer set" of Hinton et al., arXiv 1503.02531), all of `transfer` where it is None.
    transfer: what students learn from: `train`, the training samples that validation left; `noise`, made images without labels; or a
    further part of the data set (`Source.more`).
    labelled: so many of the samples that students learn from, or such a share of them, keep their label; the others have UNLABELLED.
    teacher_share, teacher_classes: the training samples that the teacher learns from: such a share of them, those of these classes, given
    by name or number. All by default.
    """

    val_size: Annotated[int | float, BeforeValidator(_number), AfterValidator(_count_or_share)] = 1 / 6
    transfer_size: Annotated[int, Field(ge=1)] | None = None
    split_seed: Seed = 0
    transfer: Annotated[str, LEFT_OUT_UNSET] = TRAIN
    labelled: Annotated[Annotated[int | float, BeforeValidator(_number), AfterValidator(_count_or_share)] | None, LEFT_OUT_UNSET] = None
    teacher_share: Annotated[float, Field(gt=0, le=1), LEFT_OUT_UNSET] = 1.0
    teacher_classes: Annotated[Annotated[tuple[StrictInt | str, ...], Field(min_length=1)] | None, LEFT_OUT_UNSET] = None

    def facts_of(self, role: Role) -> dict[str, Any]:
        """What students learn from decides no teacher's training, and what the teacher learns from none of theirs.

        `transfer_size` stays a fact of teachers where students learn from training samples: so it was when their keys were made.
        """
        facts = super().facts_of(role)
        for name in ("transfer", "labelled") if role == "teacher" else ("teacher_share", "teacher_classes"):
            facts.pop(name, None)
        if role == "teacher" and self.transfer != TRAIN:
            facts["transfer_size"] = None
        return facts


def validation_size(options: SplitOptions, total: int, name: str) -> int:
    """How many of the `total` training images of the data set called `name` choices are made on. Raises UserError for none, or all."""
    val_size = options.val_size if isinstance(options.val_size, int) else round(options.val_size * total)
    if not 1 <= val_size < total:
        raise UserError(
            f"val_size {options.val_size} is {val_size} of the {total} training images of data {name!r}; expected 1 .. {total - 1}"
        )
    return val_size


def cut(source: Source, options: SplitOptions, of_classes: bool = False) -> Splits:
    """The parts; by class where an image has one, else by chance, and always the same for the same options.

    Args:
        source: the data set.
        options: how it is cut.
        of_classes: whether a sample's target is its class, so that a task can do without the labels of some, and choose classes.

    Raises:
        UserError: the source is too small, or has no such part, or the options ask for what such samples don't have.
        TooMuch: made images do not fit in memory.
    """
    # What is said here is what lets two labels be mixed.
    whole = replace(source.train, classes=source.num_classes) if source.train.one_label else source.train
    train, val = _validated(whole, source, options)
    if not of_classes:
        _refuse_classes(options, source.name)
    apart = _apart(source, options, len(train))
    transfer = train if apart is None else apart
    if options.transfer_size is not None and options.transfer != NOISE:
        if options.transfer_size > len(transfer):
            cut_off = f" after {len(val)} went to validation" if source.val is None else ""
            left = f"that are left for training{cut_off}" if apart is None else f"of the part {options.transfer!r}"
            raise UserError(f"transfer_size {options.transfer_size} is more than the {len(transfer)} images of data {source.name!r} {left}")
        chosen, _ = stratified(_strata(transfer), options.transfer_size, options.split_seed)
        transfer = transfer.within(chosen)
    if options.labelled is not None:
        transfer = _partly_labelled(transfer, options.labelled, options)
    return Splits(train, transfer, val, source.test, source, _taught(train, source, options), apart)


def _validated(whole: Part, source: Source, options: SplitOptions) -> tuple[Part, Part]:
    """What training has, and what choices are made on: cut from `whole`, the training part, unless the source sets samples apart for it.

    Raises UserError where `val_size` is written though the source does.
    """
    if source.val is not None:
        if "val_size" in options.model_fields_set:
            raise UserError(
                f"val_size: data {source.name!r} has {len(source.val)} validation samples of its own, which differ in kind from those for "
                "training; leave val_size out"
            )
        return whole, source.val
    val_rows, train_rows = stratified(_strata(whole), validation_size(options, len(whole), source.name), options.split_seed)
    return whole.within(train_rows), whole.within(val_rows)


def _strata(part: Part) -> Tensor:
    """int64 [N]: the class of each sample, those without one being a class of their own; 0 for all where samples have no class.

    Pixels of all classes are in nearly every image, so that masks need no strata.
    """
    if not part.one_label:
        return torch.zeros(len(part), dtype=torch.long)
    return part.labels - UNLABELLED if part.without_label else part.labels


def _apart(source: Source, options: SplitOptions, training: int) -> Part | None:
    """What students learn from, where these are not the `training` samples of the training part that validation left."""
    if options.transfer == TRAIN:
        return None
    if options.transfer == NOISE:
        first = 1 + max(int(part.index.max()) for part in source.parts)
        return noise_part(source.train, options.transfer_size or training, options.split_seed, first, source.name)
    if options.transfer not in source.more:
        known = [TRAIN, NOISE, *source.more]
        raise UserError(f"transfer: data {source.name!r} has no part {shown(options.transfer)}{nearest(options.transfer, known)}")
    part = source.more[options.transfer]
    return replace(part, classes=source.num_classes) if part.one_label else part


def _refuse_classes(options: SplitOptions, name: str) -> None:
    """Raise UserError for options that only a task with one class a sample can follow."""
    for key in ("labelled", "teacher_classes"):
        if getattr(options, key) is not None:
            raise UserError(f"{key} needs one class a sample, which this task's samples of data {name!r} don't have; leave it out")


def _partly_labelled(part: Part, labelled: int | float, options: SplitOptions) -> Part:
    """The part, in which so many samples keep their label, of each class its share; which, follows from their positions."""
    if part.target is None:
        raise UserError(f"labelled: the samples of transfer: {options.transfer} have no labels; leave labelled out")
    known = (part.labels != UNLABELLED).nonzero().flatten()
    count = labelled if isinstance(labelled, int) else round(labelled * len(part))
    if not 1 <= count <= len(known):
        raise UserError(
            f"labelled {labelled} is {count} of the {len(part)} samples that students learn from; "
            f"expected 1 .. {len(known)}, which is how many have a label"
        )
    chosen, _ = stratified(part.labels[known], count, _seed(options, _LABELLED), part.index[known])
    target = torch.full_like(part.labels, UNLABELLED)
    target[known[chosen]] = part.labels[known[chosen]]
    return replace(part, target=target)


def _taught(train: Part, source: Source, options: SplitOptions) -> Part | None:
    """What a teacher learns from; None where that is all of the training part."""
    if options.teacher_share == 1 and options.teacher_classes is None:
        return None
    rows = torch.arange(len(train))
    if options.teacher_classes is not None:
        classes = _class_numbers(options.teacher_classes, source)
        rows = rows[torch.isin(train.labels, torch.tensor(classes))]
        if not len(rows):
            raise UserError(f"teacher_classes: none of the {len(train)} training samples of data {source.name!r} is of these classes")
    size = round(options.teacher_share * len(rows))
    if size < 1:
        raise UserError(f"teacher_share {options.teacher_share} is {size} of {len(rows)} training samples; expected one or more")
    chosen, _ = stratified(_strata(train)[rows], size, _seed(options, _TEACHER), train.index[rows])
    return train.within(rows[chosen])


def _class_numbers(classes: Sequence[int | str], source: Source) -> list[int]:
    """The numbers of classes that are given by name or number. Raises UserError for one that is unknown or given twice."""
    names = list(source.class_names)
    found: list[int] = []
    for given in classes:
        if isinstance(given, str) and given not in names:
            raise UserError(f"teacher_classes: data {source.name!r} has no class {shown(given)}{nearest(given, names)}")
        number = names.index(given) if isinstance(given, str) else given
        if not 0 <= number < len(names):
            raise UserError(f"teacher_classes: data {source.name!r} has the classes 0 .. {len(names) - 1}, got {number}")
        if number in found:
            raise UserError(f"teacher_classes: class {number} ({names[number]}) is listed twice; list it once")
        found.append(number)
    return found


def _seed(options: SplitOptions, choice: int) -> int:
    """What one of the choices is drawn with, so that it says nothing about another."""
    return int(hash64(options.split_seed, choice))
