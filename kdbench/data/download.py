"""Fetching a data set's file so that a killed or damaged download leaves no half file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from rich.progress import Progress

from kdbench.errors import UserError

_SECONDS_WITHOUT_AN_ANSWER = 30
_CHUNK = 1 << 18


class NotFetched(Exception):
    """No address had the file whole; the message says what each gave."""


_FORBIDDEN: ContextVar[str | None] = ContextVar("forbidden", default=None)


@contextmanager
def without_downloads(reason: str = "a dry run downloads nothing") -> Iterator[None]:
    """Inside, nothing is downloaded, for a reason that errors give."""
    token = _FORBIDDEN.set(reason)
    try:
        yield
    finally:
        _FORBIDDEN.reset(token)


def forbidden() -> str | None:
    """Why nothing may be downloaded now, None where it may."""
    if reason := _FORBIDDEN.get():
        return reason
    return None if allowed() else "KDBENCH_OFFLINE forbids downloads"


def allowed() -> bool:
    """Whether a run may download."""
    return not os.environ.get("KDBENCH_OFFLINE")


def fetch(addresses: Iterable[str], destination: Path, most: int, check: Callable[[Path], object], progress: Progress) -> Path:
    """Download to a temporary name, `check` the content, and only then give it its name. Returns `destination`.

    addresses: of the same file, tried in turn. most: the bytes that it may have. check: raises UserError for a file that is not whole.
    Raises NotFetched, and OSError where the file can't be stored.
    """
    failures = []
    for address in addresses:
        with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
            arrived = Path(scratch) / destination.name
            try:
                _copy(address, arrived, most, progress)
                check(arrived)
            except (URLError, HTTPException, TimeoutError, ConnectionError, UserError) as error:
                failures.append(f"{address}: {error}")
                continue
            return arrived.replace(destination)
    raise NotFetched("; ".join(failures))


def _copy(url: str, destination: Path, most: int, progress: Progress) -> None:
    """Raises UserError for more than `most` bytes, of which no more are stored."""
    with urlopen(url, timeout=_SECONDS_WITHOUT_AN_ANSWER) as response, destination.open("wb") as out:
        length = response.headers.get("Content-Length")
        task = progress.add_task(destination.name, total=int(length) if length else None)
        while chunk := response.read(_CHUNK):
            if out.tell() + len(chunk) > most:
                raise UserError(f"it sends more than {most} bytes")
            out.write(chunk)
            progress.advance(task, len(chunk))
