"""Where a training runs: rank, device, how modules are prepared, where reports and checkpoints go. The loop knows nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdbench.training.checkpoint import load_checkpoint, save_checkpoint

State = dict[str, Any]
OnReport = Callable[[Mapping[str, float]], None]
OnResume = Callable[[str], None]


class Session(Protocol):
    """What the loop asks of its surroundings. `LocalSession` is one process; `distributed.train.RaySession` one worker of several."""

    rank: int
    world_size: int
    device: torch.device
    threads: int

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module, on the device and wrapped for gradient exchange where there are several workers."""
        ...

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        """While this is open, backward passes do not exchange gradients."""
        ...

    def report(self, metrics: Mapping[str, float], state: Callable[[], State] | None) -> None:
        """Make an epoch known (nothing, where `metrics` is empty); `state`, where given, is called and kept. All workers call together."""
        ...

    def resume(self) -> State | None:
        """The last kept state of this unit, or None for a fresh start."""
        ...

    def resumed(self, place: str) -> None:
        """Make known where an interrupted training goes on. All workers call together."""
        ...

    def lost_peer(self, error: Exception) -> bool:
        """Whether an error says no more than that another worker is gone."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate every worker's rows (equal numbers of them) in rank order."""
        ...


def device_for(gpus: float) -> torch.device:
    """The device of a process that may use so many GPUs, or such a share of one: the first GPU that it sees, or the CPU.

    Ray shows a process the GPUs that it reserved for it and no others.
    """
    return torch.device("cuda" if gpus and torch.cuda.is_available() else "cpu")


class LocalSession:
    """One process without Ray: a laptop, a test, or the inside of a Tune actor."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        checkpoint: Path | None = None,
        on_report: OnReport | None = None,
        on_resume: OnResume | None = None,
        device: torch.device | None = None,
        threads: int | None = None,
    ) -> None:
        """checkpoint: the file that is kept and resumed from; on_report: told of each epoch; on_resume: told where an interrupted training
        goes on; device: the CPU by default (see `device_for`); threads: of CPU kernels, all by default.
        """
        self.checkpoint = checkpoint
        self.on_report = on_report
        self.on_resume = on_resume
        self.device = device or torch.device("cpu")
        self.threads = threads or torch.get_num_threads()

    def prepare(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def report(self, metrics: Mapping[str, float], state: Callable[[], State] | None) -> None:
        if state is not None and self.checkpoint is not None:
            save_checkpoint(state(), self.checkpoint)
        if metrics and self.on_report is not None:
            self.on_report(metrics)

    def resume(self) -> State | None:
        return load_checkpoint(self.checkpoint) if self.checkpoint is not None else None

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def resumed(self, place: str) -> None:
        if self.on_resume is not None:
            self.on_resume(place)

    def lost_peer(self, error: Exception) -> bool:
        return False
