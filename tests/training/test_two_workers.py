"""Two workers give what one gives on the joined batches: real processes, real gloo, float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from kdbench.experiment import Unit
from kdbench.results.record import RunRecord
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from tests.training.gloo import free_port, joined
from tests.training.units import layout, saved_teacher, unit


def worker(rank: int, world: int, port: int, text: str, folder: str) -> None:
    with joined(rank, world, port) as session:
        record = fit(Unit.model_validate_json(text), session, layout(Path(folder)))
    if rank == 0:
        (Path(folder) / "record.json").write_text(record.model_dump_json())


@pytest.mark.parametrize(
    ("method", "recipe"),
    [("kd", {}), ({"name": "crd", "negatives": 64}, {}), ("kd", {"accumulate": 2, "clip_grad": 0.5})],
    ids=["kd", "batch-coupled", "micro-batches"],
)
def test_two_workers_give_the_weights_of_one_on_the_joined_batches(tmp_path: Path, method: str | dict, recipe: dict) -> None:
    # the transfer set of 300 in batches of 64 leaves a rest, and the 2,000 test images are shared out unevenly by no one
    one = unit(method, saved_teacher(tmp_path, "fp64"), recipe={"precision": "fp64", "batch_size": 64, **recipe})
    two = one.model_copy(update={"workers": 2})
    alone = fit(one, LocalSession(threads=1), layout(tmp_path))
    torch.multiprocessing.spawn(worker, (2, free_port(), two.model_dump_json(), str(tmp_path)), nprocs=2)
    a, b = load_file(layout(tmp_path).student(one.key)), load_file(layout(tmp_path).student(two.key))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)
    together = RunRecord.model_validate_json((tmp_path / "record.json").read_text())
    assert together.metrics == pytest.approx(alone.metrics)
    assert together.world_size == 2
    assert together.curve[-1]["val_accuracy"] == alone.curve[-1]["val_accuracy"]
