"""What a training step of each method costs beside one of the undistilled student, with the teacher's outputs cached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.part import Bench
from benchmarks.report import Row, not_measured
from benchmarks.timing import interleave
from benchmarks.trainings import QUICKSTART, begun, epochs, image_task, random_teacher, unit, with_cache
from kdbench.errors import UserError
from kdbench.experiment import TeacherRef
from kdbench.methods import METHODS
from kdbench.training.loop import Training

WHAT = "{}: a step / a step of none"
_STEPS = 8  # an epoch of it is one measurement


def measure(bench: Bench) -> Iterator[Row]:
    """Every method in turn beside `none`, on the quickstart's pair, in float32."""
    task = image_task(QUICKSTART, _STEPS * QUICKSTART.batch)
    live = random_teacher(bench.scratch, task, QUICKSTART.teacher)
    none = begun(unit(task, QUICKSTART.student, "none", live, views=1))
    names = bench.pick(quick=["kd", "fitnet"], usual=list(METHODS), full=list(METHODS))
    for name in names:
        bench.say(f"methods: {name}")
        try:
            run = _training(bench, task, live, name)
        except UserError as unfit:
            yield not_measured(WHAT.format(name), str(unfit))
            continue
        rounds = interleave({"method": epochs(run), "none": epochs(none)}, bench.seconds / len(names), least=3)
        yield Row(WHAT.format(name), rounds.ratio("method", "none"), wall=rounds.ratio("method", "none", "wall").median)


def _training(bench: Bench, task: dict[str, Any], live: TeacherRef, name: str) -> Training:
    """The method on the pair. A first training with the live teacher finds its taps, which are what is then cached."""
    first = begun(unit(task, QUICKSTART.student, name, live, views=1))
    if not first.distiller.method.needs_teacher:
        return first
    method = {"name": name, **first.distiller.method.params.model_dump(mode="json")}
    cached = with_cache(live, unit(task, QUICKSTART.student, method, live, views=1), bench.scratch / f"cache-{name}")
    return begun(unit(task, QUICKSTART.student, method, cached, views=1))
