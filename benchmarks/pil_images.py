"""The usual data path of classification code: PIL images one by one through torchvision's transforms and a DataLoader. No kdbench in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class PilImages(Dataset[tuple[Tensor, int]]):
    """images: uint8 [N, C, H, W] with 1 or 3 channels; labels: int64 [N]. An item is (what `transform` makes of the PIL image, label)."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[position])), self.labels[position]


def usual_transform(side: int, crop: int, flip: bool, mean: list[float], std: list[float]) -> transforms.Compose:
    """RandomCrop with padding, RandomHorizontalFlip, ToTensor, Normalize."""
    steps: list[Any] = [transforms.RandomCrop(side, padding=crop)] if crop else []
    steps += [transforms.RandomHorizontalFlip()] if flip else []
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def usual_loader(dataset: PilImages, batch_size: int) -> DataLoader[tuple[Tensor, int]]:
    """Shuffled, in this process (num_workers=0), incomplete last batch dropped."""
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=0)
