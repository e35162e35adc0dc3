"""Folders and tables of pictures as people have them: nothing is left out without a word, and pictures are shown upright."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from kdbench.data import decoding, pictures
from kdbench.data.decoding import Looked, check_decodable, not_shown
from kdbench.data.encoded import EncodedImages
from kdbench.data.image_folder import image_folder
from kdbench.data.parquet import parquet
from kdbench.data.pictures import turned
from kdbench.errors import UserError

SIZE = 16


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def stored(seed: int, format: str = "PNG", orientation: int | None = None) -> bytes:
    """A picture with the tag that says how a camera was held."""
    tags = Image.Exif()
    if orientation is not None:
        tags[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    picture(seed).save(buffer, format, exif=tags, quality=95)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for k in range(count):
                (tmp_path / "pets" / part / name / f"{k}.png").write_bytes(stored(10 * label + k))
    return tmp_path / "pets"


def put(folder: Path, name: str, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def images(source: Any) -> EncodedImages:
    assert isinstance(source.train.inputs, EncodedImages)
    return source.train.inputs


# --- what is read ----------------------------------------------------------------------------------------------------


def test_bitmaps_tiffs_and_folders_inside_a_class_are_read(folder: Path) -> None:
    for name, format in (
        ("a.bmp", "BMP"),
        ("b.TIF", "TIFF"),
        ("c.tiff", "TIFF"),
        ("d.ppm", "PPM"),
        ("e.jfif", "JPEG"),
        ("mon/0.png", "PNG"),
    ):
        put(folder / "train/dog", name, stored(50, format))
    source = image_folder(folder, SIZE)
    names = images(source).store.names  # type: ignore[attr-defined]
    assert names[3:] == tuple(
        f"dog/{name}" for name in ("0.png", "1.png", "2.png", "a.bmp", "b.TIF", "c.tiff", "d.ppm", "e.jfif", "mon/0.png")
    )
    assert source.train.target.tolist() == [0] * 3 + [1] * 9
    assert all(images(source).decode(row).shape == (3, SIZE, SIZE) for row in range(12))
    assert source.reading == (
        f"{folder}: read 12 images (1 .bmp, 1 .jfif, 7 .png, 1 .ppm, 1 .tif, 1 .tiff) to train on and 4 images (4 .png) to test on; "
        "nothing is left out"
    )


def test_what_is_left_out_is_counted_by_kind(folder: Path) -> None:
    for name in ("cat/notes.txt", "cat/x.heic", "dog/mon/y.HEIC", "dog/README", "dog/.DS_Store", "dog/.thumbnails/0.png", "list.csv"):
        put(folder / "train", name, b"x")
    (folder / "val/dog/round").symlink_to(folder / "val", target_is_directory=True)
    source = image_folder(folder, SIZE)
    assert len(source.train) == 6
    assert source.reading.partition("; ")[2] == (
        "left out: 2 .heic, 1 .txt, 2 hidden, 1 links to folders, or to nothing, 1 outside the class folders of train, 1 without a suffix"
    )


def test_what_lies_beside_the_folders_is_named_and_counted(folder: Path) -> None:
    before = image_folder(folder, SIZE, test="val")
    assert before.reading.endswith("; nothing is left out")
    (folder / "README.md").write_text("no picture")
    assert image_folder(folder, SIZE, test="val").reading.endswith("; nothing is left out")
    for name in ("test/cat/0.png", "more/0.png", "train/.extra/0.png", "train/.extra/1.png", ".cache/0.png", ".git/HEAD"):
        put(folder, name, stored(1))
    (folder / ".DS_Store").write_bytes(b"x")
    after = image_folder(folder, SIZE, test="val")
    assert after.reading.partition("; ")[2] == "left out: 2 folders beside train and val (more, test), 3 hidden"
    assert after.sha256 == before.sha256
    for name in ("a\nb/0.png", "b/0.png", "cover.PNG"):
        put(folder, name, stored(1))
    assert image_folder(folder, SIZE, test="val").reading.partition("; ")[2] == (
        "left out: 4 folders beside train and val (a\\nb, b, more, ...), 3 hidden, 1 images beside train and val"
    )


def test_a_link_to_a_folder_that_is_read_is_not_left_out(folder: Path) -> None:
    (folder / "val").rename(folder / "elsewhere")
    (folder / "val").symlink_to("elsewhere", target_is_directory=True)
    assert image_folder(folder, SIZE).reading.endswith("; nothing is left out")


def test_the_order_of_a_folder_without_folders_inside_is_that_of_the_names(folder: Path) -> None:
    for name in ("a b.png", "a.png", "a-.png", "A.png", "\u00e9.png"):
        put(folder / "train/cat", name, stored(1))
    names = [name.partition("/")[2] for name in images(image_folder(folder, SIZE)).store.names][:8]  # type: ignore[attr-defined]
    assert names == sorted(["0.png", "1.png", "2.png", "a b.png", "a.png", "a-.png", "A.png", "\u00e9.png"])


def test_a_file_name_that_is_not_utf8_is_read_and_named_legibly(folder: Path) -> None:
    odd = os.fsencode(folder / "train/cat") + b"/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write(stored(1))
    source = image_folder(folder, SIZE)
    assert len(source.train) == 7
    assert len(source.sha256) == 64
    with open(odd, "wb") as file:
        file.write(b"no picture")
    with pytest.raises(UserError) as caught:
        images(source).decode(3)
    assert f"{folder}/train/cat/caf\\xe9.png can't be decoded" in str(caught.value)
    str(caught.value).encode("utf-8")


def test_a_class_name_that_is_not_utf8_is_refused(folder: Path) -> None:
    for part in ("train", "val"):
        os.rename(os.fsencode(folder / part / "cat"), os.fsencode(folder / part) + b"/caf\xe9")
    with pytest.raises(
        UserError, match=r"the class folder .*train/caf\\xe9 holds control characters or bytes that are not UTF-8\. Rename"
    ) as caught:
        image_folder(folder, SIZE)
    str(caught.value).encode("utf-8")


# --- cameras that were held upright ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_tag_says(format: str, orientation: int) -> None:
    content = stored(3, format, orientation)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    shown = pictures.decoded(content, "x").permute(1, 2, 0).numpy()
    assert np.array_equal(shown, expected)
    assert shown.shape[:2] == ((24, 20) if orientation > 4 else (20, 24))
    assert turned(content) == (format != "TIFF" and orientation > 1)


def test_a_grey_picture_of_16_bits_is_turned_too() -> None:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    grey = np.arange(12, dtype=np.uint16).reshape(3, 4) << 8
    Image.fromarray(grey).save(buffer, "PNG", exif=tags)
    assert pictures.decoded(buffer.getvalue(), "x")[0].tolist() == np.rot90(grey >> 8, -1).tolist()


def test_a_tiff_is_not_counted_as_turned_whatever_it_holds() -> None:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation], tags[ExifTags.Base.ImageDescription] = 6, "with Exif"
    buffer = io.BytesIO()
    picture(3).save(buffer, "TIFF", exif=tags)
    assert b"Exif" in buffer.getvalue()
    assert not turned(buffer.getvalue())  # PIL turned it before kdbench did


@pytest.mark.parametrize("orientation", [0, 9, None])
def test_a_tag_that_says_nothing_turns_nothing(orientation: int | None) -> None:
    content = stored(3, "PNG", orientation)
    assert not turned(content)
    assert np.array_equal(pictures.decoded(content, "x").permute(1, 2, 0).numpy(), np.array(picture(3)))


def test_damaged_tags_turn_nothing_and_the_picture_is_still_shown() -> None:
    whole = stored(3, "JPEG", 6)
    broken = whole.replace(b"Exif\0\0MM\0*" if b"Exif\0\0MM" in whole else b"Exif\0\0II*\0", b"Exif\0\0XXXX", 1)
    assert broken != whole
    assert not turned(broken)
    assert pictures.decoded(broken, "x").shape == (3, 20, 24)


@pytest.mark.parametrize("content", [b"", b"Exif", b"\xff\xd8 Exif", stored(3, "JPEG", 6)[:40]])
def test_what_is_no_picture_is_not_turned(content: bytes) -> None:
    assert not turned(content)


def before_turning(images: EncodedImages) -> str:
    """The hash of images as it was when tags were not looked at."""
    digest = hashlib.sha256(f"{images.store.sha256()} {images.size} {images.resize}".encode())
    digest.update(images.rows.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(("orientation", "same"), [(None, True), (1, True), (6, False)])
def test_the_hash_of_data_changes_only_where_a_picture_is_turned(folder: Path, orientation: int | None, same: bool) -> None:
    put(folder / "train/cat", "0.jpg", stored(1, "JPEG", orientation))
    put(folder / "train/cat", "0.webp", stored(1, "WEBP", orientation))
    source = image_folder(folder, SIZE)
    assert (images(source).sha256() == before_turning(images(source))) == same
    assert source.test.inputs.sha256() == before_turning(source.test.inputs)  # type: ignore[arg-type, union-attr]
    assert source.reading.endswith("nothing is left out" if same else "nothing is left out; turned upright by their EXIF tag: 2")


def write(path: Path, labels: Any, orientation: int | None = None) -> Path:
    content = [stored(k, "JPEG", orientation if k == 1 else None) for k in range(len(labels))]
    pd.DataFrame({"image": content, "label": labels}).to_parquet(path)
    return path


@pytest.mark.parametrize("orientation", [None, 1, 8])
def test_pictures_in_parquet_are_turned(tmp_path: Path, orientation: int | None) -> None:
    train, test = (write(tmp_path / f"{name}.parquet", [0, 1, 0, 1], orientation) for name in ("train", "test"))
    source = parquet(train, test, size=20, resize=20)
    expected = picture(1).rotate(90, expand=True) if orientation == 8 else picture(1)
    mean = images(source).decode(1).float().mean((1, 2))
    whole = torch.from_numpy(np.array(expected)[2:22] if orientation == 8 else np.array(expected)[:, 2:22]).float().mean((0, 1))
    assert torch.allclose(mean, whole, atol=2)  # JPEG rounds
    assert (images(source).sha256() == before_turning(images(source))) == (orientation != 8)
    assert images(source).store.turned == (orientation == 8)


# --- broken pictures -------------------------------------------------------------------------------------------------


def test_broken_pictures_are_found_before_they_are_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_decodable(image_folder(folder, SIZE).test, "test")
    put(folder / "val/cat", "1.png", b"<html>404 not found</html>")
    with pytest.raises(UserError) as caught:
        check_decodable(image_folder(folder, SIZE).test, "test")
    assert str(caught.value) == (
        f"{folder}/val/cat/1.png can't be decoded as an image: it is none of AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP, "
        "or its header is damaged (test image)"
    )
    put(folder / "val/dog", "0.png", b"")
    put(folder / "val/dog", "1.png", stored(1)[:-100])  # cut off
    with pytest.raises(UserError, match=r"val/cat/1\.png .*; 3 of the 4 test images have such a problem"):
        check_decodable(image_folder(folder, SIZE).test, "test")
    monkeypatch.setattr(decoding, "DECODED_FIRST", 2)  # rows 0 and 2 are decoded, of the others the header is read
    with pytest.raises(UserError, match=r"; 2 of the 4 test images"):
        check_decodable(image_folder(folder, SIZE).test, "test")


def test_an_empty_file_is_called_empty(folder: Path) -> None:
    put(folder / "train/cat", "0.png", b"")
    with pytest.raises(UserError, match=r"train/cat/0\.png can't be decoded as an image: the file is empty"):
        check_decodable(image_folder(folder, SIZE).train, "training")


# --- modes -----------------------------------------------------------------------------------------------------------

GREY = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1300 + 7
Save = Callable[[], bytes]


def written(pixels: np.ndarray | Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, format, **options)
    return buffer.getvalue()


def tiff(bits: int, width: int, height: int, data: bytes, order: str = "<") -> bytes:
    """A TIFF of unsigned grey, as PIL does not write it: 12 bits, or the other order of bytes."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 0), (277, 1), (278, height), (279, len(data))]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, start if tag == 273 else value, 0) for tag, value in tags)
    return struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags)) + entries + bytes(4) + data


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which PIL does not write but for grey. pixels: uint16 [H, W, channels]."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">2I5B", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


INTEGERS = "Pillow reads its pixels as 32-bit integers, whose range is unknown"
FLOATS = "Pillow reads its pixels as floating-point numbers, whose range is unknown"
RANGELESS: dict[str, tuple[Save, str]] = {
    "integers": (lambda: written(GREY.astype(np.int32), "TIFF"), INTEGERS),
    "numbers": (lambda: written((GREY / 65535).astype(np.float32), "TIFF"), FLOATS),
    "a grey map of 16 bits": (lambda: b"P5 8 6 65535\n" + GREY.astype(">u2").tobytes(), INTEGERS),
    "a float map": (lambda: b"Pf 8 6 -1.0\n" + GREY.astype("<f4").tobytes(), FLOATS),
    "12 bits": (lambda: tiff(12, 8, 6, bytes(range(72))), "it has 12 bits a channel, which Pillow doesn't scale"),
}


@pytest.mark.parametrize("kind", RANGELESS)
def test_pixels_of_no_known_range_are_refused_from_the_header(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    save, reason = RANGELESS[kind]
    put(folder / "val/cat", "1.tif", save())
    (folder / "val/cat/1.png").unlink()
    for decoded in (2_000, 1):  # then of row 1 the header alone is read
        monkeypatch.setattr(decoding, "DECODED_FIRST", decoded)
        with pytest.raises(UserError) as caught:
            check_decodable(image_folder(folder, SIZE).test, "test")
        assert str(caught.value) == (
            f"{folder}/val/cat/1.tif can't be decoded as an image: {reason}. Save it as PNG with 8 or 16 bits a channel (test image)"
        )
    with pytest.raises(UserError, match=r"val/cat/1\.tif can't be decoded as an image: "):
        image_folder(folder, SIZE, in_memory=True)


def test_rows_of_parquet_of_no_known_range_are_refused(tmp_path: Path) -> None:
    train, test = (write(tmp_path / f"{name}.parquet", [0, 1]) for name in ("train", "test"))
    pd.DataFrame({"image": [stored(1), RANGELESS["numbers"][0]()], "label": [0, 1]}).to_parquet(test)
    with pytest.raises(UserError, match=rf"test\.parquet row 1 can't be decoded as an image: {FLOATS}\. Save it as PNG"):
        check_decodable(parquet(train, test, size=SIZE).test, "test")


HIGH = (GREY >> 8).astype(np.uint8)
COLOURS = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
OPAQUE = np.full_like(GREY, 65535)
SIXTEEN_BITS: dict[str, tuple[Save, np.ndarray]] = {
    "PNG": (lambda: written(GREY, "PNG"), HIGH),
    "TIFF": (lambda: written(GREY, "TIFF"), HIGH),
    "TIFF, big-endian": (lambda: tiff(16, 8, 6, GREY.astype(">u2").tobytes(), ">"), HIGH),
    "JPEG2000": (lambda: written(GREY, "JPEG2000", irreversible=False, num_resolutions=1), HIGH),
    "PNG with alpha": (lambda: png16(np.stack([GREY, OPAQUE], -1)), HIGH),
    "PNG in colours": (lambda: png16(COLOURS), COLOURS >> 8),
    "PNG in colours with alpha": (lambda: png16(np.dstack([COLOURS, OPAQUE])), COLOURS >> 8),
}


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_of_16_bits_a_channel_the_upper_8_are_shown(kind: str) -> None:
    save, high = SIXTEEN_BITS[kind]
    expected = np.broadcast_to(high[..., None], (6, 8, 3)) if high.ndim == 2 else high
    shown = pictures.decoded(save(), "x").permute(1, 2, 0).numpy()
    assert np.array_equal(shown, expected)


# --- what is not shown -----------------------------------------------------------------------------------------------


def alpha(mode: str, least: int) -> Image.Image:
    """A picture whose alpha is 255 but for one pixel."""
    made = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5).convert(mode)
    mask = np.full((6, 8), 255, np.uint8)
    mask[4, 3] = least
    made.putalpha(Image.fromarray(mask))
    return made


def palette(first: int) -> Image.Image:
    made = Image.fromarray(np.full((6, 8), first, np.uint8), "L").convert("P")
    made.putpixel((0, 0), 7)
    return made


TRANSPARENT: dict[str, tuple[Save, Save]] = {  # one with a pixel that is not opaque, one that has none
    "RGBA": (lambda: written(alpha("RGB", 254), "PNG"), lambda: written(alpha("RGB", 255), "PNG")),
    "LA": (lambda: written(alpha("L", 0), "PNG"), lambda: written(alpha("L", 255), "PNG")),
    "WebP": (lambda: written(alpha("RGB", 9), "WEBP", lossless=True), lambda: written(alpha("RGB", 255), "WEBP", lossless=True)),
    "TIFF": (lambda: written(alpha("RGB", 9), "TIFF"), lambda: written(alpha("RGB", 255), "TIFF")),
    "alphas of a palette": (
        lambda: written(palette(9), "PNG", transparency=bytes([255] * 7 + [99])),
        lambda: written(palette(9), "PNG", transparency=bytes([255] * 8 + [99])),
    ),
    "a colour of a palette": (lambda: written(palette(9), "GIF", transparency=9), lambda: written(palette(9), "GIF")),
    "a grey": (lambda: written(HIGH, "PNG", transparency=int(HIGH[2, 3])), lambda: written(HIGH, "PNG", transparency=1)),
    "a grey of 16 bits": (lambda: written(GREY, "PNG", transparency=int(GREY[2, 3])), lambda: written(GREY, "PNG", transparency=1)),
    "a colour": (
        lambda: written((COLOURS >> 8).astype(np.uint8), "PNG", transparency=tuple(map(int, COLOURS[1, 1] >> 8))),
        lambda: written((COLOURS >> 8).astype(np.uint8), "PNG", transparency=(1, 2, 3)),
    ),
}


@pytest.mark.parametrize("strip", [16, 2_000_000])
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_a_transparent_pixel_is_found_and_shown_as_before(kind: str, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_STRIP", strip)
    for content, transparent in zip((save() for save in TRANSPARENT[kind]), (True, False), strict=True):
        pixels, look = pictures.examined(content, "x", decode=True)
        assert look == pictures.Look(decoded=True, transparent=transparent)
        assert pixels is not None
        if "16" not in kind:
            assert np.array_equal(pixels.permute(1, 2, 0), Image.open(io.BytesIO(content)).convert("RGB"))
        assert torch.equal(pixels, pictures.decoded(content, "x"))


FRAMES = {
    "GIF": {},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "TIFF, packed": {"compression": "tiff_deflate"},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


def frames(kind: str, count: int) -> bytes:
    pictures = [Image.fromarray(np.full((16, 16, 3), shade, np.uint8)) for shade in (40, 200, 90)[:count]]
    return written(pictures[0], kind.partition(",")[0], save_all=True, append_images=pictures[1:], **FRAMES[kind])


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("kind", FRAMES)
def test_frames_after_the_first_are_found_and_not_shown(kind: str, decode: bool) -> None:
    for count in (1, 2, 3):
        pixels, look = pictures.examined(frames(kind, count), "x", decode)
        assert look == pictures.Look(decoded=decode, several_frames=count > 1)
        assert (pixels is not None) == decode
        if pixels is not None:
            assert (pixels.int() - 40).abs().max() <= 2


def test_previews_in_a_cameras_file_are_no_frames() -> None:
    shown = [picture(k) for k in range(2)]
    content = written(shown[0], "MPO", save_all=True, append_images=shown[1:])
    with Image.open(io.BytesIO(content)) as opened:
        assert getattr(opened, "n_frames", 1) == 2
    assert pictures.examined(content, "x", True)[1] == pictures.Look(decoded=True)


def test_a_second_frame_that_is_cut_off_is_no_problem() -> None:
    content = frames("GIF", 2)
    second = content.rindex(b"\x2c")  # where the second frame's description begins
    _, look = pictures.examined(content[: second + 3], "x", decode=True)
    assert (look.problem, look.decoded) == (None, True)


def test_what_is_not_shown_is_counted_by_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder / "val/cat", "0.png", written(alpha("RGB", 0), "PNG"))
    put(folder / "val/dog", "1.png", frames("GIF", 2))
    put(folder / "val/dog", "0.png", written(alpha("RGB", 0), "PNG"))
    source = image_folder(folder, SIZE)
    assert check_decodable(source.train, "training") == Looked(6, 6, 6, 0, 0)
    assert check_decodable(source.test, "test") == Looked(4, 4, 4, 2, 1)
    monkeypatch.setattr(decoding, "DECODED_FIRST", 2)  # rows 0 and 2
    assert check_decodable(source.test, "test") == Looked(4, 4, 2, 2, 1)
    put(folder / "val/dog", "1.png", written(alpha("RGB", 0), "PNG"))  # row 3, of which the header does not say it
    assert check_decodable(image_folder(folder, SIZE).test, "test") == Looked(4, 4, 2, 2, 0)


def test_one_line_says_what_is_not_shown() -> None:
    assert not_shown({"training": Looked(40, 40, 40, 0, 0), "test": Looked()}) == ""
    found = {
        "training": Looked(9_000, 256, 256, 4, 1),
        "validation": Looked(500, 500, 500, 0, 0),
        "test": Looked(5_000, 5_000, 1_667, 1_200, 3),
    }
    assert not_shown(found) == (
        "transparent pixels are shown as if they were opaque, in 4 of 256 training images looked at, 1,200 of 1,667 test images looked at; "
        "only the first of several frames is shown, in 1 of 256 training images looked at, 3 of 5,000 test images"
    )
    assert not_shown({"test": Looked(20, 20, 20, 0, 20)}) == "only the first of several frames is shown, in 20 of 20 test images"


@pytest.mark.parametrize("count", [1, 256, 257, 300, 5_000, 1_281_167])
def test_a_sample_is_spread_over_all_images_and_no_larger_than_256(count: int) -> None:
    rows = list(decoding._sampled(count))
    assert rows == sorted(set(rows))
    assert (rows[0], rows[-1], len(rows)) == (0, count - 1, min(count, 256))
    assert max(np.diff(rows), default=0) <= max(1, count / 15)


def test_a_sample_of_many_images_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder / "train/cat", "1.png", b"no picture")
    put(folder / "train/dog", "2.png", written(alpha("RGB", 0), "PNG"))
    monkeypatch.setattr(decoding, "_SAMPLED_RUNS", 2)
    monkeypatch.setattr(decoding, "_SAMPLED_RUN", 1)  # rows 0 and 5
    assert check_decodable(image_folder(folder, SIZE).train, "training", sample=True) == Looked(6, 2, 2, 1, 0)
    put(folder / "train/cat", "0.png", b"no picture")
    put(folder / "train/dog", "2.png", b"no picture")
    with pytest.raises(UserError, match=r"train/cat/0\.png .*; 2 of the 2 training images looked at have such a problem"):
        check_decodable(image_folder(folder, SIZE).train, "training", sample=True)


def test_of_images_in_memory_what_was_read_says_it(folder: Path, tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        put(folder / "val/cat", name, written(alpha("RGB", 0), "PNG"))
    source = image_folder(folder, SIZE, in_memory=True)
    said = "nothing is left out; transparent pixels are shown as if they were opaque, in 2 of 4 test images"
    assert source.reading.partition("; ")[2] == said
    assert check_decodable(source.test, "test") == Looked()
    train, test = write(tmp_path / "train.parquet", [0, 1]), tmp_path / "test.parquet"
    pd.DataFrame({"image": [stored(1), frames("GIF", 2)], "label": [0, 1]}).to_parquet(test)
    told = parquet(train, test, size=SIZE, in_memory=True).reading
    assert told.endswith(" 2 classes; only the first of several frames is shown, in 1 of 2 test images")
    assert check_decodable(parquet(train, test, size=SIZE).test, "test") == Looked(2, 2, 2, 0, 1)


# --- labels ----------------------------------------------------------------------------------------------------------


def tables(tmp_path: Path, labels: Any) -> dict[str, Path]:
    return {name: write(tmp_path / f"{name}.parquet", labels) for name in ("train", "test")}


def test_database_keys_are_no_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parquet(**tables(tmp_path, [1009, 5_000_000, 77]), size=SIZE)
    assert str(caught.value) == (
        f"data parquet: the labels of {tmp_path / 'train.parquet'} are 3 numbers up to 5000000, which would be 5000001 classes. "
        "If they are keys of a database, write them as text, or number them 0 .. 2"
    )


def test_a_few_of_the_thousand_classes_of_imagenet_are_labels(tmp_path: Path) -> None:
    source = parquet(**tables(tmp_path, [3, 999]), size=SIZE)
    assert source.num_classes == 1000
    assert source.reading == (
        "parquet: read 2 images of 1 files to train on and 2 images of 1 files to test on, 1000 classes; "
        "no image has the label 0, 1, 2, ..., and each network has an output for it: number the labels from 0, or write them as text"
    )


def test_labels_that_count_from_one_are_said_to_leave_class_0_empty(tmp_path: Path) -> None:
    source = parquet(**tables(tmp_path, [1, 2, 3]), size=SIZE)
    assert (source.num_classes, source.train.target.tolist()) == (4, [1, 2, 3])
    assert "; no image has the label 0, and each network has an output for it" in source.reading
    assert "no image" not in parquet(**tables(tmp_path, [0, 2, 1]), size=SIZE).reading


def test_a_categorical_of_pandas_holds_class_names(tmp_path: Path) -> None:
    source = parquet(**tables(tmp_path, pd.Categorical(["eel", "cat", "dog", "cat"], categories=["eel", "dog", "cat", "fox"])), size=SIZE)
    assert source.class_names == ("cat", "dog", "eel")
    assert source.train.target.tolist() == [2, 0, 1, 0]
    numbers = parquet(**tables(tmp_path, pd.Categorical([2, 0, 1])), size=SIZE)
    assert (numbers.num_classes, numbers.train.target.tolist()) == (3, [2, 0, 1])


def test_a_categorical_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"column 'label' of .* holds .*double.*; expected whole numbers or class names"):
        parquet(**tables(tmp_path, pd.Categorical([0.5, 1.5])), size=SIZE)


def test_files_beside_those_of_a_folder_of_parquet_are_counted(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("a.parquet", "b.parquet"):
        write(tmp_path / "train" / name, [0, 1])
    (tmp_path / "train/README.md").write_text("x")
    source = parquet(tmp_path / "train", write(tmp_path / "test.parquet", [0, 1]), size=SIZE)
    assert "read 4 images of 2 files (1 other files beside them are left out) to train on" in source.reading
    for name in ("old", "a", "b", "c"):
        (tmp_path / "train" / name).mkdir()
    (tmp_path / "train/b.parquet").unlink()
    source = parquet(tmp_path / "train", tmp_path / "test.parquet", size=SIZE)
    said = "read 2 images of 1 files (1 other files and 4 folders (a, b, c, ...) beside them are left out) to train on"
    assert f"{said} and 2 images of 1 files to test on" in source.reading
