"""Detectors without anchors: each cell of a pyramid says which object it lies in and how far that object's sides are.

Source: Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019 (arXiv 1904.01355).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kdbench.data.columns import wide
from kdbench.models.detectors.positions import corners, grid, positions
from kdbench.models.detectors.readings import Dense, Reading, end_to_end, suppressed

_LARGEST_EXPONENT = 5.0  # a side is at most exp(5) = 148 strides away, so that no box becomes infinite
_BOX = 4


@dataclass(frozen=True)
class CellReading(Reading):
    """A level is [B, C + 4, H, W], or C + 5 with centre-ness: class logits, the four sides, the logit of the centre-ness.

    exponential: the sides lie exp(x) strides left of, above, right of and below the cell's centre; without it x strides.
    radius: cells up to so many strides from an object's centre learn it. reach: a level of stride s takes cells whose farthest side is
    reach s / 2 .. reach s away. corners: cells stand at their upper left corners, as in torchvision, and not in their middle. lowest,
    overlap, most: of the suppression.
    """

    centreness: bool = False
    exponential: bool = True
    radius: float = 1.5
    reach: float = 4.0  # the paper has 8, for levels from stride 8 and 800 pixels
    corners: bool = False
    lowest: float = 0.05  # of suppression: Lin et al., ICCV 2017 (arXiv 1708.02002), section 4
    overlap: float = 0.5
    most: int = 1000

    @property
    def of_places(self) -> str:
        return "one cell"

    @property
    def channels(self) -> int:
        return self.num_classes + _BOX + self.centreness

    def shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        return {name: (self.channels, *grid(size, stride)) for name, stride in zip(self.names, self.strides, strict=True)}

    def dense(self, prediction: Mapping[str, Tensor], size: tuple[int, int]) -> Dense:
        logits, sides, _ = self.split(prediction)
        return Dense(logits, self._placed(sides, size))

    def _placed(self, sides: Tensor, size: tuple[int, int]) -> Tensor:
        centres, strides = self.cells(size, sides.device)
        return self.boxes(sides, centres.to(sides), strides.to(sides))

    def cells(self, size: tuple[int, int], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Where all cells stand, float32 [P, 2] of x and y in pixels, and their strides, float32 [P]; see `positions`."""
        return _cells(self.strides, self.corners, size, device)

    def split(self, prediction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Class logits [B, P, C], raw sides [B, P, 4] and logits of the centre-ness [B, P], None where there are none."""
        # In half precision, a side of 100 pixels would be rounded to a sixteenth of a pixel, and to a half in bfloat16.
        cells = torch.cat([wide(end_to_end(prediction[name])) for name in self.names], dim=1)
        logits, sides, rest = cells.split([self.num_classes, _BOX, int(self.centreness)], dim=-1)
        return logits, sides, rest[..., 0] if self.centreness else None

    def boxes(self, sides: Tensor, centres: Tensor, strides: Tensor) -> Tensor:
        """Boxes [B, P, 4] from raw sides [B, P, 4]. centres: [P, 2] of x and y in pixels. strides: [P]."""
        distances = sides.clamp(max=_LARGEST_EXPONENT).exp() if self.exponential else sides
        left_top, right_bottom = (distances * strides[:, None]).chunk(2, dim=-1)
        return torch.cat([centres - left_top, centres + right_bottom], dim=-1)

    def detections(
        self, prediction: Mapping[str, Tensor], size: tuple[int, int], count: int, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits, sides, central = self.split(prediction)
        scores, boxes = logits.sigmoid(), self._placed(sides, size)
        if central is not None:
            scores = (scores * central.sigmoid()[..., None]).sqrt()
        levels = tuple(prediction[name].shape[-2] * prediction[name].shape[-1] for name in self.names)
        return suppressed(scores, boxes, size, count, valid, lowest=self.lowest, overlap=self.overlap, candidates=levels, most=self.most)


@lru_cache(maxsize=16)
def _cells(strides: tuple[int, ...], at_corners: bool, size: tuple[int, int], device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Kept, because every step of a training asks for them."""
    with torch.inference_mode(False):  # made inside it, a later backward pass could not use them
        centres, of_cells = positions(size, strides, device)
        return (torch.cat(corners(size, strides, device)) if at_corners else centres), of_cells
