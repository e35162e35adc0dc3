"""Every family is exported with a dynamic batch: torch.export, and ONNX in onnxruntime, give what the network gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from tests.models.detectors.torchvisions import ours

pytestmark = pytest.mark.slow

SMALL = {"backbone": "resnet10t", "width": 16, "levels": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "fcos": SMALL,
    "retinanet": SMALL | {"anchor": 16},
    "faster_rcnn": SMALL | {"anchor": 16, "hidden": 32, "proposals": 50},
    "mask_rcnn": SMALL | {"anchor": 16, "hidden": 32, "proposals": 50, "drawn": 10},
    "ssdlite": {"backbone": "mobilenet_v3_small", "width": 32, "levels": 4},
}


@pytest.mark.parametrize("family", [pytest.param(name, marks=[] if name == "fcos" else [pytest.mark.nodes]) for name in FAMILIES])
def test_a_family_is_exported_with_a_dynamic_batch(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ours(family, **FAMILIES[family])
    network.requires_grad_(False)
    shapes, images = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}, torch.rand(2, 3, 64, 96)
    exported = torch.export.export(network, (images,), dynamic_shapes=shapes).module()
    program = torch.onnx.export(network, (images,), dynamo=True, external_data=False, dynamic_shapes=shapes)
    assert program is not None
    program.save(tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    for count in (1, 2, 5):
        images = torch.rand(count, 3, 64, 96)
        expected = network(images)
        served = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        for (name, values), stored in zip(expected.items(), served, strict=True):
            torch.testing.assert_close(exported(images)[name], values, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.from_numpy(stored), values, rtol=1e-4, atol=1e-4)
