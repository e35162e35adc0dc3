"""Part f: what the cache costs in memory: a trial's peak with it and without, and what 8 concurrent trials share.

Private memory (USS) from /proc/PID/smaps_rollup. Resident memory would count the pages of the mapped cache in every process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.part import ROOT, Bench, child_environment
from benchmarks.report import Row, at_most
from benchmarks.timing import Sample
from benchmarks.trainings import ModelPair, begun, image_task, random_teacher, unit, with_cache
from kdbench.experiment import Unit
from kdbench.training.loop import train_epoch

PEAK_GOAL, SHARED_GOAL = at_most(1.05), at_most(0.1)
# So many classes that the cache is of a size that can be told from noise, and so few images a batch that the loss's own tensors are not.
_PAIR = ModelPair("tiny_cnn of width 8 -> tiny_cnn", {"name": "tiny_cnn", "width": 8}, "tiny_cnn", 1, 28, 32)
_CACHED = (16_000, 4_000)  # images and classes: 122 MB of logits
_SAMPLED_EVERY = 0.005  # seconds


def measure(bench: Bench) -> Iterator[Row]:
    """Both kinds of trial, one at a time and many at once."""
    together = bench.pick(quick=2, usual=8, full=8)
    repeats = bench.pick(quick=1, usual=2, full=5)
    alone, cached, size = _units(bench.scratch, *_CACHED)
    bench.say("memory: one trial at a time")
    peaks = [(_run([cached], bench)[0]["peak"], _run([alone], bench)[0]["peak"]) for _ in range(repeats)]
    ratios = Sample(tuple(with_it / without for with_it, without in peaks))
    said = f"{Sample(tuple(p[0] for p in peaks)).median:.0f} MB against {Sample(tuple(p[1] for p in peaks)).median:.0f} MB"
    yield Row("peak of a trial's own memory: cached kd / student alone", ratios, goal=PEAK_GOAL, note=f"{said}; a cache of {size:.0f} MB")
    bench.say(f"memory: {together} trials at once")
    many, few = (_run([one] * together, bench) for one in (cached, alone))
    extra = tuple((mine["now"] - Sample(tuple(a["now"] for a in few)).median) / size for mine in many)
    yield Row(
        f"{together} trials at once: own memory beyond a student alone's, as a share of the cache",
        Sample(extra),
        "of the cache",
        SHARED_GOAL,
        note=f"a copy each would be 1; cache {size:.0f} MB, {Sample(tuple(m['now'] for m in many)).median:.0f} MB a process",
    )


def _units(folder: Path, images: int, classes: int) -> tuple[Unit, Unit, float]:
    """A student alone and with the cache, and the size of the cache's logits in MB."""
    task = image_task(_PAIR, images, classes)
    live = random_teacher(folder, task, _PAIR.teacher)
    recipe: dict[str, Any] = {"views": 1, "batch_size": _PAIR.batch}
    one = unit(task, _PAIR.student, "kd", live, **recipe)
    cached = unit(task, _PAIR.student, "kd", with_cache(live, one, folder / "cache"), **recipe)
    return unit(task, _PAIR.student, "none", **recipe), cached, images * classes * 2 / 2**20


def _run(units: list[Unit], bench: Bench) -> list[dict[str, float]]:
    """Train all at once, a process each. All are alive, and through with training, when any of them counts its pages."""
    command = [sys.executable, "-m", "benchmarks.memory"]
    with ExitStack() as stack:
        log = stack.enter_context((bench.scratch / "memory.log").open("w"))
        processes = []
        for number, one in enumerate(units):
            path = bench.scratch / f"unit-{number}.json"
            path.write_text(one.model_dump_json())
            options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            process = subprocess.Popen([*command, str(path)], cwd=ROOT, env=child_environment(), **options)
            processes.append(stack.enter_context(process))
        for order in ("trained", "counted"):
            for process in processes:
                assert process.stdout is not None
                if process.stdout.readline().strip() != order:
                    raise RuntimeError(f"a trial ended: {(bench.scratch / 'memory.log').read_text()[-2000:]}")
            for process in processes:
                assert process.stdin is not None
                print("go on", file=process.stdin, flush=True)
        return [json.loads(process.stdout.read()) for process in processes if process.stdout is not None]


def private_megabytes() -> float:
    """This process's own memory: pages that no other process has mapped, in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))) / 1024


class _Peak(threading.Thread):
    """The most private memory that this process had while it was watched, without pages of files: alone, a mapped file is private too."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.megabytes = 0.0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(_SAMPLED_EVERY):
            self.megabytes = max(self.megabytes, _dirty_megabytes())

    def stop(self) -> float:
        self._over.set()
        self.join()
        return max(self.megabytes, _dirty_megabytes())


def _dirty_megabytes() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024


def main() -> None:
    """One trial: an epoch, then it waits for the others before it counts."""
    one = Unit.model_validate_json(Path(sys.argv[1]).read_text())
    training = begun(one)
    peak = _Peak()
    peak.start()
    train_epoch(training, 0)
    highest = peak.stop()
    print("trained", flush=True)
    sys.stdin.readline()
    now = private_megabytes()
    print("counted", flush=True)
    sys.stdin.readline()
    print(json.dumps({"peak": highest, "now": now}), flush=True)


if __name__ == "__main__":
    main()
