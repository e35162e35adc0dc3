"""Pictures that do not fill their input: what a task finds in them is what torchvision's detectors find, with the same random weights."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import Tensor

from kdbench.data.loader import in_order
from kdbench.models.build import ModelSpec
from kdbench.models.detectors.pyramids import IMAGENET
from kdbench.tasks.detection import Detection
from tests.models.detectors.torchvisions import ALL, CLASSES, SMALL, assert_same, pictures, tame, theirs

BOX = [5, 5, 40, 40]
SPREADS = {
    "fcos_resnet50_fpn": {"head.classification_head.cls_logits": (-2.0, 2.0), "head.regression_head.bbox_reg": (1.5, 0.3)},
    "retinanet_resnet50_fpn": {"head.classification_head.cls_logits": (-2.0, 2.0), "head.regression_head.bbox_reg": (0.0, 0.3)},
    "fasterrcnn_resnet50_fpn": {
        "rpn.head.cls_logits": (0.0, 2.0),
        "rpn.head.bbox_pred": (0.0, 0.2),
        "roi_heads.box_predictor.cls_score": (0.0, 2.0),
        "roi_heads.box_predictor.bbox_pred": (0.0, 0.5),
    },
}


def stored() -> list[Tensor]:
    """uint8 [3, H, W] of three sizes."""
    return [(picture * 255).round().to(torch.uint8) for picture in pictures()]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Detection:
    """On COCO's files of pictures that are letterboxed into 128 x 256 pixels, none of them resized."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "width": p.shape[2], "height": p.shape[1]} for i, p in enumerate(stored())]
    objects = [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": BOX, "area": 1600, "iscrowd": 0} for i in range(len(images))]
    categories = [{"id": c + 1, "name": f"c{c}"} for c in range(CLASSES)]
    for part in ("train2017", "val2017"):
        (root / part).mkdir()
        for i, picture in enumerate(stored()):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(root / part / f"{i}.png")
        told = {"images": images, "categories": categories, "annotations": objects}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(told))
    data = {"name": "coco", "path": str(root), "size": [128, 256]}
    made = Detection(Detection.Options.model_validate({"data": data, "val_size": 1}))
    made.options = made.options.model_copy(update={"kept_boxes": ALL})
    return made


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", *(pytest.param(name, marks=pytest.mark.slow) for name in [*SPREADS][1:])])
def test_boxes_of_padded_pictures_are_torchvisions(task: Detection, name: str) -> None:
    two_stages = name.startswith("faster")
    limits = {"box_detections_per_img": ALL} if two_stages else {"score_thresh": 0.05, "detections_per_img": ALL}
    peer = theirs(name, two_stages, **SMALL, **limits)
    tame(peer, SPREADS[name])
    network = task.build_model(ModelSpec.model_validate({"name": name})).eval()
    network.load_state_dict(peer.state_dict())
    network.input_spec = IMAGENET  # type: ignore[assignment]  # as torchvision normalises
    (batch,) = in_order(task.splits().test, 8)
    with torch.no_grad():
        kept = task.predict(network, batch.inputs)
        found = peer([picture.float() / 255 for picture in stored()])
    assert isinstance(kept, dict)
    assert_same(kept, found, background=two_stages)


def test_a_picture_ends_where_the_padding_begins(task: Detection) -> None:
    (batch,) = in_order(task.splits().test, 8)
    valid = task._valid(batch.inputs)
    assert valid is not None
    assert valid.tolist() == [[128, 256], [100, 256], [128, 190]]
    assert isinstance(batch.inputs, Tensor)
    assert task._valid(batch.inputs[:1]) is None  # nothing to cut
    grey = torch.tensor([124, 116, 104])[None, :, None, None].expand(1, 3, 128, 256) / 255
    assert task._valid(grey) is None  # of a picture that is all of that colour, nothing is known
