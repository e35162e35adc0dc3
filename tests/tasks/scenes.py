"""Objects of one image and what a detector may say of them, on the cells of a 32x32 image at strides 4 and 8."""

from __future__ import annotations

import torch
from torch import Tensor

from kdbench.models.detectors.positions import positions

CENTRES, STRIDES = positions((32, 32), (4, 8))  # 64 cells, then 16
Target = dict[str, Tensor]


def target(*objects: tuple[tuple[float, ...], int], rows: int = 3) -> Target:
    """One image's objects, padded to `rows`."""
    boxes, labels = torch.zeros(1, rows, 4), torch.full((1, rows), -1)
    for row, (box, label) in enumerate(objects):
        boxes[0, row], labels[0, row] = torch.tensor(box), label
    return {"boxes": boxes, "labels": labels}


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def boxes_around(centres: Tensor, images: int) -> Tensor:
    sides = noise(images, len(centres), 4).exp() * 4
    return torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], dim=-1)


def sides_of(boxes: Tensor) -> Tensor:
    """Raw sides [B, 80, 4] that a `CellReading` reads as these boxes [B, 80, 4]."""
    sides = torch.cat([CENTRES - boxes[..., :2], boxes[..., 2:] - CENTRES], dim=-1)
    return (sides / STRIDES[:, None]).log()


def levels(logits: Tensor, sides: Tensor) -> dict[str, Tensor]:
    """What a network with these logits [B, 80, C] and raw sides [B, 80, 4] gives."""
    cells = torch.cat([logits, sides], dim=-1).mT
    images, channels, _ = cells.shape
    return {"level:0": cells[..., :64].reshape(images, channels, 8, 8), "level:1": cells[..., 64:].reshape(images, channels, 4, 4)}
