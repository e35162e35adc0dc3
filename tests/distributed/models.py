"""Networks that fail in the ways in which processes fail, once or always; named in experiments by their dotted path."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.training.units import SmoothNet


class Fragile(SmoothNet):
    """Kills its process at a training step, where a file says that it should and that this is not the process to spare."""

    def __init__(self, num_classes: int, in_channels: int, mark: str, step: int) -> None:
        super().__init__(num_classes, in_channels)
        self.mark, self.step, self.steps = Path(mark), step, 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        if self.training and self.steps > self.step and self.mark.exists() and int(self.mark.read_text()) != os.getpid():
            self.mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


class Broken(SmoothNet):
    """Has a mistake in its code that shows on the worker of one rank only, after some steps."""

    def __init__(self, num_classes: int, in_channels: int, rank: int, step: int) -> None:
        super().__init__(num_classes, in_channels)
        self.rank, self.step, self.steps = rank, step, 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        if self.steps > self.step and torch.distributed.is_initialized() and torch.distributed.get_rank() == self.rank:
            raise ValueError("a mistake of this worker's")
        return super().forward(images)


def _seen(model: nn.Module) -> nn.Module:
    """With the sizes of its lazy layers settled."""
    model.eval()(torch.zeros(1, 1, 28, 28))
    return model.train()


def fragile(num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    return _seen(Fragile(num_classes, in_channels, **options))


def broken(num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    return _seen(Broken(num_classes, in_channels, **options))
