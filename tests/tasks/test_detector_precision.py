"""Every family under autocast: losses are single precision and finite, boxes are not rounded, gradients reach all weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdbench.tasks.detector_losses import losses_of
from tests.models.detectors.test_exports import FAMILIES
from tests.models.detectors.torchvisions import ours
from tests.tasks.scenes import target


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_in_bfloat16(family: str) -> None:
    torch.manual_seed(0)
    network = ours(family, **FAMILIES[family]).train()
    objects = target(((3.0, 4.0, 30.0, 40.0), 1), ((20.0, 10.0, 44.0, 30.0), 4))
    objects = {name: torch.cat([column, column]) for name, column in objects.items()} | {"draws": torch.tensor([3, 4])}
    objects["masks"] = torch.ones(2, 1, 64, 64, dtype=torch.int64)  # of the first object, everything; of the second, nothing
    truth: dict[str, Any] = {name: objects[name] for name in ("boxes", "labels")} if network.reading.wants_truth else {}
    with torch.autocast("cpu", torch.bfloat16):
        prediction = network(torch.rand(2, 3, 64, 64), **truth)
    terms = losses_of(network.reading).losses(prediction, objects, (64, 64))
    assert prediction["level:0"].dtype == torch.bfloat16
    for term in terms.values():
        assert term.dtype == torch.float32
        assert term.isfinite()
        assert term > 0
    sum(terms.values()).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in network.parameters())
    dense = network.reading.dense(prediction, (64, 64))
    assert dense.boxes.dtype == dense.logits.dtype == torch.float32
    if "proposals" in prediction:
        assert prediction["proposals"].dtype == torch.float32


def test_every_family_says_what_each_term_is_divided_by() -> None:
    objects = target(((3.0, 4.0, 30.0, 40.0), 1)) | {"draws": torch.tensor([3])}
    objects["masks"] = torch.ones(1, 1, 64, 64, dtype=torch.int64)
    for family, options in FAMILIES.items():
        network = ours(family, **options).eval()
        losses = losses_of(network.reading)
        terms = losses.losses(network(torch.rand(1, 3, 64, 64)), objects, (64, 64))
        assert losses.weights(objects, (64, 64)).keys() == terms.keys()
