"""Cutting a source into the four parts that every task has: train, transfer, val and test."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from kdbench.data.options import Seed
from kdbench.data.sources import Source
from kdbench.data.splits import stratified
from kdbench.errors import UserError
from kdbench.tasks.base import Splits, Task


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
    """How the training images are cut.

    val_size: samples, or a share of the training images, that choices are made on. transfer_size: how many of the remaining ones students
    learn from (the "transfer set" of Hinton et al., arXiv 1503.02531), all where it is None; a teacher always learns from all of them.
    """

    val_size: Annotated[int | float, BeforeValidator(_number), AfterValidator(_count_or_share)] = 1 / 6
    transfer_size: Annotated[int, Field(ge=1)] | None = None
    split_seed: Seed = 0


def validation_size(options: SplitOptions, total: int, name: str) -> int:
    """How many of the `total` training images of the data set called `name` choices are made on. Raises UserError for none, or all."""
    val_size = options.val_size if isinstance(options.val_size, int) else round(options.val_size * total)
    if not 1 <= val_size < total:
        raise UserError(
            f"val_size {options.val_size} is {val_size} of the {total} training images of data {name!r}; expected 1 .. {total - 1}"
        )
    return val_size


def cut(source: Source, options: SplitOptions) -> Splits:
    """The four parts; by class where an image has one, else by chance, and always the same for the same options.

    Raises UserError where the source is too small.
    """
    total = len(source.train)
    val_size = validation_size(options, total, source.name)
    # Pixels of all classes are in nearly every image, so that masks need no strata.
    classes = source.train.labels if source.train.one_label else torch.zeros(total, dtype=torch.long)
    val_rows, train_rows = stratified(classes, val_size, options.split_seed)
    # What is said here is what lets two labels be mixed.
    whole = replace(source.train, classes=source.num_classes) if source.train.one_label else source.train
    train, val = whole.within(train_rows), whole.within(val_rows)
    transfer = train
    if options.transfer_size is not None:
        if options.transfer_size > len(train_rows):
            raise UserError(
                f"transfer_size {options.transfer_size} is more than the {len(train_rows)} images of data {source.name!r} "
                f"that are left for training after {val_size} went to validation"
            )
        chosen, _ = stratified(classes[train_rows], options.transfer_size, options.split_seed)
        transfer = train.within(chosen)
    return Splits(train, transfer, val, source.test, source)
