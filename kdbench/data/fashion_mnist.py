"""Fashion-MNIST (Xiao, Rasul & Vollgraf, arXiv 1708.07747): a subset that ships with kdbench, or all of it from disk or from its mirror."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import Progress

from kdbench.account import home
from kdbench.bounded import open_regular
from kdbench.data.batch import Part
from kdbench.data.download import NotFetched, allowed, fetch, forbidden
from kdbench.data.facts import Facts, NotHere
from kdbench.data.sources import Source
from kdbench.errors import UserError

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
TRAIN_IMAGES = 60_000  # test image i has position TRAIN_IMAGES + i, so that a position names one image of the whole set
SIDE = 28

# Mean and standard deviation of the 60,000 training images' pixels; used for the subset too, so that a model fits both.
MEAN, STD = 0.2860, 0.3530

EMBEDDED = Path(__file__).parent / "fashion_mnist_embedded.parquet"
EMBEDDED_BYTES = 5_377_005
EMBEDDED_SHA256 = "1610c68ba41991cd95def5a960a638ff701c69e17a91c904183667c367b5a99f"

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
_GZIP_OVERHEAD = 100_000  # bytes by which a packed file may be longer than its content
_WAY_OUT = "delete it, or let KDBENCH_DATA name a folder with whole files"


@dataclass(frozen=True)
class _File:
    """One of the four files of the data set: its name without .gz, and what it holds when it is whole, uncompressed."""

    name: str
    header: int  # bytes before the data
    size: int
    sha256: str


_FILES = {
    "train images": _File("train-images-idx3-ubyte", 16, 47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train labels": _File("train-labels-idx1-ubyte", 8, 60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "test images": _File("t10k-images-idx3-ubyte", 16, 7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "test labels": _File("t10k-labels-idx1-ubyte", 8, 10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}


def fashion_mnist(size: Literal["embedded", "full"] = "embedded") -> Source:
    """Grey images 28x28 of clothes in 10 classes.

    embedded: 12,000 training and 2,000 test images, equally many of each class, read from the package. full: 60,000 and 10,000,
    looked for in `KDBENCH_DATA`, where Debian and torchvision put them, and in kdbench's cache, else downloaded into the cache
    (never while `KDBENCH_OFFLINE` is set). Raises UserError for a damaged file, and where the full set is nowhere to be had.
    """
    train, test = _embedded(EMBEDDED) if size == "embedded" else full_parts()
    return Source("fashion_mnist", train, test, len(CLASS_NAMES), CLASS_NAMES, (MEAN,), (STD,))


def _embedded(path: Path) -> tuple[Part, Part]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"data fashion_mnist: can't read {path} ({error}), which is part of kdbench; install kdbench again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != EMBEDDED_SHA256:
        raise UserError(
            f"data fashion_mnist: {path} is damaged: {len(content)} bytes with SHA-256 {found[:12]}..., "
            f"expected {EMBEDDED_BYTES} with {EMBEDDED_SHA256[:12]}...; install kdbench again"
        )
    table = pq.read_table(pa.BufferReader(content)).combine_chunks()
    pixels = np.frombuffer(table["image"].chunk(0).buffers()[1], np.uint8)
    is_test = table["source_index"].to_numpy() >= TRAIN_IMAGES
    whole = _part(pixels, table["label"].to_numpy(), table["source_index"].to_numpy())
    return whole.select(torch.from_numpy(~is_test)), whole.select(torch.from_numpy(is_test))


def full_parts() -> tuple[Part, Part]:
    """The 60,000 training and the 10,000 test images."""
    paths = next((paths for folder in _folders() if (paths := _all_files(folder))), None) or _download(_cache())
    content = {key: np.frombuffer(_content(paths[key], file), np.uint8, offset=file.header) for key, file in _FILES.items()}
    train, test = content["train labels"], content["test labels"]
    return (
        _part(content["train images"], train, np.arange(len(train))),
        _part(content["test images"], test, TRAIN_IMAGES + np.arange(len(test))),
    )


def full_set_folder() -> Path | None:
    """Where the full set lies on this machine, None where it would have to be downloaded."""
    return next((folder for folder in _folders() if _all_files(folder)), None)


def _part(pixels: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> Part:
    images = torch.from_numpy(pixels.reshape(-1, 1, SIDE, SIDE).copy())
    return Part(images, torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(positions.astype(np.int64)))


def _folders() -> list[Path]:
    """Where the four files may lie, the first place first."""
    homes = []
    if named := os.environ.get("KDBENCH_DATA"):
        homes += [Path(named) / inside for inside in ("", "fashion-mnist", "FashionMNIST", "FashionMNIST/raw")]
    homes.append(DEBIAN)
    torchvision_roots = (Path("data"), home() / ".cache" / "torchvision", home() / ".cache" / "torch" / "datasets")
    homes += [root / "FashionMNIST" / "raw" for root in torchvision_roots]
    return [*homes, _cache()]


def _cache() -> Path:
    return home() / ".cache" / "kdbench" / "fashion-mnist"


def _all_files(folder: Path) -> dict[str, Path] | None:
    """The four files in `folder`, uncompressed or not; None where one is missing."""
    present = {key: path for key, file in _FILES.items() if (path := _present(folder, file))}
    return present if len(present) == len(_FILES) else None


def _present(folder: Path, file: _File) -> Path | None:
    return next((path for path in (folder / file.name, folder / f"{file.name}.gz") if path.is_file()), None)


def _content(path: Path, file: _File) -> bytes:
    """What the file holds, uncompressed and checked."""
    try:
        with open_regular(path) as raw, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw as unpacked:
            longer = os.fstat(raw.fileno()).st_size > file.size + _GZIP_OVERHEAD
            content = b"" if longer else unpacked.read(file.size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"data fashion_mnist: {path} is damaged ({path.stat().st_size} bytes: {error}); {_WAY_OUT}") from error
    except OSError as error:
        raise UserError(f"data fashion_mnist: can't read {path} ({error}); {_WAY_OUT}") from error
    if longer or len(content) > file.size:
        raise UserError(f"data fashion_mnist: {path} is damaged: its content is longer than {file.size} bytes; {_WAY_OUT}")
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise UserError(
            f"data fashion_mnist: {path} is damaged: its content is {len(content)} bytes with SHA-256 {found[:12]}..., "
            f"expected {file.size} with {file.sha256[:12]}...; {_WAY_OUT}"
        )
    return content


def _download(folder: Path) -> dict[str, Path]:
    """Fetch what `folder` lacks; returns the four files."""
    if reason := forbidden():
        raise _nowhere(reason)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Progress(console=Console(stderr=True)) as progress:
            return {key: _present(folder, file) or _fetch(file, folder, progress) for key, file in _FILES.items()}
    except NotFetched as error:
        raise _nowhere(f"it can't be downloaded ({error})") from error
    except OSError as error:
        raise _nowhere(f"it can't be stored in {folder} ({error})") from error


def _fetch(file: _File, folder: Path, progress: Progress) -> Path:
    name = f"{file.name}.gz"
    most = file.size + _GZIP_OVERHEAD
    return fetch([f"{mirror}{name}" for mirror in MIRRORS], folder / name, most, lambda path: _content(path, file), progress)


def _nowhere(reason: str) -> NotHere:
    looked = ", ".join(str(folder) for folder in _folders())
    return NotHere(
        f"data fashion_mnist: the full set is in none of {looked}, and {reason}; let KDBENCH_DATA name a folder that holds it, "
        "run `apt-get install dataset-fashion-mnist`, or use {name: fashion_mnist, size: embedded}",
        Facts("fashion_mnist", len(CLASS_NAMES), SIDE, (MEAN,), (STD,), TRAIN_IMAGES, 10_000),
        downloadable=allowed(),
    )
