"""A folder of image files in ImageNet's layout, train/<class>/<file> and val/<class>/<file>: decoded on demand, or once into memory."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from kdbench.data.encoded import IMAGENET_MEAN, IMAGENET_STD, encoded_part
from kdbench.data.sources import Source
from kdbench.errors import UserError, nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
_TEST_FOLDERS = ("test", "val")


@dataclass(frozen=True)
class Files:
    """Image files by row. names: their paths below `folder`, with /."""

    folder: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]  # in bytes

    def read(self, row: int) -> bytes:
        try:
            return (self.folder / self.names[row]).read_bytes()
        except OSError as error:
            raise UserError(f"{self.name(row)} can't be read: {error.strerror or error}") from error

    def name(self, row: int) -> str:
        return str(self.folder / self.names[row])

    @cached_property
    def _digest(self) -> str:
        listing = "\n".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))
        return hashlib.sha256(listing.encode()).hexdigest()

    def sha256(self) -> str:
        """Of the files' names below the folder and their sizes, not of what is in them: that would be hours of reading for ImageNet."""
        return self._digest


def image_folder(
    path: Path,
    size: Annotated[int, Field(ge=8)] = 224,
    resize: Annotated[int, Field(ge=8)] | None = None,
    test: str | None = None,
    in_memory: bool = False,
) -> Source:
    """Colour images `size` x `size` from the files below `path`: train/<class>/ and test/<class>/, or val/<class>/.

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
            f"data image_folder: {folders[0]} and {folders[1]} must hold folders of the same classes; "
            f"{one_sided[0]!r} is only in {folders[one_sided[0] in test_classes].name}"
        )
    stores = [_files(folder, classes) for folder in folders]
    first = 0
    sides = []
    for store, labels in stores:
        sides.append(encoded_part(store, labels, first, size, resize, in_memory))
        first += len(labels)
    return Source("image_folder", sides[0], sides[1], len(classes), classes, IMAGENET_MEAN, IMAGENET_STD)


def _test_folder(path: Path, named: str | None) -> str:
    if not path.is_dir():
        raise UserError(f"data image_folder: there is no folder {path}")
    if named is not None:
        return named
    found = [name for name in _TEST_FOLDERS if (path / name).is_dir()]
    if len(found) > 1:
        raise UserError(f"data image_folder: {path} has both test and val; say which holds the test images, such as `test: val`")
    return found[0] if found else _TEST_FOLDERS[0]


def _classes(folder: Path) -> tuple[str, ...]:
    """The folders inside, in order of their names."""
    if not folder.is_dir():
        there = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
        raise UserError(f"data image_folder: there is no folder {folder}" + (nearest(folder.name, there) if there else ""))
    found = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")))
    if not found:
        raise UserError(f"data image_folder: {folder} holds no folders; expected one for each class")
    return found


def _files(folder: Path, classes: tuple[str, ...]) -> tuple[Files, np.ndarray]:
    """The image files of each class, in order of their names, and their labels."""
    names, sizes, labels = [], [], []
    for label, name in enumerate(classes):
        entries = sorted((entry for entry in os.scandir(folder / name) if _is_image(entry)), key=lambda entry: entry.name)
        if not entries:
            raise UserError(f"data image_folder: {folder / name} holds no images; expected files ending in {', '.join(SUFFIXES)}")
        names += [f"{name}/{entry.name}" for entry in entries]
        sizes += [entry.stat().st_size for entry in entries]
        labels += [label] * len(entries)
    return Files(folder, tuple(names), tuple(sizes)), np.array(labels)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
