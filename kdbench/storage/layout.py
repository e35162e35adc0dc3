"""Where things lie under a results folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdbench.storage.address import folder_at, is_address
from kdbench.storage.folder import local_path
from kdbench.storage.working_copy import origin, working_copy


def results_folder(option: str | Path | None = None, configured: str | Path | None = None) -> Path:
    """`--results`, else `results:` in the experiment, else KDBENCH_RESULTS, else ./results; always absolute.

    For an address such as s3://bucket/folder this is its working copy on this machine. Raises UserError for an address or a path that can't
    be used.
    """
    chosen = str(option or configured or os.environ.get("KDBENCH_RESULTS") or "results")
    if is_address(chosen):
        return working_copy(chosen)
    whole = local_path(str(folder_at(chosen)), "results folder").resolve()
    return folder_at(str(whole))  # the folder that a relative path begins in has a name too


@dataclass(frozen=True)
class Layout:
    """The folders of one results folder. Records (`v1/`) are the truth; all else can be made again or is an attachment of a record."""

    root: Path

    @classmethod
    def at(cls, location: str) -> Layout:
        """On any machine, from the `location` of a layout on another one."""
        return cls(results_folder(location))

    @property
    def location(self) -> str:
        """What other machines find these results by: an address, or the path of a folder that they must share."""
        return origin(self.root) or str(self.root)

    def here(self, path: Path) -> Path:
        """A path inside the results as another machine named it, on this one: their working copies have one name, in different places."""
        if origin(self.root) is None or self.root.name not in path.parts:
            return path
        return self.root.joinpath(*path.parts[path.parts.index(self.root.name) + 1 :])

    def teacher(self, unit_key: str) -> Path:
        return self.root / "teachers" / unit_key / "model.safetensors"

    def student(self, unit_key: str) -> Path:
        return self.root / "students" / unit_key / "student.safetensors"

    def cache(self, key: str) -> Path:
        return self.root / "cache" / key

    def cache_lock(self, key: str, purpose: Literal["use", "build", "copy"]) -> Path:
        """Shared by all that use an entry; held alone by who builds or downloads it. Outside of the entry, so that it outlives it."""
        return self.lock(f"cache-{key}.{purpose}")

    def study(self, study_id: str) -> Path:
        return self.root / "studies" / f"{study_id}.journal"

    def checkpoints(self, experiment: str) -> Path:
        """What an experiment's unfinished trainings go on from; cleared when nothing is unfinished any more."""
        return self.root / "checkpoints" / experiment

    def checkpoint(self, experiment: str, unit_key: str) -> Path:
        return self.checkpoints(experiment) / f"{unit_key}.pt"

    def predictions(self, unit_key: str, test_hash: str) -> str:
        """Of a finished network on one test part; relative to the root, as a record names it."""
        return f"predictions/{unit_key}-{test_hash[:16]}.safetensors"

    def choice(self, key: str) -> Path:
        """A measured choice (precision, memory format), made once and kept."""
        return self.root / "choices" / f"{key}.json"

    def profile(self, experiment: str, name: str) -> Path:
        """The trace of a few training steps."""
        return self.root / "profiles" / experiment / f"{re.sub(r'[^A-Za-z0-9_.+-]+', '-', name)}.json"

    def log(self, unit_key: str) -> Path:
        """The traceback of a training whose code failed."""
        return self.root / "logs" / f"{unit_key}.log"

    def lock(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"
