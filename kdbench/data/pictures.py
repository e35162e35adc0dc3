"""One picture in a file: which formats and sizes are read, how it is decoded, which way up it is shown."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from kdbench.bounded import ImplausibleFile, open_regular
from kdbench.errors import UserError, in_one_line

# PIL knows forty formats more. Of one of them it hands the file to Ghostscript, and few have readers that many people use.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
LARGEST_IMAGE = 100_000_000  # bytes of a file, which is read whole
MOST_PIXELS = 100_000_000  # of one picture; decoding takes seven bytes a pixel
# A picture of one colour packs hundreds of pixels into a byte, a photograph of the poorest quality twenty.
PLAUSIBLE_PIXELS = 10_000_000  # up to here any number of pixels in a byte is plausible
PIXELS_PER_BYTE = 50
LABEL_PIXELS_PER_BYTE = 1_000  # large areas of one label pack well
_STRIP = 2_000_000  # pixels
# PIL's modes whose conversion to bytes cuts off at 255, whatever the pixels' range is.
_RANGELESS = {"I": "32-bit integers", "F": "floating-point numbers"}

_PNG = b"\x89PNG\r\n\x1a\n"
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
_SIDEWAYS = tuple(_TURNS[tag] for tag in (5, 6, 7, 8))  # those that exchange height and width
# Of labels per pixel: formats that keep each pixel's number.
LABEL_FORMATS = ("BMP", "GIF", "PNG", "PPM", "TIFF")
_NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # PIL's modes of one whole number a pixel
_LARGEST_NUMBER = 65_535


def decoded(content: bytes, name: str, size: tuple[int, int] | None = None) -> Tensor:
    """uint8 [3, H, W] of a picture in one of FORMATS, turned upright where its EXIF tag says how; of an animation the first.

    size: height and width according to an annotation. The picture is then turned only if that is what gives it this size, since annotations
    are made on the stored pixels or on the turned ones. Raises UserError, naming the picture, where neither has this size.
    """
    try:
        with _opened(content) as picture:
            picture.load()
            return _upright_pixels(picture, size)
    except Exception as error:  # whatever PIL raises for a damaged file: KeyError, ZeroDivisionError, struct.error, ...
        raise _undecodable(not content, name, error) from error


def cut_out(content: bytes, name: str) -> Image.Image | None:
    """A picture with its transparency, as RGBA; None for one that has no alpha. Raises UserError as `decoded` does.

    RGBA, grey with alpha, and a palette or a colour that is transparent are all read so.
    """
    try:
        with _opened(content) as picture:
            picture.load()
            return picture.convert("RGBA") if picture.has_transparency_data else None
    except Exception as error:  # as in `decoded`
        raise _undecodable(not content, name, error) from error


def _turn(picture: Image.Image, size: tuple[int, int] | None) -> Image.Transpose | None:
    """What turns a picture that is loaded upright, None for one that is shown as it is. PIL itself turns a TIFF when it loads it."""
    turn = _TURNS.get(_orientation(picture))
    stored = (picture.height, picture.width)
    if size is None:
        return turn
    if stored == size:
        return None
    if turn in _SIDEWAYS and stored == size[::-1]:
        return turn
    raise _OtherSize(
        f"has {picture.width} x {picture.height} pixels, and its annotation or mask {size[1]} x {size[0]}; "
        "mend one of the two, or leave the picture out"
    )


def _upright_pixels(picture: Image.Image, size: tuple[int, int] | None) -> Tensor:
    """uint8 [3, H, W] of a picture that is loaded. size: as of `decoded`."""
    turn = _turn(picture, size)
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


class _OtherSize(Exception):
    """A sound picture of another size than its annotation says. The message says which."""


def _opened(content: bytes) -> Image.Image:
    """A picture whose header is read, and whose pixels are not. Raises _Refused, and whatever PIL raises for a damaged file."""
    picture = _plausible(io.BytesIO(content), len(content), FORMATS, PIXELS_PER_BYTE)
    if (rangeless := _rangeless(picture)) is not None:
        picture.close()
        raise _Refused(f"{rangeless}. Save it as PNG with 8 or 16 bits a channel")
    return picture


def _plausible(file: BinaryIO, nbytes: int, formats: tuple[str, ...], density: int) -> Image.Image:
    """A picture with no more pixels than a file of so many bytes may have, `density` a byte. Raises what `_opened` raises."""
    most = min(MOST_PIXELS, max(PLAUSIBLE_PIXELS, density * nbytes))
    try:
        picture = Image.open(file, formats=formats)
    except Image.DecompressionBombError:  # from 179 million pixels on
        raise _Refused(f"it has more than {most:,} pixels. Make it smaller") from None
    width, height = picture.size
    if width * height <= most:
        return picture
    picture.close()
    if width * height <= MOST_PIXELS:
        raise _Refused(f"{width} x {height} pixels in {nbytes:,} bytes are implausible. Make it smaller")
    raise _Refused(f"it has {width} x {height} pixels, expected at most {MOST_PIXELS:,}. Make it smaller")


def _rangeless(picture: Image.Image) -> str | None:
    """Why the pixels of a picture can't be scaled to bytes; None if they can."""
    if kind := _RANGELESS.get(picture.mode):
        return f"Pillow reads its pixels as {kind}, whose range is unknown"
    if isinstance(picture, TiffImagePlugin.TiffImageFile) and 12 in picture.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, ()):
        return "it has 12 bits a channel, which Pillow doesn't scale"  # it reads them into 16 bits, as a picture that is almost black
    return None


def _undecodable(empty: bool, name: str, error: Exception, formats: Sequence[str] = FORMATS) -> UserError:
    reason = in_one_line(error)
    if isinstance(error, UnidentifiedImageError):  # whose own message has an address in memory
        reason = "the file is empty" if empty else f"it is none of {', '.join(formats)}, or its header is damaged"
    elif isinstance(error, _OtherSize):
        return UserError(f"{name} {error}")
    elif isinstance(error, _Refused):
        reason = str(error)
    return UserError(f"{name} can't be decoded as an image: {reason}")


def numbers(content: bytes, name: str) -> NDArray[Any]:
    """A label file's pixels as they are stored: numbers, uint8 or uint16 [H, W], palette indices too; or colours, uint8 [H, W, 3].

    No EXIF tag is looked at. Raises UserError, naming the file, where it can't be decoded, or has a number below 0 or above 65,535.
    """
    try:
        with _plausible(io.BytesIO(content), len(content), LABEL_FORMATS, LABEL_PIXELS_PER_BYTE) as picture:
            # Bytes 24 and 25 of a PNG are the bits of a pixel and its kind, 0 for grey.
            if content.startswith(_PNG) and content[24] in (2, 4) and content[25] == 0:
                raise _Refused(f"its pixels are grey of {content[24]} bits, which Pillow scales. Save it with 8 bits")
            picture.load()
            if picture.mode not in _NUMBERS:
                if picture.mode not in ("RGB", "RGBA"):
                    raise _Refused(f"its pixels are of mode {picture.mode}; labels must be whole numbers, palette indices or colours")
                return np.asarray(picture)[..., :3]
            pixels = np.asarray(picture)
    except Exception as error:  # as in `decoded`
        raise _undecodable(not content, name, error, LABEL_FORMATS) from error
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.size and (pixels.min() < 0 or pixels.max() > _LARGEST_NUMBER):
        raise UserError(f"{name} has pixels of {pixels.min()} .. {pixels.max()}; labels must be 0 .. {_LARGEST_NUMBER:,}")
    return pixels.astype(np.uint8 if picture.mode == "1" else np.uint16)


def size_in_header(path: Path, name: str, of_labels: bool = False) -> tuple[int, int]:
    """Height and width of the picture in a file as it is shown, or of a label file as `numbers` gives it; the pixels are not read.

    Raises UserError, naming the file, where it can't be read or is no picture.
    """
    formats, density = (LABEL_FORMATS, LABEL_PIXELS_PER_BYTE) if of_labels else (FORMATS, PIXELS_PER_BYTE)
    nbytes = 0
    try:
        with open_regular(path) as file:
            nbytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            with _plausible(file, nbytes, formats, density) as picture:
                height, width = picture.height, picture.width
                return (width, height) if not of_labels and _TURNS.get(_orientation(picture)) in _SIDEWAYS else (height, width)
    except (FileNotFoundError, PermissionError, ImplausibleFile) as error:
        raise UserError(f"{name} can't be read: {error.strerror or error}") from error
    except Exception as error:  # as in `decoded`
        raise _undecodable(nbytes == 0, name, error, formats) from error


def turned(content: bytes) -> bool:
    """Whether a picture is shown turned, by the EXIF tag that cameras write. Of a JPEG, what stands before the pixels is enough.

    False for a TIFF, which PIL itself has always turned, and for what is no picture.
    """
    if content.startswith(_TIFF) or not any(mark in content for mark in _EXIF):  # a search takes a hundredth of what PIL takes
        return False
    try:
        with _opened(content) as picture:
            return _orientation(picture) in _TURNS
    except Exception:  # as in `decoded`, which says what is wrong with it
        return False


def _orientation(picture: Image.Image) -> int:
    """The EXIF tag of a picture; 1, upright, where it has none."""
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever PIL raises for tags that are damaged: the pixels are not
        return 1


@dataclass(frozen=True)
class Look:
    """What a look at one image finds. problem: why it can't be decoded. transparent is known only if it is decoded."""

    problem: str | None = None
    decoded: bool = False
    transparent: bool = False
    several_frames: bool = False


def examined(content: bytes, name: str, decode: bool, size: tuple[int, int] | None = None) -> tuple[Tensor | None, Look]:
    """Read the header of a picture, and its pixels too, uint8 [3, H, W], if `decode` is set. Raises UserError as `decoded` does."""
    try:
        with _opened(content) as picture:
            pixels, transparent, several = None, False, False
            if decode:
                picture.load()
                pixels = _upright_pixels(picture, size)
            with suppress(Exception):  # what is not shown may be damaged
                transparent = decode and _is_transparent(picture)
                # Of several pictures in a camera's file, MPO, the others are previews.
                several = picture.format != "MPO" and bool(getattr(picture, "is_animated", False))
            return pixels, Look(None, decode, transparent, several)
    except Exception as error:  # as in `decoded`
        raise _undecodable(not content, name, error) from error


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
