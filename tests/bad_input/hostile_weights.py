"""Hostile files of weights: pickles that call, nest or claim, zips that lie, safetensors whose headers do."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.bad_input.hostile_case import SENTINEL, SPARSE, Case, Draws, Makers, experiment, odd_file, run


def weighed(folder: Path, name: str, draws: Draws) -> Case:
    """An experiment whose teacher, or student, begins with the file."""
    place = draws.choice([{"teacher.weights": name}, {"students": [{"name": "tiny_cnn", "width": 4, "weights": name}]}])
    return run(experiment(folder, place), draws, said=name)


def torch_zip(path: Path, content: bytes, storages: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> None:
    """A file as torch.save writes it: a zip of a pickle, a version and storages."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in {"data.pkl": content, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", data)
        for name, data in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", data)


class _Call:
    """What unpickling would call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def calling(folder: Path, draws: Draws) -> Case:
    """A pickle that calls a function when it is read."""
    touch = f"touch {SENTINEL}"
    call = draws.pick(
        [
            _Call(os.system, touch),
            _Call(os.mkdir, SENTINEL),
            _Call(open, SENTINEL, "w"),
            _Call(exec, f"open('{SENTINEL}', 'w')"),
            _Call(subprocess.check_output, touch, -1, None, None, None, None, None, True, True),
            _Call(torch.load, "other.pt"),
            _Call(getattr, _Call(__import__, "os"), "system"),
        ]
    )
    name = draws.choice(["weights.pt", "weights.pth", "weights.bin", "weights.safetensors"])
    content = pickle.dumps({"weight": call, "x": torch.zeros(1).numpy()}, protocol=draws.choice([0, 2, 4]))
    if draws.random() < 0.5:
        torch_zip(folder / name, content)
    else:
        (folder / name).write_bytes(content)
    return weighed(folder, name, draws)


def nested(folder: Path, draws: Draws) -> Case:
    """A pickle of lists in lists, tuples in tuples, or mappings in mappings, thousands of levels deep."""
    levels = draws.choice([1_000, 20_000, draws.randint(50_000, 300_000)])
    key = b"X\x01\x00\x00\x00a"
    content = draws.pick(
        [
            b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b".",
            b"\x80\x02)" + b"\x85" * levels + b".",
            b"\x80\x02}" + (key + b"}") * levels + b"s" * levels + b".",
            b"\x80\x02" + b"(" * levels + b"t" * levels + b".",
            b"\x80\x02}" + key + b"]" * levels + b"a" * (levels - 1) + b"s.",
        ]
    )
    torch_zip(folder / "weights.pt", content)
    return weighed(folder, "weights.pt", draws)


def claiming(folder: Path, draws: Draws) -> Case:
    """A pickle of instructions that claim gigabytes, or double what they hold a hundred times."""
    content = draws.pick(
        [
            b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a.",  # a text
            b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"a.",  # bytes
            b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"1.",  # a whole number
            b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",  # a frame
            b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",  # a place to remember
            b"\x80\x02)" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(100)) + b".",  # pairs of pairs
            b"\x80\x02}" + b"".join(b"q%c}X\x01\x00\x00\x00ah%csX\x01\x00\x00\x00bh%cs" % (n, n, n) for n in range(100)) + b".",
            b"\x80\x02X\xff\xff\xff\x7fa.",
        ]
    )
    if draws.random() < 0.5:
        torch_zip(folder / "weights.pt", content)
    else:
        (folder / "weights.pt").write_bytes(content)
    return weighed(folder, "weights.pt", draws)


class _Storage:
    """What a tensor of a file lies in: numbers that the file has, or claims to have."""

    def __init__(self, name: str, numel: int, kind: Any = torch.FloatStorage) -> None:
        self.persistent = ("storage", kind, name, "cpu", numel)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.persistent if isinstance(value, _Storage) else None


def _pickled_tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    tensor = _Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    _Pickler(buffer, protocol=2).dump({"weight": tensor})
    return buffer.getvalue()


def odd_tensors(folder: Path, draws: Draws) -> Case:
    """Tensors before the beginning or behind the end of what they lie in, of 10^18 numbers in the same 4 bytes, or in nothing."""
    many = draws.randint(10**5, 10**9)
    storage = _Storage("0", 4)
    content = draws.pick(
        [
            _pickled_tensor(storage, -draws.randint(1, 10**6), (2,), (1,)),
            _pickled_tensor(storage, 0, (many,), (1,)),
            _pickled_tensor(storage, 0, (many, many), (0, 0)),
            _pickled_tensor(storage, 0, (2, 2), (-1, 1)),
            _pickled_tensor(storage, 2**62, (1,), (1,)),
            _pickled_tensor(_Storage("0", 10**12), 0, (10**12,), (1,)),
            _pickled_tensor(_Storage("7", 4), 0, (4,), (1,)),
            _pickled_tensor(_Storage("../../etc/passwd", 4), 0, (4,), (1,)),
            _pickled_tensor(_Storage("0", -4), 0, (4,), (1,)),
            _pickled_tensor(storage, 0, (0, 2**62, 2**62), (1, 1, 1)),
        ]
    )
    torch_zip(folder / "weights.pt", content, {"0": bytes(16)})
    return weighed(folder, "weights.pt", draws)


def odd_zips(folder: Path, draws: Draws) -> Case:
    """A zip that is compressed, that lies about sizes, or that lacks what torch looks for."""
    path = folder / "weights.pt"
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1_000)}, buffer)
    content = bytearray(buffer.getvalue())
    directory = content.find(b"PK\x01\x02")
    kind = draws.pick(
        ["deflated", "huge", "far", "cut", "noise", "no pickle", "bytes of another order", "many", "wrong version", "own code"]
    )
    if kind == "deflated":
        torch_zip(path, bytes(draws.randint(10_000_000, 100_000_000)), method=zipfile.ZIP_DEFLATED)
    elif kind == "no pickle":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/version", b"3\n")
    elif kind == "bytes of another order":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
            archive.writestr("archive/byteorder", b"../../../middle")
    elif kind == "many":
        torch_zip(path, pickle.dumps({}, protocol=2), {str(number): b"" for number in range(draws.randint(30_000, 60_000))})
    elif kind == "wrong version":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps([1], protocol=2))
            archive.writestr("archive/version", b"9" * 5_000)
    elif kind == "own code":  # as TorchScript keeps it
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/constants.pkl", pickle.dumps((), protocol=2))
            archive.writestr("archive/data.pkl", pickle.dumps(_Call(os.mkdir, SENTINEL), protocol=2))
            archive.writestr("archive/code/__torch__.py", f"open('{SENTINEL}', 'w')")
            archive.writestr("archive/version", b"3\n")
    else:
        if kind == "huge":
            struct.pack_into("<II", content, directory + 20, 0xFFFFFFF0, 0xFFFFFFF0)
        elif kind == "far":
            struct.pack_into("<I", content, directory + 42, 0x7FFFFFFF)
        elif kind == "cut":
            del content[draws.randrange(100, len(content) - 100) :]
        else:
            content[directory : directory + 60] = draws.randbytes(60)
        path.write_bytes(content)
    return weighed(folder, "weights.pt", draws)


def safetensors(folder: Path, draws: Draws) -> Case:
    """Headers of 10^15 bytes, nested headers, tensors that overlap, lie before the beginning or have 2^80 numbers."""
    entry: dict[str, Any] = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    data = bytes(16)
    header: Any = draws.pick(
        [
            10**15,
            2**64 - 1,
            90_000_000,
            b"[" * 200_000,
            b'{"w": ' * 100_000,
            b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, ' + b"9" * 5_000 + b"]}}",
            {"a": entry, "b": entry},
            {"a": {**entry, "data_offsets": [-16, 0]}},
            {"a": {**entry, "data_offsets": [16, 0]}},
            {"a": {**entry, "data_offsets": [0, 10**15]}},
            {"a": {**entry, "shape": [2**40, 2**40]}},
            {"a": {**entry, "shape": [0, -1, 2**63], "data_offsets": [0, 0]}},
            {"a": {**entry, "dtype": "PYTHON"}},
            {"a": {**entry, "data_offsets": [8, 16], "shape": [2]}},
            {"__metadata__": [1], "a": entry},
            {f"weight{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(50_000)},
            {"\x00\x1b[2J\ud83d": entry},
            b"\xff" * 50,
            b"",
        ]
    )
    if isinstance(header, int):
        content = struct.pack("<Q", header) + b"{}"
    else:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + data
    (folder / "weights.safetensors").write_bytes(content)
    if draws.random() < 0.2:
        os.truncate(folder / "weights.safetensors", SPARSE)
    return weighed(folder, "weights.safetensors", draws)


def no_weights(folder: Path, draws: Draws) -> Case:
    """A pipe, a device, a link round in a circle or a hole of 50 GB."""
    name = draws.choice(["weights.pt", "weights.pth", "weights.safetensors"])
    odd_file(folder / name, draws)
    return replace(weighed(folder, name, draws), said="weights")  # of a link, the message may name what it leads to


def holes(folder: Path, draws: Draws) -> Case:
    """A few bytes as such a file begins, and behind them a hole of 50 GB."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(10)}, buffer, _use_new_zipfile_serialization=False)
    name, content = draws.pick(
        [
            ("weights.pt", buffer.getvalue()),
            ("weights.pt", b"\x80\x02X\xff\xff\xff\x7f"),
            ("weights.pt", b"PK\x03\x04"),
            ("weights.pt", b"\x93NUMPY\x01\x00v\x00"),
            ("weights.safetensors", struct.pack("<Q", 2)),
            ("weights.pt", b"\x89HDF\r\n\x1a\n"),
        ]
    )
    (folder / name).write_bytes(content)
    os.truncate(folder / name, SPARSE)
    return weighed(folder, name, draws)


def of_others(folder: Path, draws: Draws) -> Case:
    """What other programs write, under the name of weights: tar, numpy, text, pickles of things."""
    path = folder / "weights.pt"
    kind = draws.pick(["tar", "numpy", "text", "number", "legacy", "set", "mixed", "names"])
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name in ("storages", "tensors", "pickle"):
                member = tarfile.TarInfo(name)
                content = pickle.dumps(_Call(os.mkdir, SENTINEL), protocol=2)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    elif kind == "legacy":
        parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, _Call(os.mkdir, SENTINEL)]
        path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    else:
        written = {
            "numpy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
            "text": b"weights\n" * 100_000,
            "number": pickle.dumps(10**5_000, protocol=2),
            "set": pickle.dumps({"weight": {1, 2}}, protocol=2),
            "mixed": pickle.dumps({1: 2, "weight": b"\x00"}, protocol=2),
            "names": pickle.dumps({"x" * 1_000_000: 1}, protocol=2),
        }
        path.write_bytes(written[kind])
    return weighed(folder, "weights.pt", draws)


WEIGHTS: Makers = (
    (calling, 5),
    (nested, 3),
    (claiming, 3),
    (odd_tensors, 4),
    (odd_zips, 4),
    (safetensors, 6),
    (no_weights, 2),
    (holes, 2),
    (of_others, 1),
)
