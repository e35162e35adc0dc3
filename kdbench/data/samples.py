"""All columns of a sample through one view, and what is asked of them before training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdbench.data.columns import Columns, alone, like, named, tensors
from kdbench.data.kinds import Enlarged, Image, Kind, Labels, Masks, Pixels, Plain, form_of, kind_of, mixing
from kdbench.data.views import Augment, View
from kdbench.errors import UserError

UNLABELLED = -1  # the label of a sample that has none, in a part where others have theirs


def kinds_of(columns: Columns, kinds: Mapping[str, Kind], images: bool) -> dict[str, Kind]:
    """The kind of each column: the named one, or that of `kind_of`, which `images` is for.

    Raises UserError, naming the column, where it has none.
    """
    found = {}
    for name, values in named(columns, "").items():
        try:
            found[name] = kinds[name] if name in kinds else kind_of(values, images)
        except UserError as error:
            raise UserError(_said_of(name, str(error))) from error
    return found


def size_of(inputs: Columns, kinds: Mapping[str, Kind]) -> tuple[int, int] | None:
    """Height and width of the samples' images, which `views.view_of` takes; None for samples without any.

    inputs: of any number of samples. kinds: of all of them. The first column counts that has pixels and is not enlarged.
    """
    for name, values in named(inputs, "").items():
        if _scale(kinds[name]) == 1:
            return values.shape[-2], values.shape[-1]
    return None


def unfit(columns: Columns, kinds: Mapping[str, Kind], steps: Augment, size: tuple[int, int] | None) -> str | None:
    """Why one of the columns can't be used, or can't follow these steps, in one line that names it; None where all can.

    columns: of all samples. kinds: of all columns. size: of the samples' images, see `size_of`.
    """
    for name, values in named(columns, "").items():
        kind = kinds[name]
        reason = kind.problem(values) or kind.refuses(steps) or _unplaced(kind, values, steps, size)
        if reason:
            return _said_of(name, reason)
    return None


def unmixable(
    inputs: Columns, target: Columns | None, kinds: tuple[Mapping[str, Kind], Mapping[str, Kind]], classes: int | None, steps: Augment
) -> str | None:
    """Why two of these samples can't be mixed, in one line; None where they can, or where no step mixes any.

    Mixup and cutmix take one image, uint8 [N, C, H, W], and one label, int64 [N]. kinds: of the inputs' columns and of the target's.
    classes: how many the label may name, None where nobody said.
    """
    if not steps.mixes:
        return None
    if target is None or (alone(target) and bool((tensors(target)[0] == UNLABELLED).any())):
        return f"{mixing(steps)}, and not all of these samples have one; leave it out"
    if alone(inputs) and alone(target) and classes is not None:
        (image,), (label,) = tensors(inputs), tensors(target)
        of_image, of_label = isinstance(kinds[0][""], Image), isinstance(kinds[1][""], Plain)
        if of_image and of_label and image.ndim == 4 and label.ndim == 1 and label.dtype == torch.int64:
            return None
    return f"{mixing(steps)}, of a known number of classes, and no other column; this data has others"


def seen(columns: Columns, kinds: Mapping[str, Kind], view: View) -> Columns:
    """Inputs or target of a view's samples as it shows them, each column as its kind says. kinds: of all columns."""
    return like({name: kinds[name].seen(values, view) for name, values in named(columns, "").items()}, columns)


def _scale(kind: Kind) -> int | None:
    """How many times as large as the sample's image a column of this kind is; None for one without pixels."""
    if isinstance(kind, Enlarged):
        return kind.scale
    return 1 if isinstance(kind, (Image, Labels, Masks, Pixels)) else None


def _unplaced(kind: Kind, values: Tensor, steps: Augment, size: tuple[int, int] | None) -> str | None:
    """Why the steps that move something can't be told to a column: it has another size than the image, or there is no image."""
    if not steps.moves or isinstance(kind, Plain):
        return None
    keys = ", ".join(f"recipe.augment.{key}" for key in steps.moves)
    if size is None:
        return f"{keys} move the sample's image, and it has none; leave these keys out"
    scale = _scale(kind)
    wanted = None if scale is None else (size[0] * scale, size[1] * scale)
    if wanted is None or tuple(values.shape[-2:]) == wanted:
        return None
    return f"must be {wanted[0]}x{wanted[1]} pixels to follow {keys}, got {form_of(values)}; leave these keys out, or resize the column"


def _said_of(name: str, text: str) -> str:
    return f"column {name!r}: {text}" if name else text
