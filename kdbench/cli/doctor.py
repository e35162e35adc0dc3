"""What this machine has and lacks for kdbench: `kdbench doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from kdbench import __version__
from kdbench.errors import KDBenchError

OLDEST_PYTHON = (3, 11)
GIB = 2**30
FREE_DISK, FREE_MEMORY = 5 * GIB, 2 * GIB  # below these, trainings and caches of common data sets get tight
SHARED_MEMORY = GIB // 4  # what kdbench lets Ray reserve there
# Instructions that multiply bfloat16 matrices: without one of them bf16 is emulated, and slower than fp32.
BF16_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16"}


@dataclass(frozen=True)
class Finding:
    """One line: ok, a piece of advice, or something missing without which kdbench can't work."""

    subject: str
    state: Literal["ok", "advice", "missing"]
    text: str


def examine(results: Path) -> list[Finding]:
    """Look at this machine and at the results folder; nothing is written where the folder doesn't exist yet."""
    findings = [_python(), *_packages()]
    if all(finding.state != "missing" for finding in findings):
        findings += [_processor(), _precision(), *_accelerators(), _full_fashion_mnist()]
    return [*findings, _memory(), _shared_memory(), *_results(results), _git()]


# --- software --------------------------------------------------------------------------------------------------------


def _python() -> Finding:
    wanted = ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "missing", f"{platform.python_version()}, kdbench needs {wanted} or newer")
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    """What kdbench's own metadata require, against what is installed."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in requires("kdbench") or ()]
    except ImportError:
        yield Finding("packaging", "missing", "not installed: pip install packaging")
        return
    except PackageNotFoundError:
        yield Finding(
            "kdbench",
            "advice",
            f"{__version__}, not installed: `pip install -e .` in the checkout checks its packages and makes the command",
        )
        return
    yield Finding("kdbench", "ok", __version__)
    for requirement in requirements:
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": "onnx"}):
            yield _package(requirement.name, requirement.specifier.contains, str(requirement.specifier), optional=marker is not None)


def _package(name: str, fits: Callable[[str, bool], bool], wanted: str, optional: bool) -> Finding:
    state: Literal["advice", "missing"] = "advice" if optional else "missing"
    command = "pip install 'kdbench[onnx]' (for kdbench export --format onnx)" if optional else f"pip install '{name}{wanted}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, state, f"not installed: {command}")
    if not fits(found, True):
        return Finding(name, "advice", f"{found}, tested with {wanted}: {command}")
    return Finding(name, "ok", found)


def _git() -> Finding:
    """Which commit the records of a run in this folder would name."""
    from kdbench.records.environment import DIRTY, recorded_commit

    commit = recorded_commit()
    if commit is not None:
        changed = ", with uncommitted changes" if commit.endswith(DIRTY) else ""
        return Finding("git", "ok", f"records name commit {commit[:12]}{changed}")
    why = "not found" if shutil.which("git") is None else "this folder is in no repository that has a commit"
    return Finding("git", "advice", f"{why}: records will not say which commit they were made with")


# --- the machine -----------------------------------------------------------------------------------------------------


def _processor() -> Finding:
    import torch

    from kdbench.distributed.cluster import available_cpus

    usable, name = available_cpus(), _cpu_line("model name")
    text = ", ".join(part for part in (f"{usable} of {os.cpu_count()} usable", torch.backends.cpu.get_cpu_capability(), name) if part)
    quota = _cpu_quota()
    if quota is not None and quota < usable:
        return Finding("cpu", "advice", f"{text}; the container gets the time of {quota:g}: set runtime.concurrent to {max(1, int(quota))}")
    return Finding("cpu", "ok", text)


def _precision() -> Finding:
    features = (_cpu_line("flags") or _cpu_line("Features")).split()
    present = [title for feature, title in BF16_INSTRUCTIONS.items() if feature in features]
    if present:
        return Finding(
            "precision", "ok", f"bf16 in hardware ({', '.join(present)}); `precision: auto` measures whether it pays for your model"
        )
    return Finding("precision", "ok", "no bf16 in this CPU: fp32 is fastest on it, and what `precision: auto` will choose")


def _accelerators() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("gpu", "advice", f"none that torch {torch.__version__} can use: trainings run on CPUs")
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        native = "bf16" if torch.cuda.get_device_capability(number) >= (8, 0) else "no bf16: use fp16"
        yield Finding(f"gpu {number}", "ok", f"{device.name}, {_gib(device.total_memory)}, {native}")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup("memory.max")
    if limit.isdigit():
        total = min(total, int(limit))
    if total < FREE_MEMORY:
        return Finding("memory", "advice", f"{_gib(total)}: set runtime.concurrent: 1, and a small batch_size")
    return Finding("memory", "ok", _gib(total))


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "ok", "no /dev/shm here; Ray uses a temporary folder")
    size = shutil.disk_usage(folder).total
    if size < SHARED_MEMORY:
        return Finding("shared memory", "advice", f"/dev/shm has {_gib(size)}, Ray wants {_gib(SHARED_MEMORY)}: docker run --shm-size=1g")
    return Finding("shared memory", "ok", f"/dev/shm has {_gib(size)}")


# --- files -----------------------------------------------------------------------------------------------------------


def _results(folder: Path) -> Iterator[Finding]:
    from kdbench.credentials import without_secrets
    from kdbench.storage.layout import Layout
    from kdbench.tracking import tracking_uri

    existing = next(place for place in (folder, *folder.parents) if place.exists())
    reason = _not_writable(folder, existing)
    if reason:
        yield Finding("results", "missing", reason)
    else:
        free = shutil.disk_usage(existing).free
        location = Layout(folder).location
        text = f"{location}: writable, {_gib(free)} free" + ("" if location == str(folder) else f" in {folder}, its working copy")
        yield Finding("results", "ok", text) if free >= FREE_DISK else Finding("results", "advice", f"{text}: caches of teachers need room")
    yield Finding("mlflow at", "ok", without_secrets(tracking_uri(folder)))


def _not_writable(folder: Path, existing: Path) -> str | None:
    """Why the results folder can't be used, None where it can. A folder that exists is tried out; one that doesn't is left uncreated."""
    if existing == folder:
        from kdbench.records.store import ResultStore

        try:
            ResultStore(folder).check_writable()
        except KDBenchError as error:
            return str(error)
        return None
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return None
    return f"{folder} can't be made in {existing}: choose another with --results DIR or the variable KDBENCH_RESULTS"


def _full_fashion_mnist() -> Finding:
    from kdbench.data.fashion_mnist import full_set_folder

    folder = full_set_folder()
    if folder is not None:
        return Finding("fashion_mnist", "ok", f"full set in {folder}")
    text = "the 14,000 images that ship are there; the full set would be downloaded"
    return Finding("fashion_mnist", "advice", f"{text} (or: apt-get install dataset-fashion-mnist, or let KDBENCH_DATA name its folder)")


# --- what the operating system says ----------------------------------------------------------------------------------


def _cpu_line(key: str) -> str:
    """The first value of `key` in Linux's /proc/cpuinfo; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _cpu_quota() -> float | None:
    """CPUs' worth of time that a container may use, None where there is no limit."""
    quota, _, period = _cgroup("cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() else None


def _cgroup(name: str) -> str:
    """A limit of the container this process is in (cgroup v2); empty where there is none."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text().strip() if path.is_file() else ""


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"
