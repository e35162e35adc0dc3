"""A stream of a teacher's cache on disk: the rows of one thing, such as the logits or one tap, in shards that any process can write.

In the entry's folder: NAME.npy, allocated whole at first; NAME.json, the manifest; NAME.parts/, the checksum of each shard that is written.
Once all shards are there the manifest takes up their checksums, and only then is the stream read. A killed build goes on at the first
shard without a checksum.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from kdbench.bounded import open_regular, read_file
from kdbench.data.columns import Columns, alone, named, single
from kdbench.data.options import LEFT_OUT_UNSET, StrictOptions
from kdbench.errors import RunFailed, UserError, in_one_line, not_written
from kdbench.models.trace import sample_shapes
from kdbench.training.cache.top_k import densified, largest
from kdbench.training.checkpoint import write_atomically

_LARGEST_WHOLE = {"fp16": 2**11, "fp32": 2**24}  # up to here each whole number has a form of its own
SHARD_ROWS = 2048  # the images that a killed build may have to predict again, and the least that a parallel build shares out

# Bytes of a manifest: 600,000 shards, which are 10^9 images. An entry's facts are some hundred bytes.
LARGEST_MANIFEST = 50_000_000
_DIGITS = hashlib.sha256().digest_size * 2
_SHA256 = re.compile(rb"[0-9a-f]{64}")

ENTRY = "entry.json"  # beside the streams: what they are of
Kind = Literal["prediction", "map", "tokens", "vector"]


class Shard(NamedTuple):
    """Consecutive rows of one pass over the images: `start` to `stop` of pass `view`; `number` counts through the stream."""

    number: int
    view: int
    start: int
    stop: int


class Stream(StrictOptions):
    """What a stream holds: for each of `views` passes over `images` images one row of this kind and shape.

    top_k: of a prediction's classes only so many are kept, with the log of the sum of the others' exponentials; all where it is None.
    parts: of a prediction of several tensors, the shape of one row of each by name; they lie end to end in a row of the stream.
    whole: which of the parts are whole numbers.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    views: int
    images: int
    precision: Literal["fp16", "fp32"]
    top_k: int | None = None
    shard_rows: int = Field(default_factory=lambda: SHARD_ROWS)
    parts: Annotated[dict[str, tuple[int, ...]] | None, LEFT_OUT_UNSET] = None
    whole: Annotated[tuple[str, ...] | None, LEFT_OUT_UNSET] = None

    @model_validator(mode="after")
    def _parts_fill_a_row(self) -> Stream:
        if self.parts is not None:
            sizes = [math.prod(shape) for shape in self.parts.values() if min(shape, default=1) > 0]
            if len(sizes) < len(self.parts) or (sum(sizes),) != self.shape:
                raise ValueError(f"the parts do not fill a row of the shape {list(self.shape)}")
        return self

    @property
    def rows(self) -> int:
        return self.views * self.images

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of one element; with `top_k` an element is a whole row."""
        number = {"fp16": "<f2", "fp32": "<f4"}[self.precision]
        if self.top_k is None:
            return np.dtype(number)
        position = "<i2" if self.shape[0] <= np.iinfo(np.int16).max else "<i4"
        return np.dtype([("values", number, (self.top_k,)), ("classes", position, (self.top_k,)), ("rest", "<f4")])

    @property
    def array_shape(self) -> tuple[int, ...]:
        return (self.rows,) if self.top_k is not None else (self.rows, *self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.array_shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def shards(self) -> Iterator[Shard]:
        number = 0
        for view in range(self.views):
            for start in range(0, self.images, self.shard_rows):
                yield Shard(number, view, start, min(start + self.shard_rows, self.images))
                number += 1

    def packed(self, outputs: Columns) -> np.ndarray:
        """Outputs [B, *shape] as they are stored. Raises UserError for numbers that half precision has no room for."""
        outputs = (torch.cat([self._row(name, outputs) for name in self.parts], 1) if self.parts else self._row("", outputs)).float()
        if self.top_k is None:
            return self._numbers(outputs)
        values, classes, rest = largest(outputs, self.top_k)
        rows = np.empty(len(outputs), self.dtype)
        rows["values"], rows["classes"], rows["rest"] = self._numbers(values), classes.cpu().numpy(), rest.cpu().numpy()
        return rows

    def _row(self, name: str, outputs: Columns) -> Tensor:
        """One part's numbers, [B, numbers]; those of a stream without parts, [B, *shape]."""
        tensor = single(outputs, name)
        if not self.parts:
            return tensor
        if name in (self.whole or ()) and tensor.numel() and int(tensor.abs().max()) > _LARGEST_WHOLE[self.precision]:
            raise UserError(
                f"cache.precision: {name} of the teacher's {self.name} reaches {int(tensor.abs().max())}, more than {self.precision} holds "
                "exactly" + ("; set cache.precision to fp32" if self.precision == "fp16" else "")
            )
        return tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]

    def _numbers(self, outputs: Tensor) -> np.ndarray:
        stored = outputs.to(torch.float16 if self.precision == "fp16" else torch.float32)
        if self.precision == "fp16" and bool((stored.isinf() & outputs.isfinite()).any()):
            raise UserError(
                f"cache.precision: the teacher's {self.name} reaches {outputs[outputs.isfinite()].abs().max().item():.3g}, "
                "more than fp16 has room for; set cache.precision to fp32"
            )
        return stored.cpu().contiguous().numpy()

    def unpacked(self, rows: np.ndarray, device: torch.device) -> Columns:
        """Stored rows as float32 outputs [B, *shape], whole numbers as int64."""
        if self.top_k is None:
            flat = torch.from_numpy(rows).to(device, non_blocking=True).float()
            return flat if self.parts is None else self._split(flat, self.parts)
        values, classes, rest = (torch.from_numpy(np.ascontiguousarray(rows[name])) for name in ("values", "classes", "rest"))
        return densified(values.float(), classes.long(), rest, self.shape[0]).to(device, non_blocking=True)

    def _split(self, rows: Tensor, parts: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        pieces = rows.split([math.prod(shape) for shape in parts.values()], dim=1)
        split = {name: piece.reshape(len(rows), *shape) for (name, shape), piece in zip(parts.items(), pieces, strict=True)}
        return {name: piece.long() if name in (self.whole or ()) else piece for name, piece in split.items()}


def layout_of(columns: Columns) -> dict[str, Any]:
    """The keys of a Stream that holds such rows: `shape`, and the parts of a row where there are several tensors."""
    if alone(columns):
        return {"shape": sample_shapes(columns)}
    tensors = named(columns, "")
    parts = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
    whole = tuple(name for name, tensor in tensors.items() if not tensor.is_floating_point())
    return {"shape": (sum(map(math.prod, parts.values())),), "parts": parts, "whole": whole or None}


class Manifest(StrictOptions):
    """A stream and how far it is. sha256: of each shard, empty until all are written. measured: why `top_k` is what it is."""

    stream: Stream
    sha256: tuple[str, ...] = ()
    measured: Mapping[str, float] | None = None

    @property
    def finished(self) -> bool:
        return bool(self.sha256)


class StreamFiles:
    """One stream's files in an entry's folder."""

    def __init__(self, folder: Path, name: str) -> None:
        safe = quote(name, safe="")
        self.folder = folder
        self.data, self.manifest, self.parts = folder / f"{safe}.npy", folder / f"{safe}.json", folder / f"{safe}.parts"

    def read(self) -> Manifest | None:
        """The manifest, None where there is no such stream. Raises RunFailed where it can't be read."""
        try:
            return Manifest.model_validate_json(read_file(self.manifest, LARGEST_MANIFEST))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise damaged(self.folder, in_one_line(error)) from error

    def open(self) -> np.ndarray | None:
        """The rows of a finished stream, memory-mapped; None where there is none. Raises RunFailed where it is damaged."""
        manifest = self.read()
        if manifest is None or not manifest.finished:
            return None
        return self._mapped(manifest.stream)

    def _mapped(self, stream: Stream) -> np.ndarray:
        try:
            with open_regular(self.data):
                rows = np.load(self.data, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise damaged(self.folder, in_one_line(error)) from error
        if rows.dtype != stream.dtype or rows.shape != stream.array_shape:
            raise damaged(self.folder, f"{self.data.name} is not what its manifest says")
        return np.asarray(rows)  # still mapped, without what np.memmap does at every access

    def check(self) -> None:
        """Raises RunFailed where the files are not what the manifest says, finished or not."""
        manifest = self.read()
        if manifest is not None:
            self._mapped(manifest.stream)

    def begin(self, stream: Stream, measured: Mapping[str, float] | None = None) -> None:
        """Allocate the stream, or take up what a killed build left of it. Raises DiskFull where there is no room for all of it."""
        kept = self.read()
        if kept is not None and kept.stream == stream:
            return
        self.remove()
        header = _header(stream)
        temporary = self.data.with_name(f".{self.data.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(header)
                file.flush()
                if sys.platform == "linux":  # a disk without room for all of it says so now, and not after an hour
                    os.posix_fallocate(file.fileno(), 0, len(header) + stream.nbytes)
                else:
                    os.ftruncate(file.fileno(), len(header) + stream.nbytes)
            temporary.replace(self.data)
        except OSError as error:
            raise not_written(error, self.data) from error
        finally:
            temporary.unlink(missing_ok=True)
        self._write(Manifest(stream=stream, measured=measured))

    def missing(self, stream: Stream) -> list[Shard]:
        """The shards that a build still has to write."""
        manifest = self.read()
        if manifest is None or manifest.stream != stream:
            return list(stream.shards)
        return [] if manifest.finished else [shard for shard in stream.shards if self._mark(shard) is None]

    def finish(self, stream: Stream) -> None:
        """All shards are written: from now on the stream is read."""
        manifest = self.read()
        assert manifest is not None, "a stream is begun before it is finished"
        if manifest.finished:
            return
        marks = [self._mark(shard) for shard in stream.shards]
        self._write(manifest.model_copy(update={"sha256": tuple(mark or "" for mark in marks)}))
        shutil.rmtree(self.parts, ignore_errors=True)

    def remove(self) -> None:
        self.manifest.unlink(missing_ok=True)  # first: without it the rest is not looked at
        self.data.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def keep(self, manifest: Manifest) -> None:
        """The data are those of a finished stream: from now on it is read."""
        self._write(manifest)

    def broken_shards(self, manifest: Manifest | None = None) -> list[Shard]:
        """Those of a finished stream (of `manifest`, or of its own) whose bytes are not the ones that were written. Reads all of it."""
        manifest = manifest or self.read()
        if manifest is None or not manifest.finished:
            return []
        stream = manifest.stream
        rows = self._mapped(stream)
        shards = zip(stream.shards, manifest.sha256, strict=True)
        return [shard for shard, sha in shards if hashlib.sha256(rows[_range(stream, shard)].data).hexdigest() != sha]

    def discard(self, shards: Sequence[Shard]) -> None:
        """Take the stream back to a build that still lacks these shards."""
        manifest = self.read()
        assert manifest is not None
        lacking = {shard.number for shard in shards}
        for shard, sha in zip(manifest.stream.shards, manifest.sha256, strict=True):
            if shard.number not in lacking:
                self.mark(shard, sha)
        self._write(manifest.model_copy(update={"sha256": ()}))

    def mark(self, shard: Shard, sha: str) -> None:
        write_atomically(self.parts / str(shard.number), lambda temporary: temporary.write_text(sha))

    def _mark(self, shard: Shard) -> str | None:
        try:
            sha = read_file(self.parts / str(shard.number), _DIGITS)
        except OSError:
            return None
        return sha.decode() if _SHA256.fullmatch(sha) else None

    def _write(self, manifest: Manifest) -> None:
        text = json.dumps(manifest.model_dump(mode="json"), indent=1)
        write_atomically(self.manifest, lambda temporary: temporary.write_text(text))


def streams_in(folder: Path) -> list[str]:
    """Names of the streams that an entry holds or is getting."""
    return sorted(unquote(path.stem) for path in folder.glob("*.json") if path.name != ENTRY)


class ShardWriter:
    """Writes one shard of a stream that was begun, a batch after the other. Use as a context manager; only `finish` makes it count."""

    def __init__(self, files: StreamFiles, stream: Stream, shard: Shard) -> None:
        self._files, self._stream, self._shard = files, stream, shard
        self._digest = hashlib.sha256()
        first = (shard.view * stream.images + shard.start) * (stream.nbytes // stream.rows)
        self._position = len(_header(stream)) + first

    def __enter__(self) -> ShardWriter:
        self._file = os.open(self._files.data, os.O_WRONLY)
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)

    def write(self, outputs: Columns) -> None:
        """The next rows, outputs [B, *shape]."""
        self.write_packed(self._stream.packed(outputs).tobytes())

    def write_packed(self, rows: bytes) -> None:
        """The next rows, as they are stored."""
        data = memoryview(rows)
        self._digest.update(data)
        try:
            while data:
                written = os.pwrite(self._file, data, self._position)
                self._position += written
                data = data[written:]
        except OSError as error:
            raise not_written(error, self._files.data) from error

    def finish(self) -> None:
        try:
            os.fsync(self._file)  # before the checksum says that it is there
        except OSError as error:
            raise not_written(error, self._files.data) from error
        self._files.mark(self._shard, self._digest.hexdigest())


def damaged(folder: Path, why: str) -> RunFailed:
    return RunFailed(f"the teacher cache {folder} is damaged ({why}); the next run mends it")


def _range(stream: Stream, shard: Shard) -> slice:
    first = shard.view * stream.images
    return slice(first + shard.start, first + shard.stop)


def _header(stream: Stream) -> bytes:
    file = BytesIO()
    description = np.lib.format.dtype_to_descr(stream.dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": description, "fortran_order": False, "shape": stream.array_shape})
    return file.getvalue()
