"""Files below a local folder: whole or not there, and on disk before a call returns."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kdbench.bounded import check_safetensors, open_regular, read_file
from kdbench.errors import UnreadableFile, UserError, not_written, printable
from kdbench.storage.object_store import LARGEST_FILE

NOT_WRITABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP}
)
_UNLOOKED = 4_000_000  # bytes of a file that any memory holds: it is read, and whoever reads it sees what it is
# What record files and seals are called, whatever a label is called. A folder of such a name stands where one of them belongs.
_RECORD_NAME = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}\.parquet|compacted-[0-9a-f]{32}\.parquet|[0-9A-HJKMNP-TV-Z]{26}-[0-9a-f]{32}\.json")
NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})


def stands_for_records(name: str) -> bool:
    """Whether a file of that name would be one of records; a folder of that name is none, and a reader has to say so."""
    return _RECORD_NAME.fullmatch(name) is not None


def file_sha256(path: Path) -> str:
    """In hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_path(path: str | Path, where: str) -> Path:
    """A path that a user wrote, with a leading `~` replaced; whether something is there is not asked.

    Args:
        path: The path as it was written.
        where: The key, option or variable that it comes from, for the message.

    Raises:
        UserError: There is no such user, the path leads round in a circle of symbolic links, or no file system takes it.
    """
    written = str(path)
    try:
        place = Path(written).expanduser()
    except RuntimeError as error:
        user = written.split("/")[0]
        reason = "this user has no home folder" if user == "~" else f"there is no user {user[1:]!r} on this machine"
        raise UserError(f"{where}: {printable(written):.200}: {reason}; write the path in full") from error
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except OSError as error:
        reason = "a circle of symbolic links" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise UserError(f"{where}: {printable(written):.200}: {reason}") from error
    except ValueError as error:  # a null byte, or a character that no file name can hold
        raise UserError(f"{where}: {written!r:.200} is not a path") from error
    return place


class Folder:
    """`object_store.Files` in a folder, which need not exist yet. Paths are relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.name = str(self.root)

    def create(self, path: str, data: bytes) -> None:
        """Write a new file. Raises FileExistsError where there is one, and what `replace` raises."""
        if self.exists(path):
            raise FileExistsError(path)
        self.replace(path, data)

    def replace(self, path: str, data: bytes) -> None:
        """Write a file in one step. Raises UserError where the folder can't be written, DiskFull where there is no space."""
        self._replace(path, lambda file: file.write(data))

    def take(self, path: str, local: Path) -> None:
        """As `replace`, with the content of a file of any size."""
        with local.open("rb") as source:
            self._replace(path, lambda file: shutil.copyfileobj(source, file))

    def _replace(self, path: str, write: Callable[[BinaryIO], object]) -> None:
        target = self.root / path
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            _write(temporary, target, write)
        except OSError as error:
            raise self._explained(error, target) from error

    def read(self, path: str, most: int = LARGEST_FILE) -> bytes:
        """Raises FileNotFoundError, and UnreadableFile for anything but a regular file of at most `most` bytes. Nothing is waited for.

        A large safetensors file has the length that its header declares, or is not read: a hole in a file may be longer than the memory.
        """
        place = self.root / path
        try:
            if place.suffix == ".safetensors" and place.stat().st_size > _UNLOOKED:
                check_safetensors(place)
            return read_file(place, most)
        except FileNotFoundError:
            if not place.is_symlink():
                raise
            reason = "it is a link to nothing"
        except OSError as error:
            reason = error.strerror or str(error)
        raise UnreadableFile(f"{place} can't be read: {reason}")

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()

    def find(self, prefix: str) -> list[str]:
        """The paths of all files in the folder `prefix`, in any order, and of folders where there should be a file of records.

        Raises UserError where this is a file itself, or the root is.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.name} is a file, expected a results folder")
        top = self.root / prefix
        if top.exists() and not top.is_dir():
            raise UserError(f"{top} is a file, expected a folder; restore the folder from a copy, or move the file away")
        start = len(str(self.root)) + 1
        return [
            f"{parent}/{name}"[start:] for parent, folders, names in os.walk(top) for name in (*names, *filter(stands_for_records, folders))
        ]

    def remove(self, path: str, patient: bool = True) -> None:
        """No error where there is no such file."""
        (self.root / path).unlink(missing_ok=True)

    def _explained(self, error: OSError, path: Path) -> Exception:
        if error.errno in NOT_WRITABLE or isinstance(error, PermissionError):
            return UserError(
                f"the results folder {self.name} can't be written ({error.strerror or error}): "
                "choose another with --results DIR or the variable KDBENCH_RESULTS"
            )
        return not_written(error, path)


def _write(temporary: Path, target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Survives a power cut: the content and every folder entry that leads to it are on disk before this returns."""
    folder = target.parent
    new_folders = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _removed_on_failure(lambda: temporary.unlink(missing_ok=True)):
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    for changed in dict.fromkeys([folder, *(new.parent for new in new_folders)]):
        _sync_folder(changed)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:  # some network file systems have no such call; their rename is durable or nothing can be done
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _removed_on_failure(remove: Callable[[], None]) -> Iterator[None]:
    """Calls `remove` when the body is left by an exception, an interrupt from the keyboard included."""
    try:
        yield
    except BaseException:
        remove()
        raise
