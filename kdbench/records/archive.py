"""Reading a zip that somebody else made: nothing is unpacked before its size, kind and hash are known to be plausible."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from kdbench.bounded import open_regular, open_zip, parse_json
from kdbench.errors import UserError, shown

FORMAT = 1
MANIFEST = "manifest.json"

# What is read whole is at most so long, in bytes. A record of 1,000 epochs with ten curves is 300 kB, its line in the manifest 200 bytes.
LARGEST_MANIFEST = 32_000_000
LARGEST_RECORD = 4_000_000
# What is copied piece by piece may be of any size that the disk holds, but a small archive that claims to be a large one is refused.
PLAUSIBLE_RATIO = 200  # of a file's size to its compressed size; weights and predictions compress to a half, a constant to a thousandth
PLAUSIBLE_BYTES = 100_000_000  # up to here any ratio is plausible
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # unlike bzip2 and LZMA, they are unpacked in pieces of bounded size
_PIECE = 1 << 20

_NOT_OURS = "is not an archive that kdbench results export wrote"


class Archive:
    """An open archive whose manifest agrees with its content. Use it in a `with` statement.

    hashes: the SHA-256 of each file, in hex, by name, without the manifest.
    """

    hashes: Mapping[str, str]

    def __init__(self, path: Path) -> None:
        """Read the manifest alone. Raises UserError where `path` is no archive of kdbench's, is damaged, or claims implausible sizes."""
        self.path = path
        with _explained(path):
            self._file = open_regular(path)
            try:
                self._zip = open_zip(self._file)
                self._members = {info.filename: info for info in self._zip.infolist()}
                self._check_members()
                self.hashes = self._listed()
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._zip.close()
        self._file.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all files, unpacked."""
        return sum(info.file_size for info in self._members.values())

    def size(self, name: str) -> int:
        """Bytes of a file, unpacked."""
        return self._members[name].file_size

    def read(self, name: str, most: int) -> bytes:
        """A whole file. Raises UserError where it is longer than `most` bytes, or was changed after it was exported."""
        self._check_size(name, most)
        return b"".join(self.pieces(name))

    def pieces(self, name: str) -> Iterator[bytes]:
        """A file piece by piece. Raises UserError after the last one where the file was changed after it was exported."""
        digest = hashlib.sha256()
        for piece in self._unpacked(name):
            digest.update(piece)
            yield piece
        if digest.hexdigest() != self.hashes[name]:
            raise UserError(f"{self.path}: {shown(name)} was changed after it was exported (its SHA-256 differs); nothing was imported")

    def _unpacked(self, name: str) -> Iterator[bytes]:
        """In pieces: in one go, zipfile unpacks all that the compressed bytes hold, whatever size the file is said to have."""
        with _explained(self.path), self._zip.open(self._members[name]) as member:
            while piece := member.read(_PIECE):
                yield piece

    def _check_size(self, name: str, most: int) -> None:
        if (size := self.size(name)) > most:
            raise UserError(f"{self.path}: {shown(name)} is {size / 1e6:.1f} MB, expected at most {most / 1e6:g} MB; nothing was imported")

    def _check_members(self) -> None:
        infos = self._zip.infolist()
        if len(self._members) != len(infos):
            [(odd, _)] = Counter(info.filename for info in infos).most_common(1)
            raise UserError(f"{self.path}: {shown(odd)} is in it twice; nothing was imported")
        for info in infos:
            if info.compress_type not in _METHODS or info.flag_bits & 0x1:  # bit 0: encrypted
                raise UserError(
                    f"{self.path} {_NOT_OURS}: {shown(info.filename)} is encrypted or compressed in a way that export never uses"
                )
        packed = sum(info.compress_size for info in infos)
        if packed > os.fstat(self._file.fileno()).st_size:
            raise UserError(f"{self.path} {_NOT_OURS}: its files overlap; nothing was imported")
        largest = max(infos, key=lambda info: info.file_size, default=None)
        if largest is not None and self.nbytes > max(PLAUSIBLE_BYTES, PLAUSIBLE_RATIO * packed):
            raise UserError(
                f"{self.path} claims to hold {self.nbytes / 1e9:.2f} GB, {shown(largest.filename)} alone {largest.file_size / 1e9:.2f} GB, "
                f"packed into {packed} bytes; nothing was imported"
            )

    def _listed(self) -> dict[str, str]:
        """The SHA-256 of every file by name, as the manifest has it. Raises UserError where archive and manifest disagree."""
        if MANIFEST not in self._members:
            raise UserError(f"{self.path} {_NOT_OURS}: it has no {MANIFEST}")
        self._check_size(MANIFEST, LARGEST_MANIFEST)
        try:
            manifest: Any = parse_json(b"".join(self._unpacked(MANIFEST)), most=len(self._members) + 100)
            version, files = manifest["format"], manifest["files"]
            if not isinstance(version, int) or not isinstance(files, dict) or not all(isinstance(sha, str) for sha in files.values()):
                raise TypeError
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path}: its {MANIFEST} can't be read; nothing was imported") from error
        if version != FORMAT:
            raise UserError(
                f"{self.path} has archive format {version}, this kdbench reads {FORMAT}: update kdbench (pip install -U kdbench)"
            )
        if odd := sorted(self._members.keys() ^ {*files, MANIFEST}):
            raise UserError(f"{self.path}: {shown(odd[0])} is not what its {MANIFEST} lists; nothing was imported")
        return files


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What zipfile raises, as one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        zlib.error,
        NotImplementedError,
        EOFError,
        RuntimeError,
        ValueError,
        OverflowError,
        struct.error,
    ) as error:
        raise UserError(f"{path} {_NOT_OURS}, or it is damaged ({error}); nothing was imported") from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
