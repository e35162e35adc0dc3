"""Filling a teacher's cache: what is missing, what fits the budget, how long it takes, and the writing itself, shard by shard."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from kdbench.data.batch import Batch
from kdbench.data.columns import Columns, mapped
from kdbench.data.loader import in_order, view_batches
from kdbench.data.views import Augment
from kdbench.errors import RunFailed
from kdbench.models.outputs import Shapes
from kdbench.models.taps import probe
from kdbench.tasks.base import Task
from kdbench.tasks.build import build_task
from kdbench.training.cache.outputs import LOGITS, TEST, CacheSpec, entry_text, open_cache, read_entry, row_of, tap_stream
from kdbench.training.cache.streams import ENTRY, Kind, Manifest, Shard, ShardWriter, Stream, StreamFiles, layout_of, streams_in
from kdbench.training.cache.top_k import smallest_faithful
from kdbench.training.checkpoint import write_atomically
from kdbench.training.teacher import LiveTeacher, load_teacher

BATCH = 256
_MEASURED = 512  # images that the choice of top_k looks at

TapSets = Iterable[tuple[str, ...]]  # what the methods ask for, one set a method


@dataclass(frozen=True)
class Piece:
    """What one forward pass over some images is for: the shard of the streams that lack it."""

    test: bool  # of the clean test part, not of a view of the transfer part
    shard: Shard
    streams: tuple[str, ...]
    taps: tuple[str, ...]  # of the streams

    @property
    def images(self) -> int:
        return self.shard.stop - self.shard.start


@dataclass(frozen=True)
class Plan:
    """What is to be written, and what is not because the entry would outgrow its budget.

    nbytes: of the whole entry once it is written. too_big: tap sets that stay live, with the bytes that the entry would have with them;
    logits that don't fit are the empty set, and then nothing is written. top_k: what the measurement of `auto` found.
    """

    pieces: tuple[Piece, ...]
    streams: tuple[Stream, ...]
    nbytes: int
    too_big: Mapping[tuple[str, ...], int]
    measured: Mapping[str, float] | None = None

    @property
    def images(self) -> int:
        return sum(piece.images for piece in self.pieces)


def cached_already(folder: Path, tap_sets: TapSets) -> bool:
    """Whether an entry serves all of these. Raises RunFailed where it is damaged."""
    return all(open_cache(folder, taps) is not None for taps in {(), *tap_sets}) and StreamFiles(folder, TEST).open() is not None


def mend(folder: Path) -> list[str]:
    """Take away what is damaged of an entry, to be written again; its names. Checksums are not looked at, only what is cheap to see."""
    gone = []
    try:
        entry = read_entry(folder)
        if entry is not None:
            row_of(folder, entry)
    except RunFailed:
        gone.append(ENTRY)
        (folder / ENTRY).unlink()
    for name in streams_in(folder):
        files = StreamFiles(folder, name)
        try:
            files.check()
        except RunFailed:
            gone.append(name)
            files.remove()
    return gone


class Builder:
    """Fills one entry. It holds the teacher, so that a process makes one and gives it piece after piece."""

    def __init__(self, spec: CacheSpec, folder: Path, device: torch.device) -> None:
        self.spec, self.folder, self.device = spec, folder, device
        self._live: dict[tuple[str, ...], LiveTeacher] = {}

    @cached_property
    def task(self) -> Task:
        return build_task(self.spec.task)

    @cached_property
    def network(self) -> torch.nn.Module:
        return load_teacher(self.spec.teacher, self.task, self.device)

    def teacher(self, taps: tuple[str, ...]) -> LiveTeacher:
        if taps not in self._live:
            ref = self.spec.teacher
            self._live[taps] = LiveTeacher(self.network, self.task, taps, ref.precision, ref.memory_format)
        return self._live[taps]

    # --- before ------------------------------------------------------------------------------------------------------

    def plan(self, tap_sets: TapSets) -> Plan:
        """What is still to be written so that methods with these taps find all of theirs, as far as the budget goes.

        Logits come first, then the sets that add the least. What is there already counts, and stays.
        """
        wanted = sorted({tuple(dict.fromkeys(taps)) for taps in tap_sets if taps})
        shapes = probe(self.network, self.task.example("teacher"), {tap for taps in wanted for tap in taps})
        logits, measured = self._logits(shapes)
        chosen = {LOGITS: logits, TEST: self._stream(TEST, "prediction", self._kept)}
        budget = self.spec.options.budget_gb * 1e9
        size = sum(stream.nbytes for stream in chosen.values())
        if size > budget and not self._finished(LOGITS):
            return Plan((), (), 0, {(): size}, measured)
        too_big: dict[tuple[str, ...], int] = {}
        sets = {taps: [self._stream(tap_stream(tap), shapes.taps[tap].kind, shapes.taps[tap].shape) for tap in taps] for taps in wanted}
        for taps, streams in sorted(sets.items(), key=lambda item: sum(stream.nbytes for stream in item[1])):
            new = [stream for stream in streams if stream.name not in chosen]
            with_them = size + sum(stream.nbytes for stream in new)
            if with_them > budget and not all(self._finished(stream.name) for stream in new):
                too_big[taps] = with_them
                continue
            chosen |= {stream.name: stream for stream in new}
            size = with_them
        return Plan(tuple(self._pieces(chosen.values(), wanted)), tuple(chosen.values()), size, too_big, measured)

    def _stream(self, name: str, kind: Kind, of: Columns | tuple[int, ...], top_k: int | None = None) -> Stream:
        """of: the shape of one row, or rows like those that come."""
        splits, test = self.spec.splits, name == TEST
        return Stream(
            name=name,
            kind=kind,
            **({"shape": of} if isinstance(of, tuple) else layout_of(of)),
            views=1 if test else self.spec.views,
            images=len(splits.test if test else splits.transfer),
            # What is compared with stored predictions is as exact as these.
            precision="fp32" if test and self.task.kept_exactly else self.spec.options.precision,
            top_k=top_k,
        )

    @cached_property
    def _kept(self) -> Columns:
        """What the task keeps of the teacher's prediction of a test image."""
        (batch,) = view_batches(self.spec.splits.test, 0, Augment(), 0, 1, self.device, range(1))
        return self.teacher(()).kept(batch)

    def _finished(self, name: str) -> bool:
        return StreamFiles(self.folder, name).open() is not None

    def _logits(self, shapes: Shapes) -> tuple[Stream, Mapping[str, float] | None]:
        """The stream of the logits, and what was measured where `top_k` is auto: a build that goes on keeps what was chosen before."""
        kept = StreamFiles(self.folder, LOGITS).read()
        if kept is not None:
            return kept.stream, kept.measured
        top_k, measured = self.spec.options.top_k, None
        one_vector = not isinstance(shapes.prediction, dict) and len(shapes.prediction) == 1
        classes = shapes.logits[0] if one_vector else 0  # top_k is for one vector of logits an image
        if top_k == "auto":
            top_k, measured = smallest_faithful(self._some_logits()) if classes else (None, None)
        if top_k is not None and top_k >= classes:
            top_k = None
        of = shapes.prediction if isinstance(shapes.prediction, tuple) else self._some_prediction
        return self._stream(LOGITS, "prediction", of, top_k), measured

    @cached_property
    def _some_prediction(self) -> Columns:
        (batch,) = self._batches(Shard(0, 0, 0, 1), test=False)
        return self.teacher(())(batch).prediction

    def _some_logits(self) -> torch.Tensor:
        batches = self._batches(Shard(0, 0, 0, min(_MEASURED, len(self.spec.splits.transfer))), test=False)
        return torch.cat([self.teacher(())(batch).logits.float().cpu() for batch in batches])

    def _pieces(self, streams: Iterable[Stream], tap_sets: TapSets) -> Iterator[Piece]:
        lacking: dict[tuple[bool, Shard], list[str]] = {}
        tap_of = {tap_stream(tap): tap for taps in tap_sets for tap in taps}
        for stream in streams:
            for shard in StreamFiles(self.folder, stream.name).missing(stream):
                lacking.setdefault((stream.name == TEST, shard), []).append(stream.name)
        for (test, shard), names in lacking.items():
            yield Piece(test, shard, tuple(names), tuple(tap_of[name] for name in names if name in tap_of))

    def seconds(self, plan: Plan) -> float:
        """How long this process would need, from a few batches."""
        taps = sorted({tap for piece in plan.pieces for tap in piece.taps})
        teacher, part = self.teacher(tuple(taps)), self.spec.splits.transfer
        (batch,) = in_order(part.select(torch.arange(min(BATCH, len(part)))), BATCH, self.device)
        times = []
        for _ in range(3):  # the first warms up; other load can only lengthen the rest
            start = time.perf_counter()
            mapped(teacher(batch).prediction, lambda tensor: tensor.float().cpu())
            times.append(time.perf_counter() - start)
        return min(times) / len(batch) * plan.images

    # --- the writing -------------------------------------------------------------------------------------------------

    def begin(self, plan: Plan) -> None:
        """Make the entry and allocate its streams. Raises DiskFull where there is no room."""
        index = self.spec.splits.transfer.index.numpy()
        content = BytesIO()
        np.save(content, index)
        text = entry_text(self.spec, index)
        if read_entry(self.folder) is None:
            write_atomically(self.folder / "index.npy", lambda temporary: temporary.write_bytes(content.getvalue()))
            write_atomically(self.folder / ENTRY, lambda temporary: temporary.write_text(text))
        for stream in plan.streams:
            StreamFiles(self.folder, stream.name).begin(stream, plan.measured if stream.name == LOGITS else None)

    def write(self, piece: Piece) -> Iterator[int]:
        """Predict a piece's images and write them, yielding how many after each batch. Any process of this machine may do any piece."""
        with self._writing(piece) as writers:
            for images, outputs in self._outputs(piece):
                for name, writer in writers.items():
                    writer.write(outputs[name])
                yield images

    def predicted(self, piece: Piece, streams: Mapping[str, Stream]) -> dict[str, bytes]:
        """A piece's rows as each of its streams stores them: for a process that has the entry's files out of reach."""
        rows: dict[str, list[bytes]] = {name: [] for name in piece.streams}
        for _, outputs in self._outputs(piece):
            for name, parts in rows.items():
                parts.append(streams[name].packed(outputs[name]).tobytes())
        return {name: b"".join(parts) for name, parts in rows.items()}

    def put(self, piece: Piece, rows: Mapping[str, bytes]) -> None:
        """Write what another process `predicted`."""
        with self._writing(piece) as writers:
            for name, writer in writers.items():
                writer.write_packed(rows[name])

    def _outputs(self, piece: Piece) -> Iterator[tuple[int, dict[str, Columns]]]:
        """Batch by batch: how many images, and what each stream gets."""
        teacher = self.teacher(piece.taps)
        for batch in self._batches(piece.shard, piece.test):
            if piece.test:
                yield len(batch), {TEST: teacher.kept(batch)}
                continue
            outputs = teacher(batch)
            maps = {tap_stream(tap): tensor for tap, tensor in outputs.maps.items()}
            yield len(batch), {name: maps.get(name, outputs.prediction) for name in piece.streams}

    @contextmanager
    def _writing(self, piece: Piece) -> Iterator[dict[str, ShardWriter]]:
        """Writers for the piece's streams. The shards count once this is left without an error."""
        with ExitStack() as files:
            writers = {name: files.enter_context(self._writer(name, piece.shard)) for name in piece.streams}
            yield writers
            for writer in writers.values():
                writer.finish()

    def finish(self, plan: Plan) -> None:
        for stream in plan.streams:
            StreamFiles(self.folder, stream.name).finish(stream)

    def _writer(self, name: str, shard: Shard) -> ShardWriter:
        files = StreamFiles(self.folder, name)
        manifest = files.read()
        assert isinstance(manifest, Manifest), "a stream is begun before it is written"
        return ShardWriter(files, manifest.stream, shard)

    def _batches(self, shard: Shard, test: bool) -> Iterator[Batch]:
        splits, rows = self.spec.splits, range(shard.start, shard.stop)
        if test:
            return view_batches(splits.test, 0, Augment(), 0, BATCH, self.device, rows)
        recipe = self.spec.recipe
        return view_batches(splits.transfer, shard.view, recipe.augment, self.spec.data_seed, BATCH, self.device, rows)


def build_here(builder: Builder, plan: Plan) -> Iterator[int]:
    """Write all pieces in this process, yielding how many images after each batch."""
    for piece in plan.pieces:
        yield from builder.write(piece)
