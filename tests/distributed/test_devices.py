"""Which device computes: a GPU only where one was reserved. No GPU is needed: its presence is pretended, and nothing here ran on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.benchmark.emptying import needs_ray
from kdbench.benchmark.run import profile, run
from kdbench.benchmark.watch import Unwatched
from kdbench.distributed import cache
from kdbench.distributed.cluster import check_fits_here, decided, device_here, slots_of, unusable_gpus, workers_on
from kdbench.errors import UserError
from kdbench.experiment import Experiment, Runtime
from kdbench.records.store import ResultStore
from kdbench.training import session
from kdbench.training.cache.build import Builder
from kdbench.training.cache.outputs import CacheSpec
from kdbench.training.session import LocalSession, device_for
from tests import private_ray
from tests.training.units import saved_teacher, unit

CPU, GPU = torch.device("cpu"), torch.device("cuda")
STAND_IN = torch.device("cpu:0")  # the CPU, but not equal to `CPU`: what stands for a GPU where something has to run
RECIPE = {"epochs": 1, "batch_size": 50, "precision": "fp32", "memory_format": "contiguous", "compile": False}


def experiment(**changes: Any) -> Experiment:
    asked = {
        "name": "devices",
        "task": {"name": "classification", "data": "fashion_mnist", "transfer_size": 100, "val_size": 100},
        "teacher": {"model": {"name": "tiny_cnn", "width": 4}},
        "students": [{"name": "tiny_cnn", "width": 3}],
        "methods": ["kd"],
        "recipe": RECIPE,
        "seeds": 1,
    }
    return Experiment.model_validate({**asked, **changes})


def runtime(**keys: Any) -> Runtime:
    return Runtime.model_validate(keys)


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """A machine of four CPUs where torch sees so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("kdbench.distributed.cluster.available_cpus", lambda: 4)


@pytest.mark.parametrize(
    ("keys", "nodes", "gpus"),
    [
        ({}, [{"CPU": 8}], 0),
        ({}, [{"CPU": 8, "GPU": 0}], 0),
        ({}, [{"CPU": 8, "GPU": 4}], 1),
        ({"address": "auto"}, [{"CPU": 2}, {"CPU": 8, "GPU": 1}], 1),
        ({"gpus_per_worker": 0}, [{"CPU": 8, "GPU": 4}], 0),
        ({"gpus_per_worker": 0.25}, [{"CPU": 8, "GPU": 4}], 0.25),
        ({"gpus_per_worker": 2}, [{"CPU": 8}], 2),
    ],
)
def test_a_worker_gets_a_gpu_by_itself_where_a_node_has_one(keys: dict[str, Any], nodes: list[dict[str, float]], gpus: float) -> None:
    asked = runtime(**keys)
    assert decided(asked, nodes).gpus_per_worker == gpus
    slots = slots_of(asked, nodes)
    assert slots.gpus == gpus
    assert slots.trial_resources.get("GPU", 0) == gpus


def test_trainings_by_default_do_not_share_a_gpu() -> None:
    node = {"CPU": 16, "GPU": 2}
    assert workers_on(node, decided(runtime(), [node])) == 2
    assert slots_of(runtime(), [node]).concurrent == 2


@pytest.mark.parametrize(
    ("gpus", "keys", "device"),
    [(0, {}, CPU), (1, {}, GPU), (1, {"gpus_per_worker": 0}, CPU), (1, {"gpus_per_worker": 0.5}, GPU), (0, {"gpus_per_worker": 1}, CPU)],
)
def test_the_command_itself_computes_where_the_runtime_says(
    gpus: int, keys: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, gpus)
    assert device_here(runtime(**keys)) == device


def test_no_process_takes_a_gpu_that_nobody_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 1)
    assert LocalSession().device == device_for(0) == CPU
    assert device_for(1) == device_for(0.5) == GPU


@pytest.mark.parametrize(
    ("gpus", "keys", "needed"),
    [
        (0, {}, False),
        (0, {"concurrent": 2}, True),
        (1, {}, False),
        (1, {"gpus_per_worker": 1}, False),
        (1, {"gpus_per_worker": 0.5}, True),
        (2, {}, True),
        (2, {"concurrent": 1}, False),
        (2, {"gpus_per_worker": 0}, False),
    ],
)
def test_ray_runs_trainings_where_several_gpus_or_shares_do_them_at_once(
    gpus: int, keys: dict[str, Any], needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, gpus)
    assert needs_ray(runtime(**keys), searching=False) is needed
    assert needs_ray(runtime(**keys), searching=True)


def test_too_few_gpus_for_the_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 1)
    with pytest.raises(UserError, match=r"2 workers need 2 GPUs \(auto\), this machine has 1; use gpus_per_worker: 0 to train on CPUs"):
        check_fits_here(runtime(workers=2))
    check_fits_here(runtime(workers=2, gpus_per_worker=0))


def test_a_training_on_cpus_leaves_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The precision is measured, the teacher trained, measured from its file and cached, the student trained: none of it on the GPU."""
    pretend(monkeypatch, 1)
    fast = {"epochs": 1, "batch_size": 50}
    on_cpus = experiment(runtime={"gpus_per_worker": 0}, recipe=fast)
    assert run(on_cpus, tmp_path / "first", Unwatched()).failures == ()
    (weights,) = (tmp_path / "first" / "teachers").rglob("model.safetensors")
    given = on_cpus.model_copy(update={"teacher": on_cpus.teacher and on_cpus.teacher.model_copy(update={"weights": weights})})
    assert run(given, tmp_path / "second", Unwatched()).failures == ()
    profile(on_cpus, tmp_path / "first", Unwatched())
    for folder in ("first", "second"):
        assert all(record.devices in ([], ["cpu"]) for record in ResultStore(tmp_path / folder).scan())


def test_all_of_a_run_without_ray_is_on_the_gpu_that_it_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 1)
    asked: list[float] = []
    devices: list[torch.device] = []
    local, builder = LocalSession.__init__, Builder.__init__

    def stand_in(gpus: float) -> torch.device:
        asked.append(gpus)
        return STAND_IN if gpus else CPU

    def noted_session(self: LocalSession, *args: Any, **keys: Any) -> None:
        local(self, *args, **keys)
        devices.append(self.device)

    def noted_builder(self: Builder, spec: CacheSpec, folder: Path, device: torch.device) -> None:
        builder(self, spec, folder, device)
        devices.append(device)

    monkeypatch.setattr(session, "device_for", stand_in)
    monkeypatch.setattr(LocalSession, "__init__", noted_session)
    monkeypatch.setattr(Builder, "__init__", noted_builder)
    assert run(experiment(), tmp_path, Unwatched()).failures == ()
    assert set(asked) == {1.0}
    assert set(devices) == {STAND_IN}
    assert len(devices) >= 4  # teacher, cache, the method's check, student


def test_who_writes_the_cache_uses_the_gpu_that_is_reserved_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 1)
    asked: list[float] = []

    def noted(gpus: float) -> torch.device:
        asked.append(gpus)
        return CPU

    monkeypatch.setattr(cache, "device_for", noted)
    of = unit("kd", saved_teacher(tmp_path))
    spec = CacheSpec(teacher=of.teacher, task=of.task, recipe=of.recipe, data_seed=0)
    for gpus in (0, 0.5):
        cache._Writer(spec.model_dump_json(), str(tmp_path / "cache"), str(tmp_path), torch.get_num_threads(), gpus, None)
    assert asked == [0, 0.5]


def test_a_reserved_gpu_that_torch_can_not_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0)
    assert unusable_gpus(0) is None
    assert "install a build of torch for CUDA, or set runtime.gpus_per_worker: 0" in str(unusable_gpus(1))
    pretend(monkeypatch, 1)
    assert unusable_gpus(1) is None


@pytest.fixture
def ray_with_a_gpu() -> Iterator[None]:
    """A Ray whose node says that it has a GPU."""
    import ray

    others = ray.is_initialized()
    ray.shutdown()
    private_ray.start(gpus=1)
    yield
    ray.shutdown()
    if others:
        private_ray.start()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_with_a_gpu")
@pytest.mark.parametrize("workers", [1, 2])
def test_trials_and_workers_train_where_ray_reserved(workers: int, tmp_path: Path) -> None:
    """Without a reservation the node's CPUs train. auto reserves its GPU, which a trial without a usable torch can't take."""
    search = {"trials": 1, "sampler": "random", "scheduler": "none", "top_k": 1}
    several = experiment(teacher=None, methods=["none"], search=search, recipe={**RECIPE, "lr": 0.1})

    def trained(**keys: Any) -> tuple[str, ...]:
        asked = several.model_copy(update={"runtime": runtime(address="auto", workers=workers, **keys)})
        return run(asked, tmp_path / str(keys), Unwatched()).failures

    assert trained(gpus_per_worker=0) == ()
    if workers == 1 and not torch.cuda.is_available():
        (failure,) = trained()
        assert "can't use it; install a build of torch for CUDA" in failure
