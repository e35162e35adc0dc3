"""Part begin: a start ends before the first step, and two checkouts are held against each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import begin, begin_worker
from benchmarks.part import Bench
from benchmarks.report import Row
from benchmarks.timing import Arm, Spent
from kdbench.training import loop


def test_a_start_ends_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def stop(*arguments: object) -> None:
        nonlocal steps
        steps += 1
        begin_worker._stop()

    monkeypatch.setattr(loop, "train_step", stop)
    starts = begin_worker._starts(tmp_path)
    assert starts.keys() == begin.WHAT.keys()
    for count, start in enumerate(starts.values(), start=1):
        begin_worker._begin(start)
        assert steps == count
    with pytest.raises(AssertionError, match="without a first step"):
        begin_worker._begin(lambda: None)


class Fake:
    """A worker whose starts take two seconds, or one in a folder called `before`."""

    def __init__(self, tree: Path, scratch: Path) -> None:
        self.seconds = 1.0 if tree.name == "before" else 2.0

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *exception: object) -> None:
        return

    def arm(self, kind: str) -> Arm:
        return lambda: Spent(3 * self.seconds, self.seconds)


def measured(folder: Path) -> list[Row]:
    return list(begin.measure(Bench("quick", 0.0, folder, folder, lambda text: None)))


def test_two_checkouts_are_held_against_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(begin, "Worker", Fake)
    monkeypatch.setenv(begin.BEFORE, str(tmp_path / "before"))
    rows = measured(tmp_path)
    assert len(rows) == 2 * len(begin.WHAT)
    assert {row.value.median for row in rows if row.value is not None} == {2.0}
    assert [row.unit for row in rows] == ["s", "x"] * len(begin.WHAT)


def test_without_another_checkout_the_comparison_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(begin, "Worker", Fake)
    monkeypatch.delenv(begin.BEFORE, raising=False)
    *rows, last = measured(tmp_path)
    assert [row.unit for row in rows] == ["s"] * len(begin.WHAT)
    assert last.verdict == "not measured"


@pytest.mark.slow
def test_a_worker_answers_with_the_seconds_of_its_starts(tmp_path: Path) -> None:
    with begin.Worker(begin.ROOT, tmp_path / "now") as worker:
        first, second = worker.arm("none")(), worker.arm("none")()
    assert min(first.cpu, second.cpu) > 0
    assert worker._process.returncode == 0
