"""Files and JSON that somebody else may have written: regular files only, and no more of them than is plausible.

Reading a pipe waits for whoever writes to it, reading a device may never end, and a file of `/proc` says that it has no bytes. What is
opened here is a regular file, and what is read of it is bounded by what arrives, not by what it says of itself.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

_BLOCK = 1 << 16
LARGEST_SAFETENSORS_HEADER = 4_000_000  # bytes of a file's description: 30,000 tensors
DEEPEST = 50  # levels of lists and objects in JSON; what kdbench writes has five

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
        ImplausibleFile: it is no regular file, or has more than `most` bytes.
        OSError: there is none, or it can't be read.
    """
    pieces: list[bytes] = []
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        room = most + 1 if size <= most else 0
        while room and (piece := file.read(min(room, max(size + 1, _BLOCK)))):
            pieces.append(piece)
            room -= len(piece)
    if not room:
        raise ImplausibleFile(path, f"it has more than {_bytes(most)}")
    return b"".join(pieces)


def parse_json(content: bytes | str) -> Any:
    """The value that JSON stands for.

    Raises:
        ValueError: it is not JSON, not UTF-8, holds a number of thousands of digits, or has more than `DEEPEST` levels.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise _too_deep() from None
    brackets = (b"[", b"{") if isinstance(content, bytes) else ("[", "{")
    if sum(map(content.count, brackets)) > DEEPEST:  # type: ignore[arg-type]
        _check_depth(value)
    return value


def check_safetensors(path: Path) -> None:
    """Look at what a safetensors file declares, before anything is made from it or its content is hashed.

    Raises:
        ImplausibleFile: it is no regular file, or its header is none, is too long, or tells of more or fewer bytes than the file has.
        OSError: there is none, or it can't be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LARGEST_SAFETENSORS_HEADER, size - 8):
            raise ImplausibleFile(path, "it is not a safetensors file")
        header = file.read(length)
    try:
        ends = [entry["data_offsets"][1] for name, entry in parse_json(header).items() if name != "__metadata__"]
        complete = max(ends, default=0) == size - 8 - length
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise ImplausibleFile(path, "it is not a safetensors file") from None
    if not complete:
        raise ImplausibleFile(path, "it does not have the length that its header declares")


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
