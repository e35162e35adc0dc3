"""Images that stay files until they are looked at.

`EncodedImages` stands where a `Part` otherwise holds a uint8 tensor. What it stands for, [N, 3, height, width], is too large to hold.
`encoded_targets` has the targets per pixel that stay in files.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

from kdbench.data.frames import PADDING, Colour, Fitting, Frame, Placement, sides_of
from kdbench.data.pictures import decoded
from kdbench.data.resizing import parts

# Of ImageNet's training images: what pretrained networks were normalised with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Store(Protocol):
    """Encoded images by row. `read` is called from several threads at once."""

    def read(self, row: int) -> bytes:
        """The file that a row holds. Raises UserError, naming it, where it can't be read."""
        ...

    def name(self, row: int) -> str:
        """What an error calls a row: a path, or a file and a row in it."""
        ...

    def sha256(self) -> str:
        """Hash of what the store holds: of the files' bytes (`content.files_sha256`), not of where they lie."""
        ...

    @property
    def turned(self) -> int:
        """How many of the images `turned` says are shown turned."""
        ...


class Encoded(ABC):
    """A column that is decoded when it is asked for. It stands for a tensor of which type and shape are known."""

    dtype: torch.dtype
    ndim: int

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Of the tensor that it stands for."""

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, rows: Tensor) -> Self:
        """Some of the samples; nothing is decoded by it."""

    @abstractmethod
    def sha256(self) -> str:
        """Hash of all that decides what is decoded."""


@dataclass(frozen=True)
class EncodedImages(Encoded):
    """Images of a store, which fill an input of one size as `Frame` says.

    rows: int64 [N], which of the store's images. Indexing selects images, as it does with a tensor; nothing is decoded by it.
    size: height and width of what is seen, one number for both.
    resize: of the fitting `centre`, pixels of the shorter side before the centre is cut out.
    fitting, padding: see `Frame`.
    sizes: int64 [images of the store, 2], height and width of each image according to its annotation. An image is then turned as its EXIF
        tag says only if that is what gives it this size. None where all are turned.
    """

    store: Store
    rows: Tensor
    size: int | tuple[int, int]
    resize: int = 0
    fitting: Fitting = "centre"
    padding: Colour = PADDING
    sizes: Tensor | None = None

    dtype = torch.uint8
    ndim = 4

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), 3, *sides_of(self.size)))

    @cached_property
    def frame(self) -> Frame:
        """How the images fill the input."""
        return Frame(sides_of(self.size), self.fitting, self.resize, self.padding)

    @property
    def turned(self) -> int:
        """How many images of the store the EXIF tag alone turns."""
        return self.store.turned if self.sizes is None else 0

    def __getitem__(self, rows: Tensor) -> EncodedImages:
        return replace(self, rows=self.rows[rows])

    def sha256(self) -> str:
        """Hash of what the store holds, of the rows and of the sizes."""
        if self.fitting == "centre" and isinstance(self.size, int):
            digest = hashlib.sha256(f"{self.store.sha256()} {self.size} {self.resize}".encode())
        else:
            digest = hashlib.sha256(f"{self.store.sha256()} {self.frame.facts}".encode())
        if self.sizes is not None:
            digest.update(b"annotated" + self.sizes.numpy().tobytes())
        elif self.store.turned:  # the same files were once shown as they are stored, under the hash without this
            digest.update(b"turned upright")
        digest.update(self.rows.numpy().tobytes())
        return digest.hexdigest()

    def annotated_size(self, row: int) -> tuple[int, int] | None:
        """Height and width of an image according to its annotation."""
        if self.sizes is None:
            return None
        height, width = self.sizes[int(self.rows[row])].tolist()
        return height, width

    def decode(self, row: int, bits: Tensor | None = None, smallest: float = 1.0) -> Tensor:
        """One image, uint8 [3, height, width]: as it is fitted, or the random part that `bits` [3] stand for (see `resizing.parts`).

        Always the same for the same versions of PIL and torchvision. Raises UserError, naming the image, where it can't be decoded.
        """
        return self.placed(row, bits, smallest)[0]

    def placed(self, row: int, bits: Tensor | None = None, smallest: float = 1.0) -> tuple[Tensor, Placement]:
        """`decode`, and where the image's pixels lie in what it returns."""
        where = int(self.rows[row])
        image = decoded(self.store.read(where), self.store.name(where), self.annotated_size(row))
        height, width = image.shape[-2:]
        part = None
        if bits is not None:
            top, left, high, wide = parts(height, width, bits[None], smallest)[0].tolist()
            part = (top, left, high, wide)
        placement = self.frame.place(height, width, part)
        return placement.picture(image, self.padding), placement

    def fitted(self, image: Tensor) -> Tensor:
        """What evaluation sees of a decoded image, uint8 [3, H, W]: uint8 [3, height, width]."""
        height, width = image.shape[-2:]
        return self.frame.place(height, width).picture(image, self.padding)
