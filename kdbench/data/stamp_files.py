"""Cut-outs of real objects and photographs to paste them on, from two Debian packages: read, made small, and shared out among the parts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdbench.bounded import read_file
from kdbench.catalogue import nearest
from kdbench.data.facts import Facts, NotHere
from kdbench.data.pictures import LARGEST_IMAGE, cut_out, decoded
from kdbench.errors import UserError, in_one_line, shown

INSTALLED = Path("/usr/share")
STAMPS, STAMPS_PACKAGE = Path("tuxpaint/stamps"), "tuxpaint-stamps-default"
GROUNDS, GROUNDS_PACKAGE = Path("backgrounds/mate/nature"), "mate-backgrounds"
UNUSUAL = "symbols"  # letters, digits and signs: a category of its own, which is left out unless it is asked for

PARTS = ("train", "val", "test")
# The part of object i of a category, and of photograph i, in the order of their names: every fourth is in the test part alone, every
# fourth in the validation part alone.
_PART_OF = ("train", "val", "test", "train")
FEWEST = 3  # objects of a category: one for each part
OPAQUE = 128  # the least alpha of a pixel that belongs to an object

_MOST_FILES = 20_000  # in the folder of stamps
_MOST_CAPTION = 100_000  # bytes of a file with a caption in all languages
_MIRRORED = "_mirror"  # ends the name of a stamp that is the mirror image of another


@dataclass(frozen=True)
class Stamp:
    """One object. picture: RGBA, no larger than it is ever shown, cut at the edges of its opaque pixels. category: a number from 0."""

    name: str
    category: int
    picture: Image.Image
    caption: str


@dataclass(frozen=True)
class Pool:
    """What the scenes of one part are made of. stamps: of each category, at least one. grounds: photographs, RGB."""

    stamps: tuple[tuple[Stamp, ...], ...]
    grounds: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Library:
    """categories: by number. pools: by part, with no object and no ground in two of them. read: what was read, in one line."""

    categories: tuple[str, ...]
    pools: Mapping[str, Pool]
    captions: tuple[str, ...]
    read: str


def open_library(categories: Sequence[str] | None, largest: int, ground: int, facts: Facts) -> Library:
    """The objects of these categories, and the photographs.

    Args:
        categories: folders of stamps; None for all but `symbols`.
        largest: pixels of the longer side that an object has at most.
        ground: pixels of the shorter side that a photograph is made to have, if it has more.
        facts: of the data set, for a dry run.

    Raises:
        NotHere: a package is not installed.
        UserError: a category is unknown or has too few objects, or a file can't be read.
    """
    stamps, photographs = _folder(STAMPS, STAMPS_PACKAGE, facts), _folder(GROUNDS, GROUNDS_PACKAGE, facts)
    files = _by_category(stamps)
    chosen = _chosen(categories, files)
    grounds = sorted(path for path in photographs.iterdir() if path.suffix.lower() == ".jpg" and not path.is_symlink())
    if len(grounds) < FEWEST:
        raise UserError(
            f"data stamps: {photographs} holds {len(grounds)} photographs, expected {FEWEST} or more; {_way_out(GROUNDS_PACKAGE)}"
        )
    wanted = [(number, path) for number, name in enumerate(chosen) for path in files[name]]
    plain = [(number, path) for number, path in wanted if not path.stem.endswith(_MIRRORED)]
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="stamps") as pool:
        found = list(pool.map(lambda entry: _stamp(entry[0], entry[1], stamps, largest), plain))
        backs = list(pool.map(lambda path: _ground(path, ground), grounds))
    objects = [stamp for stamp in found if stamp is not None]
    left_out = {
        "of other categories": sum(map(len, files.values())) - len(wanted),
        "mirror images of another": len(wanted) - len(plain),
        "without transparent pixels": len(plain) - len(objects),
    }
    kept = _large_enough(objects, chosen, named=categories is not None)
    left_out["of categories with too few"] = len(objects) - sum(len(those) for those in kept.values())
    told = ", ".join(f"{count} {why}" for why, count in left_out.items() if count)
    read = f"data stamps: {sum(len(those) for those in kept.values())} objects of {len(kept)} categories on {len(backs)} photographs"
    return Library(
        tuple(kept),
        {part: _pool(part, kept, backs) for part in PARTS},
        tuple(stamp.caption for those in kept.values() for stamp in those),
        read + (f"; left out: {told}" if told else ""),
    )


def _folder(inside: Path, package: str, facts: Facts) -> Path:
    """Where the package's files lie: in KDBENCH_DATA, else where Debian puts them."""
    named = os.environ.get("KDBENCH_DATA")
    places = [*([Path(named) / inside] if named else []), INSTALLED / inside]
    if found := next((place for place in places if place.is_dir()), None):
        return found
    looked = " and ".join(str(place) for place in places)
    raise NotHere(f"data stamps: there is no folder {looked}; {_way_out(package)}", facts)


def _way_out(package: str) -> str:
    return f"run `apt-get install {package}` (Debian, GPL-2), or let KDBENCH_DATA name a folder with {STAMPS} and {GROUNDS}"


def _by_category(folder: Path) -> dict[str, list[Path]]:
    """Pictures of each folder inside, and of the folders in it, sorted. Links are not followed."""
    found: dict[str, list[Path]] = {}
    for path in _pictures(folder):
        inside = path.relative_to(folder).parts
        if len(inside) > 1:
            found.setdefault(inside[0], []).append(path)
    if not found:
        raise UserError(f"data stamps: {folder} holds no folder with PNG pictures; {_way_out(STAMPS_PACKAGE)}")
    return {name: sorted(paths, key=lambda path: path.relative_to(folder).as_posix()) for name, paths in sorted(found.items())}


def _pictures(folder: Path) -> Iterator[Path]:
    seen = 0
    for place, _, names in os.walk(folder, followlinks=False):
        for name in names:
            seen += 1
            if seen > 100 * _MOST_FILES:
                raise UserError(f"data stamps: {folder} holds more than {100 * _MOST_FILES:,} files; name the folder of the stamps alone")
            path = Path(place) / name
            if path.suffix.lower() == ".png" and not path.is_symlink():
                yield path


def _chosen(categories: Sequence[str] | None, files: Mapping[str, Sequence[Path]]) -> tuple[str, ...]:
    if categories is None:
        return tuple(name for name in files if name != UNUSUAL)
    for name in categories:
        if name not in files:
            raise UserError(f"data stamps: there is no category {shown(name)}{nearest(name, files)}")
        if list(categories).count(name) > 1:
            raise UserError(f"data stamps: category {shown(name)} is listed twice; list it once")
    return tuple(categories)


def _large_enough(objects: Sequence[Stamp], names: Sequence[str], named: bool) -> dict[str, list[Stamp]]:
    """The objects by category, numbered anew; categories that can't give one to each part are left out, or refused if they were named."""
    kept: dict[str, list[Stamp]] = {}
    for number, name in enumerate(names):
        those = [stamp for stamp in objects if stamp.category == number]
        if len(those) >= FEWEST:
            kept[name] = [Stamp(stamp.name, len(kept), stamp.picture, stamp.caption) for stamp in those]
        elif named:
            raise UserError(f"data stamps: category {name!r} has {len(those)} usable pictures, expected {FEWEST} or more; leave it out")
    if not kept:
        raise UserError(f"data stamps: no category has {FEWEST} usable pictures or more; {_way_out(STAMPS_PACKAGE)}")
    return kept


def _pool(part: str, stamps: Mapping[str, Sequence[Stamp]], grounds: Sequence[Image.Image]) -> Pool:
    def own(count: int) -> list[int]:
        return [place for place in range(count) if _PART_OF[place % len(_PART_OF)] == part]

    objects = tuple(tuple(those[place] for place in own(len(those))) for those in stamps.values())
    return Pool(objects, tuple(grounds[place] for place in own(len(grounds))))


def _stamp(category: int, path: Path, folder: Path, largest: int) -> Stamp | None:
    """The object, None where the picture has no transparency or nothing that is opaque."""
    name = path.relative_to(folder).as_posix()
    picture = cut_out(_content(path, LARGEST_IMAGE), str(path))
    if picture is None:
        return None
    opaque = np.asarray(picture.getchannel("A")) >= OPAQUE
    if not opaque.any():
        return None
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    trimmed = picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    return Stamp(name, category, at_most(trimmed, largest), _caption(path))


def at_most(picture: Image.Image, longest: int) -> Image.Image:
    """The picture with a longer side of at most so many pixels; it is never enlarged."""
    width, height = picture.size
    long = max(width, height)
    if long <= longest:
        return picture
    size = tuple(max(1, (2 * side * longest + long) // (2 * long)) for side in (width, height))
    return picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)


def _caption(path: Path) -> str:
    """What the file of captions says first, in English: its first line. The words of the file's name where there is no such file."""
    beside = path.with_suffix(".txt")
    if beside.is_file() and not beside.is_symlink():
        text = _content(beside, _MOST_CAPTION).decode(errors="replace").splitlines()
        if text and text[0].strip():
            return text[0].strip().rstrip(".")
    return " ".join(path.stem.replace("_", "-").split("-"))


def _ground(path: Path, shortest: int) -> Image.Image:
    """The photograph, RGB, with a shorter side of at most so many pixels."""
    picture = Image.fromarray(decoded(_content(path, LARGEST_IMAGE), str(path)).permute(1, 2, 0).contiguous().numpy())
    width, height = picture.size
    return at_most(picture, -(-shortest * max(width, height) // min(width, height)))


def _content(path: Path, most: int) -> bytes:
    try:
        return read_file(path, most)
    except OSError as error:
        raise UserError(f"data stamps: can't read {path} ({in_one_line(error)}); install the package again") from error
