"""Detectors with anchors: each cell of a pyramid says for boxes of several shapes what object each lies on, and how it has to be moved.

Sources: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017 (arXiv 1708.02002), for RetinaNet; Liu et al., "SSD: Single Shot
MultiBox Detector", ECCV 2016 (arXiv 1512.02325). Numbers and anchors are those of torchvision, so that its weights mean the same here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.data.columns import wide
from kdbench.models.detectors.positions import corners, grid
from kdbench.models.detectors.readings import Dense, Reading, end_to_end, suppressed

LARGEST_GROWTH = math.log(1000 / 16)  # a side grows 62 times at most, so that no box becomes infinite
BOX = 4
Weights = tuple[float, float, float, float]  # what the offsets of x, y, width and height are multiplied by before they are learned
PLAIN: Weights = (1.0, 1.0, 1.0, 1.0)


def encode(boxes: Tensor, anchors: Tensor, weights: Weights = PLAIN) -> Tensor:
    """The offsets that move anchors to boxes: of the centre, in sides of the anchor, and the logarithm of how the sides grow.

    boxes, anchors: [..., 4], of positive sides. Source: Girshick et al., CVPR 2014 (arXiv 1311.2524), appendix C.
    """
    centre, sides = _centre_and_sides(boxes)
    from_centre, from_sides = _centre_and_sides(anchors)
    offsets = torch.cat([(centre - from_centre) / from_sides, (sides / from_sides).log()], dim=-1)
    return offsets * offsets.new_tensor(weights)


def decode(offsets: Tensor, anchors: Tensor, weights: Weights = PLAIN) -> Tensor:
    """The boxes [..., 4] that `offsets` [..., 4] make of anchors [..., 4]: the inverse of `encode`, with growth up to `LARGEST_GROWTH`."""
    moves, growth = (offsets / offsets.new_tensor(weights)).chunk(2, dim=-1)
    from_centre, from_sides = _centre_and_sides(anchors)
    centre, half = from_centre + moves * from_sides, from_sides * growth.clamp(max=LARGEST_GROWTH).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _centre_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes.chunk(2, dim=-1)
    return low + (high - low) / 2, high - low


def anchor_sizes(smallest: int, levels: int, octaves: int = 3) -> tuple[tuple[int, ...], ...]:
    """Sizes of the anchors of each level, in pixels: `octaves` steps between a power of two and the next, beginning at `smallest`."""
    return tuple(tuple(int((smallest << level) * 2 ** (step / octaves)) for step in range(octaves)) for level in range(levels))


@dataclass(frozen=True)
class BoxesOfCells(Reading):
    """What the families with anchors have in common: a level is [B, A D, H, W], of each of a cell's A anchors D numbers, anchor by anchor.

    The last four of the D are offsets, see `encode`; those before them say the class.
    """

    @property
    @abstractmethod
    def weights(self) -> Weights:
        """Of the offsets."""

    @property
    @abstractmethod
    def per_cell(self) -> tuple[int, ...]:
        """Anchors of a cell, of each level."""

    @property
    @abstractmethod
    def class_channels(self) -> int:
        """Numbers of an anchor before its offsets."""

    @abstractmethod
    def anchors(self, size: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """All anchors for images of `size`, float32 [P, 4] in pixels: level by level, cells row by row, and the anchors of a cell."""

    @property
    def of_places(self) -> str:
        counts = sorted(set(self.per_cell))
        return f"{' or '.join(map(str, counts))} anchors a cell"

    def shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        each = self.class_channels + BOX
        rows = zip(self.level_names, self.strides, self.per_cell, strict=True)
        return {name: (count * each, *grid(size, stride)) for name, stride, count in rows}

    def split(self, prediction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the anchors say of their class, [B, P, class_channels], and their offsets, [B, P, 4]; float32 or wider."""
        levels = zip(self.level_names, self.per_cell, strict=True)
        places = torch.cat([wide(end_to_end(prediction[name], count)) for name, count in levels], dim=1)
        classes, offsets = places.split([self.class_channels, BOX], dim=-1)
        return classes, offsets

    def boxes(self, offsets: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes [B, P, 4] from offsets [B, P, 4], for images of `size`."""
        return decode(offsets, self.anchors(size, offsets.device).to(offsets), self.weights)

    def places_of_levels(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Anchors of each level, for images of `size`."""
        grids = (grid(size, stride) for stride in self.strides)
        return tuple(rows * columns * count for (rows, columns), count in zip(grids, self.per_cell, strict=True))


@dataclass(frozen=True)
class AnchorReading(BoxesOfCells):
    """RetinaNet's: of each anchor the logits of C classes, one sigmoid each, and four offsets.

    sizes: of the anchors of each level, in pixels; an anchor of size s and ratio r is s sqrt(r) high and s / sqrt(r) wide. ratios: height
    by width. lowest, overlap, most: of the suppression. above, below: intersection over union with an object from which an anchor learns
    it, and below which it learns that there is none.
    """

    sizes: tuple[tuple[int, ...], ...] = ()
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    lowest: float = 0.05
    overlap: float = 0.5
    most: int = 1000
    above: float = 0.5
    below: float = 0.4

    @property
    def weights(self) -> Weights:
        return PLAIN

    @property
    def per_cell(self) -> tuple[int, ...]:
        return tuple(len(sizes) * len(self.ratios) for sizes in self.sizes)

    @property
    def class_channels(self) -> int:
        return self.num_classes

    @property
    def places(self) -> tuple[str, tuple[int, ...]]:
        # Boxes are compared as such, but anchors of other sizes look for other objects.
        smallest = ", ".join(str(sizes[0]) for sizes in self.sizes)
        return f"{self.of_places} from {smallest} pixels on", self.strides

    def anchors(self, size: tuple[int, int], device: torch.device | None = None) -> Tensor:
        levels = zip(corners(size, self.strides, device), self.sizes, strict=True)
        return torch.cat([_around(where, _shapes(sizes, self.ratios).to(where)) for where, sizes in levels])

    def dense(self, prediction: Mapping[str, Tensor], size: tuple[int, int]) -> Dense:
        logits, offsets = self.split(prediction)
        return Dense(logits, self.boxes(offsets, size))

    def detections(
        self, prediction: Mapping[str, Tensor], size: tuple[int, int], count: int, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits, boxes = self.dense(prediction, size)
        levels = self.places_of_levels(size)
        return suppressed(
            logits.sigmoid(), boxes, size, count, valid, lowest=self.lowest, overlap=self.overlap, candidates=levels, most=self.most
        )


def _shapes(sizes: tuple[int, ...], ratios: tuple[float, ...]) -> Tensor:
    """Anchors around the point (0, 0), float32 [A, 4]: ratio by ratio, each with all sizes; corners in whole pixels."""
    heights = torch.tensor(ratios).sqrt()
    sides = torch.stack([1 / heights, heights], dim=-1)[:, None] * torch.tensor(sizes, dtype=torch.float32)[:, None]
    halves = (sides.flatten(0, 1) / 2).round()
    return torch.cat([-halves, halves], dim=-1)


def _around(where: Tensor, shapes: Tensor) -> Tensor:
    """The shapes [A, 4] around each of the points [N, 2]: [N A, 4]."""
    return (where.repeat(1, 2)[:, None] + shapes).flatten(0, 1)


@dataclass(frozen=True)
class DefaultBoxReading(BoxesOfCells):
    """SSD's: of each default box the logits of C + 1 classes that exclude each other, the background first, and four offsets.

    scales: of the boxes of each level and one more, as shares of the picture's sides. ratios: of each level, width by height; each gives a
    box and its transpose, beside the square one and the one on the way to the next level's. lowest, overlap, most: of the suppression, the
    last of each class. above: intersection over union from which a box learns an object.

    `dense` gives of a class the log-odds against all others and the background, so that its sigmoid is the softmax's score.
    """

    scales: tuple[float, ...] = ()
    ratios: tuple[tuple[float, ...], ...] = ()
    lowest: float = 0.001
    overlap: float = 0.55
    most: int = 300
    above: float = 0.5

    @property
    def weights(self) -> Weights:
        return (10.0, 10.0, 5.0, 5.0)

    @property
    def per_cell(self) -> tuple[int, ...]:
        return tuple(2 + 2 * len(ratios) for ratios in self.ratios)

    @property
    def class_channels(self) -> int:
        return self.num_classes + 1

    def anchors(self, size: tuple[int, int], device: torch.device | None = None) -> Tensor:
        picture = torch.tensor([size[1], size[0]], dtype=torch.float32, device=device)
        found = []
        for level, (stride, ratios) in enumerate(zip(self.strides, self.ratios, strict=True)):
            rows, columns = grid(size, stride)
            y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
            centres = torch.stack([(x + 0.5) / columns, (y + 0.5) / rows], dim=-1).flatten(0, 1)[:, None]
            halves = self._shapes(level, ratios).to(centres) / 2
            found.append((torch.cat([centres - halves, centres + halves], dim=-1) * picture.repeat(2)).flatten(0, 1))
        return torch.cat(found)

    def _shapes(self, level: int, ratios: tuple[float, ...]) -> Tensor:
        """Width and height of the boxes of a cell, as shares of the picture's: float32 [A, 2]."""
        scale, between = self.scales[level], math.sqrt(self.scales[level] * self.scales[level + 1])
        wide_ones = [(scale * math.sqrt(ratio), scale / math.sqrt(ratio)) for ratio in ratios]
        both = [side for width, height in wide_ones for side in ((width, height), (height, width))]
        return torch.tensor([(scale, scale), (between, between), *both]).clamp(max=1)

    def dense(self, prediction: Mapping[str, Tensor], size: tuple[int, int]) -> Dense:
        logits, offsets = self.split(prediction)
        return Dense(log_odds(logits)[..., 1:], self.boxes(offsets, size))

    def detections(
        self, prediction: Mapping[str, Tensor], size: tuple[int, int], count: int, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits, offsets = self.split(prediction)
        scores, boxes = logits.softmax(-1)[..., 1:], self.boxes(offsets, size)
        return suppressed(
            scores, boxes, size, count, valid, lowest=self.lowest, overlap=self.overlap, candidates=(), most=self.most, by_class=True
        )


def log_odds(logits: Tensor) -> Tensor:
    """Of classes that exclude each other, each one's log-odds against all others together, [..., C]; finite wherever the logits are."""
    first = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.argmax(-1, keepdim=True), True)
    # Beside the first class, one's probability is at most 1/2, which its complement does not round away.
    shares = logits.log_softmax(-1).masked_fill(first, -1.0)
    others = logits.logsumexp(-1, keepdim=True) + torch.log1p(-shares.exp())
    beside_the_first = logits.masked_fill(first, -torch.inf).logsumexp(-1, keepdim=True)
    return logits - torch.where(first, beside_the_first, others)
