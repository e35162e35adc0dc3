"""SSDLite on backbones by name, against torchvision's own network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.taps import probe
from tests.models.detectors.torchvisions import ALL, CLASSES, assert_same, ours, theirs

NAME = "ssdlite320_mobilenet_v3_large"


def test_with_the_same_weights_boxes_are_torchvisions() -> None:
    """Torchvision resizes every picture to 320 pixels here, so none is padded."""
    peer = theirs(NAME, True, detections_per_img=ALL)
    generator = torch.Generator().manual_seed(2)
    pictures = torch.rand(4, 3, 320, 320, generator=generator)
    # With random statistics, all cells of such a deep network say the same. So its statistics are those of the pictures.
    for layer in peer.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        for head in peer.head.children():
            for layer in head.module_list:
                layer[1].weight.normal_(0, 0.05, generator=generator)
        peer.head.train()(list(peer.backbone.train()((pictures - 0.5) / 0.5).values()))
    peer.eval()
    network = ours(NAME, preset="coco_v1")
    network.load_state_dict(peer.state_dict())
    with torch.no_grad():
        kept = network.reading.detections(network((pictures - 0.5) / 0.5), (320, 320), ALL)
        found = peer(list(pictures))
    assert_same(kept, found, background=True)
    assert found[0]["scores"].std() > 0.05


def test_its_own_normalisation_comes_with_the_preset() -> None:
    assert ours(NAME, preset="coco_v1").input_spec.mean == (0.5, 0.5, 0.5)
    assert ours(NAME, mean=(0.1, 0.2, 0.3)).input_spec.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("backbone", ["mobilenet_v3_large", "mobilenet_v3_small", "mobilenet_v2", "resnet10t"])
@pytest.mark.parametrize("size", [(64, 64), (65, 100)])
def test_small_pictures_have_the_shapes_that_the_reading_says(backbone: str, size: tuple[int, int]) -> None:
    for levels in (2, 4, 6):
        network = ours("ssdlite", backbone=backbone, width=32, levels=levels)
        given = network(torch.rand(2, 3, *size))
        assert {key: tuple(value.shape[1:]) for key, value in given.items()} == network.reading.shapes(size)
        boxes = network.reading.dense(given, size)
        assert boxes.logits.shape == (2, boxes.boxes.shape[1], CLASSES)


@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", "mobilenet_v2", "resnet10t"])
def test_levels_are_taps_and_every_weight_is_used(backbone: str) -> None:
    network = ours("ssdlite", backbone=backbone, width=32, levels=4)
    taps = probe(network, (3, 64, 64), [f"level:{level}" for level in range(4)]).taps
    assert [tap.shape[1:] for tap in taps.values()] == [(4, 4), (2, 2), (1, 1), (1, 1)]
    assert [tap.shape[0] for tap in taps.values()][2:] == [32, 16]
    total: Tensor = sum(level.square().sum() for level in network.train()(torch.rand(2, 3, 64, 64)).values())
    total.backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("levels", [1, 7])
def test_a_number_of_levels_outside_is_refused(levels: int) -> None:
    with pytest.raises(UserError, match=rf"levels must be 2 to 6, got {levels}"):
        ours("ssdlite", levels=levels)


def test_a_state_of_torchvisions_fits_name_by_name() -> None:
    peer: Any = theirs(NAME, True)
    assert ours(NAME).state_dict().keys() == peer.state_dict().keys()
