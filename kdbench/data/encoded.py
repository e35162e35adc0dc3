"""Images that stay files until they are looked at.

`EncodedImages` stands where a `Part` otherwise holds a uint8 tensor. What it stands for, [N, 3, size, size], is too large to hold.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class EncodedImages:
    """Images of a store. Seen without augmentation, the shorter side is `resize` pixels and the centre `size` x `size` is shown.

    rows: int64 [N], which of the store's images. Indexing selects images, as it does with a tensor; nothing is decoded by it.
    """

    store: Store
    rows: Tensor
    size: int
    resize: int

    dtype = torch.uint8
    ndim = 4

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), 3, self.size, self.size))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> EncodedImages:
        return replace(self, rows=self.rows[rows])

    def sha256(self) -> str:
        """Hash of what the store holds, of the rows and of the sizes."""
        digest = hashlib.sha256(f"{self.store.sha256()} {self.size} {self.resize}".encode())
        if self.store.turned:  # the same files were once shown as they are stored, under the hash without this
            digest.update(b"turned upright")
        digest.update(self.rows.numpy().tobytes())
        return digest.hexdigest()

    def decode(self, row: int, bits: Tensor | None = None, smallest: float = 1.0) -> Tensor:
        """One image, uint8 [3, size, size]: its centre, or the random part that `bits` [3] stand for (see `resizing.parts`).

        Always the same for the same versions of PIL and torchvision. Raises UserError, naming the image, where it can't be decoded.
        """
        from torchvision.transforms.v2 import functional as transforms  # takes two seconds, so only who has files pays

        where = int(self.rows[row])
        image = decoded(self.store.read(where), self.store.name(where))
        height, width = image.shape[-2:]
        if bits is not None:
            box = parts(height, width, bits[None], smallest)[0].tolist()
            part: Tensor = transforms.resized_crop(image, *box, size=[self.size, self.size], antialias=True)
            return part
        return self.centre(image)

    def centre(self, image: Tensor) -> Tensor:
        """What evaluation sees of a decoded image, uint8 [3, H, W]: uint8 [3, size, size]."""
        from torchvision.transforms.v2 import functional as transforms

        centre: Tensor = transforms.center_crop(transforms.resize(image, [self.resize], antialias=True), [self.size, self.size])
        return centre
