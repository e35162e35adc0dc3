"""One view of images and their target in one call, as tests ask for it."""

from __future__ import annotations

from torch import Tensor

from kdbench.data.draws import Draws
from kdbench.data.pixels import unit_range
from kdbench.data.views import Augment, view_of


def augment(images: Tensor, target: Tensor, index: Tensor, view: int, data_seed: int, spec: Augment) -> tuple[Tensor, Tensor]:
    """One view of each image, and its target; all steps but mixup and cutmix, for which there is `augment_mixed`.

    images: uint8 [B, C, H, W]; target: [B] or any other per-image form, returned as it is, or labels per pixel [B, H, W],
    which move with the image and come back as int64, IGNORED where nothing of the image is seen. index: int64 [B], on the images' device.
    Returns float32 [B, C, H, W] in [0, 1] and the target, the same bits in every batch and on every device.
    """
    return augment_drawn(images, target, Draws(data_seed, index, view), spec)


def augment_drawn(images: Tensor, target: Tensor, draws: Draws, spec: Augment) -> tuple[Tensor, Tensor]:
    """`augment` with draws that are there already."""
    view = view_of(draws, spec, images.shape[-2:])
    return unit_range(view.picture(images)), view.labels(target) if target.ndim == 3 else target
