"""The working directory that travels with a job: code and experiments, never results, data or environments.

The archive depends on names and contents alone, so that a cluster that has it is not sent it again.
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from kdbench.errors import UserError

LIMIT_BYTES = 100 * 2**20  # what Ray's job server takes in one request (measured: 110 MB are refused)
# Left out everywhere, as in a .gitignore. What a first slash anchors may well be the name of a room of code further down.
_HISTORY = (".git", ".hg", ".idea", ".vscode", ".ipynb_checkpoints")
_MADE = (".venv", "/venv", "__pycache__", "*.py[cod]", "*.egg-info", "node_modules", ".*_cache", ".hypothesis", ".tox", ".nox", ".coverage")
_RESULTS = ("/build", "/dist", "/results", "mlflow.db*", "mlruns", "mlartifacts")
_SECRETS = (".env", ".netrc", ".aws", ".ssh", "*.pem", "auth_token")
NEVER = (*_HISTORY, *_MADE, *_RESULTS, *_SECRETS)
DATA_FOLDERS = ("data", "datasets")  # at the top; one with Python files in it is code all the same
IGNORE_FILES = (".gitignore", ".rayignore")
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # the earliest time that an archive can hold: when a file was touched makes no other archive
_NAMED_FOLDERS = 4


@dataclass(frozen=True)
class Package:
    """A packed working directory. files: their paths in it, sorted. left_out: what is at its top and did not go along."""

    archive: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return self.archive.stat().st_size


def pack(folder: Path, archive: Path, keep_out: Iterable[Path] = ()) -> Package:
    """Write what a job needs of `folder` into the zip file `archive`.

    Left out are NEVER, data folders, what the .gitignore and .rayignore files name, and `keep_out`, such as the results folder.
    Raises UserError, naming the largest folders, where the archive is more than Ray takes.
    """
    apart = {path.resolve() for path in keep_out} | {archive.resolve()}
    files = tuple(sorted(_files(folder, folder, [(folder, GitIgnoreSpec.from_lines(NEVER))], apart)))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for name in files:
            entry = zipfile.ZipInfo(name, _FIRST_DAY)
            entry.external_attr = (0o755 if os.access(folder / name, os.X_OK) else 0o644) << 16
            target.writestr(entry, (folder / name).read_bytes(), zipfile.ZIP_DEFLATED)
        sizes = {entry.filename: entry.compress_size for entry in target.infolist()}
    packed = Package(archive, files, _left_out(folder, files))
    if packed.nbytes > LIMIT_BYTES:
        raise UserError(
            f"{folder}: as a job's working directory it takes {packed.nbytes / 2**20:.0f} MiB, Ray takes {LIMIT_BYTES // 2**20} MiB; "
            f"the largest in it: {_largest(sizes)}; name in .rayignore what the job does not need"
        )
    return packed


def _files(folder: Path, root: Path, rules: list[tuple[Path, GitIgnoreSpec]], apart: set[Path]) -> Iterator[str]:
    """Paths, relative to `root`, of the files that no rule leaves out. Links are followed where they lead to files only."""
    rules = rules + [(folder, _rules(folder / name)) for name in IGNORE_FILES if (folder / name).is_file()]
    for path in folder.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        if any(rule.match_file(f"{path.relative_to(place).as_posix()}{'/' if is_folder else ''}") for place, rule in rules):
            continue
        if Path(os.path.realpath(path)) in apart or (is_folder and folder == root and _holds_data(path)):
            continue
        if is_folder:
            yield from _files(path, root, rules, apart)
        elif path.is_file():
            yield path.relative_to(root).as_posix()


def _rules(file: Path) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(file.read_text(encoding="utf-8", errors="replace").splitlines())


def _holds_data(folder: Path) -> bool:
    return folder.name in DATA_FOLDERS and not any(folder.glob("*.py"))


def _left_out(folder: Path, files: Iterable[str]) -> tuple[str, ...]:
    there = {name.partition("/")[0] for name in files}
    return tuple(sorted(path.name for path in folder.iterdir() if path.name not in there))


def _largest(sizes: dict[str, int]) -> str:
    """The largest folders, two levels deep, with what they add to the archive."""
    folders: Counter[str] = Counter()
    for name, size in sizes.items():
        folders["/".join(name.split("/")[:-1][:2]) or name] += size
    return ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in folders.most_common(_NAMED_FOLDERS))
