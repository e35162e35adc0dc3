"""Two workers give what one gives on the joined batches: real processes, real gloo, float64."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdbench.distributed.train import gathered
from kdbench.experiment import Unit
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from tests.training.units import layout, saved_teacher, unit


class GlooSession:
    """One of several plain processes joined by gloo: `RaySession` without Ray."""

    def __init__(self) -> None:
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device, self.threads = torch.device("cpu"), 1

    def prepare(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module)

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def report(self, metrics: Mapping[str, float], state: Callable[[], dict[str, Any]] | None) -> None:
        pass

    def resume(self) -> None:
        return None

    def gather(self, rows: Tensor) -> Tensor:
        return gathered(rows)


def worker(rank: int, world: int, port: int, text: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    record = fit(Unit.model_validate_json(text), GlooSession(), layout(Path(folder)))
    if rank == 0:
        (Path(folder) / "record.json").write_text(record.model_dump_json())
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("method", "recipe"),
    [("kd", {}), ("tf_nkd", {}), ("kd", {"accumulate": 2, "clip_grad": 0.5})],
    ids=["kd", "batch-coupled", "micro-batches"],
)
def test_two_workers_give_the_weights_of_one_on_the_joined_batches(tmp_path: Path, method: str, recipe: dict) -> None:
    # the transfer set of 300 in batches of 64 leaves a rest, and the 2,000 test images are shared out unevenly by no one
    one = unit(method, saved_teacher(tmp_path, "fp64"), recipe={"precision": "fp64", "batch_size": 64, **recipe})
    two = one.model_copy(update={"workers": 2})
    alone = fit(one, LocalSession(threads=1), layout(tmp_path))
    torch.multiprocessing.spawn(worker, (2, free_port(), two.model_dump_json(), str(tmp_path)), nprocs=2)
    a, b = load_file(layout(tmp_path).student(one.key)), load_file(layout(tmp_path).student(two.key))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)
    from kdbench.results.record import RunRecord

    joined = RunRecord.model_validate_json((tmp_path / "record.json").read_text())
    assert joined.metrics == pytest.approx(alone.metrics)
    assert joined.world_size == 2
    assert joined.curve[-1]["val_accuracy"] == alone.curve[-1]["val_accuracy"]
