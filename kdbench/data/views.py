"""Augmentation as a pure function of (data seed, sample index, view): any worker can replay any view in any order.

That is what lets a teacher's outputs be cached under augmentation. A sample has views 0, 1, 2, ...; each of them is augmented, view 0 too.
Evaluation uses no augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdbench.data.changes import Change, Erased, Recoloured, Shifted
from kdbench.data.draws import Decision, Draws
from kdbench.data.mixing import mixed, mixed_labels
from kdbench.data.motion import Motion
from kdbench.data.operations import LARGEST_MAGNITUDE, Operation
from kdbench.data.options import StrictOptions
from kdbench.data.resizing import ResizedPart

IGNORED = 255  # the label of a pixel that has none: a crop brings them in from outside the image

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


@dataclass(frozen=True)
class View:
    """One view of B samples: what was drawn for it, and the steps that all columns of the samples go through.

    draws: of these samples. steps: what the experiment asks for. size: height and width of the samples' images, None where they have none.
    changes: the steps in their order, with each sample's decisions; mixup and cutmix are none of them.
    scale: how many times as large as `size` the pictures are that `changes` are for.
    """

    draws: Draws
    steps: Augment
    size: tuple[int, int] | None
    changes: tuple[Change, ...]
    scale: int = 1

    @property
    def motions(self) -> tuple[Motion, ...]:
        """Where the steps that move something take points, in their order. Each has an edge, beyond which all is lost for the next ones."""
        return tuple(motion for change in self.changes if (motion := change.motion) is not None)

    @property
    def mirrored(self) -> Tensor:
        """Whether left and right have changed places, bool [B]."""
        mirrored = torch.zeros_like(self.draws.index, dtype=torch.bool)
        for motion in self.motions:
            mirrored = mirrored ^ motion.mirrored
        return mirrored

    def picture(self, images: Tensor) -> Tensor:
        """Images uint8 [B, C, H, W] as the view shows them."""
        for change in self.changes:
            images = change.picture(images)
        return images

    def moved(self, values: Tensor, outside: float) -> Tensor:
        """Values per pixel [B, C, H, W] of any type: they move with the images and are not recoloured. `outside` where no pixel is seen."""
        for change in self.changes:
            values = change.moved(values, outside)
        return values

    def labels(self, labels: Tensor) -> Tensor:
        """Whole numbers per pixel [B, H, W] or [B, T, H, W]: int64 of the same shape, IGNORED where no pixel is seen."""
        shown = labels.long()
        return self.moved(shown[:, None], IGNORED)[:, 0] if labels.ndim == 3 else self.moved(shown, IGNORED)

    def enlarged(self, scale: int) -> View:
        """The same view of images whose height and width are `scale` times as large: the same decisions, times `scale`."""
        return replace(self, changes=tuple(change.enlarged(scale) for change in self.changes), scale=self.scale * scale)

    def repeated(self, times: int) -> View:
        """The view of each sample, `times` in a row: for several pictures of one sample."""
        rows = torch.arange(len(self.draws.index), device=self.draws.index.device).repeat_interleave(times)
        return view_of(self.draws.at(rows), self.steps, self.size).enlarged(self.scale)


def view_of(draws: Draws, steps: Augment, size: Sequence[int] | None) -> View:
    """The view that `draws` and `steps` stand for. size: height and width of the samples' images; without images nothing moves."""
    if size is None:
        return View(draws, steps, None, ())
    height, width = size
    shape, changes = (height, width), list[Change]()
    if steps.resized_crop is not None:
        changes.append(ResizedPart.drawn(draws, shape, steps.resized_crop))
    if steps.crop or steps.flip:
        changes.append(Shifted.drawn(draws, shape, steps.crop, steps.flip))
    if steps.operations:
        changes.extend(Operation.drawn(draws, shape, steps.operations, steps.magnitude))
    if steps.color:
        changes.append(Recoloured.drawn(draws, steps.color))
    if steps.erase:
        changes.append(Erased.drawn(draws, shape, steps.erase))
    return View(draws, steps, shape, tuple(changes))


def drawn_ahead(draws: Draws, spec: Augment) -> Draws:
    """The draws of an epoch, the commonest ones made at once: on a batch hashing them would cost more than the crop itself."""
    return draws.ahead(_MOVES) if spec.crop or spec.flip else draws


def augment_mixed(images: Tensor, target: Tensor, draws: Draws, spec: Augment, classes: int) -> tuple[Tensor, Tensor]:
    """One view of each image with mixup or cutmix. The first half of the samples is returned, the second half holds the partner of each.

    images: uint8 [2B, C, H, W]; target: int64 [2B]. Returns float32 [B, C, H, W] in [0, 1] and soft labels, float32 [B, classes].
    Both of a pair are first seen through the view as they are alone.
    """
    own, other = view_of(draws, spec, images.shape[-2:]).picture(images).chunk(2)
    label, other_label = target.chunk(2)
    first = torch.arange(len(own), device=draws.index.device)
    inputs, share = mixed(own, other, draws.at(first), spec.mixup, spec.cutmix)
    return inputs, mixed_labels(label, other_label, share, classes)
