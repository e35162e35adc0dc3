"""The clock at the borders of a step's parts: everything is charged to something, and the loop is afterwards as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.data.batch import Batch
from kdbench.models.outputs import Outputs
from kdbench.training import profiling
from kdbench.training.assembly import assemble
from kdbench.training.profiling import PARTS, profile_steps
from kdbench.training.session import LocalSession
from tests.training.units import saved_teacher, unit, with_cache


@pytest.mark.parametrize("cached", [False, True])
def test_every_part_of_a_step_is_charged_and_the_loop_is_left_as_it_was(tmp_path: Path, cached: bool) -> None:
    of = unit("kd", saved_teacher(tmp_path))
    if cached:
        assert of.teacher is not None
        of = of.model_copy(update={"teacher": with_cache(of.teacher, of, tmp_path / "cache")})
    run = assemble(of, LocalSession(device=torch.device("cpu")))
    teacher = run.teacher
    found = profile_steps(run, 4, tmp_path / "traces" / "kd.json")
    assert tuple(found.milliseconds) == PARTS
    assert all(milliseconds > 0 for milliseconds in found.milliseconds.values())
    assert found.steps == 4
    assert run.teacher is teacher
    assert not run.wrapped._forward_hooks
    assert not run.wrapped._forward_pre_hooks
    assert not run.distiller.method._forward_hooks
    assert json.loads((tmp_path / "traces" / "kd.json").read_text())["traceEvents"]


def test_what_a_part_takes_is_charged_to_it_and_to_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = assemble(unit("kd", saved_teacher(tmp_path)), LocalSession(device=torch.device("cpu")))
    now = 0.0
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now)
    teacher, method_forward = run.teacher, run.distiller.method.forward
    assert teacher is not None

    def slow_teacher(batch: Batch) -> Outputs:
        nonlocal now
        now += 2.0
        return teacher(batch)

    def slow_method(*arguments: Any) -> Any:
        nonlocal now
        now += 0.5
        return method_forward(*arguments)

    run.teacher = slow_teacher  # type: ignore[assignment]
    monkeypatch.setattr(run.distiller.method, "forward", slow_method)
    found = profile_steps(run, 3, tmp_path / "trace.json")
    assert found.milliseconds == dict.fromkeys(PARTS, 0.0) | {"teacher": 2000.0, "method": 500.0}
