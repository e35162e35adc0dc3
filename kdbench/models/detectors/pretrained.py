"""Torchvision's weights of detectors, trained on COCO, in networks for other classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdbench.errors import UserError

COCO_COLUMNS = 91  # of torchvision's classifiers: one for each category id of COCO up to 90, and the first for the background
_COUNTER = "num_batches_tracked"
# Layers that say something of each class: numbers of a class, and whether the network keeps the background's.
_CLASS_LAYERS = {
    r"head\.classification_head\.cls_logits\.(weight|bias)": (1, False),
    r"head\.classification_head\.module_list\.\d+\.1\.(weight|bias)": (1, True),
    r"roi_heads\.box_predictor\.cls_score\.(weight|bias)": (1, True),
    r"roi_heads\.box_predictor\.bbox_pred\.(weight|bias)": (4, True),
    r"roi_heads\.mask_predictor\.mask_fcn_logits\.(weight|bias)": (1, True),
}


class WithTorchvisionsWeights(nn.Module):
    """A detector whose layers have the names of torchvision's.

    class_ids: the data's own numbers of its classes, by which the columns of weights for COCO are chosen; () where they have none.
    """

    class_ids: tuple[int, ...] = ()

    def translated_weights(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file under this network's names, with the columns of its classes: what fits already stays as it is."""
        wanted = self.state_dict()
        named = current_names(stored, wanted)
        rows = {name: len(named[name]) for name in named if _layer(name) and name in wanted and named[name].dim()}
        if not self.class_ids or all(rows[name] == len(wanted[name]) for name in rows):
            return named
        return columns_by_category(named, self.class_ids)


def columns_by_category(state_dict: Mapping[str, Tensor], category_ids: Sequence[int], columns: int = COCO_COLUMNS) -> dict[str, Tensor]:
    """The state of a detector of torchvision's with the columns of some categories, in the order given.

    Args:
        state_dict: As torchvision writes it, with a column for each category id.
        category_ids: Ids of the classes, each from 1 up to `columns` - 1.
        columns: Of the classifier.

    Returns:
        The tensors by the same names. Layers that know classes have the rows of the categories, behind those of the background where the
        classes exclude each other; all others are what they were.

    Raises:
        UserError: an id has no column, or a layer has another number of columns.
    """
    beyond = [number for number in category_ids if not 1 <= number < columns]
    if beyond:
        raise UserError(f"weights: category id {beyond[0]} has no column; the file knows the ids 1 to {columns - 1}")
    found = dict(state_dict)
    for name, tensor in state_dict.items():
        if (layer := _layer(name)) is None:
            continue
        each, background = layer
        if len(tensor) % (columns * each):
            raise UserError(
                f"weights: {name!r} has {len(tensor)} rows, expected a multiple of {columns * each}, for {columns} columns of classes"
            )
        chosen = torch.tensor([*([0] if background else []), *category_ids])
        by_class = tensor.view(-1, columns, each, *tensor.shape[1:])
        found[name] = by_class[:, chosen].reshape(-1, *tensor.shape[1:])
    return found


def _layer(name: str) -> tuple[int, bool] | None:
    return next((facts for pattern, facts in _CLASS_LAYERS.items() if re.fullmatch(pattern, name)), None)


def current_names(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that torchvision's layers have today, in which its oldest files of weights are not written.

    Counters of batch normalization that the network does not have, because its statistics are frozen, are left out.
    """
    found = {}
    for name, tensor in stored.items():
        today = name if name in wanted else next((new for new in _newer(name) if new in wanted), name)
        if today in wanted or not today.endswith(_COUNTER):
            found[today] = tensor
    return found


def _newer(name: str) -> list[str]:
    """What a layer of an old file may be called today."""
    rules = (
        (r"(.*fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),
        (r"(rpn\.head\.conv)\.(weight|bias)", r"\1.0.0.\2"),
    )
    names = [re.sub(pattern, new, name) for pattern, new in rules if re.fullmatch(pattern, name)]
    if tower := re.fullmatch(r"(head\.(?:classification|regression)_head\.conv)\.(\d+)\.(weight|bias)", name):
        names.append(f"{tower[1]}.{int(tower[2]) // 2}.0.{tower[3]}")  # every second one was an activation
    if mask := re.fullmatch(r"(roi_heads\.mask_head)\.mask_fcn(\d+)\.(weight|bias)", name):
        names.append(f"{mask[1]}.{int(mask[2]) - 1}.0.{mask[3]}")
    return names
