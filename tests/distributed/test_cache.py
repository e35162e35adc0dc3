"""A teacher's cache filled by Ray's processes: the bytes of a build in one process, and a mistake arrives as what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.distributed import cache, cluster
from kdbench.distributed.cache import worth_ray, write_with_ray
from kdbench.errors import DiskFull
from kdbench.experiment import Runtime
from kdbench.training.cache.build import Builder, Plan, build_here
from kdbench.training.cache.outputs import CacheSpec, open_cache
from kdbench.training.cache.streams import Stream
from tests.training.units import saved_teacher, unit

CPU = torch.device("cpu")
TAPS = ("stage:-1",)


def begun(spec: CacheSpec, folder: Path) -> tuple[Builder, Plan]:
    builder = Builder(spec, folder, CPU)
    plan = builder.plan([TAPS])
    builder.begin(plan)
    return builder, plan


@pytest.mark.usefixtures("ray")
def test_shards_written_by_rays_processes_are_the_bytes_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdbench.training.cache.streams.SHARD_ROWS", 128)
    augmented = unit("kd", saved_teacher(tmp_path), recipe={"augment": {"crop": 2, "flip": True}, "views": 2})
    assert augmented.teacher is not None
    spec = CacheSpec(teacher=augmented.teacher, task=augmented.task, recipe=augmented.recipe, data_seed=0)
    builder, plan = begun(spec, tmp_path / "ray")
    assert sorted(write_with_ray(builder, plan, Runtime())) == sorted(piece.images for piece in plan.pieces)
    builder.finish(plan)
    assert open_cache(builder.folder, TAPS) is not None
    here, same = begun(spec, tmp_path / "here")
    for _ in build_here(here, same):
        pass
    here.finish(same)
    written, expected = ({path.name: path.read_bytes() for path in b.folder.iterdir()} for b in (builder, here))
    assert written == expected

    full, plan = begun(spec, tmp_path / "full")
    data = full.folder / "logits.npy"
    data.unlink()
    data.symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"the disk is full: .*logits\.npy"):
        list(write_with_ray(full, plan, Runtime()))


@pytest.mark.parametrize(
    ("runtime", "pieces", "seconds", "anyway", "worth"),
    [
        ({}, 100, 1000.0, True, False),  # one GPU, so one writer
        ({"gpus_per_worker": 0}, 100, 1000.0, True, True),
        ({"gpus_per_worker": 0.5}, 100, 1000.0, True, True),
        ({"gpus_per_worker": 0}, 100, 1000.0, False, False),
        ({"gpus_per_worker": 0}, 100, 10.0, True, False),
        ({"gpus_per_worker": 0}, 1, 1000.0, True, False),
        ({"gpus_per_worker": 0, "cpus_per_worker": 3}, 100, 1000.0, True, False),
        ({"gpus_per_worker": 1}, 100, 1000.0, True, False),
        ({"address": "auto"}, 2, 1.0, True, True),
        ({"address": "auto"}, 1, 1.0, True, False),
    ],
)
def test_ray_is_used_on_a_cluster_and_for_long_builds(
    monkeypatch: pytest.MonkeyPatch, runtime: dict[str, Any], pieces: int, seconds: float, anyway: bool, worth: bool
) -> None:
    monkeypatch.setattr(cluster, "available_cpus", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    stream = Stream(name="logits", kind="prediction", shape=(10,), views=1, images=pieces, precision="fp16", shard_rows=1)
    plan = Plan(tuple(cache.Piece(False, shard, ("logits",), ()) for shard in stream.shards), (stream,), 0, {})
    assert worth_ray(Runtime.model_validate(runtime), plan, seconds, anyway) == worth
