"""What a result was made with: versions, commit, devices, and a hash of the host's name (the name itself is nobody's business)."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kdbench import __version__

# `<hash>` or `<hash>-dirty`: of the checkout that a job was sent from; the copy that it runs in has no .git.
COMMIT_VARIABLE = "KDBENCH_COMMIT"
DIRTY = "-dirty"
PACKAGES = ("torch", "torchvision", "timm", "ray", "optuna", "mlflow", "pyarrow", "numpy")


@cache
def describe_environment() -> dict[str, Any]:
    """The environment columns of a record: git_commit, git_dirty, versions, host_hash."""
    commit = recorded_commit()
    return {
        "git_commit": commit.removesuffix(DIRTY) if commit else None,
        "git_dirty": commit.endswith(DIRTY) if commit else None,
        "versions": {"kdbench": __version__, "python": platform.python_version(), **_versions()},
        "host_hash": hashlib.sha256(platform.node().encode()).hexdigest()[:12],
    }


def recorded_commit() -> str | None:
    """What records of this process name as their commit, ending in `-dirty` where the checkout holds changes; None where it has none."""
    return commit_of(Path.cwd()) or os.environ.get(COMMIT_VARIABLE)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit_of(folder: Path) -> str | None:
    """The commit of a checkout, ending in `-dirty` where it holds changes; None where the folder is no checkout or there is no git."""
    commit = _git(folder, "rev-parse", "HEAD")
    return commit and commit + (DIRTY if _git(folder, "status", "--porcelain") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
