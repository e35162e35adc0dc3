"""Several workers without other processes: what a test needs that looks at one worker's decisions, or that says what the others have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.experiment import Unit
from kdbench.training.assembly import assemble
from kdbench.training.loop import train_step
from kdbench.training.session import LocalSession, State


class AlikeSession(LocalSession):
    """One of `world_size` workers. `others` makes another worker's rows of this one's; by default all have the same."""

    def __init__(
        self,
        world_size: int,
        rank: int = 0,
        others: Callable[[Tensor], Tensor] = lambda rows: rows,
        checkpoint: Path | None = None,
    ) -> None:
        self.places: list[str] = []
        super().__init__(checkpoint, on_resume=self.places.append, device=torch.device("cpu"), threads=1)
        self.world_size, self.rank, self.others = world_size, rank, others
        self.clocks: list[float] = []  # what this worker's clock said each time that the workers compared theirs
        self.alone = 0  # how often a backward pass was not to exchange gradients
        self.kept: list[tuple[int, dict[str, Any]]] = []  # for each checkpoint, how often that had been, and the training's progress

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        self.alone += 1
        return super().without_exchange(module)

    def gather(self, rows: Tensor) -> Tensor:
        if rows.shape == (1,) and rows.dtype == torch.float64:
            self.clocks.append(rows.item())
        return torch.cat([rows if rank == self.rank else self.others(rows) for rank in range(self.world_size)])

    def report(self, metrics: Mapping[str, float], state: Callable[[], State] | None) -> None:
        if state is not None:
            self.kept.append((len(self.clocks), state()["progress"]))
        super().report(metrics, state)


def losses_of_workers(of: Unit, workers: int, changed: Callable[[Batch], Batch]) -> Tensor:
    """The mean of the workers' losses in their first step, each of whom is told how much all count together.

    of: a training that is for so many workers. changed: each one's batch.
    """

    class Counting(AlikeSession):
        everyones: Tensor | None = None
        own: Tensor

        def gather(self, rows: Tensor) -> Tensor:
            self.own = rows
            return super().gather(rows) if self.everyones is None else self.everyones

    def steps(everyones: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        losses, counted = [], []
        for rank in range(workers):
            session = Counting(workers, rank)
            session.everyones = everyones
            run = assemble(of, session)
            losses.append(train_step(run, changed(next(iter(run.loader.batches(0))))))
            counted.append(session.own)
        return losses, counted

    _, counted = steps(None)
    losses, _ = steps(torch.cat(counted))
    return torch.stack(losses).mean(0)
