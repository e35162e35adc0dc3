"""What travels through a training step: a batch of samples, and the part of a data set that it is cut from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kdbench.data.encoded import EncodedImages


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
    """Some of a data set's samples.

    inputs:  images uint8 [N, C, H, W], or `EncodedImages`, which stand for such a tensor and are decoded when they are asked for.
    target:  [N, ...].
    index:   int64 [N], the positions in the source data set.
    classes: of how many classes a target [N] names one; None where nobody said, and then labels can't be mixed.
    rows:    int64 [N], which of `inputs` are the part's images, so that a part of a part shares its pixels; None for all, in their order.
    """

    inputs: Tensor | EncodedImages
    target: Tensor
    index: Tensor
    classes: int | None = None
    rows: Tensor | None = None
    _moved: dict[torch.device, Part] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def pixels(self) -> Tensor:
        """The images of a part that is in memory, uint8 [N, C, H, W]."""
        assert isinstance(self.inputs, Tensor), "these images are still encoded"
        return self.inputs if self.rows is None else self.inputs[self.rows]

    def select(self, rows: Tensor) -> Part:
        """The samples at `rows`, their pixels copied."""
        where = rows if self.rows is None else self.rows[rows]
        return Part(self.inputs[where], self.target[rows], self.index[rows], self.classes)

    def within(self, rows: Tensor) -> Part:
        """The samples at `rows`, whose pixels stay where they are: a data set that is cut in parts takes no more memory than before."""
        if not isinstance(self.inputs, Tensor):
            return self.select(rows)
        where = rows if self.rows is None else self.rows[rows]
        return Part(self.inputs, self.target[rows], self.index[rows], self.classes, where)

    def on(self, device: torch.device) -> Part:
        """The part with its tensors on the device: copied once, and kept there as long as this part is. Encoded images stay on the CPU."""
        if not isinstance(self.inputs, Tensor) or self.index.device == device:
            return self
        if device not in self._moved:
            self._moved[device] = Part(self.pixels.to(device), self.target.to(device), self.index.to(device), self.classes)
        return self._moved[device]

    def sha256(self) -> str:
        """Content hash of images, targets and positions; of encoded images see `EncodedImages.sha256`."""
        digest = hashlib.sha256()
        inputs = self.pixels if isinstance(self.inputs, Tensor) else self.inputs
        for content in (inputs, self.target, self.index):
            digest.update(str((tuple(content.shape), content.dtype)).encode())
            if isinstance(content, Tensor):
                digest.update(content.contiguous().numpy().tobytes())
            else:
                digest.update(content.sha256().encode())
        return digest.hexdigest()
