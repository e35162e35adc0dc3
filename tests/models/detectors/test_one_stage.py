"""FCOS and RetinaNet on backbones by name, against torchvision's own networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from kdbench.errors import UserError
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.detectors.pyramids import IMAGENET
from kdbench.models.taps import probe, tap_shapes
from tests.models.detectors.torchvisions import ALL, CLASSES, SMALL, assert_same, ours, padded, pictures, tame, theirs

SIDES = {"fcos_resnet50_fpn": 1.5, "retinanet_resnet50_fpn": 0.0}  # around which random boxes have a size
NAMES = tuple(SIDES)
TINY = {"backbone": "resnet10t", "width": 16, "finest": 8, "levels": 3}


@pytest.mark.parametrize("name", NAMES)
def test_with_the_same_weights_boxes_are_torchvisions_on_a_padded_picture(name: str) -> None:
    peer = theirs(name, False, **SMALL, score_thresh=0.05, detections_per_img=ALL)
    tame(peer, {"head.classification_head.cls_logits": (-2.0, 2.0), "head.regression_head.bbox_reg": (SIDES[name], 0.3)})
    network = ours(name)
    network.load_state_dict(peer.state_dict())
    batch, valid = padded()
    with torch.no_grad():
        kept = network.reading.detections(network(batch), (128, 256), ALL, valid)
        found = peer(pictures())
    assert_same(kept, found, background=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_builds_what_torchvisions_weights_need(name: str) -> None:
    network = ours(name, preset="coco_v1")
    assert network.input_spec == IMAGENET
    norms = [layer for layer in network.backbone.body.modules() if isinstance(layer, nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert {type(layer) for layer in norms} == {FrozenBatchNorm2d}
    assert {layer.eps for layer in norms} == {1e-5 if name.startswith("fcos") else 0.0}
    peer: Any = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=CLASSES)
    assert network.state_dict().keys() == {key for key in peer.state_dict() if not key.endswith("num_batches_tracked")}
    assert ours(name).input_spec.mean == (0.5,) * 3


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
@pytest.mark.parametrize("size", [(64, 64), (65, 100)])
def test_small_pictures_of_any_size_have_the_shapes_that_the_reading_says(name: str, size: tuple[int, int]) -> None:
    for levels in (1, 3, 5):
        network = ours(name, **{**TINY, "levels": levels})
        given = network(torch.rand(2, 3, *size))
        assert {key: tuple(value.shape[1:]) for key, value in given.items()} == network.reading.shapes(size)
        assert len(given) == levels


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_levels_of_the_pyramid_are_taps_and_stages_are_the_backbones(name: str) -> None:
    network = ours(name, **{**TINY, "levels": 5})
    shapes = probe(network, (3, 64, 64), [f"level:{level}" for level in range(5)])
    assert [shapes.taps[f"level:{level}"].shape for level in range(5)] == [(16, 8, 8), (16, 4, 4), (16, 2, 2), (16, 1, 1), (16, 1, 1)]
    assert shapes.reading == network.reading
    stages = tap_shapes(network, (3, 64, 64)).taps
    assert stages["stage:0"].shape == (128, 8, 8)
    assert stages["stage:-1"].shape == (512, 2, 2)
    resnet = ours(name, backbone="resnet18", width=16, finest=4, levels=2)
    assert tap_shapes(resnet, (3, 64, 64)).taps["stage:0"].shape == (64, 16, 16)


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [("resnet10t", (128, 256)), ("convnext_atto", (80, 160)), ("mobilenet_v3_small", (24, 48)), ("vgg11_bn", (512, 512))],
)
def test_backbones_of_both_libraries_are_cut_where_they_halve_the_picture(backbone: str, channels: tuple[int, ...]) -> None:
    spec = ModelSpec.model_validate({"name": "retinanet", "backbone": backbone, "width": 8, "levels": 2, "anchor": 16})
    network: Any = build_model(spec, num_classes=2, in_channels=1, image_size=64, mean=(0.5,), std=(0.2,))
    given = network.backbone.body(torch.rand(2, 1, 64, 64))
    assert [tuple(x.shape[1:]) for x in given.values()] == [(channels[0], 8, 8), (channels[1], 4, 4)]
    assert [name for name, weight in network.named_parameters() if not weight.requires_grad] == []
    sum(level.square().sum() for level in network.train()(torch.rand(2, 1, 64, 64)).values()).backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"backbone": "vit_tiny_patch16_224"}, "backbone 'vit_tiny_patch16_224' gives no map at stride 8, only at 16; a pyramid needs"),
        ({"backbone": "vit_b_16"}, "backbone 'vit_b_16': torchvision's network is not one sequence of layers; use one of timm's"),
        ({"backbone": "resnet81"}, "backbone 'resnet81' is neither one of torchvision's nor of timm's; did you mean"),
        ({"backbone": 18}, "backbone = 18, expected a text such as 'resnet50'"),
        ({"finest": 6}, "finest = 6: the stride of the finest level must be 4, 8, 16 or 32"),
        ({"levels": 9}, "levels must be 1 to 8, got 9"),
        ({"preset": "coco"}, "preset 'coco' is unknown. Available: coco_v1"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as error:
        ours("retinanet", **{**TINY, **options})
    assert reason in str(error.value)
    assert str(error.value).startswith("model 'retinanet': ")
    assert "\n" not in str(error.value)


def test_a_preset_needs_three_channels() -> None:
    with pytest.raises(UserError, match=r"preset coco_v1 is for images of three channels, and these have 1"):
        build_model(ModelSpec(name="fcos", preset="coco_v1"), num_classes=2, in_channels=1, image_size=64, mean=(0.5,), std=(0.2,))


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_a_lower_limit_keeps_more_boxes(name: str) -> None:
    network = ours(name, **TINY)
    prediction = network(torch.rand(1, 3, 64, 64))
    few, many = (replace(network.reading, lowest=lowest).detections(prediction, (64, 64), 50) for lowest in (0.5, 0.0))
    assert int((few["scores"] > 0).sum()) == 0
    assert int((many["scores"] > 0).sum()) > 0
