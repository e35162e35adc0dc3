"""What a column of a data set holds, and so how a view changes it: images move and are recoloured, boxes move, words stay as they are.

A sample's columns all go through the same steps with the same decisions (`views.View`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdbench.data.pixels import unit_range
from kdbench.data.views import Augment, View
from kdbench.errors import UserError

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Kind(Protocol):
    """How one column goes through a view. `seen` must give the same bits for a sample in every batch."""

    def seen(self, values: Tensor, view: View) -> Tensor:
        """The column of the view's samples, [B, ...], as the view shows it."""
        ...

    def refuses(self, steps: Augment) -> str | None:
        """Why the column can't follow these steps, in one line that names the key; None where it can. Asked before training."""
        ...

    def problem(self, values: Tensor) -> str | None:
        """What is wrong with the type or shape of the column of N samples, [N, ...], in one line; None for a sound one."""
        ...


@dataclass(frozen=True)
class Plain:
    """What no view changes: labels of samples, words, features. Any type, [B, ...]."""

    def seen(self, values: Tensor, view: View) -> Tensor:
        return values

    def refuses(self, steps: Augment) -> str | None:
        return None

    def problem(self, values: Tensor) -> str | None:
        return None


@dataclass(frozen=True)
class Sided(Plain):
    """What no view changes and a mirror image makes wrong: words and answers that tell left from right. Any type, [B, ...]."""

    def refuses(self, steps: Augment) -> str | None:
        return "recipe.augment.flip would make wrong what this column says of left and right; leave it out" if steps.flip else None


@dataclass(frozen=True)
class Image:
    """A picture, uint8 [B, C, H, W], or T pictures of one scene, [B, T, C, H, W]; seen as float32 in [0, 1].

    The pictures of a scene move alike and are recoloured by the same operations and factors; an operation that looks at a picture's own
    levels, such as equalize or contrast, looks at each picture's.
    """

    def seen(self, values: Tensor, view: View) -> Tensor:
        if values.ndim == 4:
            return unit_range(view.picture(values))
        return unit_range(view.repeated(values.shape[1]).picture(values.flatten(0, 1)).view(values.shape))

    def refuses(self, steps: Augment) -> str | None:
        return None

    def problem(self, values: Tensor) -> str | None:
        sound = values.dtype == torch.uint8 and values.ndim in (4, 5)
        return None if sound else f"an image must be uint8 [N, C, H, W], or [N, T, C, H, W] for several of one scene; got {form_of(values)}"


@dataclass(frozen=True)
class Enlarged:
    """A picture `scale` times as high and wide as the sample's image, uint8 [B, C, H, W] or [B, T, C, H, W]; seen as float32 in [0, 1].

    For pairs of a small and a large picture: both go through the same steps, all lengths times `scale`.
    """

    scale: int

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"Enlarged.scale must be at least 1, got {self.scale}")

    def seen(self, values: Tensor, view: View) -> Tensor:
        return Image().seen(values, view.enlarged(self.scale))

    def refuses(self, steps: Augment) -> str | None:
        if steps.operations:
            return (
                "recipe.augment.operations recolours a picture by its own levels and neighbouring pixels, so an enlarged picture would no "
                "longer match the small one; leave it out"
            )
        return _unmixed(steps, "an enlarged picture")

    def problem(self, values: Tensor) -> str | None:
        return Image().problem(values)


@dataclass(frozen=True)
class Labels:
    """A label per pixel, whole numbers [B, H, W], or [B, T, H, W] for T pictures of one scene; seen as int64.

    Each pixel takes the label of the nearest one, and IGNORED (255) where the view shows nothing of the image.
    """

    def seen(self, values: Tensor, view: View) -> Tensor:
        return view.labels(values)

    def refuses(self, steps: Augment) -> str | None:
        return _unmixed(steps, "a label per pixel")

    def problem(self, values: Tensor) -> str | None:
        sound = values.dtype in _WHOLE and values.ndim in (3, 4)
        return None if sound else f"labels per pixel must be whole numbers [N, H, W] or [N, T, H, W]; got {form_of(values)}"


@dataclass(frozen=True)
class Masks:
    """Masks of objects, int64 [B, G, H, W]: bit k of group g says that object 63 g + k covers the pixel.

    Each pixel takes the bits of the nearest one, and 0 where the view shows nothing of the image. What is erased hides no mask, as it hides
    no box. The masks of an object whose box is lost in a view stay: whoever reads them asks `has_box` which objects count.
    """

    def seen(self, values: Tensor, view: View) -> Tensor:
        for change in view.changes:
            if change.motion is not None:
                values = change.moved(values, 0)
        return values

    def refuses(self, steps: Augment) -> str | None:
        return _unmixed(steps, "a set of masks")

    def problem(self, values: Tensor) -> str | None:
        sound = values.dtype == torch.int64 and values.ndim == 4
        return None if sound else f"masks must be int64 [N, G, H, W], a bit for each object; got {form_of(values)}"


@dataclass(frozen=True)
class Pixels:
    """Numbers per pixel that move with the image and are never recoloured, float [B, C, H, W]: depth, radiance, surface normals.

    Each pixel takes the numbers of the nearest one, so that no number appears that the picture doesn't hold, and `outside` where the view
    shows nothing of the image.
    mirror, mirror_offset: in a mirror image, channel c holds mirror[c] times its number plus mirror_offset[c]: (-1, 1, 1) for normals whose
    first channel points to the right, (-1,) and (pi,) for an angle. Empty for numbers that are the same in a mirror, and for no offset.
    """

    mirror: tuple[float, ...] = ()
    mirror_offset: tuple[float, ...] = ()
    outside: float = 0.0

    def __post_init__(self) -> None:
        if self.mirror_offset and len(self.mirror_offset) != len(self.mirror):
            raise ValueError(f"Pixels: {len(self.mirror_offset)} numbers of mirror_offset for {len(self.mirror)} of mirror")

    def seen(self, values: Tensor, view: View) -> Tensor:
        if self.mirror:
            factor, offset = (
                torch.tensor(numbers, dtype=values.dtype, device=values.device)[:, None, None]
                for numbers in (self.mirror, self.mirror_offset or (0.0,) * len(self.mirror))
            )
            values = torch.where(view.mirrored[:, None, None, None], values * factor + offset, values)
        return view.moved(values, self.outside)

    def refuses(self, steps: Augment) -> str | None:
        turning = next((key for key in ("operations", "resized_crop") if getattr(steps, key)), None)
        if self.mirror and turning:
            return (
                f"recipe.augment.{turning} turns or stretches the image, and numbers that change in a mirror, such as directions, would "
                "not turn with it; leave it out"
            )
        return _unmixed(steps, "a picture of numbers")

    def problem(self, values: Tensor) -> str | None:
        if not values.is_floating_point() or values.ndim != 4:
            return f"numbers per pixel must be float [N, C, H, W]; got {form_of(values)}"
        if self.mirror and len(self.mirror) != values.shape[1]:
            return f"mirror has {len(self.mirror)} numbers for the {values.shape[1]} channels of {form_of(values)}"
        return None


@dataclass(frozen=True)
class Boxes:
    """M boxes a sample, float32 [B, M, 4] of x0, y0, x1, y1 in pixels from the image's upper left corner; unused rows are zeros.

    A moved box is the smallest upright box around its moved corners, and is cut at the edge of the picture after *each* step that moves
    something, as the picture is. A box of whose area less than `visible` is left becomes a row of zeros. What is erased hides no box.

    The labels of the boxes are another column, which no view changes: a row's label stays when its box is lost. Whoever reads labels must
    ask `has_box` which rows count.
    """

    visible: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.visible <= 1:
            raise ValueError(f"Boxes.visible must be a share between 0 and 1, got {self.visible}")

    def seen(self, values: Tensor, view: View) -> Tensor:
        motions = view.motions
        if not motions:
            return values
        boxes, left = values, torch.ones_like(values[..., 0])
        for motion in motions:
            moved = motion.boxes(boxes)
            boxes = motion.cut(moved)
            left = left * (_area(boxes) / _area(moved).clamp(min=torch.finfo(values.dtype).tiny))
        kept = has_box(values) & has_box(boxes) & (left >= self.visible)
        return boxes.where(kept[..., None], 0)

    def refuses(self, steps: Augment) -> str | None:
        return _unmixed(steps, "a set of boxes")

    def problem(self, values: Tensor) -> str | None:
        sound = values.dtype == torch.float32 and values.ndim == 3 and values.shape[2] == 4
        return None if sound else f"boxes must be float32 [N, M, 4] of x0, y0, x1, y1 in pixels; got {form_of(values)}"


NO_OBJECT = -1  # the label of a row of boxes or points without an object


def has_box(boxes: Tensor) -> Tensor:
    """Which rows of boxes [..., 4] hold a box, bool [...]; the others are padding, or were lost in a view."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


@dataclass(frozen=True)
class Points:
    """K points a sample, float32 [B, K, 3] of x and y in pixels from the image's upper left corner, and 0 where a point can't be seen.

    A point that leaves the picture in any step can't be seen from there on; x and y then say where it would be. What is erased hides none.
    pairs: rows that change places in a mirror image, such as the left and the right hand.
    mirrors: False for points of which no pairs say what a mirror image makes of them.
    """

    pairs: tuple[tuple[int, int], ...] = ()
    mirrors: bool = True

    def seen(self, values: Tensor, view: View) -> Tensor:
        points, visible = values[..., :2], values[..., 2]
        for motion in view.motions:
            points = motion.points(points)
            visible = visible * motion.inside(points)
        found = torch.cat([points, visible[..., None]], dim=-1)
        if not self.pairs:
            return found
        rows = list(range(values.shape[1]))
        for one, other in self.pairs:
            rows[one], rows[other] = other, one
        return found[:, rows].where(view.mirrored[:, None, None], found)

    def refuses(self, steps: Augment) -> str | None:
        if steps.flip and not self.mirrors:
            return "recipe.augment.flip would leave these points with the names of their mirror images; leave it out"
        return _unmixed(steps, "a set of points")

    def problem(self, values: Tensor) -> str | None:
        if values.dtype != torch.float32 or values.ndim != 3 or values.shape[2] != 3:
            return f"points must be float32 [N, K, 3] of x, y and visible; got {form_of(values)}"
        rows = [row for pair in self.pairs for row in pair]
        if len(set(rows)) != len(rows) or not set(rows) <= set(range(values.shape[1])):
            return f"pairs must name each row at most once, 0 .. {values.shape[1] - 1}; got {self.pairs}"
        return None


def kind_of(values: Tensor, images: bool) -> Kind:
    """The kind of a column for which none was named.

    Args:
        values: the column of all samples: uint8 [N, C, H, W] are images, uint8 or int64 [N, H, W] labels per pixel. Columns of rank 1 or 2
            are plain.
        images: whether the column may be one of images, as inputs may. A picture as a target must say whether it is recoloured.

    Raises:
        UserError: for any other form. Such a column must name its kind.
    """
    if values.ndim in (1, 2):
        return Plain()
    if values.ndim == 3 and values.dtype in (torch.uint8, torch.int64):
        return Labels()
    if images and values.ndim == 4 and values.dtype == torch.uint8:
        return Image()
    raise UserError(
        f"a column {form_of(values)} needs a kind; name one in `kinds`: Image, Enlarged, Labels, Masks, Pixels, Boxes, Points or Plain"
    )


def mixing(steps: Augment) -> str:
    """The beginning of a line that refuses mixup or cutmix."""
    return f"recipe.augment.{'mixup' if steps.mixup else 'cutmix'} mixes two images and their labels, so it needs one label per image"


def form_of(values: Tensor) -> str:
    """Type and shape of a column as an error tells them."""
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"


def _unmixed(steps: Augment, what: str) -> str | None:
    """What a column says that can't be mixed with another sample's."""
    return f"{mixing(steps)}; {what} can't be mixed" if steps.mixes else None


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
