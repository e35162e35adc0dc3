"""Batches of a part, in memory or in files: shuffled and augmented for training, in order for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from kdbench.data.batch import INPUTS, TARGET, Batch, Part
from kdbench.data.changes import Change
from kdbench.data.decoding import decoded_ahead
from kdbench.data.draws import Draws
from kdbench.data.hashing import hash64
from kdbench.data.kinds import Boxes, Kind, Plain, Points
from kdbench.data.mixing import partners
from kdbench.data.samples import seen, size_of, unfit, unmixable
from kdbench.data.views import Augment, augment_mixed, drawn_ahead, view_of
from kdbench.errors import UserError

_CPU = torch.device("cpu")


class Loader:
    """Training batches of one worker, a pure function of (order seed, epoch, step, rank).

    `batch_size` counts the samples of all workers together: rank r takes the r-th of `world_size` chunks, so the workers' batches
    joined in rank order are the batch that a single worker would see. An incomplete last batch is dropped; a set smaller than one batch
    gives one batch of what it has. Images in memory stay uint8 on `device`; files are decoded ahead by threads.

    even: whether the batch must be cut into equal parts; else some workers have one sample more than others, and the batch is the same for
    any number of workers.
    views: epoch e shows view e mod `views` of every sample; None shows a new view every epoch. Without augmentation the view is always 0.
    Raises UserError where the batch can't be cut evenly, and where `check_views` does.
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
        even: bool = True,
        device: torch.device = _CPU,
    ) -> None:
        if batch_size < 1 or (even and batch_size % world_size):
            raise UserError(f"batch_size {batch_size} can't be cut evenly among {world_size} workers; make it a multiple of {world_size}")
        if views is not None and views < 1:
            raise UserError(f"views is {views}; expected at least 1, or nothing for a new view every epoch")
        self.batch_size = min(batch_size, len(part) // world_size * world_size if even else len(part))
        if self.batch_size < world_size:
            raise UserError(f"{len(part)} training samples are too few for {world_size} workers")
        check_views(part, augment)
        self.part, self.device = part.on(device), device
        self.augment, self.views = augment, views
        self.data_seed, self.order_seed = data_seed, order_seed
        self.rank = rank
        ends = [self.batch_size * worker // world_size for worker in range(world_size + 1)]
        self.shares = tuple(end - start for start, end in pairwise(ends))  # samples of each worker in a batch
        self._first = ends[rank]

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
        share = self.shares[self.rank]
        firsts = (step * self.batch_size + self._first for step in range(start_step, self.steps_per_epoch))
        plan = (order[first : first + share] for first in firsts)
        draws = Draws(self.data_seed, self.part.index, self.view(epoch))
        if self.part.in_memory:
            draws = drawn_ahead(draws, self.augment)
        return _batches(self.part, plan, draws, self.augment, self.device)

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

    part: the very one that a `Loader` is given, since mixup and cutmix draw a sample's partner from all of it.
    rows: only these of the part, one after the other; all by default. Raises UserError where `check_views` does.
    """
    check_views(part, augment)
    part = part.on(device)
    rows = range(len(part)) if rows is None else rows
    plan = torch.arange(rows.start, rows.stop, device=part.index.device).split(batch_size)
    return _batches(part, plan, Draws(data_seed, part.index, view), augment, device)


def check_views(part: Part, augment: Augment) -> None:
    """Raise UserError where samples of the part can't be augmented so."""
    of_inputs, of_target = part.kinds_of_inputs, part.kinds_of_target
    size = size_of(part.values, of_inputs)
    reason = unfit(part.values, of_inputs, augment, size)
    if part.target is not None:
        reason = reason or unfit(part.target, of_target, augment, size)
    reason = reason or unmixable(part.values, part.target, (of_inputs, of_target), part.classes, augment)
    if part.encoded is not None and augment.resized_crop:
        reason = reason or _left_behind(part, of_inputs, of_target)
    if reason:
        raise UserError(reason)


def _left_behind(part: Part, of_inputs: Mapping[str, Kind], of_target: Mapping[str, Kind]) -> str | None:
    """Why a column can't follow a part of the picture that is cut out where its file is decoded; None where all can.

    What is encoded itself is drawn with the same part. Boxes and points that were placed in a whole picture are moved. What lies in memory
    as pixels was made for the usual sight of the picture.
    """
    drawn = {part.encoded, *part.encoded_targets}
    moved = (Plain, Boxes, Points) if part.encoded_images.frame.shows_all else (Plain,)
    kinds = [*((name or INPUTS, kind) for name, kind in of_inputs.items()), *((name or TARGET, kind) for name, kind in of_target.items())]
    left = [name for name, kind in kinds if name not in drawn and not isinstance(kind, moved)]
    if not left:
        return None
    return f"recipe.augment.resized_crop is done where a file is decoded, and the column {left[0]!r} would not follow; leave it out"


def _batches(part: Part, plan: Iterable[Tensor], draws: Draws, spec: Augment, device: torch.device) -> Iterator[Batch]:
    """A batch for the rows of each entry of `plan`; rows and part lie on one device. draws: of the whole part."""
    if spec.mixes:
        plan = (torch.cat([rows, partners(rows, len(part), draws.at(rows))]) for rows in plan)
    if part.in_memory:
        yield from (_augmented(part.select(rows), draws.at(rows), spec) for rows in plan)
        return
    smallest = spec.resized_crop if part.encoded is not None else None
    rest = spec if smallest is None else spec.model_copy(update={"resized_crop": None})  # which is done where a file is decoded
    for chosen, done in decoded_ahead(part, plan, draws.view, draws.data_seed, smallest, device):
        batch = _augmented(chosen, Draws(draws.data_seed, chosen.index, draws.view), rest, done)
        del chosen, done  # what was decoded is as large as the batch, which somebody trains on now
        yield batch


def _augmented(chosen: Part, draws: Draws, spec: Augment, done: Change | None = None) -> Batch:
    """The batch of samples that are in memory; with mixup or cutmix the second half of them are the partners of the first.

    done: a step before all others that pixels have gone through.
    """
    if spec.mixes:
        assert chosen.classes is not None
        images, soft = augment_mixed(chosen.pixels, chosen.labels, draws, spec, chosen.classes)
        return Batch(images, soft, chosen.index[: len(images)], draws.view)
    kinds = chosen.kinds_of_inputs
    view = view_of(draws, spec, size_of(chosen.values, kinds))
    if done is not None:
        view = replace(view, changes=(done, *view.changes))
    shown = seen(chosen.values, kinds, view)
    target = seen(chosen.target, chosen.kinds_of_target, view) if chosen.target is not None else None
    return Batch(shown, target, chosen.index, draws.view)
