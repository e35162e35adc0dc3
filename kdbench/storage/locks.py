"""Locks between processes: files that the operating system lets go of when their holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from kdbench.bounded import ImplausibleFile, regular_descriptor
from kdbench.errors import UserError, not_written

_LONGEST_NUMBER = 20  # digits of the id of a process


class Held(Exception):
    """Somebody else holds the lock. `holder`: "process 123", or as much of that as is known."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock alone."""
    try:
        with os.fdopen(regular_descriptor(path, os.O_RDWR), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, ImplausibleFile):
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock alone, or with others that share it.

    Raises Held where it is taken, unless `wait`, UserError where something else stands in its place, RunFailed where it can't be written.
    """
    with _opened(path) as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise Held(f"process {file.read(_LONGEST_NUMBER).strip() or 'unknown'}") from None
        if not shared:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def _opened(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.fdopen(regular_descriptor(path, os.O_RDWR | os.O_CREAT), "r+")
    except ImplausibleFile as error:
        raise UserError(f"the lock {path} can't be taken: {error.strerror}; remove it") from None
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"the lock {path} can't be taken: {path.parent} is no folder; move away what is in its place") from None
    except OSError as error:
        raise not_written(error, path) from error
