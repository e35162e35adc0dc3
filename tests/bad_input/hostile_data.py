"""Hostile data sets: bombs under the names of known sets, pictures that unpack to gigabytes, Parquet that lies, folders without end."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from kdbench.data.cifar import ARCHIVE, FOLDER
from kdbench.data.fashion_mnist import _FILES
from tests.bad_input.hostile_case import ODD, RUN_IMPORTS, SPARSE, Case, Draws, Makers, experiment, odd_file, run

DATA_VARIABLE = {"KDBENCH_DATA": "{here}/data"}
PICTURE_IMPORTS = (*RUN_IMPORTS, "PIL.Image", "torchvision.transforms.v2")


# --- known sets ------------------------------------------------------------------------------------------------------


def _packed(count: int, byte: int = 0) -> bytes:
    """`count` times 100 MB, packed: gzip files may follow each other."""
    return gzip.compress(bytes([byte]) * 100_000_000, 6) * count


def fashion(folder: Path, draws: Draws) -> Case:
    """Fashion-MNIST's files as gigabytes in a few megabytes, as a hole, as something else, or cut off."""
    data = folder / "data"
    data.mkdir()
    for file in list(_FILES.values())[1:]:
        (data / file.name).write_bytes(b"")
    images = data / _FILES["train images"].name
    kind = draws.pick(["bomb", "bomb", "sparse", "noise", "cut", "link to an endless file", "nested gzip", "header"])
    if kind == "bomb":
        images.with_name(f"{images.name}.gz").write_bytes(_packed(draws.randint(4, 60), draws.randrange(256)))
    elif kind == "sparse":
        with images.open("wb") as sparse:
            sparse.truncate(SPARSE)
    elif kind == "link to an endless file":
        images.with_name(f"{images.name}.gz").symlink_to("/proc/self/pagemap")
    elif kind == "nested gzip":
        images.with_name(f"{images.name}.gz").write_bytes(gzip.compress(_packed(20)))
    else:
        content = {
            "noise": draws.randbytes(50_000),
            "cut": gzip.compress(draws.randbytes(9_000))[:-100],
            "header": b"\x1f\x8b\x08\x04\xff\xff",
        }
        images.with_name(f"{images.name}.gz").write_bytes(content[kind])
    changes = {"task.data": {"name": "fashion_mnist", "size": "full"}}
    return run(experiment(folder, changes), draws, said="data fashion_mnist", environment=DATA_VARIABLE)


def _member(name: str, content: bytes = b"", **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for fact, value in facts.items():
        setattr(member, fact, value)
    return member, content


def tars(folder: Path, draws: Draws) -> Case:
    """CIFAR-100's archive with links to devices, holes, gigabytes of zeros, headers that lie, or nothing."""
    (folder / "data").mkdir()
    path = folder / "data" / ARCHIVE
    train, test = f"{FOLDER}/train.bin", f"{FOLDER}/test.bin"
    kind = draws.pick(
        ["link", "link to a link", "device", "pipe", "missing", "folder", "bomb", "bomb", "many", "claims", "long name", "noise", "cut"]
    )
    members: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {
        "link": [_member(train, type=tarfile.SYMTYPE, linkname="/dev/zero"), _member("dev/zero", b"x")],
        "link to a link": [
            _member(train, type=tarfile.SYMTYPE, linkname="test.bin"),
            _member(test, type=tarfile.SYMTYPE, linkname="train.bin"),
        ],
        "device": [_member(train, type=tarfile.CHRTYPE, devmajor=1, devminor=5)],
        "pipe": [_member(train, type=tarfile.FIFOTYPE)],
        "missing": [_member(f"../{train}", b"x")],
        "folder": [_member(train, type=tarfile.DIRTYPE)],
        "many": [_member(f"{FOLDER}/{number}") for number in range(draws.randint(40_000, 90_000))],
        "long name": [_member("x" * draws.randint(1_000_000, 9_000_000)), _member(train, b"x")],
    }
    if kind in members:
        with tarfile.open(path, "w:gz") as archive:
            for member, content in members[kind]:
                archive.addfile(member, io.BytesIO(content))
    elif kind in ("bomb", "claims"):
        size = draws.randint(2, 8) * 10**9 if kind == "bomb" else draws.choice([2**62, 10**15])
        header = _member(train)[0]
        header.size = size
        block = header.tobuf(tarfile.GNU_FORMAT)
        path.write_bytes(gzip.compress(block) + (_packed(size // 10**8 + 1) if kind == "bomb" else gzip.compress(bytes(10_240))))
    else:
        whole = gzip.compress(_member(train)[0].tobuf() + bytes(1_000_000))
        path.write_bytes(draws.randbytes(30_000) if kind == "noise" else whole[: len(whole) // 2])
    return run(experiment(folder, {"task.data": {"name": "cifar100"}}), draws, said="data cifar100", environment=DATA_VARIABLE)


def unpacked_sets(folder: Path, draws: Draws) -> Case:
    """CIFAR-100 as files, of which one is a hole, a link round in a circle, or empty."""
    data = folder / "data" / FOLDER
    data.mkdir(parents=True)
    kind = draws.pick(["sparse file", "empty", "endless file"])
    if kind == "empty":
        (data / "train.bin").write_bytes(b"")
    else:
        ODD[kind](data / "train.bin")
    odd_file(data / "test.bin", draws)
    return run(experiment(folder, {"task.data": {"name": "cifar100"}}), draws, said="data cifar100", environment=DATA_VARIABLE)


# --- pictures --------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, pixels: bytes | None = None, *more: bytes) -> bytes:
    """A grey PNG of 8 bits; `pixels` are packed rows, and by default as many zeros as it takes."""
    if pixels is None:
        packer = zlib.compressobj(6)
        rows = bytes(width + 1) * max(1, 4_000_000 // (width + 1))
        whole, rest = divmod(height * (width + 1), len(rows))
        pixels = b"".join(packer.compress(rows) for _ in range(whole)) + packer.compress(rows[:rest]) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(more) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _sound(draws: Draws) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), tuple(draws.choices(range(256), k=3))).save(buffer, "PNG")
    return buffer.getvalue()


def _jpeg(width: int, height: int) -> bytes:
    """One that says so of itself, and holds a few pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, height, width)
    return bytes(content)


def _tiff(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    """A TIFF of tags: number, type, count, value."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", 8) + directory


def _picture(draws: Draws) -> bytes:
    """A picture that is larger than anybody's memory, or says so, or is none."""
    side = draws.randint(50_000, 65_000)
    long = zlib.compress(bytes(draws.randint(100_000_000, 300_000_000)), 6)
    grey = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (278, 4, 1, side)]
    make: Callable[[], bytes] = draws.pick(
        [
            lambda: _png(side, draws.randint(4_000, 6_000)),  # above PIL's limit of 179 million pixels
            lambda: _png(13_000, draws.randint(13_300, 13_700)),  # just below it, where PIL only warns
            lambda: _png(2**31 - 1, 2**31 - 1, b""),
            lambda: _png(0, 10, b""),
            lambda: _png(40, 40, b"", _chunk(b"zTXt", b"a\0\0" + long)),
            lambda: _png(40, 40, b"", _chunk(b"iCCP", b"a\0\0" + long)),
            lambda: _png(40, 40, b"", struct.pack(">I", 2**31 - 1) + b"tEXt"),
            lambda: _png(40, 40, draws.randbytes(500)),
            lambda: _sound(draws)[: draws.randint(40, 90)],
            lambda: _jpeg(65_500, 65_500),
            lambda: _jpeg(13_000, 13_000),
            lambda: b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x01\x01\0;",
            lambda: b"BM" + struct.pack("<IHHIIiiHHIIIIII", 10**9, 0, 0, 54, 40, 2**31 - 1, -(2**31) + 1, 1, 24, 0, 0, 0, 0, 0, 0),
            lambda: _tiff(grey),
            lambda: _tiff([*grey[:5], (273, 4, 2**31, 8), (279, 4, 2**31, 8)]),
            lambda: _tiff([(270, 2, 2**32 - 1, 8)], 8),
            lambda: b"P6 100000 100000 255\n" + bytes(100),
            lambda: b"P5 " + b"9" * 5_000 + b" 1 255\n",
            lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(called) (w) file closefile showpage\n",
            lambda: b"\0\0\x01\0\x01\0\0\0\0\0\x01\0\x20\0\xff\xff\xff\x7f\x16\0\0\0",
            lambda: b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3) + bytes(14),
            lambda: b"RIFF\xff\xff\xff\x7fWEBPVP8L" + struct.pack("<I", 100) + b"\x2f" + draws.randbytes(90),
            lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='1e9' height='1e9'/>",
            lambda: b"",
        ]
    )
    return make()


def _folders(folder: Path, draws: Draws, images: int = 8) -> Path:
    """A folder of sound images, some of each class to train and to test on."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            place = folder / "images" / part / name
            place.mkdir(parents=True)
            for number in range(images):
                (place / f"{number}.png").write_bytes(_sound(draws))
    return folder / "images"


def _of_folder(folder: Path, draws: Draws, said: str = "", **options: Any) -> Case:
    data = {"name": "image_folder", "path": "images", "size": 32, **options}
    changes = {"task": {"name": "classification", "data": data, "val_size": 4}, "recipe.batch_size": 4}
    return run(experiment(folder, changes), draws, said=said, imports=PICTURE_IMPORTS, progress=("images: read ",))


def pictures(folder: Path, draws: Draws) -> Case:
    """One hostile picture among sound ones."""
    ending = draws.choice([".png", ".jpg", ".gif", ".tif", ".webp"])
    hostile = _folders(folder, draws) / draws.choice(["train", "val"]) / draws.choice(["a", "b"]) / f"hostile{ending}"
    hostile.write_bytes(_picture(draws))
    return _of_folder(folder, draws, "hostile", **draws.choice([{}, {"in_memory": True}]))


def folders(folder: Path, draws: Draws) -> Case:
    """Folders without images or without end, links round in a circle, pipes, names that are no text."""
    kind = draws.pick(
        ["nested", "round", "pipe", "not UTF-8", "control", "sparse", "file", "other classes", "many classes", "unreadable name", "proc"]
    )
    if kind == "proc":
        return _of_folder(folder, draws, path=draws.choice(["/proc", "/dev", "/proc/self/task"]))
    images = _folders(folder, draws)
    place = images / "train" / "c"
    (images / "val" / "c").mkdir()
    (images / "val" / "c" / "1.png").write_bytes(_sound(draws))
    if kind == "nested":  # 1,200 levels; the path of the last is too long for the system to take at once
        place.mkdir()
        here = os.open(place, os.O_RDONLY)
        for _ in range(draws.randint(1_100, 1_300)):
            os.mkdir("n" * 3, dir_fd=here)
            below = os.open("n" * 3, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
    elif kind == "round":
        place.mkdir()
        for number in range(50):
            (place / f"{number}.png").symlink_to(f"{(number + 1) % 50}.png")
    elif kind == "pipe":
        place.mkdir()
        for number in range(10):
            os.mkfifo(place / f"{number}.png")
    elif kind == "sparse":
        place.mkdir()
        ODD["sparse file"](place / "1.png")
    elif kind == "file":
        place.write_bytes(b"a class")
    elif kind in ("other classes", "many classes"):
        for number in range(2 if kind == "other classes" else 20_000):
            (images / "train" / f"class {number}").mkdir()
    else:
        name = {"not UTF-8": b"\xff\xfe", "control": b"a\nb\x1b[2J", "unreadable name": b"\xed\xa0\xbd" * 50}[kind]
        for part in ("train", "val"):
            os.mkdir(os.fsencode(images / part) + b"/" + name)
            Path(os.fsdecode(os.fsencode(images / part) + b"/" + name + b"/1.png")).write_bytes(
                _sound(draws) if kind == "not UTF-8" else b""
            )
        (place.parent / "c").mkdir()
    return _of_folder(folder, draws)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _tables(folder: Path, draws: Draws, images: Any = None, labels: Any = None, **options: Any) -> Case:
    """Parquet of images to train and to test on; by default sound ones, of two classes."""
    sound = pa.table({"image": pa.array([_sound(draws) for _ in range(12)]), "label": pa.array([0, 1] * 6)})
    pq.write_table(sound, folder / "test.parquet")
    columns = {"image": sound["image"] if images is None else images, "label": sound["label"] if labels is None else labels}
    pq.write_table(pa.table(columns), folder / "train.parquet", **options)
    return _of_parquet(folder, draws)


def _of_parquet(folder: Path, draws: Draws) -> Case:
    data = {"name": "parquet", "train": "train.parquet", "test": "test.parquet", "size": 32, **draws.choice([{}, {"in_memory": True}])}
    changes = {"task": {"name": "classification", "data": data, "val_size": 4}, "recipe.batch_size": 4}
    return run(experiment(folder, changes), draws, said="train.parquet", imports=PICTURE_IMPORTS, progress=("parquet: read ",))


def labels(folder: Path, draws: Draws) -> Case:
    """Labels that are no classes: numbers without bound, NaN, texts of megabytes, lists, null."""
    values = draws.pick(
        [
            pa.array([0.5, float("nan")] * 6),
            pa.array([2**62, 1] * 6),
            pa.array([-(2**63), 2**63 - 1] * 6),
            pa.array([2**64 - 1, 1] * 6, pa.uint64()),
            pa.array([None, 1] * 6, pa.int64()),
            pa.array([[1], [2, 3]] * 6),
            pa.array(["x" * 1_000_000, "y"] * 6),
            pa.array([b"\xff", b"\xfe"] * 6).view(pa.string()),
            pa.array([True, False] * 6),
            pa.array(["0", "1"] * 6),
            pa.array([{"a": 1}] * 12),
            pa.array([10**9, 10**9 + 1] * 6),
            pa.nulls(12),
        ]
    )
    return _tables(folder, draws, labels=values)


def columns(folder: Path, draws: Draws) -> Case:
    """A column of images that holds none, or pictures that are bombs."""
    values = draws.pick(
        [
            pa.array([_picture(draws)] * 2 + [_sound(draws)] * 10),
            pa.array([_sound(draws)] * 11 + [b"no picture"]),
            pa.array(["text"] * 12),
            pa.array([[1, 2]] * 12),
            pa.array([{"path": "/etc/passwd", "bytes": None}] * 12, pa.struct([("path", pa.string()), ("bytes", pa.binary())])),
            pa.array([None] * 12, pa.binary()),
            pa.array([{"bytes": {"bytes": b"x"}}] * 12),
            pa.array([1] * 12),
        ]
    )
    return _tables(folder, draws, images=values)


def bombs(folder: Path, draws: Draws) -> Case:
    """Parquet of millions of rows, or of one value of hundreds of megabytes, in a few kilobytes."""
    count = draws.randint(3_000_000, 20_000_000)
    zeros = pa.array([0]).take(pa.repeat(0, count))
    long = bytes(draws.randint(100_000_000, 400_000_000))
    packed: dict[str, Any] = {"compression": draws.choice(["zstd", "gzip", "snappy"])}
    kind = draws.pick(["rows", "null rows", "long value", "long label", "dictionary"])
    if kind == "rows":
        return _tables(folder, draws, pa.array([b""]).take(pa.repeat(0, count)), zeros, **packed)
    if kind == "null rows":
        return _tables(folder, draws, pa.nulls(count, pa.binary()), pa.nulls(count, pa.int64()), **packed)
    if kind == "long value":
        return _tables(folder, draws, pa.array([long] + [_sound(draws)] * 11), use_dictionary=False, **packed)
    if kind == "long label":
        return _tables(folder, draws, labels=pa.array([long.decode("ascii")] + ["a"] * 11), use_dictionary=False, **packed)
    return _tables(folder, draws, labels=pa.array([long.decode("ascii"), *["a"] * 11]).dictionary_encode(), **packed)


def no_tables(folder: Path, draws: Draws) -> Case:
    """Parquet that is damaged, or none."""
    case = _tables(folder, draws)
    path = folder / "train.parquet"
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little")
    kind = draws.pick(["odd", "odd", "footer", "length", "pages", "cut", "empty", "folder"])
    if kind in ("odd", "folder"):
        path.unlink()
        if kind == "odd":
            odd_file(path, draws, but=["folder"])
        else:
            path.mkdir()
            os.mkfifo(path / "1.parquet")
        return case
    if kind == "footer":
        content[-8 - footer : -8] = draws.randbytes(footer)
    elif kind == "length":
        content[-8:-4] = (2**31 + 5).to_bytes(4, "little")
    elif kind == "pages":
        content[4 : -8 - footer] = draws.randbytes(len(content) - 12 - footer)
    else:
        del content[0 if kind == "empty" else draws.randrange(10, len(content) - 1) :]
    path.write_bytes(content)
    return case


DATA: Makers = (
    (fashion, 5),
    (tars, 6),
    (unpacked_sets, 2),
    (pictures, 10),
    (folders, 5),
    (labels, 4),
    (columns, 2),
    (bombs, 3),
    (no_tables, 3),
)
