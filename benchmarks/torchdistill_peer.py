"""torchdistill from the outside: its environment, which borrows the running one's packages, and the process that obeys orders in it."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.part import ROOT, child_environment
from benchmarks.timing import Arm, Spent
from kdbench.data.batch import Part

VERSION = "1.1.5"
_INSTALL_SECONDS = 120


class PeerMissing(Exception):
    """torchdistill can't be measured here. The message says why."""


def peer_python(kept: Path) -> Path:
    """The interpreter of an environment with torchdistill, made at the first call. Raises PeerMissing where pip can't get it.

    Everything but torchdistill itself comes from the environment that runs the benchmark: both sides then use the very same torch.
    """
    folder = kept / f"torchdistill-{VERSION}"
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        venv.create(folder, with_pip=False, clear=True)
        site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (site / "borrowed.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", f"torchdistill=={VERSION}"]
        try:
            done = subprocess.run(install, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise PeerMissing(f"pip could not fetch torchdistill {VERSION} within {_INSTALL_SECONDS} s") from None
        if done.returncode:
            raise PeerMissing(f"pip could not install torchdistill {VERSION}: {_last_line(done.stderr)}")
        ready.touch()
    return python


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no reason given"


def save_images(path: Path, train: Part, val: Part) -> Path:
    """The images that both sides see, as the peer's process reads them."""
    arrays = {"train": train.pixels, "train_labels": train.labels, "val": val.pixels, "val_labels": val.labels}
    np.savez(path, **{name: tensor.numpy() for name, tensor in arrays.items()})  # type: ignore[arg-type]
    return path


class TorchdistillProcess:
    """A running `torchdistill_trial`. Use as a context manager. `start_seconds`: from its command to its first step done."""

    def __init__(self, python: Path, job: Mapping[str, Any], scratch: Path) -> None:
        self._job, self._log = scratch / "peer-job.json", scratch / "peer.log"
        self._job.write_text(json.dumps(job))
        self._command = [str(python), "-m", "benchmarks.torchdistill_trial", str(self._job)]

    def __enter__(self) -> TorchdistillProcess:
        begun = time.perf_counter()
        log = self._log.open("w")
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        log.close()
        self._answer()
        self.start_seconds = time.perf_counter() - begun
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def order(self, do: str, **what: Any) -> dict[str, Any]:
        """Have something done and wait for the answer. Raises PeerMissing where the process has died."""
        self.send(do, **what)
        return self._answer()

    def send(self, do: str, **what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerMissing(f"its process ended: {_last_line(self._log.read_text())}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def steps(self, count: int) -> Arm:
        """An arm of `count` optimizer steps over there, in seconds a sample."""

        def some_steps() -> Spent:
            answer = self.order("steps", count=count)
            return Spent(answer["wall"], answer["cpu"]).over(answer["samples"])

        return some_steps
