"""Parts of a data set whose images or targets per pixel are files: checked, or decoded ahead by threads, always in the same order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdbench.data.batch import TARGET, Part
from kdbench.data.columns import Columns, like, named
from kdbench.data.draws import Draws
from kdbench.data.encoded import Encoded, EncodedImages, Store
from kdbench.data.encoded_targets import EncodedLabels
from kdbench.data.frames import Placement
from kdbench.data.motion import Motion
from kdbench.data.pictures import Look, examined
from kdbench.data.resizing import ResizedInFile, part_bits
from kdbench.errors import UserError

_BATCHES_AHEAD = 2  # decoded before they are asked for
DECODED_FIRST = 2_000  # images of a part that `check_decodable` decodes
_SAMPLED_RUNS, _SAMPLED_RUN = 16, 16  # of a sample: images that follow each other lie in the same row groups of Parquet
_STDERR = 2  # the descriptor, to which C libraries write


@dataclass(frozen=True)
class Looked:
    """How many images of a part were looked at and decoded, and how many of them have something that is not shown."""

    images: int = 0  # in the part
    seen: int = 0
    decoded: int = 0
    transparent: int = 0  # of those that were decoded
    several_frames: int = 0  # of those that were seen


def _counted(looks: Sequence[Look], images: int) -> Looked:
    transparent = sum(look.transparent for look in looks)
    return Looked(images, len(looks), sum(look.decoded for look in looks), transparent, sum(look.several_frames for look in looks))


def not_shown(found: Mapping[str, Looked]) -> str:
    """One line that says which images have something that is not shown. Empty if none has. found: by what the line calls the images."""

    def where(counts: Iterable[tuple[str, int, int, int]]) -> str:
        told = [f"{n:,} of {among:,} {what} images{' looked at' if among < of else ''}" for what, n, among, of in counts if n]
        return ", ".join(told)

    transparent = where((what, look.transparent, look.decoded, look.images) for what, look in found.items())
    several = where((what, look.several_frames, look.seen, look.images) for what, look in found.items())
    said = [f"transparent pixels are shown as if they were opaque, in {transparent}"] if transparent else []
    return "; ".join([*said, f"only the first of several frames is shown, in {several}"] if several else said)


def check_decodable(part: Part, what: str, sample: bool = False) -> Looked:
    """Decode images of a part, to find broken files before hours of training. Images in memory are sound.

    Up to 2,000 images are decoded, evenly chosen where there are more. Of the others only the header is read, which finds empty files and
    files of another kind, but none that was cut off.

    Args:
        part: the images.
        what: what an error calls them, such as "test".
        sample: whether to look only at some images, 256 at most, in runs that are evenly spread.

    Returns:
        What of the images is not shown.

    Raises:
        UserError: names the first image that can't be decoded, and says how many there are.
    """
    if part.in_memory:
        return Looked()
    rows = _sampled(len(part)) if sample else range(len(part))
    every = -(-len(rows) // DECODED_FIRST)

    def look(place: int) -> Look:
        try:
            return _looked_at(part, rows[place], decode=place % every == 0)
        except UserError as error:
            return Look(str(error))  # the error itself would keep the image's bytes

    with _without_libtiff(), ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode") as pool:
        looks = list(pool.map(look, range(len(rows))))
    problems = [found.problem for found in looks if found.problem is not None]
    if problems:
        seen = " looked at" if len(rows) < len(part) else ""
        many = f"; {len(problems)} of the {len(rows)} {what} images{seen} have such a problem"
        raise UserError(f"{problems[0]}{many if len(problems) > 1 else f' ({what} image)'}")
    return _counted(looks, len(part))


def _looked_at(part: Part, row: int, decode: bool) -> Look:
    """A sample's picture and, if `decode` is set, its labels per pixel, which must be as large. Raises UserError."""
    look, placement = Look(decoded=decode), None
    if part.encoded is not None:
        images = part.encoded_images
        where = int(images.rows[row])
        image, look = examined(images.store.read(where), images.store.name(where), decode, images.annotated_size(row))
        placement = images.frame.place(*image.shape[-2:]) if image is not None else None
    for target in part.encoded_targets.values() if decode else ():
        if isinstance(target, EncodedLabels):  # masks were checked when they were read
            target.drawn(row, placement)
    return look


def _sampled(count: int) -> Sequence[int]:
    """Rows of a sample: all of a few images, evenly spread runs of many."""
    if count <= _SAMPLED_RUNS * _SAMPLED_RUN:
        return range(count)
    starts = [(count - _SAMPLED_RUN) * run // (_SAMPLED_RUNS - 1) for run in range(_SAMPLED_RUNS)]
    return [start + step for start in starts for step in range(_SAMPLED_RUN)]


@contextmanager
def _without_libtiff() -> Iterator[None]:
    """Keep what the C library for TIFF says of damaged files off the terminal, where it would stand beside our own line."""
    try:
        kept = os.dup(_STDERR)
    except OSError:  # the command was started without one
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), _STDERR)
    try:
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)


def decoded_ahead(
    part: Part, plan: Iterable[Tensor], view: int, data_seed: int, smallest: float | None, device: torch.device
) -> Iterator[tuple[Part, ResizedInFile | None]]:
    """For the rows of each entry of `plan`, the part's samples with all that was encoded as tensors, on the device.

    Samples are decoded by as many threads as the kernels have (`torch.get_num_threads`), a few batches before they are asked for. The
    targets of a sample are drawn with the placement of its picture. What comes out depends neither on the number of threads nor on who is
    faster.

    smallest: as `Augment.resized_crop`, of a part whose images are encoded; None shows each picture as it is fitted. With it comes what it
    did to the pictures.
    """
    with closing(_Decoders(torch.get_num_threads())) as decoders:
        ahead: deque[tuple[Part, deque[Future[_Sample]]]] = deque()
        for rows in plan:
            chosen = part.select(rows)
            ahead.append((chosen, decoders.start(chosen, view, data_seed, smallest)))
            if len(ahead) > _BATCHES_AHEAD:
                yield _collected(*ahead.popleft(), smallest, device)
        while ahead:
            yield _collected(*ahead.popleft(), smallest, device)


@dataclass(frozen=True)
class _Sample:
    """What was decoded of one sample: its image, None where that lies in memory, its targets by name, and where the image's pixels lie."""

    image: Tensor | None
    targets: dict[str, Tensor]
    placement: Placement | None


def _sample(chosen: Part, row: int, bits: Tensor | None = None, smallest: float = 1.0) -> _Sample:
    image, placement = chosen.encoded_images.placed(row, bits, smallest) if chosen.encoded is not None else (None, None)
    return _Sample(image, {name: column.drawn(row, placement) for name, column in chosen.encoded_targets.items()}, placement)


class _Decoders:
    """The threads; closing them drops what nobody waits for any more."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def start(self, chosen: Part, view: int, data_seed: int, smallest: float | None) -> deque[Future[_Sample]]:
        if smallest is None:
            return deque(self._pool.submit(_sample, chosen, row) for row in range(len(chosen)))
        bits = part_bits(Draws(data_seed, chosen.index, view))
        return deque(self._pool.submit(_sample, chosen, row, bits[row], smallest) for row in range(len(chosen)))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _collected(
    chosen: Part, samples: deque[Future[_Sample]], smallest: float | None, device: torch.device
) -> tuple[Part, ResizedInFile | None]:
    """The decoded batch; on its way to a GPU from pinned memory, so that nobody waits for the copy."""
    pinned = device.type == "cuda"

    def empty(column: Encoded) -> Tensor:
        return torch.empty(column.shape, dtype=column.dtype, pin_memory=pinned)

    pixels = empty(chosen.encoded_images) if chosen.encoded is not None else None
    drawn = {name: empty(column) for name, column in chosen.encoded_targets.items()}
    placements = []
    for row in range(len(chosen)):
        sample = samples.popleft().result()  # and is let go of: a batch of masks is large
        if pixels is not None and sample.image is not None:
            pixels[row] = sample.image
        for name, values in sample.targets.items():
            drawn[name][row] = values
        placements.append(sample.placement)

    def moved(tensor: Tensor) -> Tensor:
        return (tensor.pin_memory() if pinned and not tensor.is_pinned() else tensor).to(device, non_blocking=True)

    columns = {name: moved(pixels if name == chosen.encoded else column) for name, column in chosen.columns.items()}  # type: ignore[arg-type]
    target = chosen.target
    if target is not None:
        target = like({name: moved(drawn.get(name, column)) for name, column in named(target, TARGET).items()}, target)
    found = replace(chosen, target=target, index=moved(chosen.index)).with_inputs(columns)
    return found, None if smallest is None else ResizedInFile(_motion(chosen, placements, device))


def _motion(chosen: Part, placements: Sequence[Placement | None], device: torch.device) -> Motion:
    """Where points go from the usual sight of each picture to the part of it that is seen."""
    frame = chosen.encoded_images.frame
    factors, shifts = [], []
    for part in placements:
        assert part is not None, "parts are cut from encoded images"
        usual = frame.place(*part.original)
        factor = [new / old for new, old in zip(part.scale, usual.scale, strict=True)]
        factors.append(factor)
        shifts.append([new - old * each for new, old, each in zip(part.shift, usual.shift, factor, strict=True)])
    linear = torch.diag_embed(torch.tensor(factors, dtype=torch.float32))
    mirrored = torch.zeros(len(placements), dtype=torch.bool)
    return Motion(linear.to(device), torch.tensor(shifts, dtype=torch.float32).to(device), frame.size, mirrored.to(device))


def measured_target(part: Part) -> Columns:
    """The target as metrics take it: labels per pixel are drawn as evaluation sees them, by several threads.

    Masks of objects stay `EncodedMasks`, since they are measured at the size of the pictures: `EncodedMasks.rles`.
    """
    assert part.target is not None, "samples without labels measure nothing"
    labels = {name: column for name, column in part.encoded_targets.items() if isinstance(column, EncodedLabels)}
    if not labels:
        return part.target
    drawn = {name: torch.empty(column.shape, dtype=column.dtype) for name, column in labels.items()}

    def draw(row: int) -> None:
        for name, column in labels.items():
            drawn[name][row] = column.drawn(row)

    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode") as pool:
        for _ in pool.map(draw, range(len(part))):
            pass
    return like({name: drawn.get(name, column) for name, column in named(part.target, TARGET).items()}, part.target)


def encoded_part(store: Store, labels: np.ndarray, first: int, size: int, resize: int | None) -> Part:
    """All images of a store with their labels, [N]; positions begin at `first`."""
    rows = torch.arange(len(labels))
    images = EncodedImages(store, rows, size, resize or round(size / 0.875))
    return Part(images, torch.from_numpy(labels.astype(np.int64)), rows + first)


def decoded_now(train: Part, test: Part) -> tuple[Part, Part, str]:
    """Both parts with their images in memory, decoded as they are seen in evaluation, and the line of `not_shown` on them."""
    (train, trained), (test, tested) = map(_decoded_part, (train, test))
    return train, test, not_shown({"training": trained, "test": tested})


def _decoded_part(part: Part) -> tuple[Part, Looked]:
    images = part.encoded_images
    pixels = torch.empty(images.shape, dtype=torch.uint8)

    def decode(row: int) -> Look:
        where = int(images.rows[row])
        image, look = examined(images.store.read(where), images.store.name(where), decode=True)
        assert image is not None, "it was asked to be decoded"
        pixels[row] = images.fitted(image)
        return look

    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode") as pool:
        looks = list(pool.map(decode, range(len(part))))
    columns = {name: pixels if name == part.encoded else column for name, column in part.columns.items()}
    return part.with_inputs(columns), _counted(looks, len(part))
