"""How boxes are measured: COCO's average precision, and how alike two detectors are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from kdbench.data.kinds import NO_OBJECT, has_box
from kdbench.tasks.by_class import of_class

SAME = 0.5  # intersection over union from which two detectors have the same box
MOST_BOXES = 100  # of an image, as COCO counts them
_SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}  # areas in pixels of the original picture


def average_precision(kept: Mapping[str, Tensor], target: Mapping[str, Tensor], class_names: Sequence[str] = ()) -> dict[str, float]:
    """COCO's average precision in percent, by one evaluation: the numbers of pycocotools.

    `ap` over overlaps 0.50, 0.55, ..., 0.95; `ap50` and `ap75`: means over classes that occur. `ap_small`, `ap_medium`, `ap_large`: of
    objects of an area below 32^2, below 96^2 and above, where the target has some. `ap/NAME`: of each class that occurs.

    Boxes are moved back to the original picture where the target has `scale`, `shift` and `size`, and those that were found are cut at
    its edge; a true box that sticks out of it a little stays as it is, as pycocotools has it. An object's own
    `area` decides its size where the target has it, and a `crowd` is ignored as pycocotools ignores it.

    Args:
        kept: Boxes [N, K, 4], scores [N, K] and classes [N, K]; rows with score 0 are padding.
        target: Boxes [N, M, 4] and labels [N, M]; rows labelled -1 are padding.
        class_names: Of the labels; without them no class is measured by itself.

    Returns:
        The numbers; 0 where the target has no object at all.
    """
    return measured(_found(kept, target), _objects(target), len(kept["scores"]), class_names, "bbox")


def measured(
    found: list[dict[str, Any]],
    objects: list[dict[str, Any]],
    images: int,
    class_names: Sequence[str],
    of: Literal["bbox", "segm"],
    sizes: Sequence[tuple[int, int]] = (),
) -> dict[str, float]:
    """The numbers of `average_precision`.

    Args:
        found: What a detector found, as COCO's result files have it: image_id, category_id, score, and bbox or segmentation.
        objects: The annotations, as COCO's have them: id from 1 on, image_id, category_id, area, iscrowd, and bbox or segmentation.
        images: How many there are; their ids are 0, 1, ....
        class_names: See `average_precision`.
        of: Whether boxes or masks are compared.
        sizes: Height and width of each picture, which masks need.
    """
    occurring = sorted({one["category_id"] for one in objects})
    if not objects or not found:
        numbers = dict.fromkeys(("ap", "ap50", "ap75"), 0.0)
        numbers |= {f"ap_{size}": 0.0 for size, (least, most) in _SIZES.items() if any(least <= one["area"] < most for one in objects)}
        return numbers | ({of_class("ap", class_names[label]): 0.0 for label in occurring} if class_names else {})
    from faster_coco_eval import COCO, COCOeval_faster  # takes a second, so only who measures a detector pays

    pictures = [{"id": image, **({"height": sizes[image][0], "width": sizes[image][1]} if sizes else {})} for image in range(images)]
    categories = [{"id": label, "name": str(label)} for label in sorted({one["category_id"] for one in [*objects, *found]})]
    truth = COCO({"images": pictures, "categories": categories, "annotations": objects})
    evaluation = COCOeval_faster(truth, truth.loadRes(found), of, print_function=lambda *_: None)
    evaluation.params.maxDets = [1, 10, MOST_BOXES]
    evaluation.evaluate()
    evaluation.accumulate()
    # [overlaps, recalls, classes, sizes, most boxes], -1 where no such object occurs.
    precision = evaluation.eval["precision"][..., -1]
    everything = precision[..., 0]
    numbers = {"ap": _percent(everything), "ap50": _percent(everything[0]), "ap75": _percent(everything[5])}
    for position, size in enumerate(_SIZES, start=1):
        if (precision[..., position] > -1).any():
            numbers[f"ap_{size}"] = _percent(precision[..., position])
    if class_names:
        columns = {category["id"]: column for column, category in enumerate(categories)}
        numbers |= {of_class("ap", class_names[label]): _percent(everything[:, :, columns[label]]) for label in occurring}
    return numbers


def original(boxes: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """Boxes [N, K, 4] of network inputs in pixels of the original pictures: float32 on the CPU. What sticks out of a picture stays so.

    target: with `scale` and `shift` [N, 2] of x and y, or without any: then inputs are the pictures.
    """
    boxes = boxes.float().cpu()
    if "scale" not in target:
        return boxes
    scale, shift = (target[name].float().cpu() for name in ("scale", "shift"))
    return (boxes - shift.repeat(1, 2)[:, None]) / scale.repeat(1, 2)[:, None]


def found_in_picture(boxes: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """What a detector found, as `original`, cut at the edges of the picture, whose `size` [N, 2], height and width, the target has."""
    moved = original(boxes, target)
    if "scale" not in target:
        return moved
    return torch.minimum(moved.clamp(min=0), target["size"].float().cpu().flip(1).repeat(1, 2)[:, None])


def _found(kept: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    boxes = _corners_and_sides(found_in_picture(kept["boxes"], target))
    real = (kept["scores"] > 0).cpu()
    columns = (real.nonzero()[:, 0], kept["classes"].cpu()[real], kept["scores"].float().cpu()[real], boxes[real])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [{"image_id": image, "category_id": label, "score": score, "bbox": box} for image, label, score, box in rows]


def _objects(target: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The true boxes as COCO's annotations."""
    moved, labels = original(target["boxes"], target), target["labels"].cpu()
    boxes = _corners_and_sides(moved)
    real = (labels != NO_OBJECT) & has_box(moved)
    area = target["area"].double().cpu() if "area" in target else boxes[..., 2:].prod(-1)
    crowd = target["crowd"].cpu().int() if "crowd" in target else torch.zeros_like(labels)
    columns = (real.nonzero()[:, 0], labels[real], area[real], crowd[real], boxes[real])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    # pycocotools takes an id of 0 for none.
    return [
        {"id": number, "image_id": image, "category_id": label, "area": size, "iscrowd": group, "bbox": box}
        for number, (image, label, size, group, box) in enumerate(rows, start=1)
    ]


def _corners_and_sides(boxes: Tensor) -> Tensor:
    """x0, y0, x1, y1 -> x0, y0, width, height, in float64."""
    boxes = boxes.double()
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def _percent(precision: NDArray[np.float64]) -> float:
    """Mean of what is no gap, in percent; 0 where all is."""
    known = precision[precision > -1]
    return 100 * float(known.mean()) if known.size else 0.0


def shared_boxes(kept: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The share, 0 .. 1, of all boxes of both that the other holds too: one of the same class that overlaps it by more than 0.5.

    kept, other: of the same images, as `average_precision` takes them. 1 where neither holds a box.
    """
    found = total = 0
    for row in range(len(kept["scores"])):
        ours, theirs = (_row_of(boxes, row) for boxes in (kept, other))
        same = (ours[1][:, None] == theirs[1]) & (box_iou(ours[0], theirs[0]) > SAME)
        found += int(same.any(1).sum()) + int(same.any(0).sum())
        total += len(ours[1]) + len(theirs[1])
    return found / total if total else 1.0


def _row_of(kept: Mapping[str, Tensor], row: int) -> tuple[Tensor, Tensor]:
    """Boxes [K, 4] and classes [K] of one image, without padding."""
    real = kept["scores"][row] > 0
    return kept["boxes"][row][real].float(), kept["classes"][row][real]
