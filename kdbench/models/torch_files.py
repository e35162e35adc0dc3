"""Files of torch.save that somebody else may have written: what a file declares is looked at before torch reads it.

`torch.load(weights_only=True)` runs nobody's code, and believes the file in all else. A few hundred bytes of instructions can have it make
gigabytes: of compressed zeros, of storages and byte arrays of any length, of a tensor that is expanded, of lists of lists of lists. So a
file's instructions are gone through first. Nothing is made of them but an outline: numbers, names, tuples and lists. The tensors themselves
are not read here.

The layout of the file: https://docs.pytorch.org/docs/stable/notes/serialization.html. The instructions: Python's `pickletools`.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kdbench.bounded import LONGEST_NAME, MOST_DIMENSIONS, ImplausibleFile, check_stored, open_regular, open_zip
from kdbench.errors import cut, printable, shown

# A tensor in a state_dict takes 32 instructions and 150 bytes.
LARGEST_PICKLE = 16_000_000  # bytes of instructions
MOST_INSTRUCTIONS = 1_000_000  # torch itself takes a second for so many, if they are simple ones
_CALL = 2  # how many simple instructions a call counts more than one
MOST_VALUES = 1_000_000  # in lists and mappings, one that lies in several others counted in each
DEEPEST = 50  # levels of lists and mappings
LARGEST_EXPANDED = 16_000_000  # bytes that a tensor of fewer stored bytes may stand for
_LONGEST_KEY = 10  # values in a tuple that is a key: its hash is computed each time
_LARGEST_KEY = 1 << 62  # of whole numbers as keys: above 2^61 - 2, a file can give any number of them the same hash

HOLDS_OBJECT = "it holds a Python object"  # how a message begins that says so
_ZIP = b"PK\x03\x04"
_END, _END_64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"  # PKWARE's APPNOTE 6.3.10, sections 4.3.14 to 4.3.16
_MAGIC = 0x1950A86A20F9469CFC6C  # the first value in a file of before PyTorch 1.6
_SAVE_AGAIN = "torch.save(torch.load(path, weights_only=True), path)"

_ITEM_BYTES = {
    "UntypedStorage": 1,
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}  # of dense tensors; quantized ones have storages of their own
_OF_STORAGE = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_OF_TENSOR = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_OF_PLAIN_VALUES = ("torch.Size", "torch.device", "torch.serialization._get_layout", "builtins.complex")
_OF_MANY_VALUES = ("builtins.set", "collections.Counter")
_OF_TEXT = ("_codecs.encode", "builtins.bytearray")
_OF_TEXT_AS = ((), ("latin1",), ("latin-1",))  # other encodings take a time that grows with the square of the text's length
_NAMESPACE = "argparse.Namespace"  # the arguments of a script, which lie beside the weights in timm's checkpoints
_CONSTANTS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"})
_VALUES: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def check_torch_file(path: Path) -> None:
    """Look at what a file of `torch.save` declares, before `torch.load` reads it.

    Raises:
        ImplausibleFile: it is no regular file, no such file, or one that would take more time or memory than its tensors do.
        OSError: there is none, or it can't be read.
    """
    check_stored(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.read(len(_ZIP)) == _ZIP:
                _check_zip(file, size)
            else:
                _check_legacy(file, size)
        except (IndexError, KeyError, TypeError, AttributeError):
            raise ImplausibleFile(path, "its instructions are damaged") from None
        except (ValueError, NotImplementedError, OverflowError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
            raise ImplausibleFile(path, str(error)) from None


# --- the two kinds of file -------------------------------------------------------------------------------------------


def _check_zip(file: BinaryIO, size: int) -> None:
    _check_end(file, size)
    with open_zip(file) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 0x1 for member in members):
        raise ValueError("its content is compressed or encrypted, which torch.save never does")
    places = {member.orig_filename.lower(): member for member in members}  # torch looks names up without regard to case
    if len(places) < len(members):
        raise ValueError("a part of it is listed twice")
    if sum(member.file_size for member in members) > size:
        raise ValueError("its parts overlap")
    folder = next(iter(places), "").partition("/")[0]
    if f"{folder}/constants.pkl" in places:
        raise ValueError("it is a TorchScript archive; save its weights with torch.save(torch.jit.load(path).state_dict(), ...)")
    instructions = places.get(f"{folder}/data.pkl")
    if instructions is None:
        raise ValueError("it has no data.pkl")

    def stored_bytes(identity: Sequence[Any]) -> int:
        key = str(identity[2])
        stored = places.get(f"{folder}/data/{key}".lower()) if key.isascii() else None
        if stored is None:
            raise ValueError(f"the content of tensor storage {shown(key)} is missing")
        return stored.file_size

    _Outline(stored_bytes).checked(BytesIO(_content(file, instructions)))


def _check_end(file: BinaryIO, size: int) -> None:
    """torch and Python look for a zip's list of files in different ways. Where it is just before the end, they find the same one."""
    tail_size = min(size, 56 + 20 + 22)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    end = tail[-22:]
    if len(end) == 22 and end.startswith(_END) and end.endswith(b"\0\0"):
        length, begin = struct.unpack_from("<II", end, 12)
        place = size - 22
        if tail[-42:-38] == _LOCATOR and len(tail) == 98 and tail.startswith(_END_64):
            place = size - 98
            length, begin = struct.unpack_from("<QQ", tail, 40)
            (told,) = struct.unpack_from("<Q", tail, 98 - 42 + 8)
        else:
            told = place if tail[-42:-38] != _LOCATOR else -1
        if told == place == begin + length:
            return
    raise ValueError("it does not end as torch.save ends a file; it may be incomplete")


def _content(file: BinaryIO, member: zipfile.ZipInfo) -> bytes:
    """As torch reads it, without a look at the checksum, which `torch.save` may have been told to leave out."""
    if member.file_size > LARGEST_PICKLE:
        raise ValueError(f"its instructions have {member.file_size / 1e6:.1f} MB, expected at most {LARGEST_PICKLE / 1e6:g} MB")
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(_ZIP):
        raise ValueError("its data.pkl is not where its list of files says")
    file.seek(sum(struct.unpack_from("<HH", header, 26)), os.SEEK_CUR)
    return file.read(member.file_size)


def _check_legacy(file: BinaryIO, size: int) -> None:
    """Five values of instructions: a magic number, a version, the machine's facts, the content, the storages' keys. Then the storages.

    A few files of before PyTorch 0.4 have storages that are parts of others: they are refused.
    """
    file.seek(0)
    beginning = file.read(LARGEST_PICKLE)
    content = BytesIO(beginning)
    storages: dict[str, int] = {}

    def stored_bytes(identity: Sequence[Any]) -> int:
        _, kind, key, _, count, part_of = identity
        if part_of is not None:
            raise ValueError(f"it has a format of before PyTorch 0.4; load it once and save it again: {_SAVE_AGAIN}")
        return storages.setdefault(key, _count_of(count) * _item_bytes(kind))

    outline = _Outline(stored_bytes)
    if not beginning.startswith(b"\x80") or outline.value(content) != _MAGIC:
        raise ValueError("it does not begin as torch.save begins a file")
    *_, keys = [outline.checked(content) for _ in range(4)]
    if sum(storages.values()) + content.tell() > size or len(keys) > len(storages):
        raise ValueError("it declares tensors that are larger than the file")


# --- instructions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """Something of a module, which nobody looks up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    nbytes: int
    item_bytes: int


class _Tensor:
    """A tensor that fits its storage."""


class _Opaque:
    """Any other object, of bounded size."""


class _Outline:
    """Goes through instructions as torch's own reader of them does (`torch._weights_only_unpickler`), and makes an outline of the values.

    Lists are lists. Mappings are lists of their values.
    """

    def __init__(self, stored_bytes: Callable[[Sequence[Any]], int]) -> None:
        """stored_bytes: of a storage, from what the instructions say of it: ("storage", class, key, device, number of elements)."""
        self._stored_bytes = stored_bytes
        self._storages: dict[str, _Storage] = {}
        self._instructions = self._characters = 0

    def checked(self, content: BytesIO) -> Any:
        """As `value`. Raises ValueError too where it is nested deeper, or holds more, than the bounds of this module allow."""
        value = self.value(content)
        level = [value] if isinstance(value, list | tuple) else []
        count = 0
        for _ in range(DEEPEST):
            count += sum(map(len, level))
            if count > MOST_VALUES:
                raise ValueError(f"it holds more than {MOST_VALUES:,} values, counting each list in each that it lies in")
            level = [part for whole in level for part in whole if isinstance(part, list | tuple)]
            if not level:
                return value
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")

    def value(self, content: BytesIO) -> Any:
        """The outline of the next value. Raises ValueError, IndexError, KeyError or TypeError where it is not what torch.save writes."""
        stack: list[Any] = []
        outer: list[list[Any]] = []  # the stacks around an open mark
        memo: dict[int, Any] = {}
        argument: Any
        for opcode, argument, _ in pickletools.genops(content):
            self._count(1)
            code = opcode.name
            if code in _CONSTANTS:
                stack.append(argument)
            elif code in _VALUES:
                stack.append(_VALUES[code])
            elif code in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif code in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif code in ("EMPTY_LIST", "EMPTY_DICT"):
                stack.append([])
            elif code == "MARK":
                outer.append(stack)
                stack = []
            elif code in ("TUPLE", "APPENDS", "SETITEMS"):
                items, stack = stack, outer.pop()
                _put(code, items, stack)
            elif code in ("TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "SETITEM"):
                taken = {"APPEND": 1, "SETITEM": 2}.get(code) or int(code[-1])
                items = [stack.pop() for _ in range(taken)][::-1]
                _put(code, items, stack)
            elif code == "GLOBAL":
                stack.append(_Named(cut(printable(argument.replace(" ", ".").replace("__builtin__.", "builtins.")))))
            elif code == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif code in ("REDUCE", "NEWOBJ"):
                self._count(_CALL)
                arguments = stack.pop()
                stack[-1] = self._called(stack[-1], arguments, new=code == "NEWOBJ")
            elif code == "BUILD":
                self._build(stack.pop(), stack[-1])
            elif code == "STOP":
                return stack.pop()
            elif code != "PROTO":
                raise ValueError(f"its instruction {code} is none of pickle's protocol 2; save it again without pickle_protocol")
        raise ValueError("its instructions are incomplete")

    def _count(self, instructions: int) -> None:
        self._instructions += instructions
        if self._instructions > MOST_INSTRUCTIONS:
            raise ValueError(f"it has more than {MOST_INSTRUCTIONS:,} instructions for what it holds; save the weights alone")

    def _storage(self, identity: Any) -> _Storage:
        if not isinstance(identity, tuple) or identity[0] != "storage":
            raise ValueError("it refers to something other than the storage of a tensor")
        item_bytes, stored = _item_bytes(identity[1]), self._stored_bytes(identity)
        declared = _count_of(identity[4]) * item_bytes
        if declared > stored:
            raise ValueError(f"a tensor storage is said to have {declared} bytes, and has {stored}")
        return self._storages.setdefault(identity[2], _Storage(declared, item_bytes))  # torch too reads each once

    def _called(self, function: Any, arguments: Any, new: bool) -> Any:
        """What a function is for, of those that torch.save writes for plain values and dense tensors. None is called here."""
        name = function.name if isinstance(function, _Named) else ""
        if new:
            if name == _NAMESPACE and arguments == ():
                return []
        elif name in _OF_STORAGE:
            return _tensor(name, arguments)
        elif name in _OF_TENSOR and isinstance(arguments[0], _Tensor):
            return arguments[0]
        elif (
            name == _WITH_ATTRIBUTES and arguments[0] != function and arguments[1].name in ("torch.Tensor", "torch.nn.parameter.Parameter")
        ):
            return self._called(arguments[0], arguments[2], new=False)
        elif name == "collections.OrderedDict" and len(arguments) <= 1:
            return self._ordered(*arguments)
        elif name in _OF_PLAIN_VALUES and _is_plain(arguments):
            self._count(sum(len(value) for value in arguments if isinstance(value, tuple)))
            return _Opaque()
        elif name in _OF_MANY_VALUES and len(arguments) == 1:
            self._count(len(arguments[0]))
            _check_keys(arguments[0])
            return _Opaque()
        elif name in _OF_TEXT and (not arguments or isinstance(arguments[0], str)) and arguments[1:] in _OF_TEXT_AS:
            self._characters += len(arguments[0]) if arguments else 0
            if self._characters > LARGEST_PICKLE:
                raise ValueError("it makes more bytes from its texts than it has")
            return arguments[0] if arguments else ""
        if name.startswith("torch."):
            raise ValueError(f"it holds something other than plain dense tensors, made by {name}; save the model's state_dict() alone")
        raise ValueError(f"{HOLDS_OBJECT}, {name or 'made by no function'}")

    def _ordered(self, pairs: Iterable[Sequence[Any]] = ()) -> list[Any]:
        """pairs: of names and values, as Python 2 wrote them."""
        values: list[Any] = []
        for key, value in pairs:
            _put("SETITEM", [key, value], [values])
            self._count(1)
        return values

    def _build(self, state: Any, target: Any) -> None:
        """Attributes of a mapping, such as a state_dict's versions, or of a script's arguments."""
        if not isinstance(target, list) or not isinstance(state, list):
            raise ValueError("it sets the state of something other than a mapping")
        self._count(len(state))
        target.extend(state)


def _put(code: str, items: list[Any], stack: list[Any]) -> None:
    """A new tuple of the items on top of the stack, or the items into the list or mapping on top of it."""
    if code.startswith("TUPLE"):
        stack.append(tuple(items))
        return
    if code.startswith("SETITEM"):
        _check_keys(items[::2])
        items = items[1::2]
    stack[-1].extend(items)


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        if not _is_key(key):
            what = f"a text of {len(key):,} characters" if isinstance(key, str) else "neither a text nor a plain number"
            raise ValueError(f"a name in it is {what}")


def _is_key(value: Any) -> bool:
    """Whether it is hashed at once. A tuple of tuples of tuples may take for ever."""
    if isinstance(value, tuple):
        return len(value) <= _LONGEST_KEY and not any(isinstance(part, tuple) for part in value) and all(map(_is_key, value))
    if isinstance(value, str):
        return len(value) <= LONGEST_NAME
    return value is None or isinstance(value, float | _Named) or (isinstance(value, int) and abs(value) < _LARGEST_KEY)


def _is_plain(arguments: Any) -> bool:
    """Whether these are a few plain values, or one tuple of them: a size."""
    values = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple) else arguments
    return isinstance(values, tuple) and len(values) <= MOST_DIMENSIONS and all(_is_key(value) for value in values)


def _tensor(function: str, arguments: Sequence[Any]) -> _Tensor:
    """arguments: storage, offset, sizes, strides, whether it needs a gradient, hooks, and of the third version the element's type."""
    storage, offset, sizes, strides = arguments[:4]
    if not isinstance(storage, _Storage) or len(sizes) != len(strides) or len(sizes) > MOST_DIMENSIONS:
        raise TypeError
    item = _dtype_bytes(arguments[6].name) if function.endswith("_v3") else storage.item_bytes
    counts = [_count_of(size) for size in sizes]
    last = _count_of(offset) + sum((size - 1) * _count_of(stride) for size, stride in zip(counts, strides, strict=True))
    if all(counts) and (last + 1) * item > storage.nbytes:
        raise ValueError(f"a tensor of the shape {counts} reaches beyond what is stored of it")
    if math.prod(counts) * item > max(storage.nbytes, LARGEST_EXPANDED):
        raise ValueError(f"a tensor of the shape {counts} is expanded from {storage.nbytes} bytes; save it with .clone()")
    return _Tensor()


def _dtype_bytes(name: str) -> int:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"it holds a tensor of the unknown type {name}")
    return dtype.itemsize


def _item_bytes(kind: Any) -> int:
    """Bytes of an element of a storage, by its class."""
    place, _, name = kind.name.rpartition(".")
    if place not in ("torch", "torch.storage") or name not in _ITEM_BYTES:
        raise ValueError(f"it holds something other than plain dense tensors, stored as {kind.name}; save the model's state_dict() alone")
    return _ITEM_BYTES[name]


def _count_of(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < _LARGEST_KEY:
        raise TypeError
    return value
