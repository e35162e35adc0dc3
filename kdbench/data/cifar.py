"""CIFAR-100 (Krizhevsky, 2009), from its binary version: plain bytes on disk, or fetched from its home."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from kdbench.account import home
from kdbench.data.batch import Part
from kdbench.data.download import NotFetched, allowed, fetch, forbidden
from kdbench.data.facts import Facts, NotHere
from kdbench.data.sources import Source
from kdbench.errors import UserError, in_one_line

ARCHIVE = "cifar-100-binary.tar.gz"
FOLDER = "cifar-100-binary"  # inside the archive, and where it is unpacked
ADDRESSES = (f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",)
PICKLED = ("cifar-100-python", "cifar-100-python.tar.gz")  # what torchvision keeps

CLASSES, SIDE, CHANNELS = 100, 32, 3
TRAIN_EACH, TEST_EACH = 500, 100  # images of each class
# Mean and deviation of the training images' channels, as distillation code for CIFAR-100 has them.
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
_RECORD = 2 + CHANNELS * SIDE * SIDE  # the superclass, the class, then the pixels, channel by channel
_WAY_OUT = "delete it, or let KDBENCH_DATA name a folder that holds a whole one"

Read = Callable[[str], bytes]


def cifar100() -> Source:
    """50,000 training and 10,000 test images, colour 32x32, in 100 classes.

    Its binary version is looked for, unpacked or not, in `KDBENCH_DATA`, in `data`, in torchvision's and kdbench's caches, else
    downloaded into the last (never while `KDBENCH_OFFLINE` is set). The Python version, which torchvision has, is a pickle and is not read.
    Raises UserError for a damaged file, NotHere where it is nowhere to be had.
    """
    place = _found() or _download(_cache())
    read = _reader(place)
    train = _part(read("train.bin"), TRAIN_EACH, place / "train.bin", first=0)
    test = _part(read("test.bin"), TEST_EACH, place / "test.bin", first=len(train))
    names = tuple(read("fine_label_names.txt").decode("ascii", errors="replace").split())
    if len(set(names)) != CLASSES:
        raise UserError(f"data cifar100: {place} names {len(set(names))} classes instead of {CLASSES}; {_WAY_OUT}")
    return Source("cifar100", train, test, CLASSES, names, MEAN, STD)


def facts() -> Facts:
    """What every copy of the set has in common."""
    return Facts("cifar100", CLASSES, SIDE, MEAN, STD, CLASSES * TRAIN_EACH, CLASSES * TEST_EACH)


def _part(content: bytes, each: int, path: Path, first: int) -> Part:
    """The images and their classes, of each class as many as there have to be: half a file, or another one, is noticed."""
    wanted = CLASSES * each * _RECORD
    if len(content) != wanted:
        raise UserError(f"data cifar100: {path} holds {len(content)} bytes, expected {wanted}; {_WAY_OUT}")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    labels = records[:, 1]
    counts = np.bincount(labels, minlength=CLASSES)
    if counts.tolist() != [each] * CLASSES:
        raise UserError(f"data cifar100: {path} is damaged: not every class has {each} images; {_WAY_OUT}")
    images = torch.from_numpy(records[:, 2:].reshape(-1, CHANNELS, SIDE, SIDE).copy())
    return Part(images, torch.from_numpy(labels.astype(np.int64)), torch.arange(first, first + len(labels)))


def _reader(place: Path) -> Read:
    """How to get at a file of the set by its name: out of a folder, or out of the archive, of which nothing is unpacked."""

    def from_folder(name: str) -> bytes:
        return (place / name).read_bytes()

    def from_archive(name: str) -> bytes:
        with tarfile.open(place) as archive:
            file = archive.extractfile(f"{FOLDER}/{name}")
            assert file is not None, "a member that is no regular file raises KeyError or is one of ours"
            return file.read()

    def read(name: str) -> bytes:
        try:
            return from_folder(name) if place.is_dir() else from_archive(name)
        except (OSError, EOFError, KeyError, tarfile.TarError) as error:
            raise UserError(f"data cifar100: {place} can't be read: {in_one_line(error)}; {_WAY_OUT}") from error

    return read


def _roots() -> list[Path]:
    """Folders that data sets are kept in, the first one first."""
    caches = home() / ".cache"
    named = os.environ.get("KDBENCH_DATA")
    roots = [Path("data"), caches / "torchvision", caches / "torch" / "datasets"]
    return [*([Path(named)] if named else []), *roots, _cache()]


def _cache() -> Path:
    return home() / ".cache" / "kdbench" / "cifar-100"


def _found() -> Path | None:
    """The unpacked folder, or the archive."""
    return _first(("", FOLDER, "cifar100", "CIFAR100"), lambda path: (path / "train.bin").is_file()) or _first(
        (ARCHIVE,), lambda path: path.is_file()
    )


def _first(inside: Sequence[str], there: Callable[[Path], bool]) -> Path | None:
    return next((root / name for root in _roots() for name in inside if there(root / name)), None)


def _download(folder: Path) -> Path:
    """Fetch the archive into `folder`."""
    if reason := forbidden():
        raise _nowhere(reason)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Progress(console=Console(stderr=True)) as progress:
            return fetch(ADDRESSES, folder / ARCHIVE, lambda path: _reader(path)("test.bin"), progress)
    except NotFetched as error:
        raise _nowhere(f"it can't be downloaded ({error})") from error
    except OSError as error:
        raise _nowhere(f"it can't be stored in {folder} ({error})") from error


def _nowhere(reason: str) -> NotHere:
    pickled = _first(PICKLED, lambda path: path.exists())
    seen = f" ({pickled} is the Python version, a pickle, which kdbench does not read)" if pickled else ""
    looked = ", ".join(map(str, _roots()))
    return NotHere(
        f"data cifar100: it is in none of {looked}{seen}, and {reason}; put {ARCHIVE} from {ADDRESSES[0]} into one of them, "
        "or let KDBENCH_DATA name the folder that it is in",
        facts(),
        downloadable=allowed(),
    )
