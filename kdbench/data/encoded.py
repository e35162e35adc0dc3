"""Images that stay files until they are looked at: decoded ahead of the training by background threads, always in the same order.

`EncodedImages` stands where a `Part` otherwise holds a uint8 tensor. What it stands for, [N, 3, size, size], is too large to hold.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from kdbench.data.batch import Part
from kdbench.data.draws import Draws
from kdbench.data.resizing import part_bits, parts
from kdbench.errors import UserError, in_one_line

# Of ImageNet's training images: what pretrained networks were normalised with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_BATCHES_AHEAD = 2  # decoded before they are asked for
DECODED_FIRST = 2_000  # images of a part that `check_decodable` decodes
_SAMPLED_RUNS, _SAMPLED_RUN = 16, 16  # of a sample: images that follow each other lie in the same row groups of Parquet

# PIL knows forty formats more. Of one of them it hands the file to Ghostscript, and few have readers that many people use.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
LARGEST_IMAGE = 100_000_000  # bytes of a file, which is read whole
MOST_PIXELS = 100_000_000  # of one picture; decoding takes seven bytes a pixel
# A picture of one colour packs hundreds of pixels into a byte, a photograph of the poorest quality twenty.
PLAUSIBLE_PIXELS = 10_000_000  # up to here any number of pixels in a byte is plausible
PIXELS_PER_BYTE = 50
_STRIP = 2_000_000  # pixels
_STDERR = 2  # the descriptor, to which C libraries write
# PIL's modes whose conversion to bytes cuts off at 255, whatever the pixels' range is.
_RANGELESS = {"I": "32-bit integers", "F": "floating-point numbers"}

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
        return self.centre(image)

    def centre(self, image: Tensor) -> Tensor:
        """What evaluation sees of a decoded image, uint8 [3, H, W]: uint8 [3, size, size]."""
        from torchvision.transforms.v2 import functional as transforms

        centre: Tensor = transforms.center_crop(transforms.resize(image, [self.resize], antialias=True), [self.size, self.size])
        return centre


def _decoded(content: bytes, name: str) -> Tensor:
    """uint8 [3, H, W] of a picture in one of FORMATS, turned upright where its EXIF tag says how; of an animation the first."""
    try:
        with _opened(content) as picture:
            picture.load()
            return _upright_pixels(picture)
    except Exception as error:  # whatever PIL raises for a damaged file: KeyError, ZeroDivisionError, struct.error, ...
        raise _undecodable(content, name, error) from error


def _upright_pixels(picture: Image.Image) -> Tensor:
    """uint8 [3, H, W] of a picture that is loaded."""
    turn = _TURNS.get(_orientation(picture))
    upright = picture if turn is None else picture.transpose(turn)
    if upright.mode.startswith("I;16"):  # which PIL's conversion would cut off at 255
        grey = (np.asarray(upright) >> 8).astype(np.uint8)
        return torch.from_numpy(grey).expand(3, -1, -1)
    return torch.from_numpy(_pixels(upright)).permute(2, 0, 1)


def _pixels(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]. A large picture is copied strip by strip: as a whole, PIL makes two copies more of it."""
    width, height = picture.size
    pixels = np.empty((height, width, 3), np.uint8)
    for top, strip in _strips(picture):
        pixels[top : top + strip.height] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return pixels


def _strips(picture: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Strips of a picture from top to bottom, each with its first row."""
    width, height = picture.size
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        yield top, picture if rows >= height else picture.crop((0, top, width, min(top + rows, height)))


class _Refused(Exception):
    """A picture that is not decoded, though it may be sound: it has too many pixels, or pixels of no known range. The message says why."""


def _opened(content: bytes) -> Image.Image:
    """A picture whose header is read, and whose pixels are not. Raises _Refused, and whatever PIL raises for a damaged file."""
    most = min(MOST_PIXELS, max(PLAUSIBLE_PIXELS, PIXELS_PER_BYTE * len(content)))
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:  # from 179 million pixels on
        raise _Refused(f"it has more than {most:,} pixels. Make it smaller") from None
    width, height = picture.size
    rangeless = _rangeless(picture)
    if width * height <= most and rangeless is None:
        return picture
    picture.close()
    if rangeless is not None:
        raise _Refused(f"{rangeless}. Save it as PNG with 8 or 16 bits a channel")
    if width * height <= MOST_PIXELS:
        raise _Refused(f"{width} x {height} pixels in {len(content):,} bytes are implausible. Make it smaller")
    raise _Refused(f"it has {width} x {height} pixels, expected at most {MOST_PIXELS:,}. Make it smaller")


def _rangeless(picture: Image.Image) -> str | None:
    """Why the pixels of a picture can't be scaled to bytes; None if they can."""
    if kind := _RANGELESS.get(picture.mode):
        return f"Pillow reads its pixels as {kind}, whose range is unknown"
    if isinstance(picture, TiffImagePlugin.TiffImageFile) and 12 in picture.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, ()):
        return "it has 12 bits a channel, which Pillow doesn't scale"  # it reads them into 16 bits, as a picture that is almost black
    return None


def _undecodable(content: bytes, name: str, error: Exception) -> UserError:
    reason = in_one_line(error)
    if isinstance(error, UnidentifiedImageError):  # whose own message has an address in memory
        reason = f"it is none of {', '.join(FORMATS)}, or its header is damaged" if content else "the file is empty"
    elif isinstance(error, _Refused):
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


@dataclass(frozen=True)
class _Look:
    """What a look at one image finds. problem: why it can't be decoded. transparent is known only if it is decoded."""

    problem: str | None = None
    decoded: bool = False
    transparent: bool = False
    several_frames: bool = False


@dataclass(frozen=True)
class Looked:
    """How many images of a part were looked at and decoded, and how many of them have something that is not shown."""

    images: int = 0  # in the part
    seen: int = 0
    decoded: int = 0
    transparent: int = 0  # of those that were decoded
    several_frames: int = 0  # of those that were seen


def _counted(looks: Sequence[_Look], images: int) -> Looked:
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
    images = part.inputs
    if isinstance(images, Tensor):
        return Looked()
    rows = _sampled(len(images)) if sample else range(len(images))
    every = -(-len(rows) // DECODED_FIRST)

    def look(place: int) -> _Look:
        where = int(images.rows[rows[place]])
        try:
            return _examined(images.store.read(where), images.store.name(where), decode=place % every == 0)[1]
        except UserError as error:
            return _Look(str(error))  # the error itself would keep the image's bytes

    with _without_libtiff(), ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode") as pool:
        looks = list(pool.map(look, range(len(rows))))
    problems = [found.problem for found in looks if found.problem is not None]
    if problems:
        seen = " looked at" if len(rows) < len(images) else ""
        many = f"; {len(problems)} of the {len(rows)} {what} images{seen} have such a problem"
        raise UserError(f"{problems[0]}{many if len(problems) > 1 else f' ({what} image)'}")
    return _counted(looks, len(images))


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


def _examined(content: bytes, name: str, decode: bool) -> tuple[Tensor | None, _Look]:
    """Read the header of a picture, and its pixels too, uint8 [3, H, W], if `decode` is set. Raises UserError as `_decoded` does."""
    try:
        with _opened(content) as picture:
            pixels, transparent, several = None, False, False
            if decode:
                picture.load()
                pixels = _upright_pixels(picture)
            with suppress(Exception):  # what is not shown may be damaged
                transparent = decode and _is_transparent(picture)
                # Of several pictures in a camera's file, MPO, the others are previews.
                several = picture.format != "MPO" and bool(getattr(picture, "is_animated", False))
            return pixels, _Look(None, decode, transparent, several)
    except Exception as error:  # as in `_decoded`
        raise _undecodable(content, name, error) from error


def _is_transparent(picture: Image.Image) -> bool:
    """Whether a pixel of a picture that is loaded is not opaque."""
    if not picture.has_transparency_data:
        return False
    if picture.mode.startswith("I;16"):  # which PIL can't convert: one of its greys is transparent
        return bool((np.asarray(picture) == picture.info["transparency"]).any())
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        return _least(picture.getchannel(len(picture.getbands()) - 1)) < 255
    return any(_least(strip.convert("RGBA").getchannel("A")) < 255 for _, strip in _strips(picture))


def _least(channel: Image.Image) -> float:
    lowest, _ = channel.getextrema()
    assert isinstance(lowest, int | float)  # and no pair, which a picture of several channels has
    return lowest


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
    images: Any = part.inputs
    pixels = torch.empty(images.shape, dtype=torch.uint8)

    def decode(row: int) -> _Look:
        where = int(images.rows[row])
        image, look = _examined(images.store.read(where), images.store.name(where), decode=True)
        pixels[row] = images.centre(image)
        return look

    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode") as pool:
        looks = list(pool.map(decode, range(len(part))))
    return replace(part, inputs=pixels), _counted(looks, len(part))
