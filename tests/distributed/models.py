"""Networks that fail in the ways in which processes fail, once or always; named in experiments by their dotted path."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.data.columns import Columns
from kdbench.models.detectors.mask_rcnn import mask_rcnn
from kdbench.models.outputs import reading_of
from tests.each_task import MASKS
from tests.training.units import PairNet, PlainDetector, SmoothNet, dense_net, smooth_net, yes_or_no_net


class Fragile(SmoothNet):
    """Kills its process at a training step, where a file says that it should and that this is not the process to spare.

    The file goes with the first process that dies, unless it says so `for_good`.
    """

    def __init__(self, num_classes: int, in_channels: int, mark: str, step: int, for_good: bool = False) -> None:
        super().__init__(num_classes, in_channels)
        self.mark, self.step, self.for_good, self.steps = Path(mark), step, for_good, 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        if self.training and self.steps > self.step and self.mark.exists() and int(self.mark.read_text()) != os.getpid():
            if not self.for_good:
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


def _seen(model: SmoothNet) -> nn.Module:
    """With the sizes of its lazy layers settled, for images of 28 x 28 pixels."""
    model.eval()(torch.zeros(1, model.features[0].in_channels, 28, 28))
    return model.train()


def fragile(num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    return _seen(Fragile(num_classes, in_channels, **options))


def broken(num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    return _seen(Broken(num_classes, in_channels, **options))


class Placed(nn.Module):
    """Takes its time at every training step, and leaves a note of who runs it: a file `NODE.RANK.PID` in a folder.

    Where a file `FOLDER.hold` says so, no worker makes another step before so many have signed in all, or two minutes have passed.
    """

    def __init__(self, network: nn.Module, notes: str, pause: float) -> None:
        super().__init__()
        self.network, self.notes, self.pause, self.steps = network, Path(notes), pause, 0
        self.reading = reading_of(network)

    def forward(self, inputs: Columns, **truth: Tensor) -> Columns:
        if self.training:
            time.sleep(self.pause)
            if self.steps == 0:
                self._sign()
            self.steps += 1
            self._hold()
        prediction: Columns = self.network(inputs, **truth)
        return prediction

    def _hold(self) -> None:
        held, until = self.notes.with_suffix(".hold"), time.monotonic() + 120
        while held.exists() and len(list(self.notes.iterdir())) < int(held.read_text()) and time.monotonic() < until:
            time.sleep(0.1)

    def _sign(self) -> None:
        import ray

        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (self.notes / f"{node}.{rank}.{os.getpid()}").touch()


def placed(num_classes: int, in_channels: int, notes: str, pause: float) -> nn.Module:
    return Placed(smooth_net(num_classes, in_channels), notes, pause)


def placed_answers(num_classes: int, in_channels: int, image_size: int, notes: str, pause: float) -> nn.Module:
    return Placed(yes_or_no_net(num_classes, in_channels, image_size), notes, pause)


def placed_detector(num_classes: int, in_channels: int, notes: str, pause: float) -> nn.Module:
    return Placed(PlainDetector(num_classes, in_channels), notes, pause)


def placed_masks(num_classes: int, in_channels: int, notes: str, pause: float) -> nn.Module:
    options = {name: value for name, value in MASKS.items() if name != "name"}
    return Placed(mask_rcnn(num_classes=num_classes, in_channels=in_channels, **options), notes, pause)


def placed_pixels(num_classes: int, in_channels: int, notes: str, pause: float) -> nn.Module:
    return Placed(dense_net(num_classes, in_channels), notes, pause)


def placed_pairs(in_channels: int, image_size: int, vocabulary: int, notes: str, pause: float) -> nn.Module:
    return Placed(PairNet(in_channels, image_size, vocabulary), notes, pause)


def noted(num_classes: int, in_channels: int, folder: str) -> nn.Module:
    """A network that leaves an empty note of the process it was made in, and writes into it when it is evaluated."""
    note = Path(folder, str(os.getpid()))
    note.write_text("")  # of the trial before, which this process trained too, nothing stays
    network = _seen(SmoothNet(num_classes, in_channels))

    def written(module: nn.Module, _: Any) -> None:
        if not module.training and note.exists():
            note.write_text("evaluated")

    network.register_forward_pre_hook(written)
    return network
