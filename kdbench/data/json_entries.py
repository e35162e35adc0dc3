"""The entries of long lists in a JSON file, one after the other, so that a file of half a gigabyte is never in memory as a whole.

Made for one form: an object whose values are lists of objects, as COCO's annotations are. Whoever wrote the file, reading it takes bounded
memory: see `LARGEST` and `LONGEST_ENTRY`.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Collection, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from kdbench.bounded import ImplausibleFile, check_stored, open_regular
from kdbench.errors import UserError, cut, printable

LARGEST = 2_000_000_000  # bytes of a file; COCO's largest has 470 MB
LONGEST_ENTRY = 8_000_000  # characters; a polygon of a hundred thousand points has two million
_PIECE = 1 << 20  # bytes that are read at once
_SPACE = re.compile(r"[ \t\n\r]*")


def entries(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of the lists called `wanted`, each with the name of its list, in the order of the file. Other values are skipped.

    Raises:
        UserError: names the file, which can't be read, is too large, is no JSON, is no object of lists, or has an entry that is no object
            or is too long.
    """
    where = printable(str(path))
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > LARGEST:
                raise ImplausibleFile(path, f"it has {size / 1e9:.1f} GB, expected at most {LARGEST / 1e9:g} GB")
            check_stored(path)
            yield from _Reader(file, where).entries(wanted)
    except OSError as error:
        raise UserError(f"{where} can't be read: {error.strerror or error}") from error


class _Reader:
    """The text of a file from the value on that is read next, as much of it as that value needs."""

    def __init__(self, file: BufferedReader, where: str) -> None:
        self._file, self._where = file, where
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._place, self._ended = "", 0, False
        self._decode = json.JSONDecoder().raw_decode

    def entries(self, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._next() != "{":
            raise UserError(f"{self._where} must hold an object with the lists {', '.join(wanted)}")
        self._place += 1
        if self._next() == "}":
            return
        while True:
            name = self._value()
            if not isinstance(name, str):
                raise self._broken()
            self._pass(":")
            if self._next() != "[":
                self._value()
            else:
                for number, entry in enumerate(self._list()):
                    if name not in wanted:
                        continue
                    if not isinstance(entry, dict):
                        raise UserError(f"{self._where}: entry {number} of {name} is a {type(entry).__name__}, expected an object")
                    yield name, entry
            if self._next() == "}":
                return
            self._pass(",")

    def _list(self) -> Iterator[Any]:
        self._pass("[")
        if self._next() != "]":
            while True:
                yield self._value()
                if self._next() == "]":
                    break
                self._pass(",")
        self._pass("]")

    def _next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._place)
            assert match is not None, "it matches nothing, too"
            self._place = match.end()
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._read()

    def _pass(self, character: str) -> None:
        if self._next() != character:
            raise self._broken()
        self._place += 1

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self._decode(self._text, self._place)
                if end < len(self._text) or self._ended:  # else a number might go on
                    self._place = end
                    return value
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._broken(error.pos) from None
            except RecursionError:
                raise UserError(f"{self._where} is nested too deeply") from None
            except ValueError:  # a whole number of thousands of digits
                raise self._broken() from None
            if len(self._text) - self._place > LONGEST_ENTRY:
                most = f"{LONGEST_ENTRY / 1e6:g} million characters"
                raise UserError(f"{self._where} has an entry that is not valid JSON, or has more than {most}, at {self._beginning}")
            self._read()

    def _read(self) -> None:
        """Drop what was read and read on."""
        piece = self._file.read(_PIECE)
        self._ended = not piece
        try:
            self._text = self._text[self._place :] + self._utf8.decode(piece, final=self._ended)
        except UnicodeDecodeError:
            raise UserError(f"{self._where} is not valid JSON: it is not UTF-8") from None
        self._place = 0

    def _broken(self, place: int | None = None) -> UserError:
        """place: in the text that is in memory, where it is not as expected; the next character by default."""
        self._next()
        ends = (self._place if place is None else place) >= len(self._text.rstrip())
        return UserError(f"{self._where} is cut off" if ends else f"{self._where} is not valid JSON at {self._beginning}")

    @property
    def _beginning(self) -> str:
        return repr(cut(self._text[self._place : self._place + 200], 40))
