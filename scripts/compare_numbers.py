"""Compare the numbers of the present code with those of a commit: trained weights, predictions, metrics and curves, bit by bit.

    python scripts/compare_numbers.py main
    python scripts/compare_numbers.py eaaa7df --only segmentation,cached --folder ../numbers
    python scripts/compare_numbers.py main --workers

Both versions train the same small experiments in processes of their own, on the CPU with one thread each, through the commands and the
YAML files that both understand. A worktree of the commit is made for this and removed again. The script prints one line for each trained
network and exits with 1 where a number moved, a training failed or a network is missing.
With --folder the commit's results stay there, and the next comparison with the same commit begins with them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
DIFFERS = ("seconds", "device_seconds")  # of an epoch's row in the curve: they differ from run to run

_RECIPE = {"epochs": 2, "batch_size": 32, "lr": 0.05, "precision": "fp32", "memory_format": "contiguous", "compile": False}
_CLASSES = {
    "task": {"name": "classification", "data": "fashion_mnist", "val_size": 100, "transfer_size": 160},
    "teacher": {"model": {"name": "tiny_cnn", "width": 12}, "recipe": {"epochs": 1, "batch_size": 128}},
    "students": [{"name": "tiny_cnn", "width": 8}],
    "methods": ["none", "kd", "dkd", "nkd", "mgd", "crd", "ffsd", "norm", "adain", "scalekd"],
    "recipe": {**_RECIPE, "augment": {"crop": 2, "flip": True}, "views": 2},
}
_PIXELS = {
    "task": {"name": "segmentation", "data": {"name": "shapes", "train": 200, "test": 40}, "val_size": 40},
    "teacher": {"model": {"name": "tiny_fcn", "width": 12}},
    "students": [{"name": "tiny_fcn", "width": 6}],
    "methods": ["none", "kd", "cwd"],
    "recipe": {**_RECIPE, "augment": {"crop": 2, "flip": True}, "views": 2},
}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "segmentation": _PIXELS,
    "cached": _CLASSES,
    "live": _CLASSES | {"cache": {"budget_gb": 0}},
    "workers": _CLASSES | {"methods": ["rkd"], "runtime": {"workers": 2, "cpus_per_worker": 1}},
}
OPTIONAL = ("workers",)  # they start Ray, which takes longer than all else

Network = tuple[str, str, int]  # role, label of the method, seed


@dataclass(frozen=True)
class Numbers:
    """What one version found for one network."""

    weights: Path
    predictions: Path
    metrics: Mapping[str, float]
    curve: list[dict[str, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what the present code is compared with: a commit, a branch or a tag")
    parser.add_argument("--only", metavar="NAME,...", help=f"some of the experiments: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--methods", metavar="NAME,...", help="some of the methods of each experiment")
    parser.add_argument("--workers", action="store_true", help="also train with two workers, which takes longer")
    parser.add_argument("--folder", type=Path, help="where results are kept; a temporary folder by default")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else [name for name in EXPERIMENTS if options.workers or name not in OPTIONAL]
    if unknown := [name for name in chosen if name not in EXPERIMENTS]:
        parser.error(f"--only: there is no experiment {unknown[0]!r}; there is: {', '.join(EXPERIMENTS)}")
    commit = _git("rev-parse", "--verify", f"{options.commit}^{{commit}}")
    if options.workers and "workers" not in chosen:
        chosen.append("workers")
    moved = 0
    with tempfile.TemporaryDirectory(prefix="numbers-") as scratch, _worktree(commit, Path(scratch) / "commit") as before:
        folder = (options.folder or Path(scratch)).resolve()
        for name in chosen:
            experiment = dict(EXPERIMENTS[name])
            if options.methods:
                experiment["methods"] = [method for method in experiment["methods"] if method in options.methods.split(",")]
            if not experiment["methods"]:
                continue
            present = folder / "present" / name
            shutil.rmtree(present, ignore_errors=True)
            moved += _compared(name, _run(before, name, experiment, folder / commit[:12] / name), _run(ROOT, name, experiment, present))
    print(f"{moved} moved" if moved else "nothing moved")
    return 1 if moved else 0


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip())
    return done.stdout.strip()


@contextmanager
def _worktree(commit: str, folder: Path) -> Iterator[Path]:
    _git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _run(tree: Path, name: str, experiment: Mapping[str, Any], folder: Path) -> dict[Network, Numbers]:
    """Train an experiment by the code in `tree`; returns the networks that it has in `folder`. A failure is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump({"name": name, "seeds": 1, **experiment}))
    module, function = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]["kdbench"].split(":")
    ours = f"assert kdbench.__file__.startswith({str(tree / 'kdbench')!r}), kdbench.__file__"
    command = f"import sys, kdbench; {ours}; from {module} import {function} as main; sys.exit(main())"
    arguments = ["run", str(file), "--results", str(folder), "--no-mlflow"]
    # An installed kdbench may stand first in sys.path. This file runs behind all that installs, in every process, those of Ray too.
    (folder / "sitecustomize.py").write_text(f"import sys; sys.path.insert(0, {str(tree)!r})\n")
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], cwd=tree, env=_environment(folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        print(f"{name}: the code in {tree} ended with {done.returncode}: {' | '.join(last)}", flush=True)
    return dict(_networks(folder))


def _environment(modules: Path) -> dict[str, str]:
    """One thread, no GPU, and a folder with modules of ours."""
    kept = {name: value for name, value in os.environ.items() if not re.match(r"KDBENCH_|RAY_", name)}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return kept | threads | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(modules), "PYTHONHASHSEED": "0"}


def _networks(folder: Path) -> Iterator[tuple[Network, Numbers]]:
    """The finished networks in a results folder, by what people call them: the keys of two versions may differ."""
    for file in sorted((folder / "v1").rglob("*.parquet")):
        for row in pyarrow.parquet.read_table(file).to_pylist():
            if row["role"] in ("teacher", "final") and row["status"] == "ok":
                metrics = {"val": row["val_metric"], **json.loads(row["metrics"])}
                numbers = Numbers(folder / row["artifacts_uri"], folder / row["predictions_uri"], metrics, json.loads(row["curve"]))
                yield (row["role"], row["label"], row["seed"]), numbers


def _compared(experiment: str, before: Mapping[Network, Numbers], now: Mapping[Network, Numbers]) -> int:
    """Print a line for each network; returns how many moved or are missing."""
    moved = 0
    if not before and not now:
        print(f"{experiment}: neither version trained anything", flush=True)
        return 1
    for network in sorted(before.keys() | now.keys(), key=lambda network: (network[0] != "teacher", *network[1:])):
        role, label, seed = network
        title = f"{experiment}: teacher" if role == "teacher" else f"{experiment}: {label} seed {seed}"
        if network not in now or network not in before:
            differences = [f"missing {'now' if network not in now else 'at the commit'}"]
        else:
            differences = list(_differences(before[network], now[network]))
        moved += bool(differences)
        print(f"{title}: {'; '.join(differences) or 'equal'}", flush=True)
    return moved


def _differences(before: Numbers, now: Numbers) -> Iterator[str]:
    """What differs, in words. A metric or a column of the curve that one version alone has is no difference: it did not move."""
    for name in ("weights", "predictions"):
        old, new = getattr(before, name), getattr(now, name)
        if _sha256(old) != _sha256(new):
            yield f"{name} {_by_how_much(old, new)}"
    for name in before.metrics.keys() & now.metrics.keys():
        if not _same(before.metrics[name], now.metrics[name]):
            yield f"{name} {before.metrics[name]} -> {now.metrics[name]}"
    columns = {name for old, new in zip(before.curve, now.curve, strict=False) for name in _moved_columns(old, new)}
    if columns or len(before.curve) != len(now.curve):
        yield f"curve: {', '.join(sorted(columns)) or 'its length'}"


def _moved_columns(old: Mapping[str, float], new: Mapping[str, float]) -> set[str]:
    return {name for name in old.keys() & new.keys() if name not in DIFFERS and not _same(old[name], new[name])}


def _same(old: float | None, new: float | None) -> bool:
    return old == new or (isinstance(old, float) and isinstance(new, float) and math.isnan(old) and math.isnan(new))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _by_how_much(before: Path, now: Path) -> str:
    old, new = load_file(before), load_file(now)
    if old.keys() != new.keys() or any(old[name].shape != new[name].shape for name in old):
        return "have other names or shapes"
    most = max((old[name].double() - new[name].double()).abs().max().item() for name in old if old[name].numel())
    return f"differ by up to {most:.3g}" if most else "are equal in other bytes"


if __name__ == "__main__":
    sys.exit(main())
