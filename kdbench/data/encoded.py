"""Images that stay files until they are looked at: decoded ahead of the training by background threads, always in the same order.

`EncodedImages` stands where a `Part` otherwise holds a uint8 tensor. What it stands for, [N, 3, size, size], is too large to hold.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from kdbench.data.batch import Part
from kdbench.data.draws import Draws
from kdbench.data.resizing import part_bits, parts
from kdbench.errors import UserError, in_one_line

# Of ImageNet's training images: what pretrained networks were normalised with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_BATCHES_AHEAD = 2  # decoded before they are asked for
_DECODED_AT_ONCE = 256
DECODED_FIRST = 2_000  # images of a part that `check_decodable` decodes

# PIL knows forty formats more. Of one of them it hands the file to Ghostscript, and few have readers that many people use.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
LARGEST_IMAGE = 100_000_000  # bytes of a file, which is read whole
MOST_PIXELS = 100_000_000  # of one picture; decoding takes seven bytes a pixel
# A picture of one colour packs hundreds of pixels into a byte, a photograph of the poorest quality twenty.
PLAUSIBLE_PIXELS = 10_000_000  # up to here any number of pixels in a byte is plausible
PIXELS_PER_BYTE = 50
_STRIP = 2_000_000  # pixels
_STDERR = 2  # the descriptor, to which C libraries write

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_EXIF = (b"Exif", b"EXIF", b"eXIf", b"exif", b"Orientation")  # one of them stands before any tag, in each of the formats
# What turns a picture upright, by the value of its EXIF tag; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Store(Protocol):
    """Encoded images by row. `read` is called from several threads at once."""

    def read(self, row: int) -> bytes:
        """The file that a row holds. Raises UserError, naming it, where it can't be read."""
        ...

    def name(self, row: int) -> str:
        """What an error calls a row: a path, or a file and a row in it."""
        ...

    def sha256(self) -> str:
        """Hash of what the store holds: of the files' bytes (`content.files_sha256`), not of where they lie."""
        ...

    @property
    def turned(self) -> int:
        """How many of the images `turned` says are shown turned."""
        ...


@dataclass(frozen=True)
class EncodedImages:
    """Images of a store. Seen without augmentation, the shorter side is `resize` pixels and the centre `size` x `size` is shown.

    rows: int64 [N], which of the store's images. Indexing selects images, as it does with a tensor; nothing is decoded by it.
    """

    store: Store
    rows: Tensor
    size: int
    resize: int

    dtype = torch.uint8
    ndim = 4

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), 3, self.size, self.size))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> EncodedImages:
        return replace(self, rows=self.rows[rows])

    def sha256(self) -> str:
        """Hash of what the store holds, of the rows and of the sizes."""
        digest = hashlib.sha256(f"{self.store.sha256()} {self.size} {self.resize}".encode())
        if self.store.turned:  # the same files were once shown as they are stored, under the hash without this
            digest.update(b"turned upright")
        digest.update(self.rows.numpy().tobytes())
        return digest.hexdigest()

    def decode(self, row: int, bits: Tensor | None = None, smallest: float = 1.0) -> Tensor:
        """One image, uint8 [3, size, size]: its centre, or the random part that `bits` [3] stand for (see `resizing.parts`).

        Always the same for the same versions of PIL and torchvision. Raises UserError, naming the image, where it can't be decoded.
        """
        from torchvision.transforms.v2 import functional as transforms  # takes two seconds, so only who has files pays

        where = int(self.rows[row])
        image = _decoded(self.store.read(where), self.store.name(where))
        height, width = image.shape[-2:]
        if bits is not None:
            box = parts(height, width, bits[None], smallest)[0].tolist()
            part: Tensor = transforms.resized_crop(image, *box, size=[self.size, self.size], antialias=True)
            return part
        centre: Tensor = transforms.center_crop(transforms.resize(image, [self.resize], antialias=True), [self.size, self.size])
        return centre


def _decoded(content: bytes, name: str) -> Tensor:
    """uint8 [3, H, W] of a picture in one of FORMATS, turned upright where its EXIF tag says how; of an animation the first."""
    try:
        with _opened(content) as picture:
            picture.load()
            turn = _TURNS.get(_orientation(picture))
            upright = picture if turn is None else picture.transpose(turn)
            if upright.mode.startswith("I;16"):  # which PIL's conversion would cut off at 255
                grey = (np.asarray(upright) >> 8).astype(np.uint8)
                return torch.from_numpy(grey).expand(3, -1, -1)
            return torch.from_numpy(_pixels(upright)).permute(2, 0, 1)
    except Exception as error:  # whatever PIL raises for a damaged file: KeyError, ZeroDivisionError, struct.error, ...
        raise _undecodable(content, name, error) from error


def _pixels(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]. A large picture is copied strip by strip: as a whole, PIL makes two copies more of it."""
    width, height = picture.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        strip = picture if rows >= height else picture.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return pixels


class _Implausible(Exception):
    """A picture of more pixels than are decoded. The message says how many."""


def _opened(content: bytes) -> Image.Image:
    """A picture whose header is read, and whose pixels are not. Raises _Implausible, and whatever PIL raises for a damaged file."""
    most = min(MOST_PIXELS, max(PLAUSIBLE_PIXELS, PIXELS_PER_BYTE * len(content)))
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:  # from 179 million pixels on
        raise _Implausible(f"it has more than {most:,} pixels. Make it smaller") from None
    width, height = picture.size
    if width * height <= most:
        return picture
    picture.close()
    if width * height <= MOST_PIXELS:
        raise _Implausible(f"{width} x {height} pixels in {len(content):,} bytes are implausible. Make it smaller")
    raise _Implausible(f"it has {width} x {height} pixels, expected at most {MOST_PIXELS:,}. Make it smaller")


def _undecodable(content: bytes, name: str, error: Exception) -> UserError:
    reason = in_one_line(error)
    if isinstance(error, UnidentifiedImageError):  # whose own message has an address in memory
        reason = f"it is none of {', '.join(FORMATS)}, or its header is damaged" if content else "the file is empty"
    elif isinstance(error, _Implausible):
        reason = str(error)
    return UserError(f"{name} can't be decoded as an image: {reason}")


def turned(content: bytes) -> bool:
    """Whether a picture is shown turned, by the EXIF tag that cameras write. Of a JPEG, what stands before the pixels is enough.

    False for a TIFF, which PIL itself has always turned, and for what is no picture.
    """
    if content.startswith(_TIFF) or not any(mark in content for mark in _EXIF):  # a search takes a hundredth of what PIL takes
        return False
    try:
        with _opened(content) as picture:
            return _orientation(picture) in _TURNS
    except Exception:  # as in `_decoded`, which says what is wrong with it
        return False


def _orientation(picture: Image.Image) -> int:
    """The EXIF tag of a picture; 1, upright, where it has none."""
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever PIL raises for tags that are damaged: the pixels are not
        return 1


def check_decodable(part: Part, what: str) -> None:
    """Decode images of a part, to find broken files before hours of training. Images in memory are sound.

    Up to 2,000 images are decoded, evenly chosen where there are more. Of the others only the header is read, which finds empty files and
    files of another kind, but none that was cut off.

    Args:
        part: the images.
        what: what an error calls them, such as "test".

    Raises:
        UserError: names the first image that can't be decoded, and says how many there are.
    """
    images = part.inputs
    if isinstance(images, Tensor):
        return
    every = -(-len(images) // DECODED_FIRST)

    def problem(row: int) -> str | None:
        where = int(images.rows[row])
        try:
            content, name = images.store.read(where), images.store.name(where)
            _decoded(content, name) if row % every == 0 else _check_header(content, name)
        except UserError as error:
            return str(error)  # the error itself would keep the image's bytes
        return None

    with _without_libtiff(), ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode") as pool:
        problems = [found for found in pool.map(problem, range(len(images))) if found is not None]
    if problems:
        more = f"; {len(problems)} of the {len(images)} {what} images have such a problem" if len(problems) > 1 else f" ({what} image)"
        raise UserError(f"{problems[0]}{more}")


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


def _check_header(content: bytes, name: str) -> None:
    try:
        _opened(content).close()
    except Exception as error:  # as in `_decoded`
        raise _undecodable(content, name, error) from error


def decoded_ahead(
    part: Part, plan: Iterable[Tensor], view: int, data_seed: int, smallest: float | None, device: torch.device
) -> Iterator[Part]:
    """For the rows of each entry of `plan`, the part's samples with decoded images, on the device.

    The images are decoded by as many threads as the kernels have (`torch.get_num_threads`), a few batches before they are asked for.
    What comes out depends neither on their number nor on who is faster. smallest: as `Augment.resized_crop`; None shows the centre.
    """
    with closing(_Decoders(torch.get_num_threads())) as decoders:
        ahead: deque[tuple[Part, list[Future[Tensor]]]] = deque()
        for rows in plan:
            chosen = part.select(rows)
            ahead.append((chosen, decoders.start(chosen, view, data_seed, smallest)))
            if len(ahead) > _BATCHES_AHEAD:
                yield _collected(*ahead.popleft(), device)
        while ahead:
            yield _collected(*ahead.popleft(), device)


class _Decoders:
    """The threads; closing them drops what nobody waits for any more."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def start(self, chosen: Part, view: int, data_seed: int, smallest: float | None) -> list[Future[Tensor]]:
        images: Any = chosen.inputs
        if smallest is None:
            return [self._pool.submit(images.decode, row) for row in range(len(chosen))]
        bits = part_bits(Draws(data_seed, chosen.index, view))
        return [self._pool.submit(images.decode, row, bits[row], smallest) for row in range(len(chosen))]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _collected(chosen: Part, images: list[Future[Tensor]], device: torch.device) -> Part:
    """The decoded batch; on its way to a GPU from pinned memory, so that nobody waits for the copy."""
    pinned = device.type == "cuda"
    pixels = torch.empty(chosen.inputs.shape, dtype=torch.uint8, pin_memory=pinned)
    for place, image in zip(pixels, images, strict=True):
        place.copy_(image.result())
    tensors = (pixels, *(tensor.pin_memory() if pinned else tensor for tensor in (chosen.target, chosen.index)))
    inputs, target, index = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return Part(inputs, target, index, chosen.classes)


def encoded_part(store: Store, labels: np.ndarray, first: int, size: int, resize: int | None, in_memory: bool) -> Part:
    """All images of a store with their labels, [N]; positions begin at `first`. in_memory: decoded now, as they are seen in evaluation."""
    rows = torch.arange(len(labels))
    images = EncodedImages(store, rows, size, resize or round(size / 0.875))
    part = Part(images, torch.from_numpy(labels.astype(np.int64)), rows + first)
    if not in_memory:
        return part
    chosen = decoded_ahead(part, rows.split(_DECODED_AT_ONCE), 0, 0, None, torch.device("cpu"))
    return replace(part, inputs=torch.cat([some.pixels for some in chosen]))
