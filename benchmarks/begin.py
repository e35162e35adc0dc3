"""Part begin: what a process that is warm spends before the first step of a training, and of a whole run; against another commit.

    git worktree add ../before COMMIT
    KDBENCH_BENCHMARK_BEFORE=../before python -m benchmarks --only begin

Each side is a process that stays alive, with kdbench imported from its own folder: `benchmarks.begin_worker`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks.part import ROOT, Bench, child_environment
from benchmarks.report import Row, not_measured
from benchmarks.timing import Arm, Spent, interleave

BEFORE = "KDBENCH_BENCHMARK_BEFORE"  # names a checkout of an earlier commit
WORKER = ROOT / "benchmarks" / "begin_worker.py"
WHAT = {
    "none": "a training of none, from `fit` to its first step",
    "kd": "a training of kd with cached outputs, from `fit` to its first step",
    "run": "`run` of none and kd with a given teacher and no cache, to the first step",
}
_STARTS = {"none": 20, "kd": 20, "run": 3}  # a turn


def measure(bench: Bench) -> Iterator[Row]:
    """One kind of start after the other; this checkout and the earlier one take turns."""
    sides = {"now": ROOT}
    if before := os.environ.get(BEFORE):
        sides["before"] = Path(before).resolve()
    with ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(tree, bench.scratch / side)) for side, tree in sides.items()}
        for kind, what in WHAT.items():
            bench.say(f"begin: {what}")
            arms: Mapping[str, Arm] = {side: worker.arm(kind) for side, worker in workers.items()}
            rounds = interleave(arms, bench.seconds / len(WHAT), least=bench.pick(quick=2, usual=7, full=21))
            yield Row(what, rounds.seconds("now"), "s", wall=rounds.seconds("now", "wall").median)
            if "before" in sides:
                wall = rounds.ratio("now", "before", "wall").median
                yield Row(f"{what}: now / before", rounds.ratio("now", "before"), wall=wall)
    if "before" not in sides:
        yield not_measured("the same against an earlier commit", f"{BEFORE} names no checkout of one")


class Worker:
    """A process with the kdbench of one checkout, which makes starts when it is asked to. Use as a context manager."""

    def __init__(self, tree: Path, scratch: Path) -> None:
        scratch.mkdir()
        command = [sys.executable, "-P", str(WORKER), str(scratch)]
        environment = child_environment(PYTHONPATH=str(tree))
        self._process = subprocess.Popen(command, env=environment, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()

    def arm(self, kind: str) -> Arm:
        return lambda: self._spent(kind)

    def _spent(self, kind: str) -> Spent:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(kind, _STARTS[kind], file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline().split()
        if len(answer) != 2:
            raise RuntimeError(f"the worker of {kind} ended with {self._process.wait()}")
        return Spent(*map(float, answer)).over(_STARTS[kind])
