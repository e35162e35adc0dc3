"""An object store behind an address: whole objects, written in one request, and patience with a storage that refuses for a while.

A PUT is atomic, so there are no temporary names; `create` is a conditional PUT (If-None-Match), which the storage itself decides.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kdbench.credentials import without_secrets
from kdbench.errors import NO_SPACE, StorageFailed, UnreadableFile, UserError, not_written
from kdbench.storage.address import EXTRAS, checked_address

LARGEST_FILE = 40_000_000_000  # bytes that are read whole: predictions of 1,800 images of 512 x 512 pixels with forty classes
PATIENCE = "KDBENCH_STORAGE_PATIENCE"
PATIENCE_SECONDS = 600.0  # for how long a request that is refused is tried again
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 20.0
_PAUSES = random.Random()  # its own: trainings seed the process's, and clients with one seed would all come back at one moment
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError"})
_FINAL = frozenset({errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG})  # what the drivers make of "this request is wrong"
_CREDENTIALS = (
    "they are read from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role for s3://, "
    "GOOGLE_APPLICATION_CREDENTIALS for gs://"
)

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class Files(Protocol):
    """Files below one place, by their paths relative to it: a `Folder` or an `ObjectStore`."""

    name: str

    def create(self, path: str, data: bytes) -> None: ...

    def replace(self, path: str, data: bytes) -> None: ...

    def take(self, path: str, local: Path) -> None: ...

    def read(self, path: str, most: int = LARGEST_FILE) -> bytes: ...

    def exists(self, path: str) -> bool: ...

    def find(self, prefix: str) -> list[str]: ...

    def remove(self, path: str, patient: bool = True) -> None: ...


class ObjectStore:
    """`Files` at an address.

    Every method raises UserError where access is denied, credentials or the bucket are missing, and StorageFailed where the storage did
    not answer for `patience()` seconds.
    """

    def __init__(self, address: str) -> None:
        """Nothing is sent yet. Raises UserError for an address that can't be used, or whose driver is not installed."""
        self.name = checked_address(address)
        self.driver, root = _file_system(self.name)
        self.root = str(root).rstrip("/")  # as the driver names it: bucket/folder

    def create(self, path: str, data: bytes) -> None:
        """Write a new object. Raises FileExistsError where there is one with other content.

        One with this very content is taken for our own: the answer to an earlier try may have been lost on its way.
        """
        try:
            self._ask(lambda: self.driver.pipe_file(self._full(path), data, mode="create"))
        except FileExistsError:
            if self.read(path) != data:
                raise

    def replace(self, path: str, data: bytes, patient: bool = True) -> None:
        self._ask(lambda: self.driver.pipe_file(self._full(path), data), patient)

    def take(self, path: str, local: Path) -> None:
        """As `replace`, with the content of a file of any size."""
        self.upload(local, path)

    def read(self, path: str, most: int = LARGEST_FILE) -> bytes:
        """Raises FileNotFoundError, and UnreadableFile for an object of more than `most` bytes."""
        full = self._full(path)

        def content() -> bytes:
            try:
                found: bytes = self.driver.cat_file(full, start=0, end=most + 1)
            except FileNotFoundError:
                raise
            except Exception:  # each driver has errors of its own, and no range is a part of an empty object
                if self.driver.size(full) != 0:
                    raise
                found = b""
            return found

        read = self._ask(content, reading=True)
        if len(read) > most:
            raise UnreadableFile(f"{self.name}/{path} can't be read: it has more than {most / 1e6:g} MB")
        return read

    def exists(self, path: str) -> bool:
        exists: bool = self._ask(lambda: self.driver.exists(self._full(path)), reading=True)
        return exists

    def find(self, prefix: str) -> list[str]:
        return list(self.sizes(prefix))

    def folders(self) -> list[str]:
        """The first parts of all objects' paths, without a list of all objects."""

        def listed() -> list[str]:
            self.driver.invalidate_cache()
            found: list[dict[str, Any]] = self.driver.ls(self._full(""), detail=True)
            return [entry["name"] for entry in found if entry["type"] == "directory"]

        try:
            names = self._ask(listed, reading=True)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in names)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of every object below the folder `prefix`, by path."""

        def listed() -> dict[str, Any]:
            self.driver.invalidate_cache()
            found: dict[str, Any] = self.driver.find(self._full(prefix), detail=True)
            return found

        start = len(self.root) + 1
        return {path[start:]: facts["size"] for path, facts in self._ask(listed, reading=True).items()}

    def remove(self, path: str, patient: bool = True) -> None:
        """No error where there is none."""
        with suppress(FileNotFoundError):
            self._ask(lambda: self.driver.rm_file(self._full(path)), patient, reading=True)

    def upload(self, local: Path, path: str, patient: bool = True) -> None:
        """Write an object from a file of any size, in parts where it is large; it is there once all of it is."""
        self._ask(lambda: self.driver.put_file(str(local), self._full(path)), patient)

    def download(self, path: str, local: Path) -> None:
        """Raises FileNotFoundError. The file has its name once all of it is there."""
        local.parent.mkdir(parents=True, exist_ok=True)
        temporary = local.with_name(f".{local.name}.{os.getpid()}.tmp")
        try:
            self._ask(lambda: self.driver.get_file(self._full(path), str(temporary)), reading=True)
            temporary.replace(local)
        finally:
            temporary.unlink(missing_ok=True)

    def modified(self, path: str) -> datetime:
        """When it was written, by the storage's own clock. Raises FileNotFoundError."""

        def looked_up() -> datetime:
            self.driver.invalidate_cache()
            when: datetime = self.driver.modified(self._full(path))
            return when

        return self._ask(looked_up, reading=True)

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}".rstrip("/")

    def _ask(self, request: Callable[[], Answer], patient: bool = True, reading: bool = False) -> Answer:
        """The request's answer; tried again, with growing pauses, where the storage refuses or can't be reached."""
        begun, pause = time.monotonic(), _FIRST_PAUSE
        limit = patience() if patient else 0.0
        while True:
            try:
                return request()
            except FileExistsError:
                raise
            except Exception as error:  # each driver has errors of its own; what is not final may pass
                if isinstance(error, FileNotFoundError) and reading:
                    raise
                self._raise_final(error)
                reason = without_secrets(str(error).splitlines()[0] if str(error) else type(error).__name__)
                waited = time.monotonic() - begun
                if waited + pause > limit:
                    raise StorageFailed(
                        f"{self.name} refused for {waited:.0f} s ({reason}); what is finished is kept: "
                        "run the same command again when the storage answers"
                    ) from None  # the driver's own error may quote more than it should
                if pause == _FIRST_PAUSE:
                    log.warning("%s does not take a request (%s); it is tried again for up to %.0f s", self.name, reason, limit)
            time.sleep(pause * _PAUSES.uniform(0.8, 1.2))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _raise_final(self, error: Exception) -> None:
        """Raise UserError where trying again is of no use."""
        reason = without_secrets(str(error).splitlines()[0] if str(error) else type(error).__name__)
        if isinstance(error, PermissionError) or reason.startswith("Forbidden"):  # the latter is gcsfs's
            raise UserError(f"results {self.name}: access denied ({reason}) with the credentials that it has; {_CREDENTIALS}") from None
        if type(error).__name__ in _NO_CREDENTIALS:
            raise UserError(f"results {self.name}: no credentials; {_CREDENTIALS}") from None
        if isinstance(error, FileNotFoundError):
            raise UserError(f"results {self.name}: {reason.rstrip('.').lower()}; make it first, or name another") from None
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise not_written(error, error.filename or "a file") from error
        if type(error).__name__ == "ParamValidationError" or (isinstance(error, OSError) and error.errno in _FINAL):
            raise UserError(f"results {self.name}: the storage does not accept this: {reason}") from None
        if isinstance(error, TypeError | ValueError | AttributeError | NotImplementedError):  # a fault of ours
            raise error


def patience() -> float:
    """For how many seconds a request is tried. Raises UserError where the variable holds no such number."""
    return seconds_from(PATIENCE, PATIENCE_SECONDS, least=0.0)


def seconds_from(variable: str, default: float, least: float) -> float:
    """The seconds that an environment variable gives. Raises UserError where it gives none, or fewer than `least`."""
    given = os.environ.get(variable, "")
    try:
        seconds = float(given or default)
    except ValueError:
        seconds = -1.0
    if not least <= seconds < float("inf"):
        raise UserError(f"{variable}: expected a number of seconds, {least:g} or more, got {given!r}")
    return seconds


@cache
def _file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address and the path in it. Endpoint, region and credentials are the driver's own to find."""
    from fsspec.core import url_to_fs

    scheme = address.partition(":")[0]
    try:
        files, root = url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
    except ImportError:
        raise UserError(f"results {address}: the driver of {scheme}:// is missing: pip install 'kdbench[{EXTRAS[scheme]}]'") from None
    return files, root
