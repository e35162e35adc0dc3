"""Images and labels in Parquet, as data sets are shared on hubs: a column of encoded images, decoded on demand or once into memory."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdbench.bounded import ImplausibleFile, open_regular
from kdbench.data.content import Advance, Content, group_contents, read_plainly
from kdbench.data.decoding import decoded_now, encoded_part
from kdbench.data.encoded import IMAGENET_MEAN, IMAGENET_STD
from kdbench.data.options import ImageSide
from kdbench.data.pictures import LARGEST_IMAGE, turned
from kdbench.data.sources import Source
from kdbench.errors import UserError, cut, first_few, in_one_line, nearest, printable, shown

_ROW_GROUPS_KEPT = 16  # in memory, the last ones that were read
# What a file may declare. A Parquet of a few kilobytes can hold a billion rows, or gigabytes in one of them.
_LARGEST_FOOTER = 16_000_000  # bytes: 100,000 row groups, or as many columns
_PLAUSIBLE_ROWS = 1_000_000  # up to here any number of rows is plausible, beyond it one a byte of the file
_PLAUSIBLE_BYTES = 8_000_000  # of a column of a row group, unpacked: up to here any ratio to its packed size is plausible
_PLAUSIBLE_RATIO = 20  # encoded images hardly compress
_LABEL_BYTES = 64  # of each row's label, unpacked: labels that are sorted compress to almost nothing
_LONGEST_LABEL = 1_000  # bytes
# Labels that are numbers of classes leave few numbers out. ImageNet's may be those of a few of its thousand classes.
_CLASSES_AT_LEAST, _CLASSES_PER_LABEL = 1000, 10


class Rows:
    """The images of some Parquet files, one after the other, by row. A row group is read whole, and the last few are kept."""

    def __init__(self, paths: Sequence[Path], column: str, label: str) -> None:
        opened = [_opened(path, column, label) for path in paths]
        self.files, self._leaves = [file for file, _ in opened], [leaf for _, leaf in opened]
        self.paths, self.column, self.label = paths, column, label
        self._groups = [(number, group) for number, file in enumerate(self.files) for group in range(file.num_row_groups)]
        rows = [self.files[number].metadata.row_group(group).num_rows for number, group in self._groups]
        self._starts = [0, *np.cumsum(rows).tolist()]
        self.rows = self._starts[-1]
        self._kept: OrderedDict[int, pa.Array] = OrderedDict()
        self._lock = Lock()  # a reader of pyarrow is one thread's at a time; decoding, which takes longer, needs no lock

    def read(self, row: int) -> bytes:
        content = self._image(row)
        if content is None:
            raise UserError(f"{self.name(row)} has no image in column {self.column!r}")
        if len(content) > LARGEST_IMAGE:
            raise UserError(f"{self.name(row)} has {len(content) / 1e6:,.0f} MB, expected at most {LARGEST_IMAGE / 1e6:g} MB for an image")
        return content

    def _image(self, row: int) -> bytes | None:
        number = bisect_right(self._starts, row) - 1
        with self._lock:
            images = self._row_group(number, row)
        content: bytes | None = images[row - self._starts[number]].as_py()
        return content

    def name(self, row: int) -> str:
        file, _ = self._groups[bisect_right(self._starts, row) - 1]
        first = self._starts[next(k for k, (number, _) in enumerate(self._groups) if number == file)]
        return f"{printable(str(self.paths[file]))} row {row - first}"

    @cached_property
    def _content(self) -> Content:
        names = [path.name for path in self.paths]
        group = json.dumps([self.column, *names])
        return group_contents(self.paths[0].parent, {group: names}, f"data {self.paths[0].parent}", self._read)[group]

    def _read(self, path: Path, advance: Advance) -> Content:
        number = [known.name for known in self.paths].index(path.name)
        first = (
            self._starts[next(k for k, (file, _) in enumerate(self._groups) if file == number)] if self.files[number].num_row_groups else 0
        )
        rows = range(first, first + self.files[number].metadata.num_rows)
        shown = sum(content is not None and turned(content) for content in map(self._image, rows))
        return Content(read_plainly(path, advance).sha256, shown)

    @property
    def turned(self) -> int:
        return self._content.counted

    def sha256(self) -> str:
        """Of the column's name and the files' bytes, which are read once: see `content`. Neither the files' names nor their place count."""
        return hashlib.sha256(json.dumps([self.column, self._content.sha256]).encode()).hexdigest()

    def _row_group(self, number: int, row: int) -> pa.Array:
        """The image column of a row group; the caller holds the lock."""
        if number not in self._kept:
            file, group = self._groups[number]
            try:
                table = self.files[file].read_row_group(group, columns=[self._leaves[file]], use_threads=False)
                column = table.column(0).combine_chunks()
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{self.name(row)} can't be read: {in_one_line(error)}") from error
            if len(column) != self._starts[number + 1] - self._starts[number]:
                raise UserError(f"{self.name(row)} can't be read: row group {group} has {len(column)} rows, and declares another number")
            self._kept[number] = column.field("bytes") if pa.types.is_struct(column.type) else column
        self._kept.move_to_end(number)
        while len(self._kept) > _ROW_GROUPS_KEPT:
            self._kept.popitem(last=False)
        return self._kept[number]


def parquet(
    train: Path,
    test: Path,
    image: str = "image",
    label: str = "label",
    size: ImageSide = 224,
    resize: ImageSide | None = None,
    in_memory: bool = False,
) -> Source:
    """Colour images `size` x `size` from Parquet. train, test: a file each, or a folder of files, which are read in order of their names.

    image: the column with the images, as bytes of a picture that PIL reads, or as a structure with a field `bytes`. Images are turned
    upright by their EXIF tag, and normalised as ImageNet's. label: the column with the labels, whole numbers from 0 or class names, also
    as a categorical of pandas. resize: pixels of the shorter side before the centre is cut out, size / 0.875 where it is not given.
    in_memory: decode all images once, to tensors, for sets that fit.
    A row group is read as a whole to get at one image, so files with small ones (a hundred rows or fewer) train faster.
    Raises UserError for a file that is missing or no Parquet, for a column that is missing or of another type, and where train and test
    have other classes.
    """
    if resize is not None and resize < size:
        raise UserError(f"data parquet: resize is {resize}, smaller than size, {size}; the centre would not fit")
    stores = [Rows(_files(path), image, label) for path in (train, test)]
    labels = [_labels(store) for store in stores]
    names = _class_names(labels, train, test)
    first = 0
    sides = []
    for store, found in zip(stores, labels, strict=True):
        sides.append(encoded_part(store, found.numbers(names), first, size, resize))
        first += store.rows
    counts = f"parquet: read {_counted(stores[0], train)} to train on and {_counted(stores[1], test)} to test on, {len(names)} classes"
    read = printable(counts) + _gaps(labels[0], names)
    if in_memory:
        *sides, unseen = decoded_now(*sides)
        read += f"; {unseen}" if unseen else ""
    return Source("parquet", sides[0], sides[1], len(names), names, IMAGENET_MEAN, IMAGENET_STD, read=read)


def _counted(store: Rows, path: Path) -> str:
    """What was read below `path`. Whoever names a file wants none of those beside it."""
    beside = [entry for entry in path.iterdir() if entry not in store.paths] if path.is_dir() else []
    folders = [entry.name for entry in beside if entry.is_dir()]
    others = [f"{count} other files" for count in [len(beside) - len(folders)] if count]
    if folders:
        others.append(f"{len(folders)} folders ({first_few(folders)})")
    left_out = f" ({' and '.join(others)} beside them are left out)" if others else ""
    return f"{store.rows} images of {len(store.paths)} files{left_out}"


@dataclass(frozen=True)
class _Labels:
    """The labels of some files. codes: int64 [N], the labels themselves, or where they stand in `names`, if they are names."""

    codes: np.ndarray
    names: tuple[str, ...] | None

    @cached_property
    def classes(self) -> list[Any]:
        """Those that occur, sorted."""
        occurring = np.unique(self.codes).tolist()
        return occurring if self.names is None else sorted({self.names[code] for code in occurring})

    def numbers(self, classes: Sequence[str]) -> np.ndarray:
        """The classes' numbers, int64 [N]. classes: names of all."""
        if self.names is None:
            return self.codes
        place = {name: number for number, name in enumerate(classes)}
        numbers = np.array([place.get(name, -1) for name in self.names], dtype=np.int64)  # -1: a name that does not occur
        return numbers.take(self.codes)


def _gaps(labels: _Labels, names: Sequence[str]) -> str:
    """What to say of numbers between 0 and the highest label that no image has: they are classes all the same."""
    missing = sorted(set(range(len(names))) - set(labels.classes)) if labels.names is None else []
    if not missing:
        return ""
    labelled = f"no image has the label {first_few(missing)}, and each network has an output for it"
    return f"; {labelled}: number the labels from 0, or write them as text"


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.parquet"))
        if not found:
            raise UserError(f"data parquet: {printable(str(path))} holds no files ending in .parquet")
        return found
    if not path.exists():
        raise UserError(f"data parquet: there is no file or folder {printable(str(path))}")
    return [path]


def _opened(path: Path, image: str, label: str) -> tuple[pq.ParquetFile, str]:
    """A file that declares nothing implausible, and the column of its images' bytes. Values that repeat are in memory once."""
    where = printable(str(path))
    try:
        size = _checked_size(path)
        source = path if where == str(path) else open_regular(path)  # pyarrow takes names in UTF-8 alone
        declared = pq.read_metadata(source)
        schema = declared.schema.to_arrow_schema()
        leaf = _image_leaf(schema, image, where)
        _check_label_type(schema, label, where)
        if problem := _implausible(declared, size, leaf, label):
            raise UserError(f"data parquet: {where} {problem}")
        return pq.ParquetFile(source, metadata=declared, read_dictionary=[leaf, label]), leaf
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, ImplausibleFile) else in_one_line(error)
        raise UserError(f"data parquet: {where} can't be read as Parquet: {reason}") from error


def _checked_size(path: Path) -> int:
    """Bytes of a file. Raises ImplausibleFile where it is no regular one, or its list of columns and row groups is too long."""
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        footer = int.from_bytes(file.read(4), "little")
    if footer > _LARGEST_FOOTER and footer < size:
        raise ImplausibleFile(path, f"its footer has {footer / 1e6:,.0f} MB, expected at most {_LARGEST_FOOTER / 1e6:g} MB")
    return size


def _implausible(declared: pq.FileMetaData, size: int, leaf: str, label: str) -> str | None:
    """What is wrong with what a file declares; None where its images and labels may be read."""
    columns = {declared.schema.column(number).path: number for number in range(declared.num_columns)}
    groups = [declared.row_group(number) for number in range(declared.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != declared.num_rows:
        return f"declares {declared.num_rows} rows, and other numbers of them in its row groups"
    if declared.num_rows > max(_PLAUSIBLE_ROWS, size):
        return f"declares {declared.num_rows:,} rows in {size:,} bytes, which are implausible"
    images, labels = ([group.column(columns[name]) for group in groups] for name in (leaf, label))
    for number, chunk in enumerate(images):
        if problem := _too_large([chunk], 0):
            return f"declares in row group {number} images of {problem}. Write it with smaller row groups, or without compression"
    if problem := _too_large(labels, _LABEL_BYTES * declared.num_rows):
        return f"declares labels of {problem}"
    return None


def _too_large(chunks: Sequence[pq.ColumnChunkMetaData], plausible: int) -> str | None:
    unpacked, packed = sum(chunk.total_uncompressed_size for chunk in chunks), sum(chunk.total_compressed_size for chunk in chunks)
    if unpacked <= max(_PLAUSIBLE_BYTES, _PLAUSIBLE_RATIO * packed, plausible):
        return None
    return f"{unpacked:,} bytes, packed into {packed:,}, which is implausible"


def _column_type(schema: pa.Schema, column: str, where: str) -> pa.DataType:
    if column not in schema.names:
        raise UserError(f"data parquet: {where} has no column {shown(column)}{nearest(column, schema.names)}")
    return schema.field(column).type


def _image_leaf(schema: pa.Schema, column: str, where: str) -> str:
    found = _column_type(schema, column, where)
    structure = pa.types.is_struct(found) and found.get_field_index("bytes") >= 0
    inner = found.field("bytes").type if structure else found
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise UserError(f"data parquet: column {column!r} of {where} holds {cut(str(found))}; expected the bytes of encoded images")
    return f"{column}.bytes" if structure else column


def _check_label_type(schema: pa.Schema, column: str, where: str) -> None:
    written = _column_type(schema, column, where)
    found = written.value_type if pa.types.is_dictionary(written) else written  # a categorical of pandas
    if not (pa.types.is_integer(found) or pa.types.is_string(found) or pa.types.is_large_string(found)):
        raise UserError(f"data parquet: column {column!r} of {where} holds {cut(str(written))}; expected whole numbers or class names")


def _labels(store: Rows) -> _Labels:
    """The labels of all rows."""
    parts = [_labels_of(file, store.label, printable(str(path))) for path, file in zip(store.paths, store.files, strict=True)]
    if len({part.names is None for part in parts}) > 1:
        folder = printable(str(store.paths[0].parent))
        raise UserError(f"data parquet: column {store.label!r} holds numbers in some files of {folder} and names in others")
    if parts[0].names is None:
        return _Labels(np.concatenate([part.codes for part in parts]), None)
    classes = sorted({name for part in parts for name in part.classes})
    return _Labels(np.concatenate([part.numbers(classes) for part in parts]), tuple(classes))


def _labels_of(file: pq.ParquetFile, column: str, where: str) -> _Labels:
    try:
        read = file.read(columns=[column], use_threads=False).column(0).combine_chunks()
        if len(read) != file.metadata.num_rows:
            raise UserError(f"data parquet: {where} declares {file.metadata.num_rows} rows, and has {len(read)} labels")
        if read.null_count:
            raise UserError(f"data parquet: column {column!r} of {where} has no label in {read.null_count} rows")
        values = read.dictionary if pa.types.is_dictionary(read.type) else read
        if pa.types.is_integer(values.type):
            plain = read.dictionary_decode() if values is not read else read
            codes = plain.cast(pa.int64()).to_numpy(zero_copy_only=False)
            if len(codes) and codes.min() < 0:
                raise UserError(f"data parquet: column {column!r} of {where} has the label {codes.min()}; expected numbers from 0")
            return _Labels(codes, None)
        if (longest := pc.max(pc.binary_length(values)).as_py() or 0) > _LONGEST_LABEL:
            raise UserError(
                f"data parquet: column {column!r} of {where} has a label of {longest:,} bytes, expected at most {_LONGEST_LABEL:,}"
            )
        names = tuple(map(str, values.to_pylist()))
        return _Labels(read.indices.cast(pa.int64()).to_numpy(zero_copy_only=False), names)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"data parquet: column {column!r} of {where} can't be read: {in_one_line(error)}") from error


def _class_names(labels: Sequence[_Labels], train: Path, test: Path) -> tuple[str, ...]:
    """Names as they stand, sorted; numbers 0 .. the highest that occurs. Raises UserError where hardly one of them occurs."""
    trained, tested = printable(str(train)), printable(str(test))
    if (labels[0].names is None) != (labels[1].names is None):
        raise UserError(f"data parquet: the labels of {trained} and of {tested} are not of one kind: one has numbers, the other names")
    here, there = (set(part.classes) for part in labels)
    if here != there:
        other = sorted(here ^ there)[0]
        only = printable((train if other in here else test).name)
        raise UserError(f"data parquet: {trained} and {tested} must have the same classes; {shown(other)} is only in {only}")
    if labels[0].names is not None:
        return tuple(labels[0].classes)
    classes = max(here, default=-1) + 1
    if classes > max(_CLASSES_AT_LEAST, _CLASSES_PER_LABEL * len(here)):
        raise UserError(
            f"data parquet: the labels of {trained} are {len(here)} numbers up to {classes - 1}, which would be {classes} classes. "
            f"If they are keys of a database, write them as text, or number them 0 .. {len(here) - 1}"
        )
    return tuple(str(number) for number in range(max(here, default=-1) + 1))
