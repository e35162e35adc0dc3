"""Batches of a set that lies in memory: shuffled and augmented for training, in order for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdbench.data.batch import Batch, Part
from kdbench.data.hashing import hash64
from kdbench.data.views import Augment, augment
from kdbench.errors import UserError

_CPU = torch.device("cpu")


class Loader:
    """Training batches of one worker, a pure function of (order seed, epoch, step, rank).

    `batch_size` counts the samples of all workers together: rank r takes the r-th of `world_size` equal chunks, so the workers' batches
    joined in rank order are the batch that a single worker would see. An incomplete last batch is dropped; a set smaller than one batch
    gives one batch of what it has. The images stay uint8 on `device`.

    views: epoch e shows view e mod `views` of every sample; None shows a new view every epoch. Without augmentation the view is always 0.
    Raises UserError where the batch can't be cut evenly.
    """

    def __init__(
        self,
        part: Part,
        batch_size: int,
        *,
        augment: Augment,
        views: int | None,
        data_seed: int,
        order_seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = _CPU,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"batch_size {batch_size} can't be cut evenly among {world_size} workers; make it a multiple of {world_size}")
        if views is not None and views < 1:
            raise UserError(f"views is {views}; expected at least 1, or nothing for a new view every epoch")
        self.batch_size = min(batch_size, len(part) // world_size * world_size)
        if not self.batch_size:
            raise UserError(f"{len(part)} training samples are too few for {world_size} workers")
        self.part = _on(part, device)
        self.augment, self.views = augment, views
        self.data_seed, self.order_seed = data_seed, order_seed
        self.rank, self.world_size = rank, world_size

    @property
    def steps_per_epoch(self) -> int:
        return len(self.part) // self.batch_size

    def view(self, epoch: int) -> int:
        """Which augmented copy `epoch` shows."""
        if self.augment.none:
            return 0
        return epoch if self.views is None else epoch % self.views

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The epoch's batches from `start_step` on: what a resumed run still has to see."""
        order = self._order(epoch)
        share = self.batch_size // self.world_size
        for step in range(start_step, self.steps_per_epoch):
            first = step * self.batch_size + self.rank * share
            yield _batch(self.part, order[first : first + share], self.view(epoch), self.augment, self.data_seed)

    def _order(self, epoch: int) -> Tensor:
        # Drawn on the CPU whatever the device, so that every machine sees the same order; the hash keeps (1, 2) and (2, 1) apart.
        generator = torch.Generator().manual_seed(int(hash64(self.order_seed, epoch)))
        return torch.randperm(len(self.part), generator=generator).to(self.part.index.device)


def in_order(part: Part, batch_size: int, device: torch.device = _CPU) -> Iterator[Batch]:
    """Every sample once, in the part's order and without augmentation; the last batch may be smaller."""
    return view_batches(part, 0, Augment(), 0, batch_size, device)


def view_batches(
    part: Part,
    view: int,
    augment: Augment,
    data_seed: int,
    batch_size: int,
    device: torch.device = _CPU,
    rows: range | None = None,
) -> Iterator[Batch]:
    """One view of every sample once, in the part's order; the last batch may be smaller. What a teacher's cache is filled from.

    rows: only these of the part, one after the other; all by default.
    """
    part = _on(part, device)
    rows = range(len(part)) if rows is None else rows
    for chosen in torch.arange(rows.start, rows.stop, device=device).split(batch_size):
        yield _batch(part, chosen, view, augment, data_seed)


def _batch(part: Part, rows: Tensor, view: int, spec: Augment, data_seed: int) -> Batch:
    chosen = part.select(rows)
    inputs, target = augment(chosen.inputs, chosen.target, chosen.index, view, data_seed, spec)
    return Batch(inputs, target, chosen.index, view)


def _on(part: Part, device: torch.device) -> Part:
    return Part(part.inputs.to(device), part.target.to(device), part.index.to(device))
