"""Part scaling: what a trial, a report and a checkpoint cost on Ray, by how many trials run at once and on how many nodes, and beside it
what the search's study and MLflow take of a trial: what docs/scaling.md carries to large clusters.

Nodes are Ray's simulated ones: a raylet each, all on this machine. Trainings do next to nothing, so that what is left is Ray and kdbench.
Values are the driver's CPU time, which is what a larger cluster does not give it more of; wall time is beside them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from optuna.trial import create_trial

from benchmarks.part import Bench
from benchmarks.report import Row
from benchmarks.timing import Sample, Spent, timed
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.distributed.cluster import quiet
from kdbench.experiment import Experiment, Unit
from kdbench.records.record import RunRecord
from kdbench.search.space import Parameter, Range
from kdbench.search.study import MethodStudy, distribution
from kdbench.tracking import Facts, MlflowTracker, tracking_uri

AT_ONCE = (1, 2, 4, 8)
_EPOCHS = 20  # of a long trial; a short one has a single epoch
_NEVER = 1e9


class _Search(NamedTuple):
    """What of a search is varied."""

    trials: int
    epochs: int
    checkpoint_seconds: float


class _Ends(Unwatched):
    """When each trial ended."""

    def __init__(self) -> None:
        self.ends: list[Spent] = []

    def finished(self, unit: Unit, record: RunRecord) -> None:
        if unit.role == "trial":
            self.ends.append(Spent(time.perf_counter(), time.process_time()))


def measure(bench: Bench) -> Iterator[Row]:
    """For each number of nodes and of trials at once three searches: short trials, long ones, and long ones with checkpoints."""
    yield from _studies(bench)
    yield _tracking(bench)
    waves = bench.pick(quick=2, usual=2, full=8)
    for nodes in bench.pick(quick=(1,), usual=(1, 2), full=(1, 2)):
        with _cluster(nodes) as address:
            for at_once in bench.pick(quick=(1, 2), usual=AT_ONCE, full=AT_ONCE):
                bench.say(f"{at_once} trials at once, nodes: {nodes}")
                yield from _rows(bench.scratch / f"{nodes}-{at_once}", address, nodes, at_once, waves)


def _studies(bench: Bench) -> Iterator[Row]:
    """What asking for a trial and telling its end costs in a study that has so many already."""
    axes = [Parameter(f"axis{number}", Range(0.01, 1.0, log=True), 0.1, integer=False) for number in range(4)]
    space = {axis.name: distribution(axis) for axis in axes}
    for size in bench.pick(quick=(100,), usual=(100, 1_000, 10_000), full=(100, 1_000, 10_000)):
        path = bench.scratch / f"study-{size}.journal"
        study = MethodStudy(path, "study", axes, trials=size + 10, sampler="tpe", seed=0)
        draw = random.Random(0)
        study.study.add_trials(
            create_trial(params={name: draw.uniform(0.01, 1.0) for name in space}, distributions=dict(space), value=draw.random())
            for _ in range(size - 1)
        )
        study = MethodStudy(path, "study", axes, trials=size + 10, sampler="tpe", seed=0)

        def one(study: MethodStudy = study) -> None:
            point = study.ask()
            for epoch in range(1, _EPOCHS + 1):
                study.report(point.number, epoch, 0.5, last=epoch == _EPOCHS)
            study.complete(point.number, [0.5], 1.0, _EPOCHS)

        before = path.stat().st_size
        spent = [timed(one) for _ in range(5)]
        grown = (path.stat().st_size - before) / len(spent)
        note = f"four axes, TPE, {_EPOCHS} epochs; {grown:,.0f} bytes in its journal, which has {path.stat().st_size / 1e6:.2g} MB"
        yield _median(f"ask for, report and tell a trial after {size:,} others", spent, note)


def _tracking(bench: Bench) -> Row:
    """A finished training written to MLflow's database in one go, as trials are."""
    tracker = MlflowTracker(tracking_uri(bench.scratch / "mlflow"), "scaling")
    curve = [{"epoch": float(epoch), **{f"metric{number}": 0.5 for number in range(6)}} for epoch in range(1, _EPOCHS + 1)]
    params = {f"param{number}": number for number in range(30)}

    def one(number: int) -> None:
        tracker.log_run(None, "trial", f"trial {number}", curve, Facts(params, {"val_metric": 0.5}, {"a": "b"}))

    one(0)
    spent = [timed(partial(one, number)) for number in range(1, bench.pick(quick=4, usual=20, full=100))]
    return _median("a finished trial in MLflow (SQLite)", spent, f"{_EPOCHS} epochs of 6 metrics, 30 parameters")


def _median(what: str, spent: Sequence[Spent], note: str) -> Row:
    return Row(what, Sample(tuple(one.cpu * 1e3 for one in spent)), "ms", wall=median(one.wall * 1e3 for one in spent), note=note)


def _rows(folder: Path, address: str, nodes: int, at_once: int, waves: int) -> Iterator[Row]:
    trials = at_once * (waves + 1)
    short = _seconds(folder / "short", address, at_once, _Search(trials, 1, _NEVER))
    long = _seconds(folder / "long", address, at_once, _Search(trials, _EPOCHS, _NEVER))
    kept = _seconds(folder / "kept", address, at_once, _Search(trials, _EPOCHS, 0.0))
    where = f"{at_once} at once, {nodes} node{'s' if nodes > 1 else ''}"
    yield _row(f"a trial of one epoch: {where}", short, f"between two ends, over {waves * at_once} trials")
    yield _row(f"an epoch more, with its report: {where}", _difference(long, short), "training of 8 images included in wall")
    yield _row(f"a checkpoint: {where}", _difference(kept, long), "one an epoch, to disk, by the trial's process")


def _row(what: str, spent: Spent, note: str) -> Row:
    return Row(what, Sample((spent.cpu * 1e3,)), "ms", wall=spent.wall * 1e3, note=note)


def _difference(later: Spent, earlier: Spent) -> Spent:
    """For each epoch that one search's trials have more than the other's, or that they keep a checkpoint after."""
    return Spent(later.wall - earlier.wall, later.cpu - earlier.cpu).over(_EPOCHS - 1)


def _seconds(results: Path, address: str, at_once: int, search: _Search) -> Spent:
    """From the end of one trial to that of the next, by the wall and of the driver's CPU; without the first wave, which starts actors."""
    settings = {
        "name": "scaling",
        "task": {"name": "classification", "data": {"name": "shapes", "train": 16, "test": 8, "target": "class"}, "val_size": 8},
        "students": [{"name": "tiny_cnn", "width": 4}],
        "methods": ["none"],
        "recipe": {"epochs": search.epochs, "batch_size": 8, "precision": "fp32", "memory_format": "contiguous", "compile": False},
        "search": {
            "trials": search.trials,
            "sampler": "random",
            "scheduler": "none",
            "top_k": 1,
            "also": {"recipe.lr": {"low": 0.01, "high": 0.5, "log": True}},
        },
        "seeds": 1,
        "runtime": {"address": address, "concurrent": at_once, "checkpoint_seconds": search.checkpoint_seconds},
    }
    ends = _Ends()
    run(Experiment.model_validate(settings), results, ends, search_only=True)
    first, last = ends.ends[at_once - 1], ends.ends[-1]
    return Spent(last.wall - first.wall, last.cpu - first.cpu).over(search.trials - at_once)


@contextmanager
def _cluster(nodes: int) -> Iterator[str]:
    """As many slots as the most trials at once, evenly over the nodes, whatever cores there are."""
    quiet()
    from ray.cluster_utils import Cluster

    share = max(AT_ONCE) // nodes
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": share, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=share)
        cluster.wait_for_nodes()
        yield str(cluster.address)
    finally:
        cluster.shutdown()
