"""What a result was made with: versions, commit, devices, and a hash of the host's name (the name itself is nobody's business)."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kdbench import __version__

PACKAGES = ("torch", "torchvision", "timm", "ray", "optuna", "mlflow", "pyarrow", "numpy")


@cache
def describe_environment() -> dict[str, Any]:
    """The environment columns of a record: git_commit, git_dirty, versions, host_hash."""
    commit = _git("rev-parse", "HEAD")
    return {
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain")) if commit else None,
        "versions": {"kdbench": __version__, "python": platform.python_version(), **_versions()},
        "host_hash": hashlib.sha256(platform.node().encode()).hexdigest()[:12],
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git(*arguments: str) -> str | None:
    """What git says of the working directory, None where it is no checkout or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
