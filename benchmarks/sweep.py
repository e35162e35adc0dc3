"""Part d: a sweep of 16 trials x 3 epochs over temperature and weight, from nothing to its end, against torchdistill under Optuna.

Charged to kdbench: its start, Ray's, the teacher's evaluation and the cache. The peer's time is its measured start plus the number of
its steps and validations times what one of them was measured to take; only with --full is its whole sweep run.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.part import ROOT, Bench, child_environment, kdbench_command
from benchmarks.peers import job_of
from benchmarks.report import Goal, Row, at_least, not_measured
from benchmarks.timing import Sample
from benchmarks.torchdistill_peer import PeerMissing, TorchdistillProcess, peer_python
from benchmarks.trainings import BIG_TEACHER, QUICKSTART, Model, begun, random_teacher, unit
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.data.fashion_mnist import full_set_folder
from kdbench.distributed.cluster import started
from kdbench.experiment import Experiment, Runtime, TeacherRef, Unit
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.storage.layout import Layout

EPOCHS, BATCH, TRIALS = 3, 128, 16
SPACE = {"temperature": [1.0, 20.0, True], "kd_weight": [0.1, 1.0, False]}  # low, high, logarithmic: as kd's own ranges
SMALL_GOAL, LARGE_GOAL, ASHA_GOAL, QUALITY_GOAL = at_least(8), at_least(12), at_least(20), at_least(-0.3)
_SMALL, _LARGE = 6_000, 59_000  # of the large set's 60,000 images 1,000 are for validation
QUALITY_VAL = 2_000  # images that the best trial is chosen on, the same for both sides; the teacher never saw them
_RATE_STEPS = 12  # of the peer's, after a warm-up, for each estimate of its rate


@dataclass(frozen=True)
class Timeline:
    """When a kdbench sweep's trials ended, in seconds after its command, and when the whole command did."""

    ends: tuple[float, ...]
    total: float

    def extrapolated(self, trials: int) -> float:
        """The total for more trials than were run, at the pace of those that were."""
        if trials == len(self.ends):
            return self.total
        first = len(self.ends) // 2 - 1
        pace = (self.ends[-1] - self.ends[first]) / (len(self.ends) - 1 - first)
        return self.total + pace * (trials - len(self.ends))


def measure(bench: Bench) -> Iterator[Row]:
    """Wall time at two sizes and with ASHA, then the best validation metric found."""
    try:
        python = peer_python(bench.kept)
        yield from _walls(bench, python)
        yield from _quality(bench, python)
    except PeerMissing as reason:
        yield not_measured("sweeps against torchdistill in an Optuna loop", str(reason), SMALL_GOAL)


def experiment(
    images: int,
    teacher: Model,
    weights: Path,
    *,
    trials: int = TRIALS,
    scheduler: str = "none",
    seed: int = 0,
    val_size: int = 1000,
    batch: int = BATCH,
    full: bool = False,
) -> dict[str, Any]:
    """The sweep as a kdbench experiment: only temperature and weight of `kd` are searched, and as many views kept as there are epochs."""
    return {
        "name": "sweep",
        "task": {
            "name": "classification",
            "data": {"name": "fashion_mnist", "size": "full" if full else "embedded"},
            "val_size": val_size,
            "transfer_size": images,
        },
        "teacher": {"model": teacher, "weights": str(weights)},
        "students": ["tiny_cnn"],
        "methods": [{"name": "kd", "task_weight": 0.1}],
        "recipe": {"epochs": EPOCHS, "batch_size": batch, "lr": 0.1, "augment": {"crop": 2, "flip": True}, "views": EPOCHS},
        "search": {"trials": trials, "scheduler": scheduler, "top_k": 1, "seed": seed},
        "seeds": 1,
    }


# --- wall time ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sweep:
    """What is timed. run_trials: those of kdbench's that are really run; repeats: of the whole measurement."""

    title: str
    images: int
    run_trials: int
    repeats: int
    scheduler: str
    goal: Goal

    @property
    def needs_full_set(self) -> bool:
        return self.images > 12_000


def _sweeps(bench: Bench, trials: int) -> list[_Sweep]:
    repeats = bench.pick(quick=1, usual=2, full=5)
    small = bench.pick(quick=1_000, usual=_SMALL, full=_SMALL)
    title = f"sweep of {trials} x {EPOCHS} epochs at {{:,}} images, wall: torchdistill + Optuna / kdbench"
    found = [_Sweep(title.format(small), small, trials, repeats, "none", SMALL_GOAL)]
    if bench.scale != "quick":
        asha = f"the same at {small:,} images with ASHA, which stops trials early: less work"
        found.append(_Sweep(asha, small, trials, 1, "asha", ASHA_GOAL))
        found.append(_Sweep(title.format(_LARGE), _LARGE, bench.pick(quick=2, usual=2, full=trials), 1, "none", LARGE_GOAL))
    return found


def _walls(bench: Bench, python: Path) -> Iterator[Row]:
    trials = bench.pick(quick=4, usual=TRIALS, full=TRIALS)
    teacher = BIG_TEACHER.teacher
    weights = random_teacher(bench.scratch, experiment(1_000, teacher, Path())["task"], teacher).weights
    for sweep in _sweeps(bench, trials):
        if sweep.needs_full_set and full_set_folder() is None:
            yield not_measured(sweep.title, "the full Fashion-MNIST is not here (apt-get install dataset-fashion-mnist)", sweep.goal)
        else:
            yield _wall(bench, python, sweep, weights, trials)


def _wall(bench: Bench, python: Path, sweep: _Sweep, weights: Path, trials: int) -> Row:
    folder = bench.scratch / f"{sweep.scheduler}-{sweep.images}"
    folder.mkdir()
    settings = experiment(
        sweep.images, BIG_TEACHER.teacher, weights, trials=sweep.run_trials, scheduler=sweep.scheduler, full=sweep.needs_full_set
    )
    bench.say(f"{sweep.title}: torchdistill gets ready")
    peer = _Peer(bench, python, settings, folder)
    ours: list[float] = []
    theirs: list[float] = []
    for repeat in range(sweep.repeats):
        bench.say(f"{sweep.title}: kdbench, {repeat + 1} of {sweep.repeats}")
        ours.append(_timeline(folder / str(repeat), settings).extrapolated(trials))
        bench.say(f"{sweep.title}: torchdistill, {repeat + 1} of {sweep.repeats}")
        theirs.append(peer.sweep_seconds(trials))
    how = [f"kdbench extrapolated from {sweep.run_trials} of its {trials} trials"] if sweep.run_trials < trials else []
    said = f"{Sample(tuple(ours)).median:.0f} s against {Sample(tuple(theirs)).median:.0f} s; {'; '.join([*how, peer.how])}"
    return Row(sweep.title, Sample(tuple(its / mine for its, mine in zip(theirs, ours, strict=True))), goal=sweep.goal, note=said)


def _timeline(folder: Path, settings: dict[str, Any]) -> Timeline:
    """Run `kdbench tune` as a person would, and note when each trial was reported. MLflow is off: the peer tracks nothing either."""
    folder.mkdir()
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings))
    ends: list[float] = []
    said: list[str] = []
    begun_at = time.perf_counter()
    command = kdbench_command("tune", str(path), "--results", str(folder / "results"), "--no-mlflow")
    environment = child_environment(PYTHONUNBUFFERED="1")
    del environment["OMP_NUM_THREADS"]  # a user does not set it
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if re.match(r"search trials \d+/", line):
                ends.append(time.perf_counter() - begun_at)
    if process.returncode or not ends:
        raise RuntimeError(f"kdbench tune ended with {process.returncode}: {''.join(said)[-2000:]}")
    return Timeline(tuple(ends), time.perf_counter() - begun_at)


class _Peer:
    """What a sweep takes torchdistill, from its start, its rate and its validation. It gets as many threads as make it fastest."""

    def __init__(self, bench: Bench, python: Path, settings: dict[str, Any], folder: Path) -> None:
        self._bench, self._python, self._folder = bench, python, folder
        self._job = _job(settings, self._folder)
        self._steps = settings["task"]["transfer_size"] // settings["recipe"]["batch_size"]
        self.how = (
            "run in full"
            if bench.scale == "full"
            else f"torchdistill extrapolated from {_RATE_STEPS} steps, a validation and a start, on the faster of 1 and {_cores()} threads"
        )

    def sweep_seconds(self, trials: int) -> float:
        if self._bench.scale == "full":
            begun_at = time.perf_counter()
            with _threaded(self._python, self._job, self._folder, _cores()) as peer:
                peer.order("sweep", trials=trials, seed=0, space=SPACE)
            return time.perf_counter() - begun_at
        start, trial = self._measured()
        return start + trials * trial

    def _measured(self) -> tuple[float, float]:
        """Seconds of a start and of one trial, at this moment."""
        with TorchdistillProcess(self._python, self._job, self._folder) as peer:
            by_threads = []
            for threads in sorted({1, _cores()}):
                peer.order("threads", count=threads)
                peer.order("steps", count=2)
                step = peer.order("steps", count=_RATE_STEPS)["wall"] / _RATE_STEPS
                by_threads.append((step, peer.order("validate")["wall"], peer.order("begin")["wall"]))
            step, validation, build = min(by_threads)
            return peer.start_seconds, build + EPOCHS * (self._steps * step + validation)


def _cores() -> int:
    from kdbench.distributed.cluster import available_cpus

    return available_cpus()


@contextmanager
def _threaded(python: Path, job: dict[str, Any], folder: Path, threads: int) -> Iterator[TorchdistillProcess]:
    with TorchdistillProcess(python, job, folder) as peer:
        peer.order("threads", count=threads)
        yield peer


def _job(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The sweep's training as torchdistill's process is told it: kdbench's own splits, weights and recipe."""
    described = Experiment.model_validate(settings)
    assert described.teacher is not None
    assert described.teacher.weights is not None
    task, recipe = settings["task"], {**settings["recipe"], "views": None}
    teacher = TeacherRef(model=described.teacher.model, weights=described.teacher.weights, sha="given")
    return job_of(begun(unit(task, "tiny_cnn", settings["methods"][0], teacher, **recipe)), folder)


# --- quality -------------------------------------------------------------------------------------------------------------


class _BestTrial(Unwatched):
    """Keeps the best validation metric of the trials that it is told of."""

    def __init__(self) -> None:
        self.best = float("-inf")

    def finished(self, unit: Unit, record: RunRecord) -> None:
        if unit.role == "trial" and record.val_metric is not None:
            self.best = max(self.best, record.val_metric)


def _quality(bench: Bench, python: Path) -> Iterator[Row]:
    """Best validation accuracy of both sides' sweeps with a trained teacher, seed by seed. Two of the peer's sweeps run side by side."""
    repeats, trials = bench.pick(quick=(1, 2), usual=(5, TRIALS), full=(5, TRIALS))
    images, batch = bench.pick(quick=(320, 32), usual=(1_000, 32), full=(6_000, 64))
    weights = trained_teacher(bench)
    searches = [
        experiment(images, QUICKSTART.teacher, weights, trials=trials, seed=seed, val_size=QUALITY_VAL, batch=batch)
        for seed in range(repeats)
    ]
    bench.say(f"quality: {repeats} sweeps of kdbench")
    ours = []
    with started(Runtime()):
        for seed, settings in enumerate(searches):
            watch = _BestTrial()
            run(Experiment.model_validate(settings), bench.scratch / f"quality-{seed}", watch, search_only=True)
            ours.append(watch.best)
    bench.say(f"quality: {repeats} sweeps of torchdistill")
    theirs = list(_best_of_peer(bench, python, searches[0], repeats, trials))
    differences = tuple(mine - its for mine, its in zip(ours, theirs, strict=True))
    yield Row(
        f"best validation accuracy of {trials} trials: kdbench - torchdistill, paired by seed",
        Sample(differences),
        "points",
        QUALITY_GOAL,
        note=f"{images:,} images, batch {batch}, {QUICKSTART.title} pair; medians {Sample(tuple(ours)).median:.2f} and "
        f"{Sample(tuple(theirs)).median:.2f}",
    )


def _best_of_peer(bench: Bench, python: Path, settings: dict[str, Any], repeats: int, trials: int) -> Iterator[float]:
    folders = [bench.scratch / f"peer-{lane}" for lane in range(min(_cores(), repeats))]
    for folder in folders:
        folder.mkdir()
    best: dict[int, float] = {}
    with ExitStack() as stack:
        lanes = [stack.enter_context(TorchdistillProcess(python, _job(settings, folder), folder)) for folder in folders]
        for first in range(0, repeats, len(lanes)):
            here = list(zip(range(first, min(first + len(lanes), repeats)), lanes, strict=False))
            for seed, lane in here:
                lane.send("sweep", trials=trials, seed=seed, space=SPACE)
            for seed, lane in here:
                best[seed] = max(lane.receive()["values"])
    yield from (best[seed] for seed in range(repeats))


def trained_teacher(bench: Bench) -> Path:
    """The quickstart's teacher, trained on 10,000 images; kept for the next time."""
    epochs = bench.pick(quick=1, usual=3, full=8)
    settings = {
        "name": f"teacher-{epochs}",
        "task": {"name": "classification", "data": "fashion_mnist", "val_size": QUALITY_VAL, "transfer_size": 64},
        "teacher": {"model": QUICKSTART.teacher, "recipe": {"epochs": epochs, "batch_size": 128, "augment": {"crop": 2, "flip": True}}},
        "students": ["tiny_cnn"],
        "methods": ["none"],
        "recipe": {"epochs": 1, "batch_size": 64, "precision": "fp32", "memory_format": "contiguous"},
        "seeds": 1,
    }
    bench.say("a trained teacher")
    run(Experiment.model_validate(settings), bench.kept, Unwatched())
    record = ResultStore(bench.kept).scan(role="teacher", experiment=settings["name"])[-1]
    bench.say(f"its test accuracy is {record.test_metric:.2f}")
    return Layout(bench.kept).teacher(record.unit_key)
