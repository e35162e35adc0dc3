"""Files and JSON that somebody else may have written: regular files only, and no more of them than is plausible.

Reading a pipe waits for whoever writes to it, reading a device may never end, and a file of `/proc` says that it has no bytes. What is
opened here is a regular file, and what is read of it is bounded by what arrives, not by what it says of itself.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK = 1 << 16
_MOST_UNDECLARED = 16_000_000  # bytes beyond those that a file says it has: a file of /proc says 0, a journal may grow while it is read
_SMALL = 100_000_000  # bytes of a file whose holes don't matter
_MOST_EXTENTS = 100_000  # pieces of a file that are looked at in search of holes
LARGEST_SAFETENSORS_HEADER = 4_000_000  # bytes of a file's description: 30,000 tensors
LONGEST_NAME = 1_000  # characters of a tensor's name; timm's longest has 60
MOST_DIMENSIONS = 64  # of a tensor, as PyTorch's own loops have
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}  # of an element; safetensors itself knows and checks a few types more
DEEPEST = 50  # levels of lists and objects in JSON; what kdbench writes has five

# Of a zip's list of files, the central directory. zipfile makes half a kilobyte of memory from each entry.
LARGEST_DIRECTORY = 16_000_000  # bytes
MOST_MEMBERS = 150_000
LONGEST_FIELD = 1_000  # bytes of a name, a comment, or the extra fields; zipfile's time for the latter grows with the square
_ENTRY = b"PK\x01\x02"  # before each, PKWARE's APPNOTE 6.3.10, section 4.3.12
_ENTRY_BYTES = 46  # without the three fields, whose lengths are at 28

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class ImplausibleFile(OSError):
    """What lies at a path is no regular file, or is longer than such a file can be. `strerror` says what it is."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(errno.EINVAL, problem, str(path))

    def __str__(self) -> str:
        return str(self.strerror)


def open_regular(path: Path) -> BufferedReader:
    """A regular file, opened for reading in binary mode. It is not waited for.

    Raises:
        ImplausibleFile: it is a folder, a pipe, a socket, a device, or a link that leads back to itself.
        OSError: there is none, or it can't be opened.
    """
    return os.fdopen(regular_descriptor(path, os.O_RDONLY), "rb")


def regular_descriptor(path: Path, flags: int) -> int:
    """A regular file, opened with the `flags` of `os.open`. Raises what `open_regular` raises."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a socket, or a pipe that nobody reads; a folder, asked for writing
            raise ImplausibleFile(path, _kind(os.stat(path).st_mode)) from None
        if error.errno == errno.ELOOP:
            raise ImplausibleFile(path, "it is a circle of symbolic links") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise ImplausibleFile(path, _kind(mode))


def _kind(mode: int) -> str:
    kind = next((kind for test, kind in _KINDS if test(mode)), "something else")
    return f"it is {kind}, expected a regular file"


def read_file(path: Path, most: int) -> bytes:
    """The content of a regular file.

    Args:
        path: the file.
        most: the bytes that it may have.

    Raises:
        ImplausibleFile: it is no regular file, has more than `most` bytes, or many more than it says that it has.
        OSError: there is none, or it can't be read.
    """
    pieces: list[bytes] = []
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        room = 0
        if size <= most:
            most = min(most, size + _MOST_UNDECLARED)
            room = most + 1
        while room and (piece := file.read(min(room, max(size + 1, _BLOCK)))):
            pieces.append(piece)
            room -= len(piece)
    if not room:
        raise ImplausibleFile(path, f"it has more than {_bytes(most)}")
    return b"".join(pieces)


def check_stored(path: Path) -> None:
    """A file of a few kilobytes on disk may be 50 GB of nothing, which takes as much time and memory to read as if they were there.

    Raises:
        ImplausibleFile: most of a large file is a hole.
        OSError: there is none, or it can't be read.
    """
    with open_regular(path) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        if size > _SMALL and _stored(descriptor, size // 2) < size // 2:
            raise ImplausibleFile(path, f"it has {size / 1e9:.2f} GB, most of which is a hole in the file")


def _stored(descriptor: int, enough: int) -> int:
    """Bytes of a file that are no holes, counted until there are enough. File systems without holes say that all are stored."""
    stored = place = 0
    for _ in range(_MOST_EXTENTS):
        try:
            begin = os.lseek(descriptor, place, os.SEEK_DATA)
            place = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError:  # ENXIO: there is only a hole from here on
            break
        stored += place - begin
        if stored >= enough:
            break
    return stored


def parse_json(content: bytes | str, most: int | None = None) -> Any:
    """The value that JSON stands for.

    Args:
        content: the text.
        most: the values that it may hold, for content so long that its values would take much more memory than the text: an empty list
            is three bytes of text and sixty of memory. They are counted before it is parsed, and a comma in a text counts as another one.

    Raises:
        ValueError: it is not JSON, not UTF-8, holds a number of thousands of digits, more than `DEEPEST` levels or more than `most` values.
    """
    text = isinstance(content, str)
    brackets = _count(content, ("[", "{") if text else (b"[", b"{"))
    if most is not None and brackets + _count(content, (",",) if text else (b",",)) >= most:
        raise ValueError(f"it holds more than {most:,} values")
    try:
        value = json.loads(content)
    except RecursionError:
        raise _too_deep() from None
    if brackets > DEEPEST:
        _check_depth(value)
    return value


def _count(content: Any, marks: tuple[object, ...]) -> int:
    return sum(map(content.count, marks))


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """A zip, opened for reading once its list of files is known to be of plausible size.

    Which part of a file is its list of files is a matter of interpretation: a file may have several records that say it, and Python's
    versions prefer different ones. So what zipfile itself reads is bounded, not what a record says.

    Args:
        file: a regular file; stays open when the zip is closed.

    Raises:
        zipfile.BadZipFile, NotImplementedError, ValueError: it is no zip, or its list is longer than the bounds of this module.
    """
    source = _ZipSource(file)
    archive = zipfile.ZipFile(source)
    source.opened = True
    return archive


class _ZipSource:
    """A file as zipfile reads it. Until `opened`, nothing is read but the list of files and what tells its place."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.opened = False

    def read(self, size: int = -1) -> bytes:
        if self.opened:
            return self._file.read(size)
        content = self._file.read(LARGEST_DIRECTORY + 1 if size < 0 else min(size, LARGEST_DIRECTORY + 1))
        if len(content) > LARGEST_DIRECTORY or size > LARGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"its list of files is longer than {_bytes(LARGEST_DIRECTORY)}")
        if content.startswith(_ENTRY) and len(content) >= _ENTRY_BYTES:
            _check_directory(content)
        return content


def _check_directory(content: bytes) -> None:
    for number, lengths in enumerate(_field_lengths(content)):
        if number >= MOST_MEMBERS:
            raise zipfile.BadZipFile(f"it has more than {MOST_MEMBERS:,} files")
        if max(lengths) > LONGEST_FIELD:
            raise zipfile.BadZipFile(
                f"a name or a field in its list of files has {max(lengths):,} bytes, expected at most {LONGEST_FIELD:,}"
            )


def _field_lengths(content: bytes) -> Iterator[tuple[int, int, int]]:
    """The bytes of name, extra fields and comment, of entry after entry of a zip's list of files, as zipfile goes through it."""
    place = 0
    while len(content) - place >= _ENTRY_BYTES:
        lengths = struct.unpack_from("<HHH", content, place + 28)
        yield lengths
        place += _ENTRY_BYTES + sum(lengths)


def check_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Look at what a safetensors file declares, before anything is made from it or its content is hashed.

    Returns:
        The shapes of its tensors by name.

    Raises:
        ImplausibleFile: it is no regular file, or its header is none, is too long, or tells of more or fewer bytes than the file has.
        OSError: there is none, or it can't be read.
    """
    with open_regular(path) as file:
        try:
            return tensor_shapes(file.read, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            raise ImplausibleFile(path, str(error)) from None


def tensor_shapes(read: Callable[[int], bytes], size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file by name, of which its header alone is read.

    The format (https://github.com/huggingface/safetensors#format): 8 bytes of the header's length; the header, a JSON object with type,
    shape and place of each tensor; the tensors, one after the other.

    Args:
        read: gives the next so many bytes from the beginning of the file, or fewer at its end.
        size: the bytes of the file.

    Raises:
        ValueError: it is no such file, or the header is too long or tells of more or fewer bytes than the file has. The message says it.
    """
    length = int.from_bytes(read(8), "little")
    if not 2 <= length <= size - 8:
        raise ValueError("it is not a safetensors file")
    if length > LARGEST_SAFETENSORS_HEADER:
        limit = LARGEST_SAFETENSORS_HEADER // 10**6
        raise ValueError(f"it is not a safetensors file: it declares a header of {length} bytes, expected at most {limit} MB")
    try:
        header: dict[str, Any] = parse_json(read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: _shape(entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in entries.items()}
        places = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("it is not a safetensors file") from None
    if long := next((name for name in shapes if len(name) > LONGEST_NAME), None):
        raise ValueError(f"a tensor's name has {len(long):,} characters, expected at most {LONGEST_NAME:,}")
    ends = [0, *(end for _, end in places)]
    if [begin for begin, _ in places] != ends[:-1] or ends[-1] != size - 8 - length:
        raise ValueError("it does not have the length that its header declares")
    return shapes


def _shape(dtype: str, shape: list[int], begin: int, end: int) -> tuple[int, ...]:
    """Raises ValueError or TypeError where a tensor is declared in a way that makes no sense."""
    numbers = (*shape, begin, end)
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(shape) > MOST_DIMENSIONS:
        raise ValueError
    bits = _BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != (end - begin) * 8:
        raise ValueError
    return tuple(shape)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [part for whole in level for part in _parts(whole)]
        if not level:
            return
    raise _too_deep()


def _parts(value: Any) -> list[Any]:
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [part for part in parts if isinstance(part, list | dict)]


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {DEEPEST} levels deep")


def _bytes(number: int) -> str:
    return f"{number / 1e6:g} MB" if number >= 1_000_000 else f"{number / 1e3:g} kB"
