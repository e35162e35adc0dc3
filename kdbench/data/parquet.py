"""Images and labels in Parquet, as data sets are shared on hubs: a column of encoded images, decoded on demand or once into memory."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.data.content import Advance, Content, group_contents, read_plainly
from kdbench.data.encoded import IMAGENET_MEAN, IMAGENET_STD, encoded_part, turned
from kdbench.data.options import ImageSide
from kdbench.data.sources import Source
from kdbench.errors import UserError, in_one_line, nearest, printable

_ROW_GROUPS_KEPT = 16  # in memory, the last ones that were read
# Labels that are numbers of classes leave few numbers out. ImageNet's may be those of a few of its thousand classes.
_CLASSES_AT_LEAST, _CLASSES_PER_LABEL = 1000, 10


class Rows:
    """The images of some Parquet files, one after the other, by row. A row group is read whole, and the last few are kept."""

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self.files = [_opened(path) for path in paths]
        self.paths, self.column = paths, column
        for path, file in zip(paths, self.files, strict=True):
            _image_type(file.schema_arrow, column, path)
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
        return f"{self.paths[file]} row {row - first}"

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
                table = self.files[file].read_row_group(group, columns=[self.column], use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{self.name(row)} can't be read: {in_one_line(error)}") from error
            column = table.column(0).combine_chunks()
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
    stores = [Rows(_files(path), image) for path in (train, test)]
    labels = [_labels(store, label) for store in stores]
    names = _class_names(labels, train, test)
    first = 0
    sides = []
    for store, values in zip(stores, labels, strict=True):
        numbers = np.searchsorted(np.array(names), values) if values.dtype.kind == "U" else values
        sides.append(encoded_part(store, numbers, first, size, resize, in_memory))
        first += len(values)
    read = f"parquet: read {_counted(stores[0])} to train on and {_counted(stores[1])} to test on, {len(names)} classes"
    return Source("parquet", sides[0], sides[1], len(names), names, IMAGENET_MEAN, IMAGENET_STD, read=read + _gaps(labels, names))


def _counted(store: Rows) -> str:
    beside = {entry.name for path in store.paths for entry in path.parent.iterdir()} if len(store.paths) > 1 else set()
    others = len([name for name in beside if not name.endswith(".parquet")])
    left_out = f" ({others} other files beside them are left out)" if others else ""
    return f"{store.rows} images of {len(store.paths)} files{left_out}"


def _gaps(labels: Sequence[np.ndarray], names: Sequence[str]) -> str:
    """What to say of numbers between 0 and the highest label that no image has: they are classes all the same."""
    if labels[0].dtype.kind == "U":
        return ""
    missing = sorted(set(range(len(names))) - set(labels[0].tolist()))
    if not missing:
        return ""
    shown = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
    return f"; no image has the label {shown}, and each network has an output for it: number the labels from 0, or write them as text"


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.parquet"))
        if not found:
            raise UserError(f"data parquet: {path} holds no files ending in .parquet")
        return found
    if not path.is_file():
        raise UserError(f"data parquet: there is no file or folder {path}")
    return [path]


def _opened(path: Path) -> pq.ParquetFile:
    try:
        # pyarrow takes names in UTF-8 alone.
        return pq.ParquetFile(path if printable(str(path)) == str(path) else path.open("rb"))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"data parquet: {path} can't be read as Parquet: {in_one_line(error)}") from error


def _column_type(schema: pa.Schema, column: str, path: Path) -> pa.DataType:
    if column not in schema.names:
        raise UserError(f"data parquet: {path} has no column {column!r}{nearest(column, schema.names)}")
    return schema.field(column).type


def _image_type(schema: pa.Schema, column: str, path: Path) -> None:
    found = _column_type(schema, column, path)
    inner = found.field("bytes").type if pa.types.is_struct(found) and found.get_field_index("bytes") >= 0 else found
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise UserError(f"data parquet: column {column!r} of {path} holds {found}; expected the bytes of encoded images")


def _labels(store: Rows, column: str) -> np.ndarray:
    """The labels of all rows: int64 [N], or names, U [N]."""
    values = []
    for path, file in zip(store.paths, store.files, strict=True):
        written = _column_type(file.schema_arrow, column, path)
        found = written.value_type if pa.types.is_dictionary(written) else written  # a categorical of pandas
        if not (pa.types.is_integer(found) or pa.types.is_string(found) or pa.types.is_large_string(found)):
            raise UserError(f"data parquet: column {column!r} of {path} holds {written}; expected whole numbers or class names")
        read = file.read(columns=[column]).column(0)
        if read.null_count:
            raise UserError(f"data parquet: column {column!r} of {path} has no label in {read.null_count} rows")
        numbers = pa.types.is_integer(found)
        values.append(np.array(read.to_pylist(), dtype=np.int64 if numbers else np.str_))
    if len({part.dtype.kind for part in values}) > 1:
        raise UserError(f"data parquet: column {column!r} holds numbers in some files of {store.paths[0].parent} and names in others")
    return np.concatenate(values)


def _class_names(labels: Sequence[np.ndarray], train: Path, test: Path) -> tuple[str, ...]:
    """Names as they stand, sorted; numbers 0 .. the highest that occurs. Raises UserError where hardly one of them occurs."""
    kinds = [part.dtype.kind for part in labels]
    if kinds[0] != kinds[1]:
        raise UserError(f"data parquet: the labels of {train} and of {test} are not of one kind: one has numbers, the other names")
    here, there = (set(part.tolist()) for part in labels)
    if here != there:
        other = sorted(here ^ there)[0]
        raise UserError(
            f"data parquet: {train} and {test} must have the same classes; {other!r} is only in {(train if other in here else test).name}"
        )
    if kinds[0] == "U":
        return tuple(sorted(here))
    classes = max(here, default=-1) + 1
    if classes > max(_CLASSES_AT_LEAST, _CLASSES_PER_LABEL * len(here)):
        raise UserError(
            f"data parquet: the labels of {train} are {len(here)} numbers up to {classes - 1}, which would be {classes} classes. "
            f"If they are keys of a database, write them as text, or number them 0 .. {len(here) - 1}"
        )
    return tuple(str(number) for number in range(max(here, default=-1) + 1))
