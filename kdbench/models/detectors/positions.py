"""Where a detector's predictions stand in its input: the cells of a feature pyramid, all levels laid end to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST_STRIDE = 4  # of the finest level, in input pixels; each further level has twice the stride of the one before
MOST_LEVELS = 4


def strides_of_levels(levels: int) -> tuple[int, ...]:
    """Strides of a pyramid's levels from the finest on, in input pixels: 4, 8, 16, ..."""
    return tuple(FIRST_STRIDE << level for level in range(levels))


def grid(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Rows and columns of a level whose maps come from convolutions of stride 2 with padding: the size over the stride, rounded up."""
    return -(-size[0] // stride), -(-size[1] // stride)


def corners(size: tuple[int, int], strides: Sequence[int], device: torch.device | None = None) -> list[Tensor]:
    """Where torchvision's detectors put the cells of each level: the upper left corners, spread evenly over the input.

    They lie size // cells pixels apart, which is less than the stride where the stride does not divide the size.

    Args:
        size: Height and width of the input in pixels.
        strides: Of the levels, in input pixels.
        device: Of the result; the CPU by default.

    Returns:
        Float32 [H W, 2] of x and y in input pixels for each level, row by row.
    """
    found = []
    for stride in strides:
        rows, columns = grid(size, stride)
        y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
        found.append(torch.stack([x * (size[1] // columns), y * (size[0] // rows)], dim=-1).flatten(0, 1).float())
    return found


def positions(size: tuple[int, int], strides: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The cells of all levels: level by level, each row by row.

    Cell (row, column) of a level stands at ((column + 1/2) stride, (row + 1/2) stride) (Tian et al., ICCV 2019, section 3.1).

    Args:
        size: Height and width of the input in pixels.
        strides: Of the levels, in input pixels.
        device: Of the result; the CPU by default.

    Returns:
        Centres float32 [P, 2] of x and y in input pixels, and each cell's stride, float32 [P].
    """
    centres, of_cells = [], []
    for stride in strides:
        rows, columns = grid(size, stride)
        y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
        centres.append((torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5) * stride)
        of_cells.append(torch.full((rows * columns,), float(stride), device=device))
    return torch.cat(centres), torch.cat(of_cells)
