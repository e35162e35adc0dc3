"""Files of torchvision's weights, as its detectors write them and wrote them, in networks for the data's classes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection

from kdbench.errors import UserError
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.detectors.pretrained import columns_by_category, current_names
from kdbench.tasks.build import TaskSpec, build_task

NAMES = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn", "ssdlite320_mobilenet_v3_large")
IDS = (18, 3, 90)  # dog, car, toothbrush


def of_torchvision(name: str) -> Any:
    torch.manual_seed(1)
    return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=91).eval()


def loaded(name: str, path: Path, class_ids: tuple[int, ...] = IDS, **options: Any) -> Any:
    spec = ModelSpec.model_validate({"name": name, "weights": path, "preset": "coco_v1", **options})
    facts: dict[str, Any] = {"num_classes": 3, "in_channels": 3, "image_size": 64, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    return build_model(spec, **facts, class_ids=class_ids).eval()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_torchvisions_gives_its_logits_of_the_datas_categories(name: str, tmp_path: Path) -> None:
    peer = of_torchvision(name)
    torch.save(peer.state_dict(), tmp_path / "coco.pth")  # with the counters that frozen statistics don't have
    if name.startswith(("retinanet", "faster")):
        for layer in peer.backbone.body.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = 0.0  # as torchvision sets it for these weights
    network, peer = loaded(name, tmp_path / "coco.pth").double(), peer.double()
    images = torch.rand(1, 3, 64, 64).double()
    with torch.no_grad():
        if "rcnn" in name:
            given = network(images)
            real = (given["proposals"][0, :, 2:] > given["proposals"][0, :, :2]).all(1)
            maps = peer.backbone(images)
            seen = peer.roi_heads.box_roi_pool(maps, [given["proposals"][0, real]], [(64, 64)])
            logits, offsets = peer.roi_heads.box_predictor(peer.roi_heads.box_head(seen))
            ours, theirs = given["roi_logits"][0, real], logits[:, [0, *IDS]]
            torch.testing.assert_close(given["roi_offsets"][0, real], offsets.view(-1, 91, 4)[:, list(IDS)])
        else:
            ours = network.reading.split(network(images))[0][0]
            logits = peer.head(list(peer.backbone(images).values()))["cls_logits"][0]
            theirs = logits[:, [0, *IDS] if name.startswith("ssd") else list(IDS)]
    torch.testing.assert_close(ours, theirs)


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As files before torchvision 0.13 have them."""
    found = {}
    for name, tensor in state.items():
        old = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.0\.", r"\1.", name)
        old = re.sub(r"(rpn\.head\.conv)\.0\.0\.", r"\1.", old)
        old = re.sub(r"(_head\.conv)\.(\d)\.0\.", lambda found: f"{found[1]}.{2 * int(found[2])}.", old)
        found[old] = tensor
    return found


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn"])
def test_files_of_the_first_layout_are_read(name: str, tmp_path: Path) -> None:
    state = of_torchvision(name).state_dict()
    assert old_names(state).keys() != state.keys()
    torch.save(state, tmp_path / "new.pth")
    torch.save({key: value for key, value in old_names(state).items() if "num_batches" not in key}, tmp_path / "old.pth")
    new, old = (loaded(name, tmp_path / file).state_dict() for file in ("new.pth", "old.pth"))
    for key, value in new.items():
        assert torch.equal(old[key], value)


def test_columns_are_chosen_anchor_by_anchor_and_behind_the_background() -> None:
    state = {
        "head.classification_head.cls_logits.weight": torch.arange(2 * 5).float().view(10, 1, 1, 1),
        "roi_heads.box_predictor.cls_score.bias": torch.arange(5).float(),
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(20).float(),
        "rpn.head.cls_logits.bias": torch.arange(3).float(),
    }
    found = columns_by_category(state, (4, 2), columns=5)
    assert found["head.classification_head.cls_logits.weight"].flatten().tolist() == [4, 2, 9, 7]
    assert found["roi_heads.box_predictor.cls_score.bias"].tolist() == [0, 4, 2]
    assert found["roi_heads.box_predictor.bbox_pred.bias"].tolist() == [0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11]
    assert found["rpn.head.cls_logits.bias"].tolist() == [0, 1, 2]


def test_an_id_without_a_column_and_a_layer_of_other_columns_are_one_line() -> None:
    state = {"roi_heads.box_predictor.cls_score.bias": torch.zeros(7)}
    with pytest.raises(UserError, match=r"category id 91 has no column; the file knows the ids 1 to 90"):
        columns_by_category(state, (1, 91))
    with pytest.raises(UserError, match=r"'roi_heads.box_predictor.cls_score.bias' has 7 rows, expected a multiple of 91"):
        columns_by_category(state, (1,))


def test_names_that_fit_stay_and_what_does_not_fit_is_kept_for_the_error() -> None:
    wanted = {"head.classification_head.conv.0.weight": torch.zeros(1)}
    stored = {"head.classification_head.conv.0.weight": torch.ones(1), "other": torch.ones(1), "bn.num_batches_tracked": torch.ones(1)}
    assert current_names(stored, wanted).keys() == {"head.classification_head.conv.0.weight", "other"}


def test_weights_of_the_datas_own_classes_load_as_they_are_and_others_are_refused(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"name": "retinanet", "backbone": "resnet10t", "width": 8, "levels": 2}
    facts: dict[str, Any] = {"in_channels": 3, "image_size": 64, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    trained = build_model(ModelSpec.model_validate(spec), num_classes=3, **facts)
    torch.save(trained.state_dict(), tmp_path / "own.pth")
    with_weights = ModelSpec.model_validate(spec | {"weights": tmp_path / "own.pth"})
    again = build_model(with_weights, num_classes=3, class_ids=IDS, **facts)
    for name, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(UserError, match=r"has another shape|has 27 classes"):
        build_model(with_weights, num_classes=5, **facts)


def test_the_task_chooses_columns_by_the_ids_that_the_data_give(tmp_path: Path) -> None:
    data = {"name": "shapes", "target": "boxes", "size": 32, "train": 6, "test": 2}
    task = build_task(TaskSpec.model_validate({"name": "detection", "data": data, "val_size": 2}))
    assert task.source is not None
    ids = (7, 3, 90, 44, 1)  # as COCO's would be
    task.source = replace(task.source, class_ids=ids)
    options = {"backbone": "resnet18", "width": 8, "levels": 2, "anchor": 16}
    facts: dict[str, Any] = {"num_classes": 91, "in_channels": 3, "image_size": 32, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    whole = build_model(ModelSpec.model_validate({"name": "retinanet", **options}), **facts).state_dict()
    torch.save(whole, tmp_path / "coco.pth")
    network = task.build_model(ModelSpec.model_validate({"name": "retinanet", **options, "weights": tmp_path / "coco.pth"}))
    name = "head.classification_head.cls_logits.weight"
    assert torch.equal(network.state_dict()[name], whole[name].view(9, 91, 8, 3, 3)[:, list(ids)].flatten(0, 1))
    assert torch.equal(network.state_dict()["backbone.body.conv1.weight"], whole["backbone.body.conv1.weight"])
