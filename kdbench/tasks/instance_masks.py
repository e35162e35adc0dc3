"""Instance segmentation: a mask for each object beside its box; average precision of the masks in percent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from kdbench.data.columns import Columns, described, several
from kdbench.data.encoded_targets import EncodedMasks
from kdbench.data.kinds import NO_OBJECT, has_box
from kdbench.data.sources import DataSpec
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.models.detectors.mask_rcnn import MaskReading
from kdbench.models.outputs import reading_of
from kdbench.tasks.average_precision import found_in_picture, measured, original
from kdbench.tasks.by_class import is_of_class
from kdbench.tasks.detection import Detection
from kdbench.tasks.mask_losses import mask_of

_MOST = 255  # of a stored mask: certain that the object covers the pixel
_SURE = 0.5


class InstanceMasks(Detection):
    """Where the objects of an image are, what they are, and which pixels they cover.

    A target has `masks` beside detection's: int64 [B, G, H, W], bit k of plane g for the object in row 63 g + k. `kd` imitates scores and
    boxes and no masks.
    """

    name = "instance_masks"
    version = 1
    gives = frozenset({"boxes", "masks", "imitation"})

    class Options(Detection.Options):
        data: DataSpec = DataSpec(name="shapes", target="masks", size=64)

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        target = self.source.train.target
        if "masks" not in several(target):
            raise UserError(
                f"task {self.name!r} needs `masks` [N, G, H, W] of the objects; data {self.source.name!r} gives {described(target)}; "
                "use target: masks"
            )

    def build_model(self, spec: ModelSpec) -> nn.Module:
        model = super().build_model(spec)
        if not isinstance(reading_of(model), MaskReading):
            raise UserError(f"model {spec.name!r} draws no masks; name one that does, such as mask_rcnn")
        return model

    def predict(self, model: nn.Module, inputs: Columns) -> Columns:
        """Detection's best boxes, and `masks` uint8 [B, K, 28, 28] over each box, 255 where the network is certain."""
        found = self.found(model, inputs)
        return found | {"masks": (found["masks"] * _MOST).round().to(torch.uint8)}

    def metrics(self, prediction: Columns, target: Columns) -> dict[str, float]:
        """Average precision in percent: `ap`, `ap50`, ... of the masks, in pixels of the original pictures; `box_ap`, ... of the
        boxes. See `average_precision`.
        """
        kept, wanted = several(prediction), several(target)
        found, objects = _found(kept, wanted, self.size), _objects(wanted, self.size)
        images = len(kept["scores"])
        sizes = [_picture(wanted, image, self.size) for image in range(images)]
        numbers = measured(found, objects, images, self.source.class_names, "segm", sizes)
        return numbers | {f"box_{name}": value for name, value in super().metrics(prediction, target).items() if not is_of_class(name)}


def _found(kept: Mapping[str, Tensor], target: Mapping[str, Tensor], size: tuple[int, int]) -> list[dict[str, Any]]:
    """The kept masks in their pictures, as COCO's result files have them."""
    boxes, rows = found_in_picture(kept["boxes"], target), []
    for image, scores in enumerate(kept["scores"].float().cpu()):
        real = scores > 0
        probabilities = kept["masks"][image].cpu()[real].float() / _MOST
        pasted = paste_masks_in_image(probabilities[:, None], boxes[image][real], _picture(target, image, size))[:, 0] > _SURE
        columns = zip(kept["classes"][image].cpu()[real].tolist(), scores[real].tolist(), _run_lengths(pasted), strict=True)
        rows += [{"image_id": image, "category_id": label, "score": score, "segmentation": mask} for label, score, mask in columns]
    return rows


def _objects(target: Mapping[str, Any], size: tuple[int, int]) -> list[dict[str, Any]]:
    """The true masks as COCO's annotations."""
    real = (target["labels"].cpu() != NO_OBJECT) & has_box(original(target["boxes"], target))
    rows: list[dict[str, Any]] = []
    for image, some in enumerate(real):
        objects, given = some.nonzero().flatten(), target["masks"]
        if isinstance(given, EncodedMasks):  # at the size of the picture, as the data set has them
            masks = [given.rles(image)[number] for number in objects.tolist()]
        else:
            masks = _run_lengths(_in_picture(mask_of(given[image].cpu(), objects), target, image, size))
        areas = target["area"][image].cpu()[objects] if "area" in target else torch.tensor([_area(mask) for mask in masks])
        crowd = target["crowd"][image].cpu()[objects] if "crowd" in target else torch.zeros_like(objects)
        columns = (target["labels"][image].cpu()[objects], areas.double(), crowd.int())
        for label, area, group, mask in zip(*(column.tolist() for column in columns), masks, strict=True):
            one = {"id": len(rows) + 1, "image_id": image, "category_id": label, "area": area, "iscrowd": group, "segmentation": mask}
            rows.append(one)
    return rows


def _picture(target: Mapping[str, Tensor], image: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image's original picture."""
    if "size" not in target:
        return size
    height, width = target["size"][image].tolist()
    return int(height), int(width)


def _in_picture(masks: Tensor, target: Mapping[str, Tensor], image: int, size: tuple[int, int]) -> Tensor:
    """Masks [N, H, W] of an input, moved back to the original picture and to its size; bool."""
    if "scale" not in target or not len(masks):
        return masks
    height, width = _picture(target, image, size)
    scale, shift = target["scale"][image].float().cpu(), target["shift"][image].float().cpu()
    # Where the middle of each pixel of the picture lies in the input, as a share of it from -1 to 1.
    y, x = (
        ((torch.arange(side) + 0.5) * scale[axis] + shift[axis]) / length * 2 - 1
        for side, axis, length in ((height, 1, size[0]), (width, 0, size[1]))
    )
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].expand(len(masks), -1, -1, -1)
    return F.grid_sample(masks[:, None].float(), places, mode="nearest", padding_mode="border", align_corners=False)[:, 0] > _SURE


def _area(mask: Any) -> int:
    """Pixels of a mask in run-lengths."""
    from faster_coco_eval.core import mask as run_lengths

    return int(run_lengths.area([mask])[0])


def _run_lengths(masks: Tensor) -> list[Any]:
    """Masks [N, H, W], bool, as COCO's compressed run-lengths."""
    from faster_coco_eval.core import mask as run_lengths  # takes a second, so only who measures masks pays

    return list(run_lengths.encode(np.asfortranarray(masks.permute(1, 2, 0).to(torch.uint8).numpy()))) if len(masks) else []
