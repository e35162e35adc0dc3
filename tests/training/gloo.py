"""Workers that are plain processes, joined by gloo: what a test of several workers needs, without Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdbench.distributed.train import gathered


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


@contextmanager
def joined(rank: int, world: int, port: int) -> Iterator[GlooSession]:
    """A session of this process in a group of `world`, which meet at a port of this machine; the group ends with the block."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    yield GlooSession()
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
