"""What travels through a training step: a batch of samples, and the part of a data set that it is cut from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Some samples, seen through one view.

    inputs: float [B, C, H, W] in [0, 1], already augmented; each model normalises them as it was trained to.
    target: what the task's loss compares with: int64 [B], soft [B, classes], int64 [B, H, W] (255 = ignored), ...
    index:  int64 [B], position in the source data set, the same whatever the split.
    view:   which augmented copy; 0 where there is no augmentation.
    """

    inputs: Tensor
    target: Tensor
    index: Tensor
    view: int = 0

    def to(self, device: torch.device) -> Batch:
        move = {name: getattr(self, name).to(device, non_blocking=True) for name in ("inputs", "target", "index")}
        return replace(self, **move)

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Part:
    """Samples that fit in memory: uint8 images [N, C, H, W], their targets [N, ...], and their positions in the source data set [N]."""

    inputs: Tensor
    target: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: Tensor) -> Part:
        return Part(self.inputs[rows], self.target[rows], self.index[rows])

    def sha256(self) -> str:
        """Content hash of images, targets and positions."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.target, self.index):
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()
