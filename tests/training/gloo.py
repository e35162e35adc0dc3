"""Workers that are plain processes, joined by gloo: what a test of several workers needs, without Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdbench.distributed.train import gathered, lost_peer
from kdbench.training.checkpoint import load_checkpoint, save_checkpoint


class Stopped(Exception):
    """Enough checkpoints are kept: where a training was to be interrupted."""


class GlooSession:
    """One of several plain processes joined by gloo: `RaySession` without Ray."""

    def __init__(self, checkpoint: Path | None = None, stop_after: int = 0) -> None:
        """checkpoint: the file that rank 0 keeps and all resume from; stop_after: with which of them all workers stop."""
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device, self.threads = torch.device("cpu"), 1
        self.checkpoint, self.stop_after = checkpoint, stop_after
        self.places: list[str] = []

    def prepare(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module)

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def report(self, metrics: Mapping[str, float], state: Callable[[], dict[str, Any]] | None) -> None:
        if state is None or self.checkpoint is None:
            return
        if self.rank == 0:
            save_checkpoint(state(), self.checkpoint)
        self.stop_after -= 1
        if self.stop_after == 0:
            raise Stopped

    def resume(self) -> dict[str, Any] | None:
        return load_checkpoint(self.checkpoint) if self.checkpoint is not None and self.checkpoint.exists() else None

    def resumed(self, place: str) -> None:
        self.places.append(place)

    def lost_peer(self, error: Exception) -> bool:
        return lost_peer(error)

    def gather(self, rows: Tensor) -> Tensor:
        return gathered(rows)


@contextmanager
def joined(rank: int, world: int, port: int, **options: Any) -> Iterator[GlooSession]:
    """A session of this process in a group of `world`, which meet at a port of this machine; the group ends with the block."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    yield GlooSession(**options)
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
