"""Segmentation networks by name: torchvision's own logits with its own weights, any size, one epoch through the frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import segmentation

from kdbench.errors import UserError
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.taps import tap_shapes
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from tests.training.units import layout, saved_teacher, unit


def network(name: str, channels: int = 3, **options: Any) -> Any:
    spec = ModelSpec.model_validate({"name": name, **options})
    return build_model(spec, num_classes=4, in_channels=channels, image_size=64, mean=(0.5,) * channels, std=(0.2,) * channels).eval()


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_with_torchvisions_weights_logits_are_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4).eval()
    ours = network(name)
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("aux_classifier")})
    images = torch.rand(2, 3, 65, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images)["out"])


@pytest.mark.parametrize(
    ("name", "options", "stages"),
    [
        ("deeplabv3", {"backbone": "resnet18", "width": 16, "rate": 2}, [(512, 8, 8)]),
        ("deeplabv3", {"backbone": "resnet50", "width": 16}, [(256, 16, 16), (2048, 8, 8)]),
        ("fcn", {"backbone": "resnet10t", "width": 8}, [(512, 8, 8)]),
        ("lraspp", {"backbone": "mobilenet_v3_small", "width": 8}, [(24, 8, 8), (576, 4, 4)]),
        ("lraspp", {"backbone": "resnet18", "width": 8}, [(128, 8, 8), (256, 4, 4)]),
        ("unet", {"width": 4, "depth": 3}, [(4, 64, 64), (8, 32, 32), (16, 16, 16), (32, 8, 8)]),
    ],
)
def test_logits_have_the_size_of_the_picture_and_stages_are_the_backbones(
    name: str, options: dict[str, Any], stages: list[tuple[int, ...]]
) -> None:
    model = network(name, 1, **options)
    for size in ((64, 64), (37, 70)):
        assert model(torch.rand(2, 1, *size)).shape == (2, 4, *size)
    shapes = tap_shapes(model, (1, 64, 64)).taps
    assert [shapes[f"stage:{stage}"].shape for stage in range(len(stages))] == stages
    model.train()(torch.rand(2, 1, 64, 64)).square().sum().backward()
    assert [path for path, weight in model.named_parameters() if weight.grad is None] == []


def test_width_and_depth_of_the_u_net() -> None:
    assert network("unet", width=4).head.in_channels == 4
    assert [step[0].in_channels for step in network("unet", width=4, depth=2).up] == [4 + 8, 8 + 16]
    with pytest.raises(UserError, match=r"model 'unet': depth must be 1 to 7, got 8"):
        network("unet", depth=8)


def test_a_backbone_that_can_not_be_dilated_is_one_line() -> None:
    with pytest.raises(UserError) as error:
        network("deeplabv3", backbone="vit_tiny_patch16_224")
    assert str(error.value).startswith(
        "model 'deeplabv3': backbone 'vit_tiny_patch16_224' has no form that is dilated to a stride of 8; name a"
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("student", [{"name": "unet", "width": 4, "depth": 2}, {"name": "lraspp", "backbone": "resnet10t", "width": 8}])
def test_a_network_by_name_trains_with_kd(student: dict[str, Any], tmp_path: Path) -> None:
    task = {"name": "segmentation", "data": {"name": "shapes", "train": 24, "test": 6, "size": 64}, "val_size": 6}
    teacher = saved_teacher(tmp_path, "fp32", {"name": "deeplabv3", "backbone": "resnet18", "width": 8, "rate": 2}, task)
    each = unit("kd", teacher, task=task, student=student, recipe={"epochs": 1, "batch_size": 6, "lr": 0.01})
    record = fit(each, LocalSession(), layout(tmp_path))
    assert 0 <= record.metrics["miou"] <= 100


@pytest.mark.parametrize(
    ("name", "options"),
    [("deeplabv3", {"backbone": "resnet18", "width": 8}), ("lraspp", {"backbone": "mobilenet_v3_small"}), ("unet", {"width": 4})],
)
def test_it_is_exported_with_a_dynamic_batch(name: str, options: dict[str, Any]) -> None:
    model, batch = network(name, **options), torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (torch.rand(2, 3, 64, 64),), dynamic_shapes=({0: batch},)).module()
    for count in (1, 5):
        images = torch.rand(count, 3, 64, 64)
        torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-4)
