"""Several workers give what one gives on the joined batches, also where their number changes: real processes, real gloo, float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from kdbench.experiment import Unit
from kdbench.records.record import RunRecord
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from tests.training.gloo import Stopped, free_port, joined
from tests.training.units import layout, pixel_unit, saved_teacher, unit


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


@pytest.mark.parametrize(
    ("method", "recipe", "workers"),
    [
        ("kd", {}, 2),
        ("label_smoothing", {"accumulate": 3, "clip_grad": 0.5}, 2),
        ({"name": "cwd+kd", "kd": {"kd_weight": 0.3}}, {"batch_size": 19}, {"max": 2}),
        ("dist", {}, 2),
    ],
    ids=["kd", "micro-batches", "unequal-shares", "batch-coupled"],
)
def test_pixels_count_alike_for_any_number_of_workers(tmp_path: Path, method: str | dict, recipe: dict, workers: int | dict) -> None:
    one = pixel_unit(method, tmp_path, **recipe, epochs=1)
    two = Unit.model_validate(one.model_dump() | {"workers": workers})
    alone = fit(one, LocalSession(threads=1), layout(tmp_path))
    torch.multiprocessing.spawn(worker, (2, free_port(), two.model_dump_json(), str(tmp_path)), nprocs=2)
    a, b = load_file(layout(tmp_path).student(one.key)), load_file(layout(tmp_path).student(two.key))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)
    together = RunRecord.model_validate_json((tmp_path / "record.json").read_text())
    losses = [name for name in alone.curve[0] if name.startswith("train_")]
    assert {name: together.curve[0][name] for name in losses} == pytest.approx({name: alone.curve[0][name] for name in losses}, rel=1e-10)


def shrinking(rank: int, ports: tuple[int, int], text: str, folder: str) -> None:
    """Three workers train until the sixth checkpoint, in the middle of the second epoch; two of them go on."""
    training, checkpoint = Unit.model_validate_json(text), Path(folder) / "checkpoint.pt"
    with joined(rank, 3, ports[0], checkpoint=checkpoint, stop_after=6) as session, pytest.raises(Stopped):
        fit(training, session, layout(Path(folder)))
    if rank == 2:
        return
    with joined(rank, 2, ports[1], checkpoint=checkpoint) as session:
        record = fit(training, session, layout(Path(folder)))
    assert session.places == ["epoch 2 of 2, step 3 of 4, with 2 workers instead of 3"]
    if rank == 0:
        (Path(folder) / "record.json").write_text(record.model_dump_json())


def test_a_training_that_loses_a_worker_ends_with_the_weights_of_one_that_never_had_several(tmp_path: Path) -> None:
    # a batch of 64 is cut into 21, 21 and 22 samples: each must count alike, and rkd must see the joined batch
    one = unit("rkd", saved_teacher(tmp_path, "fp64"), recipe={"precision": "fp64", "batch_size": 64})
    several = Unit.model_validate(one.model_dump() | {"workers": {"min": 1, "max": 3}, "checkpoint_seconds": 0})
    alone = fit(one, LocalSession(threads=1), layout(tmp_path))
    ports = free_port(), free_port()
    torch.multiprocessing.spawn(shrinking, (ports, several.model_dump_json(), str(tmp_path)), nprocs=3)
    a, b = load_file(layout(tmp_path).student(one.key)), load_file(layout(tmp_path).student(several.key))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)
    together = RunRecord.model_validate_json((tmp_path / "record.json").read_text())
    assert together.metrics == pytest.approx(alone.metrics)
    assert (together.worker_counts, together.world_size) == ([3, 2], 2)
    for name in ("train_total", "train_cross_entropy", "val_nll"):
        assert [row[name] for row in together.curve] == pytest.approx([row[name] for row in alone.curve])
    assert together.device_hours is not None
    assert together.train_seconds is not None
    assert 2 * together.train_seconds < together.device_hours * 3600 < 3 * together.train_seconds
