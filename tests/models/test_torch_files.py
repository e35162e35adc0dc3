"""A torch file that somebody else made is refused before torch reads it, if it would take more than its tensors do; all others load."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdbench.bounded import ImplausibleFile
from kdbench.models.torch_files import check_torch_file
from kdbench.training.checkpoint import load_checkpoint, save_checkpoint
from tests.bad_input.tiny_experiment import assert_mistake, run
from tests.console import Kdbench
from tests.peak_memory import measured

MOST_MEMORY_KB = 300_000

# --- instructions, as pickle's protocol 2 writes them ----------------------------------------------------------------

EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT, MARK, TUPLE, REDUCE, BUILD, NONE, FALSE = b")", b"]", b"}", b"(", b"t", b"R", b"b", b"N", b"\x89"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def many(*parts: bytes) -> bytes:
    return MARK + b"".join(parts) + TUPLE


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def entry(value: bytes) -> bytes:
    """A file's content: one name and its value."""
    return EMPTY_DICT + text("w") + value + b"s"


def storage(count: int, key: str = "0", kind: str = "FloatStorage", legacy: bool = False) -> bytes:
    return many(text("storage"), named("torch", kind), text(key), text("cpu"), number(count), NONE if legacy else b"") + b"Q"


def tensor(of: bytes, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], function: str = "_rebuild_tensor_v2") -> bytes:
    hooks = named("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE
    return (
        named("torch._utils", function)
        + many(of, number(offset), many(*map(number, sizes)), many(*map(number, strides)), FALSE, hooks)
        + REDUCE
    )


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return named(module, name) + many(*arguments) + REDUCE


def zipped(content: bytes, members: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("w/data.pkl", b"\x80\x02" + content + b".")
            archive.writestr("w/version", b"3\n")
            for name, data in ({"data/0": bytes(16)} if members is None else members).items():
                archive.writestr(f"w/{name}", data)

    return write


def legacy(content: bytes, keys: bytes = EMPTY_LIST, rest: bytes = b"") -> Callable[[Path], None]:
    begin = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return lambda path: path.write_bytes(begin + b"\x80\x02" + content + b".\x80\x02" + keys + b"." + rest)  # type: ignore[return-value]


def _lists(levels: int) -> bytes:
    made = EMPTY_LIST + put(0)
    for level in range(levels):
        made += EMPTY_LIST + MARK + get(level) * 10 + b"e" + put(level + 1)
    return made


def _mappings(levels: int) -> bytes:
    made = entry(tensor(storage(4), 0, (4,), (1,))) + put(0)
    for level in range(levels):
        made += EMPTY_DICT + MARK + b"".join(text(f"k{index}") + get(level) for index in range(200)) + b"u" + put(level + 1)
    return made


def _hashed(last: Callable[[bytes], bytes]) -> bytes:
    """A list of tuples of tuples, 2^60 in the last, and of what is made of that."""
    tuples = EMPTY_TUPLE + put(0) + b"".join(get(level) * 2 + b"\x86" + put(level + 1) for level in range(60))
    return EMPTY_LIST + MARK + tuples + last(get(60)) + b"e"


def _expanding(path: Path) -> None:
    zipped(entry(tensor(storage(100_000_000), 0, (100_000_000,), (1,))), {"data/0": bytes(400_000_000)}, zipfile.ZIP_DEFLATED)(path)


def _one_compressed_member(path: Path) -> None:
    zipped(entry(NONE), {})(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data/0", bytes(1_000_000))


def _twice(second: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        zipped(entry(NONE), {})(path)
        with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):  # zipfile warns of duplicate names
            archive.writestr(second, b"\x80\x02N.")

    return write


def _another_list(path: Path) -> None:
    """Two lists of files: one that the records at the end tell of, and one in front of something else that looks like the end."""
    zipped(entry(NONE), {})(path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole)


def _hollow(path: Path) -> None:
    """A tensor of 50 GB that takes no space on disk."""
    size = 50_000_000_000
    with path.open("wb") as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        archive.writestr("w/version", b"3\n")
        archive.writestr("w/data.pkl", b"\x80\x02" + entry(tensor(storage(size // 4), 0, (size // 4,), (1,))) + b".")
        header = zipfile.ZipInfo("w/data/0")
        header.CRC, header.file_size, header.compress_size = 0, size, size
        header.header_offset = file.tell()
        file.write(header.FileHeader(zip64=True))
        file.seek(size, os.SEEK_CUR)
        archive.filelist.append(header)
        archive.NameToInfo[header.filename] = header
        archive.start_dir = file.tell()
        archive._didModify = True


def _hollow_legacy(path: Path) -> None:
    size = 50_000_000_000
    content = entry(tensor(storage(size // 4, legacy=True), 0, (size // 4,), (1,)))
    legacy(content, EMPTY_LIST + text("0") + b"a", struct.pack("<q", size // 4))(path)
    os.truncate(path, path.stat().st_size + size)


def _overlapping(path: Path) -> None:
    """Twenty names of one megabyte."""
    zipped(entry(NONE), {"data/0": bytes(1_000_000)})(path)
    with zipfile.ZipFile(path, "a") as archive:
        for key in range(1, 20):
            again = copy(archive.getinfo("w/data/0"))
            again.filename = f"w/data/{key}"
            archive.filelist.append(again)
        archive._didModify = True


def _nested_calls() -> bytes:
    arguments = EMPTY_TUPLE
    for _ in range(5_000):
        arguments = many(named("torch._tensor", "_rebuild_from_type_v2"), named("torch", "Tensor"), arguments, NONE)
    return named("torch._tensor", "_rebuild_from_type_v2") + arguments + REDUCE


def _without_instructions(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/version", b"3")


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in (("storages", pickle.dumps(10**9, 2)), ("tensors", pickle.dumps(10**9, 2)), ("pickle", b"N.")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


ONE = storage(4)  # four numbers, as the file holds them
HOOKS = named("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE

HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    # of the zip
    "compressed": (_expanding, "its content is compressed"),
    "one member compressed": (_one_compressed_member, "its content is compressed"),
    "two data.pkl": (_twice("w/data.pkl"), "a part of it is listed twice"),
    "two data.pkl but for case": (_twice("W/DATA.PKL"), "a part of it is listed twice"),
    "one member under many names": (_overlapping, "its parts overlap"),
    "two ends": (_another_list, "it does not end as torch.save ends a file"),
    "no data.pkl": (_without_instructions, "it has no data.pkl"),
    "a hole": (_hollow, "it has 50.00 GB, most of which is a hole in the file"),
    "a hole, legacy": (_hollow_legacy, "most of which is a hole in the file"),
    "long instructions": (zipped(entry(text("x" * 17_000_000))), "its instructions have 17.0 MB, expected at most 16 MB"),
    # storages and tensors
    "larger than stored": (zipped(entry(tensor(storage(5), 0, (5,), (1,)))), "is said to have 20 bytes, and has 16"),
    "an absent storage": (zipped(entry(tensor(storage(4, "7"), 0, (4,), (1,)))), "the content of tensor storage '7' is missing"),
    "beyond the storage": (zipped(entry(tensor(ONE, 1, (4,), (1,)))), "reaches beyond what is stored of it"),
    "strided beyond": (zipped(entry(tensor(ONE, 0, (2, 2), (3, 1)))), "reaches beyond what is stored of it"),
    "another element type": (
        zipped(
            entry(
                named("torch._utils", "_rebuild_tensor_v2")
                + many(ONE, number(0), many(number(16)), many(number(1)), named("torch", "uint8"), HOOKS)
                + REDUCE
            )
        ),
        "reaches beyond what is stored of it",
    ),
    "stride 0": (zipped(entry(tensor(ONE, 0, (10**10,), (0,)))), "is expanded from 16 bytes; save it with .clone()"),
    "as_strided": (zipped(entry(tensor(storage(4), 0, (2,) * 30, (1,) * 2 + (0,) * 28))), "is expanded from 16 bytes"),
    "100 dimensions": (zipped(entry(tensor(ONE, 0, (1,) * 100, (1,) * 100))), "its instructions are damaged"),
    "a size below 0": (zipped(entry(tensor(ONE, 0, (-1,), (1,)))), "its instructions are damaged"),
    "quantized": (zipped(entry(tensor(storage(4, kind="QUInt8Storage"), 0, (4,), (1,)))), "stored as torch.QUInt8Storage"),
    "a sparse tensor": (
        zipped(entry(call("torch._utils", "_rebuild_sparse_tensor", NONE, EMPTY_TUPLE))),
        "made by torch._utils._rebuild_sparse_tensor",
    ),
    "a nested tensor": (zipped(entry(call("torch._utils", "_rebuild_nested_tensor", NONE))), "made by torch._utils._rebuild_nested_tensor"),
    "a tensor without memory": (
        zipped(entry(call("torch._utils", "_rebuild_meta_tensor_no_storage", NONE))),
        "made by torch._utils._rebuild_meta_tensor_no_storage",
    ),
    "a tensor by its class": (zipped(entry(call("torch", "Tensor", number(10**11)))), "made by torch.Tensor"),
    "a storage by its class": (zipped(entry(call("torch", "FloatStorage", number(10**11)))), "made by torch.FloatStorage"),
    "a tensor with a set state": (
        zipped(entry(tensor(ONE, 0, (4,), (1,)) + many(ONE, number(0), many(number(10**11)), many(number(1))) + BUILD)),
        "it sets the state of something other than a mapping",
    ),
    "a call inside of a call": (
        zipped(
            entry(call("torch._tensor", "_rebuild_from_type_v2", named("builtins", "bytearray"), named("torch", "Tensor"), many(number(9))))
        ),
        "it holds a Python object, builtins.bytearray",
    ),
    "calls inside of calls": (zipped(entry(_nested_calls())), "made by torch._tensor._rebuild_from_type_v2"),
    # values
    "calls again and again": (
        zipped(EMPTY_LIST + MARK + named("collections", "OrderedDict") + put(0) + (get(0) + EMPTY_TUPLE + REDUCE) * 250_000 + b"e"),
        "it has more than 1,000,000 instructions",
    ),
    "a long tuple as a name": (zipped(EMPTY_DICT + many(*[number(1)] * 11) + NONE + b"s"), "a name in it is neither"),
    "bytes of a number": (zipped(entry(call("builtins", "bytearray", number(4 * 10**9)))), "it holds a Python object, builtins.bytearray"),
    "bytes of Python 2": (zipped(entry(call("__builtin__", "bytearray", number(4 * 10**9)))), "a Python object, builtins.bytearray"),
    "a slow encoding": (zipped(entry(call("_codecs", "encode", text("é" * 10**6), text("punycode")))), "a Python object, _codecs.encode"),
    "bytes again and again": (
        zipped(
            EMPTY_LIST
            + MARK
            + many(text("x" * 10**6), text("latin1"))
            + put(0)
            + b"".join(named("_codecs", "encode") + get(0) + REDUCE for _ in range(1_000))
            + b"e"
        ),
        "it makes more bytes from its texts than it has",
    ),
    "sets again and again": (
        zipped(
            EMPTY_LIST
            + MARK
            + many(EMPTY_LIST + MARK + b"".join(number(index) for index in range(1_000)) + b"e")
            + put(0)
            + b"".join(named("builtins", "set") + get(0) + REDUCE for _ in range(10_000))
            + b"e"
        ),
        "it has more than 1,000,000 instructions",
    ),
    "states again and again": (
        zipped(
            EMPTY_LIST
            + MARK
            + (EMPTY_DICT + MARK + b"".join(text(str(index)) + NONE for index in range(1_000)) + b"u" + put(0))
            + b"".join(HOOKS + get(0) + BUILD for _ in range(2_000))
            + b"e"
        ),
        "it has more than 1,000,000 instructions",
    ),
    "millions of instructions": (zipped(EMPTY_LIST + b"Na" * 1_000_000), "it has more than 1,000,000 instructions"),
    "a hundred thousand levels": (zipped(b"]" * 100_000 + b"a" * 99_999), "it is nested more than 50 levels deep"),
    "a list in itself": (zipped(EMPTY_LIST + put(0) + get(0) + b"a"), "it is nested more than 50 levels deep"),
    "lists of lists": (zipped(_lists(40)), "it holds more than 1,000,000 values"),
    "mappings of mappings": (zipped(_mappings(3)), "it holds more than 1,000,000 values"),
    "a tuple of tuples as a name": (zipped(_hashed(lambda last: EMPTY_DICT + last + NONE + b"s")), "a name in it is neither a text nor"),
    "a tuple of tuples in a set": (
        zipped(_hashed(lambda last: call("builtins", "set", EMPTY_LIST + last + b"a"))),
        "a name in it is neither",
    ),
    "a tuple of tuples as a name of Python 2": (
        zipped(_hashed(lambda last: call("collections", "OrderedDict", EMPTY_LIST + many(last, NONE) + b"a"))),
        "a name in it is neither",
    ),
    "an empty list as a name": (zipped(EMPTY_DICT + EMPTY_LIST + NONE + b"s"), "a name in it is neither"),
    "numbers of one hash": (
        zipped(EMPTY_DICT + MARK + b"".join(number(index * (2**61 - 1)) + NONE for index in range(9)) + b"u"),
        "a name in it is neither a text nor a plain number",
    ),
    "a long name": (zipped(EMPTY_DICT + text("a." * 1_000) + NONE + b"s"), "a name in it is a text of 2,000 characters"),
    "a long text": (zipped(b"X" + struct.pack("<I", 4_000_000_000)), "expected 4000000000 bytes in a unicodestring4"),
    "a long number": (zipped(b"\x8b" + struct.pack("<i", 2_000_000_000)), "not enough data in stream to read long4"),
    "5,000 digits": (zipped(b"I" + b"9" * 5_000 + b"\n"), "Exceeds the limit"),
    "a large memo": (zipped(entry(NONE + put(4_000_000_000)) + b"0"), "its instruction POP is none of pickle's protocol 2"),
    "nothing on the stack": (zipped(REDUCE), "its instructions are damaged"),
    "a function": (zipped(entry(call("os", "system", text("true")))), "it holds a Python object, os.system"),
    "a function of a long name": (zipped(entry(call("os\x1b", "x" * 10_000, NONE))), "it holds a Python object, os\\x1b.xxx"),
    "a function of pickle's": (zipped(entry(call("torch.hub", "load", text("x")))), "made by torch.hub.load"),
    # of before PyTorch 1.6
    "legacy, larger than the file": (
        legacy(entry(tensor(storage(10**10, legacy=True), 0, (10**10,), (1,)))),
        "it declares tensors that are larger than the file",
    ),
    "legacy, part of another": (
        legacy(
            entry(
                tensor(
                    many(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), number(4), EMPTY_TUPLE) + b"Q", 0, (), ()
                )
            )
        ),
        "load it once and save it again",
    ),
    "legacy, many keys": (
        legacy(entry(NONE), EMPTY_LIST + MARK + NONE * 1_000 + b"e"),
        "it declares tensors that are larger than the file",
    ),
    "legacy, 4 GB of text": (legacy(b"X" + struct.pack("<I", 4_000_000_000)), "expected 4000000000 bytes in a unicodestring4"),
    "tar": (_tar, "it does not begin as torch.save begins a file"),
    "an empty file": (lambda path: path.write_bytes(b""), "it does not begin as torch.save begins a file"),
    "a text": (lambda path: path.write_bytes(b"\x80\x02N."), "it does not begin as torch.save begins a file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_before_torch_reads_it(tmp_path: Path, kind: str) -> None:
    make, said = HOSTILE[kind]
    make(tmp_path / "w.pt")
    with pytest.raises(ImplausibleFile) as problem:
        check_torch_file(tmp_path / "w.pt")
    assert said in str(problem.value)
    assert str(problem.value).isprintable()
    assert len(str(problem.value)) < 250


# --- what kdbench does with them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("kind", ["bytes of a number", "a tuple of tuples as a name", "mappings of mappings", "a hole", "a function"])
def test_a_hostile_file_of_weights_is_a_mistake_in_one_line(kdbench: Kdbench, kind: str, role: str) -> None:
    make, said = HOSTILE[kind]
    make(Path("w.pt"))
    student = {"name": "tiny_cnn", "width": 4, "weights": "w.pt"}
    ended = run(kdbench, {"teacher.weights": "w.pt"} if role == "teacher" else {"students": [student]})
    assert_mistake(ended, "w.pt: not a safetensors file, nor a torch file of plain tensors (", said)


@pytest.mark.parametrize(
    "kind", ["compressed", "bytes of a number", "bytes again and again", "sets again and again", "a hole", "lists of lists"]
)
def test_a_hostile_file_takes_little_memory(tmp_path: Path, kind: str) -> None:
    make, said = HOSTILE[kind]
    make(tmp_path / "w.pt")
    imports = "from pathlib import Path; from kdbench.models.weight_files import read_weights"
    memory, told = measured(imports, "read_weights(Path(sys.argv[1]), {})", tmp_path / "w.pt")
    assert said in told
    assert memory < MOST_MEMORY_KB


def test_a_hostile_checkpoint_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HOSTILE["bytes of a number"][0](tmp_path / "checkpoint.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    assert load_checkpoint(tmp_path / "checkpoint.pt") is None


# --- ordinary files --------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))
    made[4].weight = made[3].weight
    return made


def trained() -> dict[str, Any]:
    """A checkpoint as scripts leave it."""
    model = network()
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters()}], betas=(0.8, 0.9))
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "epoch": 3}


def with_attribute(value: Tensor) -> Tensor:
    value.group = "no_decay"  # type: ignore[attr-defined]
    return value


WHOLE = torch.arange(24.0).view(2, 3, 4)
ORDINARY: dict[str, Callable[[], Any]] = {
    "weights": lambda: network().state_dict(),
    "checkpoint": trained,
    "Lightning": lambda: {
        "epoch": 1,
        "pytorch-lightning_version": "2.5",
        "state_dict": network().state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "best_k_models": {"a.ckpt": 0.5}}},
        "hparams": {"lr": 1e-3, "betas": (0.9, 0.99), "names": ["a", "b"], "none": None},
    },
    "timm": lambda: {"state_dict": network().state_dict(), "args": argparse.Namespace(lr=0.1, mean=None, opt="sgd"), "version": 2},
    "element types": lambda: {
        str(dtype): torch.zeros(3).to(dtype)
        for dtype in (
            *(torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.int16, torch.int32, torch.complex64),
            *(torch.complex128, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
        )
    },
    "views": lambda: {"whole": WHOLE, "part": WHOLE[1, 1:], "turned": WHOLE.permute(2, 0, 1), "step": WHOLE[:, ::2], "none": WHOLE[:0]},
    "expanded": lambda: {"bias": torch.ones(1).expand(1000), "mask": torch.ones(1, 1, 50, 50).expand(8, 12, 50, 50)},
    "scalars and nothing": lambda: {"scalar": torch.tensor(3), "empty": torch.zeros(0), "empty too": torch.zeros(0, 10**6)},
    "parameters": lambda: {"plain": nn.Parameter(torch.ones(3)), "with attribute": with_attribute(nn.Parameter(torch.ones(3)))},
    "a tensor with an attribute": lambda: {"w": with_attribute(torch.ones(3))},
    "a list": lambda: [torch.ones(2), (torch.zeros(1),)],
    "values": lambda: {
        "x": [b"bytes", bytearray(b"more"), bytearray(), {1, "a"}, Counter("abca"), OrderedDict(a=1), torch.Size([1, 2]), 1 + 2j],
        "y": [torch.device("cuda", 1), torch.device("cpu"), torch.float16, torch.strided, -5, 2**40, 10**30, 1e300, True, None, "ü\n"],
        0: {(1, "a"): 2, -1: 3, None: 4, 2.5: 6},
    },
}
CONJUGATED = {"w": torch.ones(2, dtype=torch.complex64).conj()}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and type(a) is type(b)
        ours, theirs = (tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for tensor in (a, b))
        return same and ours.equal(theirs)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_file_is_read(tmp_path: Path, kind: str, old: bool) -> None:
    content = ORDINARY[kind]()
    if old and kind == "element types":
        content = {name: value for name, value in content.items() if "uint16" not in name and "uint32" not in name and "uint64" not in name}
        content = {name: value for name, value in content.items() if "float8" not in name}  # torch.load can't read these
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    check_torch_file(tmp_path / "w.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert _same(torch.load(tmp_path / "w.pt", weights_only=True), content)


@pytest.mark.parametrize("content", [CONJUGATED, {"w": torch.ones(2)}])
def test_a_file_from_memory_and_one_without_checksums_are_read(tmp_path: Path, content: Any) -> None:
    buffer = io.BytesIO()
    crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, buffer)
    finally:
        torch.serialization.set_crc32_options(crc)
    (tmp_path / "w.pt").write_bytes(buffer.getvalue())
    check_torch_file(tmp_path / "w.pt")


def test_a_mapping_of_python_2_is_read(tmp_path: Path) -> None:
    pairs = EMPTY_LIST + MARK + EMPTY_LIST + MARK + text("w") + tensor(ONE, 0, (4,), (1,)) + b"e" + b"e"
    zipped(call("collections", "OrderedDict", pairs))(tmp_path / "w.pt")
    check_torch_file(tmp_path / "w.pt")
    loaded = torch.load(tmp_path / "w.pt", weights_only=True)
    assert list(loaded) == ["w"]
    assert loaded["w"].tolist() == [0.0] * 4


def test_a_truncated_file_may_be_incomplete(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "w.pt")
    os.truncate(tmp_path / "w.pt", (tmp_path / "w.pt").stat().st_size - 1)
    with pytest.raises(ImplausibleFile, match="it may be incomplete"):
        check_torch_file(tmp_path / "w.pt")


def test_a_torchscript_archive_is_named(tmp_path: Path) -> None:
    zipped(NONE, {"constants.pkl": b""})(tmp_path / "w.pt")
    with pytest.raises(ImplausibleFile, match="it is a TorchScript archive; save its weights with"):
        check_torch_file(tmp_path / "w.pt")


def test_the_checkpoint_of_a_training_is_read(tmp_path: Path) -> None:
    state = {**trained(), "random": torch.get_rng_state(), "order": {"rows": list(range(1000))}}
    save_checkpoint(state, tmp_path / "checkpoint.pt")
    assert _same(load_checkpoint(tmp_path / "checkpoint.pt"), state)


def test_tensors_are_not_read_to_be_checked(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100_000_000)}, tmp_path / "w.pt")
    imports = "from pathlib import Path; from kdbench.models.torch_files import check_torch_file"
    memory, said = measured(imports, "check_torch_file(Path(sys.argv[1]))", tmp_path / "w.pt")
    assert said == ""
    assert memory < 50_000


def test_twenty_thousand_tensors_are_within_the_bounds(tmp_path: Path) -> None:
    torch.save({f"a.module.of.the.network.{number}": torch.zeros(1) for number in range(20_000)}, tmp_path / "w.pt")
    check_torch_file(tmp_path / "w.pt")
