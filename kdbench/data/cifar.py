"""CIFAR-100 (Krizhevsky, 2009), from its binary version: plain bytes on disk, or fetched from its home."""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from kdbench.account import home
from kdbench.bounded import ImplausibleFile, open_regular, read_file
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
_LARGEST_NAMES = 10_000  # bytes of the list of class names; the true one has a thousand
# Of the archive, which is read as far as the true one goes: 0.17 GB, unpacked 0.18.
_LARGEST_ARCHIVE = 200_000_000
_MOST_MEMBERS = 100
_PIECE = 1 << 20
_WAY_OUT = "delete it, or let KDBENCH_DATA name a folder that holds a whole one"

Read = Callable[[str, int], bytes]


def cifar100() -> Source:
    """50,000 training and 10,000 test images, colour 32x32, in 100 classes.

    Its binary version is looked for, unpacked or not, in `KDBENCH_DATA`, in `data`, in torchvision's and kdbench's caches, else
    downloaded into the last (never while `KDBENCH_OFFLINE` is set). The Python version, which torchvision has, is a pickle and is not read.
    Raises UserError for a damaged file, NotHere where it is nowhere to be had.
    """
    place = _found() or _download(_cache())
    read = _reader(place)
    train = _part(read, "train.bin", TRAIN_EACH, place, first=0)
    test = _part(read, "test.bin", TEST_EACH, place, first=len(train))
    names = tuple(read("fine_label_names.txt", _LARGEST_NAMES).decode("ascii", errors="replace").split())
    if len(set(names)) != CLASSES:
        raise UserError(f"data cifar100: {place} names {len(set(names))} classes instead of {CLASSES}; {_WAY_OUT}")
    return Source("cifar100", train, test, CLASSES, names, MEAN, STD)


def facts() -> Facts:
    """What every copy of the set has in common."""
    return Facts("cifar100", CLASSES, SIDE, MEAN, STD, CLASSES * TRAIN_EACH, CLASSES * TEST_EACH)


def _part(read: Read, name: str, each: int, place: Path, first: int) -> Part:
    """The images and their classes, of each class as many as there have to be: half a file, or another one, is noticed."""
    wanted, path = CLASSES * each * _RECORD, place / name
    content = read(name, wanted)
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
    """How to get at a file of the set by its name, where it has no more bytes than asked for: out of a folder, or out of the archive."""

    def read(name: str, most: int) -> bytes:
        try:
            return read_file(place / name, most) if place.is_dir() else _member(place, f"{FOLDER}/{name}", most)
        except ImplausibleFile as error:
            raise UserError(f"data cifar100: {error.filename} can't be read: {error}; {_WAY_OUT}") from error
        except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
            raise UserError(f"data cifar100: {place} can't be read: {in_one_line(error)}; {_WAY_OUT}") from error

    return read


def _member(place: Path, wanted: str, most: int) -> bytes:
    """A regular file in the archive, of which nothing is unpacked to disk. What else is in it is passed over.

    tarfile itself reads whatever a header of an extension says that it has, so it is asked for single headers only.
    """
    content = None
    with open_regular(place) as packed, gzip.GzipFile(fileobj=packed) as archive:
        if os.fstat(packed.fileno()).st_size > _LARGEST_ARCHIVE:
            raise ImplausibleFile(place, f"it has more than {_LARGEST_ARCHIVE / 1e6:g} MB")
        for _ in range(_MOST_MEMBERS):
            header = archive.read(tarfile.BLOCKSIZE)
            if not header.strip(b"\0"):  # the end
                break
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            begin, end = archive.tell(), archive.tell() + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if not begin <= end <= _LARGEST_ARCHIVE:
                raise ImplausibleFile(place, f"it unpacks to more than {_LARGEST_ARCHIVE / 1e6:g} MB")
            if member.name == wanted and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                if member.size > most:
                    raise ImplausibleFile(place / wanted, f"it has {member.size} bytes, expected at most {most}")
                content = archive.read(member.size)
            archive.seek(end)
        while archive.read(_PIECE):  # what was cut off, or damaged, shows at the end
            if archive.tell() > _LARGEST_ARCHIVE:
                raise ImplausibleFile(place, f"it unpacks to more than {_LARGEST_ARCHIVE / 1e6:g} MB")
    if content is None:
        raise ImplausibleFile(place, f"it holds no {wanted}")
    return content


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
            return fetch(
                ADDRESSES, folder / ARCHIVE, _LARGEST_ARCHIVE, lambda path: _reader(path)("fine_label_names.txt", _LARGEST_NAMES), progress
            )
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
