"""What a part of the benchmark is told: how large to measure, for how long, where to write, and whom to tell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

ROOT = Path(__file__).resolve().parents[1]
Scale = Literal["quick", "usual", "full"]
T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    """seconds: what the part may take, roughly. scratch: an empty folder, thrown away. kept: a folder for what is dear to make."""

    scale: Scale
    seconds: float
    scratch: Path
    kept: Path
    say: Callable[[str], None]

    def pick(self, *, quick: T, usual: T, full: T) -> T:
        """A size by scale."""
        return {"quick": quick, "usual": usual, "full": full}[self.scale]


def child_environment(**changes: str) -> dict[str, str]:
    """For a process that the benchmark starts: it finds kdbench and the benchmark, and runs on one thread unless told otherwise."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "KDBENCH_OFFLINE": "1", **changes}


def kdbench_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kdbench.cli", *arguments]


def run_quietly(command: list[str], environment: dict[str, str]) -> None:
    """Run to the end. Raises RuntimeError with the last lines of what it said where it fails."""
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... ended with {done.returncode}: {done.stdout[-2000:]}")
