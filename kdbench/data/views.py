"""Augmentation as a pure function of (data seed, sample index, view): any worker can replay any view in any order.

That is what lets a teacher's outputs be cached under augmentation. A sample has views 0, 1, 2, ...; each of them is augmented, view 0 too.
Evaluation uses no augmentation.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from kdbench.data.batch import Part
from kdbench.data.draws import Decision, Draws, inside, rectangles
from kdbench.data.mixing import mixed, mixed_labels
from kdbench.data.operations import LARGEST_MAGNITUDE, operate
from kdbench.data.options import StrictOptions
from kdbench.data.pixels import UNIT, blend, grey, mean_grey, taken, unit_range
from kdbench.data.resizing import part_bits, parts, resized, resized_labels
from kdbench.errors import UserError

IGNORED = 255  # the label of a pixel that has none: a crop brings them in from outside the image

# Of the erased rectangle: the paper's share of the image's area and ratio of sides.
_ERASED_AREA = (0.02, 0.4)
_ERASED_RATIO = (0.3, 1 / 0.3)
_MOVES = (Decision.DOWN, Decision.ACROSS, Decision.MIRROR)


class Augment(StrictOptions):
    """How a view differs from its image. The steps come in the order of the keys."""

    # The smallest share of its area that a random part shows, which is then resized to the full size.
    resized_crop: Annotated[float, Field(gt=0, le=1)] | None = None
    crop: Annotated[int, Field(ge=0, le=256)] = 0  # pixels of black padding on every side, then a random crop back to the size
    flip: bool = False  # mirrored left to right, half of the time
    operations: Annotated[int, Field(ge=0, le=16)] = 0  # RandAugment's N
    magnitude: Annotated[float, Field(ge=0, le=LARGEST_MAGNITUDE)] = 9.0  # RandAugment's M
    color: Annotated[float, Field(ge=0, le=1)] = 0.0  # brightness, contrast and saturation, each times 1 - color .. 1 + color
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0  # how likely a random rectangle turns black (Zhong et al., arXiv 1708.04896)
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0  # alpha of the Beta distribution, 0 for off
    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0

    @property
    def none(self) -> bool:
        """Whether every view is the image itself."""
        return self.resized_crop is None and not (
            self.crop or self.flip or self.operations or self.color or self.erase or self.mixup or self.cutmix
        )

    @property
    def moves(self) -> tuple[str, ...]:
        """The keys whose steps move pixels or take them away, so that a target per pixel has to follow."""
        return tuple(key for key in ("resized_crop", "crop", "flip", "operations", "erase") if getattr(self, key))

    @property
    def mixes(self) -> bool:
        """Whether a view shows a second sample of the part, too, so that its label is a mixture."""
        return bool(self.mixup or self.cutmix)


def check_targets(part: Part, spec: Augment) -> None:
    """Raise UserError for targets that can't follow their images, which `augment` would alter or leave behind.

    Targets [N] and [N, K] say something of whole images and stay as they are. Whole numbers [N, H, W] are labels per pixel and move along.
    """
    target, size = part.target, tuple(part.inputs.shape[-2:])
    form = f"targets of the form {list(target.shape)}, {str(target.dtype).removeprefix('torch.')}"
    if target.ndim == 3 and (target.is_floating_point() or target.is_complex()):
        raise UserError(f"{form}, can't be used: a target [N, H, W] is a label per pixel, so it must be of whole numbers")
    if not spec.moves:
        return
    steps = ", ".join(f"recipe.augment.{key}" for key in spec.moves)
    if target.ndim > 3:
        raise UserError(f"{form}, do not follow what {steps} does to the images; leave these keys out, or use labels per pixel [N, H, W]")
    if target.ndim == 3 and tuple(target.shape[1:]) != size:
        raise UserError(
            f"{form}, do not follow what {steps} does to images of {size[0]}x{size[1]}: give each pixel a label, or leave these keys out"
        )


def augment(images: Tensor, target: Tensor, index: Tensor, view: int, data_seed: int, spec: Augment) -> tuple[Tensor, Tensor]:
    """One view of each image, and its target; all steps but mixup and cutmix, for which there is `augment_mixed`.

    images: uint8 [B, C, H, W]; target: [B] or any other per-image form, returned as it is, or labels per pixel [B, H, W],
    which move with the image and come back as int64, IGNORED where nothing of the image is seen. index: int64 [B], on the images' device.
    Returns float32 [B, C, H, W] in [0, 1] and the target, the same bits in every batch and on every device.
    """
    return augment_drawn(images, target, Draws(data_seed, index, view), spec)


def augment_drawn(images: Tensor, target: Tensor, draws: Draws, spec: Augment) -> tuple[Tensor, Tensor]:
    """`augment` with draws that are there already."""
    images, target = _changed(images, target, draws, spec)
    return unit_range(images), target


def drawn_ahead(draws: Draws, spec: Augment) -> Draws:
    """The draws of an epoch, the commonest ones made at once: on a batch hashing them would cost more than the crop itself."""
    return draws.ahead(_MOVES) if spec.crop or spec.flip else draws


def augment_mixed(images: Tensor, target: Tensor, draws: Draws, spec: Augment, classes: int) -> tuple[Tensor, Tensor]:
    """As `augment_drawn` with mixup or cutmix. The first half of the samples is returned, the second half holds the partner of each.

    images: uint8 [2B, C, H, W]; target: int64 [2B]. Returns float32 [B, C, H, W] in [0, 1] and soft labels, float32 [B, classes].
    Both of a pair are first seen through the view as they are alone.
    """
    changed, _ = _changed(images, target, draws, spec)
    own, other = changed.chunk(2)
    label, other_label = target.chunk(2)
    first = torch.arange(len(own), device=draws.index.device)
    inputs, share = mixed(own, other, draws.at(first), spec.mixup, spec.cutmix)
    return inputs, mixed_labels(label, other_label, share, classes)


def _changed(images: Tensor, target: Tensor, draws: Draws, spec: Augment) -> tuple[Tensor, Tensor]:
    """The steps that look at one sample alone; uint8 in and out."""
    dense = target.ndim == 3
    if dense:
        target = target.long()
    if spec.resized_crop is not None:
        boxes = parts(images.shape[2], images.shape[3], part_bits(draws), spec.resized_crop)
        images = resized(images, boxes)
        target = resized_labels(target, boxes) if dense else target
    if spec.crop or spec.flip:
        source = _source_pixels(images.shape[-2:], draws, spec)
        images = taken(F.pad(images, (spec.crop,) * 4), source)
        if dense:
            target = taken(F.pad(target, (spec.crop,) * 4, value=IGNORED).unsqueeze(1), source).squeeze(1)
    if spec.operations:
        images, target = operate(images, target, draws, spec.operations, spec.magnitude, IGNORED)
    if spec.color:
        images = _recoloured(images, draws, spec.color)
    if spec.erase:
        gone = _erased(images.shape[-2:], draws, spec.erase)
        images = images.masked_fill(gone[:, None], 0)
        target = target.masked_fill(gone, IGNORED) if dense else target
    return images, target


def _recoloured(images: Tensor, draws: Draws, strength: float) -> Tensor:
    """Brightness, contrast and saturation, in this order, each times a factor of 1 - strength .. 1 + strength."""
    most = round(UNIT * strength)

    def factor(decision: Decision) -> Tensor:
        return (UNIT - most + draws.below(decision, 2 * most + 1))[:, None, None, None]

    images = blend(images.new_zeros(1), images, factor(Decision.BRIGHTNESS))
    images = blend(mean_grey(images), images, factor(Decision.CONTRAST))
    return blend(grey(images), images, factor(Decision.SATURATION)) if images.shape[1] > 1 else images


def _erased(shape: torch.Size, draws: Draws, probability: float) -> Tensor:
    """The pixels that turn black: bool [B, H, W]."""
    height, width = shape
    candidates = rectangles(height, width, _ERASED_AREA, _ERASED_RATIO, draws.index.device)
    sides = candidates[draws.below(Decision.ERASED_SIDES, len(candidates))]
    top = draws.below(Decision.ERASED_DOWN, height - sides[:, 0] + 1)
    left = draws.below(Decision.ERASED_ACROSS, width - sides[:, 1] + 1)
    return inside((height, width), top, left, sides) & draws.chosen(Decision.ERASED, probability)[:, None, None]


def _source_pixels(shape: torch.Size, draws: Draws, spec: Augment) -> Tensor:
    """For each sample and output pixel, the pixel of the padded image that it shows: int64 [B, H, W], row-major."""
    height, width = shape
    device, steps = draws.index.device, 2 * spec.crop + 1
    rows = torch.arange(height, device=device) + draws.below(Decision.DOWN, steps)[:, None]
    columns = torch.arange(width, device=device).expand(len(draws.index), -1)
    if spec.flip:
        mirrored = draws.below(Decision.MIRROR, 2).bool()[:, None]
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = columns + draws.below(Decision.ACROSS, steps)[:, None]
    return rows[:, :, None] * (width + 2 * spec.crop) + columns[:, None, :]
