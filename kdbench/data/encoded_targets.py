"""Targets per pixel that stay files or run-lengths until they are looked at: labels per pixel, and masks of objects.

They are drawn for one sample at a time, with the very placement that its picture has.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdbench.data.encoded import Encoded, Store
from kdbench.data.frames import Frame, Placement
from kdbench.data.label_map import LabelMap
from kdbench.data.pictures import numbers
from kdbench.data.run_lengths import RLE, Runs
from kdbench.data.views import IGNORED
from kdbench.errors import UserError

OBJECTS_A_GROUP = 63  # bits of an int64 without its sign
_OBJECTS_AT_ONCE = 8  # masks of the original size that are in memory together: a byte of bits


class EncodedTarget(Encoded):
    """A target of one value or more a pixel."""

    @abstractmethod
    def drawn(self, row: int, placement: Placement | None = None) -> Tensor:
        """One sample's values at the size of the input.

        Args:
            row: which of the samples.
            placement: where its picture lies; None for the usual sight of a picture that is not in a file.

        Raises:
            UserError: names the file that can't be read, or has another size than the picture.
        """


@dataclass(frozen=True)
class EncodedLabels(EncodedTarget):
    """A label per pixel, uint8 [N, height, width], in files of the pictures' own sizes. IGNORED (255) where the input shows no picture.

    store: of the files, PNG or another format without loss. rows: int64 [N], which of the store's files. frame: as of the pictures.
    label_map: what the files' pixels mean.
    """

    store: Store
    rows: Tensor
    frame: Frame
    label_map: LabelMap

    dtype = torch.uint8
    ndim = 3

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), *self.frame.size))

    def __getitem__(self, rows: Tensor) -> EncodedLabels:
        return replace(self, rows=self.rows[rows])

    def sha256(self) -> str:
        digest = hashlib.sha256(f"{self.store.sha256()} {self.frame.facts} {self.label_map.sha256()}".encode())
        digest.update(self.rows.numpy().tobytes())
        return digest.hexdigest()

    def drawn(self, row: int, placement: Placement | None = None) -> Tensor:
        where = int(self.rows[row])
        name = self.store.name(where)
        labels = self.label_map.labels(numbers(self.store.read(where), name), name)
        height, width = labels.shape
        placement = placement or self.frame.place(height, width)
        if placement.original != (height, width):
            high, wide = placement.original
            raise UserError(f"{name} has {width} x {height} pixels and its picture {wide} x {high}; labels must be as large as the picture")
        rows, columns, there = placement.nearest()
        shown = torch.full(self.frame.size, IGNORED, dtype=torch.uint8)
        shown[there] = torch.from_numpy(labels)[rows[:, None], columns]
        return shown


@dataclass(frozen=True)
class EncodedMasks(EncodedTarget):
    """Masks of objects, int64 [N, groups, height, width]: bit k of group g says that object 63 g + k of the sample covers the pixel.

    Masks are drawn at the size of the picture, as pycocotools draws them, and each pixel of the input shows the pixel that its centre lies
    in. So the box of a drawn mask is the moved box of the mask to within a pixel. An object that is thinner than a pixel of the input may
    show none.

    runs: of all pictures. rows: int64 [N], which of them. frame: as of the pictures.
    """

    runs: Runs
    rows: Tensor
    frame: Frame
    groups: int

    dtype = torch.int64
    ndim = 4

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), self.groups, *self.frame.size))

    def __getitem__(self, rows: Tensor) -> EncodedMasks:
        return replace(self, rows=self.rows[rows])

    def sha256(self) -> str:
        digest = hashlib.sha256(f"{self.runs.sha256()} {self.frame.facts} {self.groups}".encode())
        digest.update(self.rows.numpy().tobytes())
        return digest.hexdigest()

    def rles(self, row: int) -> list[RLE]:
        """One sample's masks at the size of its picture, `{"size": [height, width], "counts": bytes}` each, in the order of its boxes."""
        return self.runs.of(int(self.rows[row]))

    def drawn(self, row: int, placement: Placement | None = None) -> Tensor:
        rles = self.rles(row)
        shown = torch.zeros(self.groups, *self.frame.size, dtype=torch.int64)
        if not rles:
            return shown
        from faster_coco_eval.core import mask

        rows, columns, (down, across) = (placement or self.frame.place(*rles[0]["size"])).nearest()
        for group in range(self.groups):
            first = group * OBJECTS_A_GROUP
            own = rles[first : first + OBJECTS_A_GROUP]
            for bit in range(0, len(own), _OBJECTS_AT_ONCE):
                planes = mask.decode(own[bit : bit + _OBJECTS_AT_ONCE]).transpose(2, 1, 0)  # [K, W, H], as it lies in memory
                whole = planes[0]
                for number, plane in enumerate(planes[1:], 1):
                    whole |= plane << number
                seen = torch.from_numpy(whole)[columns][:, rows].T
                shown[group, down, across] |= seen.long() << bit
        return shown


def groups_of(objects: int) -> int:
    """How many int64 the masks of so many objects take."""
    return max(1, -(-objects // OBJECTS_A_GROUP))
