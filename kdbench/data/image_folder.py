"""A folder of image files in ImageNet's layout, train/<class>/<file> and val/<class>/<file>: decoded on demand, or once into memory."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from kdbench.bounded import read_file
from kdbench.data.content import Advance, Content, files_content
from kdbench.data.decoding import decoded_now, encoded_part
from kdbench.data.encoded import IMAGENET_MEAN, IMAGENET_STD
from kdbench.data.options import ImageSide
from kdbench.data.pictures import LARGEST_IMAGE, turned
from kdbench.data.sources import Source
from kdbench.errors import UserError, first_few, nearest, printable

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_TEST_FOLDERS = ("test", "val")
_DEEPEST = 50  # levels of folders inside a class's folder


@dataclass(frozen=True)
class Files:
    """Image files by row. names: their paths below `folder`, with /."""

    folder: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]  # in bytes

    @classmethod
    def of(cls, folder: Path, names: Sequence[str]) -> Files:
        """The files of these names, as large as they are now. Raises OSError where there is none of a name."""
        return cls(folder, tuple(names), tuple(os.stat(folder / name).st_size for name in names))

    def read(self, row: int) -> bytes:
        try:
            return read_file(self.folder / self.names[row], LARGEST_IMAGE)
        except OSError as error:
            raise UserError(f"{self.name(row)} can't be read: {error.strerror or error}") from error

    def name(self, row: int) -> str:
        return _named(self.folder / self.names[row])

    @cached_property
    def _content(self) -> Content:
        return files_content(self.folder, self.names, f"data {printable(str(self.folder))}", _read)

    @property
    def turned(self) -> int:
        return self._content.counted

    def sha256(self) -> str:
        """Of the files' names below the folder and of their bytes, which are read once: see `content`."""
        return self._content.sha256


def _read(path: Path, advance: Advance) -> Content:
    content = read_file(path, LARGEST_IMAGE)
    advance(len(content))
    return Content(hashlib.sha256(content).hexdigest(), int(turned(content)))


def image_folder(
    path: Path,
    size: ImageSide = 224,
    resize: ImageSide | None = None,
    test: str | None = None,
    in_memory: bool = False,
) -> Source:
    """Colour images `size` x `size` from the files below `path`: train/<class>/ and test/<class>/, or val/<class>/.

    Images in folders inside a class's folder belong to the class. Images are turned upright by their EXIF tag. Files of other kinds and
    hidden files are left out, and so are other folders below `path`, which the source says.

    resize: pixels of the shorter side before the centre is cut out, size / 0.875 where it is not given. test: name of the folder of test
    images, needed where there is both a `test` and a `val`. in_memory: decode all images once, to tensors, for sets that fit.
    Images are normalised as ImageNet's. Raises UserError for a missing or empty folder, and where train and test have other classes.
    """
    if resize is not None and resize < size:
        raise UserError(f"data image_folder: resize is {resize}, smaller than size, {size}; the centre would not fit")
    folders = [path / "train", path / _test_folder(path, test)]
    classes, test_classes = (_classes(folder) for folder in folders)
    if classes != test_classes:
        one_sided = sorted(set(classes) ^ set(test_classes))
        raise UserError(
            f"data image_folder: {_named(folders[0])} and {_named(folders[1])} must hold folders of the same classes; "
            f"{one_sided[0]!r} is only in {folders[one_sided[0] in test_classes].name}"
        )
    listings = [_listing(folder, classes) for folder in folders]
    first = 0
    sides = []
    for folder, found in zip(folders, listings, strict=True):
        store = Files(folder, tuple(found.names), tuple(found.sizes))
        sides.append(encoded_part(store, np.array(found.labels), first, size, resize))
        first += len(found.labels)
    left_out = _left_out([*(found.left_out for found in listings), _beside(path, folders)])
    read = [f"{path}: read {listings[0].images} to train on and {listings[1].images} to test on", left_out]
    if in_memory:
        *sides, unseen = decoded_now(*sides)
        read += [unseen] if unseen else []
    told = printable("; ".join(read))
    return Source("image_folder", sides[0], sides[1], len(classes), classes, IMAGENET_MEAN, IMAGENET_STD, read=told)


def _named(path: Path) -> str:
    """A path as it is written in a message, on one line."""
    return printable(str(path))


def _test_folder(path: Path, named: str | None) -> str:
    if not path.is_dir():
        raise UserError(f"data image_folder: there is no folder {_named(path)}")
    if named is not None:
        return named
    found = [name for name in _TEST_FOLDERS if (path / name).is_dir()]
    if len(found) > 1:
        raise UserError(f"data image_folder: {_named(path)} has both test and val; say which holds the test images, such as `test: val`")
    return found[0] if found else _TEST_FOLDERS[0]


def _classes(folder: Path) -> tuple[str, ...]:
    """The folders inside, in order of their names."""
    if not folder.is_dir():
        there = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
        raise UserError(f"data image_folder: there is no folder {_named(folder)}" + (nearest(folder.name, there) if there else ""))
    found = tuple(sorted(entry.name for entry in _entries(folder) if _is_folder(entry) and not entry.name.startswith(".")))
    if not found:
        raise UserError(f"data image_folder: {_named(folder)} holds no folders; expected one for each class")
    if odd := [name for name in found if printable(name) != name]:
        raise UserError(
            f"data image_folder: the name of the class folder {_named(folder / odd[0])} holds control characters "
            "or bytes that are not UTF-8. Rename the folder"
        )
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"data image_folder: {_named(folder)} can't be read: {error.strerror or error}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one. A link that leads round in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a file, or of the file that a link leads to; None for whatever else it is."""
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError:  # a circle of links, or a file that is gone
        return None


@dataclass
class _Listing:
    """The images of a folder in order of class and name, and what else lies there."""

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)  # of the images, by suffix
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def images(self) -> str:
        return f"{len(self.names)} images ({_counted(self.kinds)})"


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _left_out(counts: Sequence[Counter[str]]) -> str:
    left_out = sum(counts, Counter[str]())
    return f"left out: {_counted(left_out)}" if left_out else "nothing is left out"


def _beside(path: Path, read: Sequence[Path]) -> Counter[str]:
    """What lies beside the folders that are read and may hold images: other folders, and files that look like pictures."""
    where = f"beside {' and '.join(folder.name for folder in read)}"
    used = [os.path.join(os.path.realpath(folder), "") for folder in read]
    found: Counter[str] = Counter()
    folders = []
    try:
        entries = _entries(path)
    except UserError:  # a folder may be open to those alone who know the names in it
        return Counter({f"folders that can't be listed ({path.name})": 1})
    for entry in entries:
        is_folder, is_picture = _is_folder(entry), os.path.splitext(entry.name)[1].lower() in SUFFIXES
        if is_folder and any(folder.startswith(os.path.join(os.path.realpath(entry.path), "")) for folder in used):
            continue
        if entry.name.startswith("."):
            found["hidden"] += is_folder or is_picture
        elif is_folder:
            folders.append(entry.name)
        elif is_picture:
            found[f"images {where}"] += 1
    if folders:
        found[f"folders {where} ({first_few(folders)})"] = len(folders)
    return found


def _listing(folder: Path, classes: tuple[str, ...]) -> _Listing:
    """All images below each class's folder. Raises UserError for a class that has none."""
    found = _Listing()
    for entry in _entries(folder):
        if not _is_folder(entry):
            found.left_out[f"outside the class folders of {folder.name}"] += 1
        elif entry.name.startswith("."):
            found.left_out["hidden"] += 1
    for label, name in enumerate(classes):
        left_out: Counter[str] = Counter()
        images = sorted(_below(folder / name, name, left_out))
        found.left_out += left_out
        if not images:
            there = f" (it holds {_counted(left_out)})" if left_out else ""
            raise UserError(
                f"data image_folder: {_named(folder / name)} holds no images{there}; expected files ending in {', '.join(SUFFIXES)}"
            )
        found.names += [image for image, _ in images]
        found.sizes += [size for _, size in images]
        found.labels += [label] * len(images)
        found.kinds.update(os.path.splitext(image)[1].lower() for image, _ in images)
    return found


def _below(folder: Path, name: str, left_out: Counter[str], level: int = 0) -> Iterator[tuple[str, int]]:
    """Path and size of each image in a class's folder and in the folders inside it; `name` is the path that the first one has."""
    if level > _DEEPEST:
        raise UserError(f"data image_folder: {_named(folder)} is nested more than {_DEEPEST} levels deep. Move its images up")
    for entry in _entries(folder):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from _below(Path(entry.path), f"{name}/{entry.name}", left_out, level + 1)
        elif (size := _size(entry)) is None:  # what leads to a folder may lead round in a circle, and a pipe may have nobody who writes
            left_out["links to folders, or to nothing" if entry.is_symlink() else "pipes, sockets or devices"] += 1
        elif suffix not in SUFFIXES:
            left_out[printable(suffix) or "without a suffix"] += 1
        elif size > LARGEST_IMAGE:
            raise UserError(
                f"{_named(Path(entry.path))} has {size / 1e6:,.0f} MB, expected at most {LARGEST_IMAGE / 1e6:g} MB for an image"
            )
        else:
            yield f"{name}/{entry.name}", size
