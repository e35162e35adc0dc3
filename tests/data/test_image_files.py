"""Folders and tables of pictures as people have them: nothing is left out without a word, and pictures are shown upright."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from kdbench.data import encoded
from kdbench.data.encoded import EncodedImages, check_decodable, turned
from kdbench.data.image_folder import image_folder
from kdbench.data.parquet import parquet
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
    shown = encoded._decoded(content, "x").permute(1, 2, 0).numpy()
    assert np.array_equal(shown, expected)
    assert shown.shape[:2] == ((24, 20) if orientation > 4 else (20, 24))
    assert turned(content) == (format != "TIFF" and orientation > 1)


def test_a_grey_picture_of_16_bits_is_turned_too() -> None:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    grey = np.arange(12, dtype=np.uint16).reshape(3, 4) << 8
    Image.fromarray(grey).save(buffer, "PNG", exif=tags)
    assert encoded._decoded(buffer.getvalue(), "x")[0].tolist() == np.rot90(grey >> 8, -1).tolist()


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
    assert np.array_equal(encoded._decoded(content, "x").permute(1, 2, 0).numpy(), np.array(picture(3)))


def test_damaged_tags_turn_nothing_and_the_picture_is_still_shown() -> None:
    whole = stored(3, "JPEG", 6)
    broken = whole.replace(b"Exif\0\0MM\0*" if b"Exif\0\0MM" in whole else b"Exif\0\0II*\0", b"Exif\0\0XXXX", 1)
    assert broken != whole
    assert not turned(broken)
    assert encoded._decoded(broken, "x").shape == (3, 20, 24)


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
    monkeypatch.setattr(encoded, "DECODED_FIRST", 2)  # rows 0 and 2 are decoded, of the others the header is read
    with pytest.raises(UserError, match=r"; 2 of the 4 test images"):
        check_decodable(image_folder(folder, SIZE).test, "test")


def test_an_empty_file_is_called_empty(folder: Path) -> None:
    put(folder / "train/cat", "0.png", b"")
    with pytest.raises(UserError, match=r"train/cat/0\.png can't be decoded as an image: the file is empty"):
        check_decodable(image_folder(folder, SIZE).train, "training")


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
