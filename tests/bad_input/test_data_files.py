"""Data sets that somebody else may have written: each is refused in one line, before it takes the memory, and before anything is made."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kdbench.data import cifar, fashion_mnist, sources
from kdbench.data.pictures import MOST_PIXELS
from kdbench.tasks import build as tasks
from tests.bad_input.measured import measured
from tests.bad_input.tiny_experiment import TINIER, assert_one_line, run, write
from tests.console import Kdbench

MOST_MEGABYTES = 300
DRY, REAL = ("run", "tiny.yaml", "--dry-run"), ("run", "tiny.yaml", "--results", "results", "--no-mlflow")
SMALL = {**TINIER, "teacher": None, "methods": ["none"], "recipe.batch_size": 4}


@pytest.fixture(autouse=True)
def nothing_kept_open() -> None:
    """Data sets are opened anew: the tests call different ones by the same relative path."""
    sources._opened.cache_clear()
    tasks._built.cache_clear()


def check(cases: dict[str, tuple[Callable[[], object], str]], task: dict[str, Any], tmp_path: Path) -> None:
    """Make each case in a folder of its own and read it by a dry run and by a run.

    Each must end with exit code 2 in one line that holds what is given beside it, and leave no results folder.
    """
    folders = []
    for number, (make, _) in enumerate(cases.values()):
        folders.append(tmp_path / f"case{number}")
        folders[-1].mkdir()
        os.chdir(folders[-1])
        write({**SMALL, "task": task})
        make()
    os.chdir(tmp_path)
    wrong = []
    for (name, (_, said)), folder, ends in zip(cases.items(), folders, measured(folders, [DRY, REAL]), strict=True):
        for ended in ends:
            one_line = len(ended.err.splitlines()) == 1 and ended.err.startswith("kdbench: ") and said in ended.err
            if ended.code != 2 or not one_line or ended.megabytes > MOST_MEGABYTES or (folder / "results").exists():
                wrong.append((name, ended))
    assert wrong == []


# --- pictures --------------------------------------------------------------------------------------------------------


def pixels(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def flat_png(width: int, height: int, *chunks: bytes, depth: int = 8) -> bytes:
    """A grey picture of one colour, of any size, made without the memory for it."""
    packer = zlib.compressobj(9)
    row = bytes(1 + -(-width * depth // 8))
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff_with(tag: int, kind: int, count: int, value: int) -> bytes:
    """A small TIFF of which one tag is something else."""
    content = bytearray(encoded(pixels(), "TIFF"))
    (first,) = struct.unpack_from("<I", content, 4)
    (tags,) = struct.unpack_from("<H", content, first)
    (place,) = [p for p in range(first + 2, first + 2 + 12 * tags, 12) if struct.unpack_from("<H", content, p)[0] == tag]
    struct.pack_into("<HHII", content, place, tag, kind, count, value)
    return bytes(content)


def torn_tiff() -> bytes:
    """A TIFF whose compressed pixels are damaged, of which the C library complains on the terminal."""
    content = bytearray(encoded(pixels(), "TIFF", compression="tiff_lzw"))
    content[12:40] = b"\xaa" * 28
    return bytes(content)


GIF_SCREEN = struct.pack("<6sHHBBB", b"GIF89a", 60_000, 60_000, 0, 0, 0)
NO_PICTURE = "it is none of AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP, or its header is damaged"

PICTURES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "900 million pixels": ("x.png", lambda: flat_png(30_000, 30_000, depth=1), "it has more than 10,000,000 pixels. Make it smaller"),
    "144 million pixels": ("x.png", lambda: flat_png(12_000, 12_000, depth=1), f"12000 x 12000 pixels, expected at most {MOST_PIXELS:,}"),
    "81 million pixels of one colour": ("x.png", lambda: flat_png(9_000, 9_000), "9000 x 9000 pixels in "),
    "a JPEG of one colour": ("x.jpg", lambda: encoded(Image.new("L", (9_000, 9_000)), "JPEG"), "9000 x 9000 pixels in "),
    "a WebP of one colour": ("x.webp", lambda: encoded(Image.new("L", (9_000, 9_000)), "WEBP"), "9000 x 9000 pixels in "),
    "a screen of a GIF": ("x.gif", lambda: GIF_SCREEN + bytes(20), "can't be decoded"),
    "a header of a PPM": ("x.ppm", lambda: b"P6 60000 60000 255\n" + bytes(1000), "it has more than 10,000,000 pixels"),
    "text of 100 MB": ("x.png", lambda: flat_png(16, 16, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8), 9))), "MAX_TEXT_CHUNK"),
    "a profile of 100 MB": ("x.png", lambda: flat_png(16, 16, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**8), 9))), "MAX_TEXT_CHUNK"),
    "PostScript": ("x.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", NO_PICTURE),
    "a Photoshop file": ("x.png", lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 16, 16, 8, 3) + bytes(1000), NO_PICTURE),
    "a TIFF 2 billion pixels wide": ("x.tif", lambda: tiff_with(256, 4, 1, 2**31), "it has more than 10,000,000 pixels"),
    "a TIFF whose width is a list": ("x.tif", lambda: tiff_with(256, 4, 2**30, 8), NO_PICTURE),
    "a TIFF whose width is text": ("x.tif", lambda: tiff_with(256, 2, 4, 0x41414141), "can't be decoded"),
    "a TIFF of 60,000 channels": ("x.tif", lambda: tiff_with(277, 3, 1, 60_000), NO_PICTURE),
    "a TIFF of 2^28 strips": ("x.tif", lambda: tiff_with(273, 4, 2**28, 8), "can't be decoded"),
    "a torn TIFF": ("x.tif", torn_tiff, "can't be decoded"),
    "an empty file": ("two\nlines.png", bytes, "two\\nlines.png can't be decoded as an image: the file is empty"),
}


def folders_of_pictures() -> None:
    for part in ("train", "val"):
        for name in ("a", "b"):
            Path("pictures", part, name).mkdir(parents=True)
            for number in range(4):
                (Path("pictures", part, name) / f"{number}.png").write_bytes(encoded(pixels(number), "PNG"))


FOLDER = {"name": "classification", "data": {"name": "image_folder", "path": "pictures", "size": 16}, "val_size": 2}


@pytest.mark.slow
def test_pictures_that_take_the_machine_or_are_none_are_refused(tmp_path: Path) -> None:
    def put(name: str, content: Callable[[], bytes]) -> Callable[[], object]:
        def made() -> None:
            folders_of_pictures()
            Path("pictures/train/a", name).write_bytes(content())

        return made

    cases = {case: (put(name, content), said) for case, (name, content, said) in PICTURES.items()}
    check(cases, FOLDER, tmp_path)


def frames(format: str) -> bytes:
    more = [pixels(seed).convert("P") for seed in range(1, 1_000)]
    return encoded(pixels().convert("P"), format, save_all=True, append_images=more)


def damaged_tags(format: str) -> bytes:
    return encoded(pixels(), format, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(256)) * 4)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "tags.jpg", "tags.png"])
def test_the_first_of_many_frames_is_read_and_damaged_tags_are_passed_over_without_a_word(kdbench: Kdbench, name: str) -> None:
    folders_of_pictures()
    kind = {".gif": "GIF", ".png": "PNG", ".jpg": "JPEG"}[Path(name).suffix]
    Path("pictures/train/a", name).write_bytes(damaged_tags(kind) if name.startswith("tags") else frames(kind))
    ended = kdbench("run", write({**SMALL, "task": FOLDER}), "--dry-run")
    assert (ended.code, ended.err) == (0, "")


# --- folders ---------------------------------------------------------------------------------------------------------


def deep() -> None:
    home = Path.cwd()
    folders_of_pictures()
    os.chdir("pictures/train/a")
    for _ in range(1_200):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(home)


def hole() -> None:
    folders_of_pictures()
    with open("pictures/train/a/hole.png", "wb") as file:
        file.truncate(50_000_000_000)


def odd_class() -> None:
    folders_of_pictures()
    for part in ("train", "val"):
        Path("pictures", part, "a").rename(Path("pictures", part, "two\nlines"))


def test_folders_that_take_the_machine_are_refused(tmp_path: Path) -> None:
    cases: dict[str, tuple[Callable[[], object], str]] = {
        "nested": (deep, "is nested more than 50 levels deep. Move its images up"),
        "a hole": (hole, "pictures/train/a/hole.png has 50,000 MB, expected at most 100 MB for an image"),
        "a class on two lines": (odd_class, "pictures/train/two\\nlines holds control characters"),
        "nowhere": (lambda: None, "there is no folder pictures"),
    }
    try:
        check(cases, FOLDER, tmp_path)
    finally:
        _remove_deep(tmp_path / "case0/pictures/train/a")


def _remove_deep(folder: Path) -> None:
    """pytest can't remove it by its path."""
    while (folder / "d").exists():
        (folder / "d").rename(folder.parent / "below")
        shutil.rmtree(folder)
        (folder.parent / "below").rename(folder)


def test_pipes_and_circles_of_links_are_left_out_and_counted(kdbench: Kdbench) -> None:
    folders_of_pictures()
    os.mkfifo("pictures/train/a/pipe.png")
    os.mkfifo("pictures/train/pipe")
    os.symlink("round.png", "pictures/train/a/round.png")
    os.symlink("..", "pictures/train/a/up")
    os.symlink("there", "pictures/val/here")
    os.symlink("here", "pictures/val/there")
    ended = kdbench("run", write({**SMALL, "task": FOLDER}), "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    words = " ".join(ended.out.split())
    left_out = "2 links to folders, or to nothing, 1 outside the class folders of train, 2 outside the class folders of val"
    assert f"left out: {left_out}, 1 pipes, sockets or devices" in words


def test_a_path_on_two_lines_is_named_on_one(kdbench: Kdbench) -> None:
    for data in ({"name": "image_folder", "path": "no\nwhere"}, {"name": "parquet", "train": "no\nwhere", "test": "x"}):
        assert_one_line(run(kdbench, {**SMALL, "task.data": data}), 2, "no\\nwhere")
    Path("two\nlines.yaml").write_text("name: [")
    assert_one_line(kdbench("run", "two\nlines.yaml"), 2, "two\\nlines.yaml: line 1, column 8: not valid YAML")


# --- Parquet ---------------------------------------------------------------------------------------------------------

PICTURE = encoded(pixels(), "PNG")


def table(images: Any = None, labels: Any = None, **options: Any) -> None:
    """train.parquet with something wrong, and a sound test.parquet."""
    sound = {"image": pa.array([PICTURE] * 8, pa.binary()), "label": pa.array([0, 1] * 4)}
    pq.write_table(pa.table(sound), "test.parquet")
    found = {name: sound[name] if values is None else values for name, values in (("image", images), ("label", labels))}
    pq.write_table(pa.table(found), "train.parquet", store_schema=False, **options)


def repeated(value: bytes | str, rows: int) -> pa.DictionaryArray:
    """A column of one value, which Parquet holds once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))


def torn() -> None:
    table()
    content = Path("train.parquet").read_bytes()
    Path("train.parquet").write_bytes(content[:200] + content[600:])


def lying() -> None:
    """Eight rows, of which the file says that they are 63."""
    table()
    content = bytearray(Path("train.parquet").read_bytes())
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[start:] = content[start:].replace(b"\x16\x10", b"\x16\x7e")  # a field of 64 bits, 8 as a zigzag varint
    Path("train.parquet").write_bytes(content)


def large_footer() -> None:
    table()
    with open("train.parquet", "wb") as file:
        file.write(b"PAR1")
        file.truncate(2_000_000_000)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<I", 1_900_000_000) + b"PAR1")


def pipe() -> None:
    table()
    os.remove("train.parquet")
    os.mkfifo("train.parquet")


def nested() -> pa.Array:
    array: pa.Array = pa.array([PICTURE] * 8)
    for _ in range(200):
        array = pa.StructArray.from_arrays([array], ["bytes"])
    return array


TABLE = {"name": "classification", "data": {"name": "parquet", "train": "train.parquet", "test": "test.parquet", "size": 16}, "val_size": 2}


@pytest.mark.slow
def test_tables_that_take_the_machine_or_are_none_are_refused(tmp_path: Path) -> None:
    def of(images: Callable[[], Any] | None = None, labels: Callable[[], Any] | None = None) -> Callable[[], object]:
        return lambda: table(images and images(), labels and labels(), compression="zstd")

    million = 1_000_000
    cases: dict[str, tuple[Callable[[], object], str]] = {
        "60 MB in 2 kB": (of(lambda: repeated(bytes(60 * million), 8)), "declares in row group 0 images of 60,000,"),
        "7 MB, 100,000 times": (
            of(lambda: repeated(bytes(7 * million), 100_000), lambda: pa.array([0, 1] * 50_000)),
            "train.parquet row ",
        ),
        "20 million rows": (
            of(lambda: repeated(PICTURE, 20 * million), lambda: pa.array(np.zeros(20 * million, np.int8))),
            "declares 20,000,000 rows in ",
        ),
        "other numbers of rows": (lying, "train.parquet declares 63 rows, and has 8 labels"),
        "structures in structures": (of(nested), "column 'image' of train.parquet holds struct<bytes: struct<"),
        "lists": (of(lambda: pa.array([[PICTURE]] * 8)), "column 'image' of train.parquet holds list"),
        "no bytes": (of(lambda: pa.array([b""] + [PICTURE] * 7)), "train.parquet row 0 can't be decoded as an image: the file is empty"),
        "labels of 10 MB": (of(labels=lambda: pa.array(["x" * 10 * million, "y"] * 4)), "declares labels of 10,000,"),
        "labels of 900 kB": (of(labels=lambda: pa.array(["x" * 900_000, "y"] * 4)), "has a label of 900,000 bytes, expected at most 1,000"),
        "no numbers": (of(labels=lambda: pa.array([0.0, float("nan")] * 4)), "column 'label' of train.parquet holds double"),
        "negative": (of(labels=lambda: pa.array([0, -1] * 4)), "has the label -1; expected numbers from 0"),
        "too large": (of(labels=lambda: pa.array([0, 2**64 - 1] * 4, pa.uint64())), "column 'label' of train.parquet can't be read"),
        "times": (of(labels=lambda: pa.array([0, 1] * 4, pa.timestamp("us"))), "expected whole numbers or class names"),
        "torn": (torn, "column 'label' of train.parquet can't be read"),
        "a footer of 1.9 GB": (large_footer, "its footer has 1,900 MB, expected at most 16 MB"),
        "a pipe": (pipe, "train.parquet can't be read as Parquet: it is a pipe, expected a regular file"),
    }
    check(cases, TABLE, tmp_path)


def test_a_value_that_repeats_is_read_as_it_is(tmp_path: Path) -> None:
    """Parquet holds it once, whether images are bytes or structures with a field of them."""
    from kdbench.data.parquet import Rows

    values = [encoded(pixels(seed), "PNG") for seed in range(3)]
    rows = [values[k % 3] for k in range(30)]
    for name, array in (("bytes", pa.array(rows)), ("structure", pa.array([{"path": str(k), "bytes": row} for k, row in enumerate(rows)]))):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"image": array, "label": pa.array([0] * 30)}), path, row_group_size=7)
        store = Rows([path], "image", "label")
        assert [store.read(row) for row in range(30)] == rows


# --- archives --------------------------------------------------------------------------------------------------------


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
    return member.tobuf(tarfile.GNU_FORMAT)


def archive(*members: bytes, zeros: int = 0) -> Callable[[], object]:
    """Of CIFAR-100: some headers, and many zeros behind them."""

    def made() -> None:
        Path("sets").mkdir()
        with gzip.open(Path("sets", cifar.ARCHIVE), "wb", 1) as file:
            file.writelines(members)
            for _ in range(zeros // 10**6):
                file.write(bytes(10**6))

    return made


def holes(folder: str, names: tuple[str, ...], size: int) -> Callable[[], object]:
    def made() -> None:
        Path("sets", folder).mkdir(parents=True)
        for name in names:
            with open(Path("sets", folder, name), "wb") as file:
                file.truncate(size)

    return made


def test_archives_of_cifar_that_take_the_machine_are_refused(tmp_path: Path) -> None:
    train, names = f"{cifar.FOLDER}/train.bin", ("train.bin", "test.bin", "fine_label_names.txt")
    nothing, limit = f"it holds no {train}", "it unpacks to more than 200 MB"
    cases: dict[str, tuple[Callable[[], object], str]] = {
        "a terabyte": (archive(header("x", 10**12)), limit),
        "600 MB of zeros": (archive(header("x", 10), zeros=600 * 10**6), limit),
        "zeros behind it": (archive(header("x", 190 * 10**6), zeros=600 * 10**6), limit),
        "a file that is too long": (archive(header(train, 190 * 10**6), zeros=190 * 10**6), "it has 190000000 bytes, expected at most 153"),
        "an extension of 180 MB": (archive(header("x", 180 * 10**6, tarfile.XHDTYPE), zeros=181 * 10**6), nothing),
        "a link": (archive(header(train, 0, tarfile.SYMTYPE)), nothing),
        "a size below 0": (archive(header("x", -(10**6))), limit),
        "10,000 files": (archive(*[header(f"../{k}", 0) for k in range(10_000)]), nothing),
        "a hole": (holes("", (cifar.ARCHIVE,), 50 * 10**9), f"{cifar.ARCHIVE} can't be read: it has more than 200 MB"),
        "holes in a folder": (holes(cifar.FOLDER, names, 50 * 10**9), "train.bin can't be read: it has more than 153.7 MB"),
    }
    check(cases, {"name": "classification", "data": "cifar100", "val_size": 100}, tmp_path)


def test_files_of_fashion_mnist_that_take_the_machine_are_refused(tmp_path: Path) -> None:
    def files(content: Callable[[int], bytes], hole: int = 0) -> Callable[[], object]:
        def made() -> None:
            Path("sets").mkdir()
            for file in fashion_mnist._FILES.values():
                path = Path("sets", f"{file.name}.gz")
                path.write_bytes(content(file.size))
                if hole:
                    os.truncate(path, hole)

        return made

    def pipe() -> None:
        Path("sets").mkdir()
        os.mkfifo(Path("sets", "train-images-idx3-ubyte.gz"))

    longer = "train-images-idx3-ubyte.gz is damaged: its content is longer than 47040016 bytes"
    cases: dict[str, tuple[Callable[[], object], str]] = {
        "600 MB of zeros": (files(lambda size: gzip.compress(bytes(600 * 10**6), 1)), longer),
        "a byte more": (files(lambda size: gzip.compress(bytes(size + 1), 1)), longer),
        "zeros behind it": (files(lambda size: gzip.compress(bytes(size), 1), hole=50 * 10**9), longer),
        "something behind it": (files(lambda size: gzip.compress(bytes(size), 1) + b"more"), "Not a gzipped file"),
        "a pipe": (pipe, "the full set is in none of"),
    }
    check(cases, {"name": "classification", "data": {"name": "fashion_mnist", "size": "full"}, "val_size": 100}, tmp_path)
