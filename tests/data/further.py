"""Data sets of generated shapes with further parts, from which students can learn."""

from __future__ import annotations

from dataclasses import replace

import torch

from kdbench.data.batch import Part
from kdbench.data.samples import UNLABELLED
from kdbench.data.shapes import shapes
from kdbench.data.sources import Source

FIRST = 2_000_000  # behind all positions of the other parts


def with_more(train: int = 60, size: int = 16, mean: float | None = None) -> Source:
    """Shapes of one object and its class; `unlabelled` has none of its labels, `partly` every other one. mean: said of all channels."""
    known = shapes(train=train, test=20, size=size, target="class")
    more = shapes(train=80, test=20, size=size, seed=1, target="class").train
    unlabelled = Part(more.inputs, None, more.index + FIRST)
    rows = torch.arange(80)
    target = torch.where(rows % 2 == 0, more.labels, UNLABELLED)
    partly = Part(more.inputs, target, more.index + 2 * FIRST)
    means = known.mean if mean is None else (mean,) * 3
    return replace(known, name="with_more", mean=means, more={"unlabelled": unlabelled, "partly": partly})
