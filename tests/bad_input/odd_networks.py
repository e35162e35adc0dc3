"""Networks with habits that a training meets late. Each is small; images are 3x32x32 in five classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Base(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, 2, 1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)

    def logits(self, images: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(images)).relu().mean((2, 3)))

    def forward(self, images: Tensor) -> Any:
        return self.logits(images)


class Frozen(Base):
    """Nothing learns."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.requires_grad_(False)


class LinearProbe(Base):
    """Only the head learns."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.conv.requires_grad_(False)


class Detached(Base):
    def forward(self, images: Tensor) -> Any:
        return self.logits(images).detach() + torch.zeros(1, requires_grad=True)


class Empty(nn.Module):
    """Nothing can learn."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None].expand(-1, self.num_classes) * torch.arange(self.num_classes)


class Grows(Base):
    """Its buffer has another shape after each step."""

    seen: Tensor

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, images: Tensor) -> Any:
        if self.training:
            self.seen = torch.cat([self.seen, torch.ones(1)])
        return self.logits(images)


class KeepsAList(Base):
    """A part of its state is no tensor."""

    def get_extra_state(self) -> list[str]:
        return ["a", "b"]

    def set_extra_state(self, state: Any) -> None:
        pass


class OneSize(Base):
    """Written for batches of exactly 20 images."""

    def forward(self, images: Tensor) -> Any:
        return self.logits(images.reshape(20, *images.shape[1:]) if self.training else images)


class SinglePositions(Base):
    """A batch norm over one number an image and channel, as on maps of 1x1."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.last = nn.BatchNorm1d(num_classes)

    def forward(self, images: Tensor) -> Any:
        return self.last(self.logits(images))


class Leaves(Base):
    """It ends the program in training mode."""

    def forward(self, images: Tensor) -> Any:
        if self.training:
            raise SystemExit("config error")
        return self.logits(images)


class Dictionary(Base):
    """Like the models of transformers."""

    def forward(self, images: Tensor) -> Any:
        return {"logits": self.logits(images), "hidden": None}


class Answer(NamedTuple):
    logits: Tensor
    aux: Tensor | None


class Auxiliary(Base):
    """Like torchvision's GoogLeNet: a tensor in eval mode, a named tuple in training mode."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.aux = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Any:
        if not self.training:
            return self.logits(images)
        return Answer(self.logits(images), self.aux(self.conv(images).mean((2, 3))))


class Pair(Base):
    """Like Auxiliary, with a tuple whose parts have no names."""

    def forward(self, images: Tensor) -> Any:
        return (self.logits(images), None) if self.training else self.logits(images)


class Tied(nn.Module):
    """Two layers share one matrix."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.encode = nn.Linear(in_channels * 16, 8)
        self.decode = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.decode.weight
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.encode(F.adaptive_avg_pool2d(images, 4).flatten(1)))
        return self.head(F.relu(self.again(F.relu(self.decode(x)))))


class Normed(Base):
    """Spectral and weight norm, whose weights are computed from others."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        parametrizations.spectral_norm(self.head)
        parametrizations.weight_norm(self.conv)


class HidesALayer(Base):
    """A layer in a plain list is no part of the network for PyTorch."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.mixers = {"last": [nn.Linear(num_classes, num_classes)]}
        self.known = [self.head]

    def forward(self, images: Tensor) -> Any:
        return self.mixers["last"][0](self.logits(images))


class HidesATensor(Base):
    """A tensor that is drawn when the network is built, and not saved."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.shift = torch.randn(num_classes)

    def forward(self, images: Tensor) -> Any:
        return self.logits(images) + self.shift


class NanInEvaluation(Base):
    def forward(self, images: Tensor) -> Any:
        return self.logits(images) * (1 if self.training else torch.nan)


class NanInTraining(Base):
    def forward(self, images: Tensor) -> Any:
        return self.logits(images) * (torch.nan if self.training else 1)


class NanLater(Base):
    """In evaluation, once it was trained for three steps."""

    steps: Tensor

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, images: Tensor) -> Any:
        self.steps.add_(float(self.training))
        return self.logits(images) * (torch.nan if not self.training and self.steps >= 3 else 1)


class Draws(Base):
    """It draws from every generator there is, and counts its steps."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self.steps = 0
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Any:
        import random

        import numpy as np

        self.steps += 1
        return self.drop(self.logits(images)) + random.random() * np.random.rand()  # noqa: NPY002
