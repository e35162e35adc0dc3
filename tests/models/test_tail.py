"""The rest of a network after a tap: its own features give its own prediction, and gradients come back to the features."""

from __future__ import annotations

import pytest
import torch

from kdbench.errors import UserError
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.tail import Tail
from kdbench.models.taps import Taps

IMAGE = (3, 32, 32)


def network(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    spec = ModelSpec.model_validate({"name": name, **options})
    neutral = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    model = build_model(spec, num_classes=7, in_channels=3, image_size=32, **neutral)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "options", "tap"),
    [
        ("cifar_resnet8", {}, "stage:1"),
        ("cifar_resnet8", {}, "pooled"),
        ("tiny_cnn", {}, "stage:-1"),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}, "block:0"),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
            "stage:0",
        ),
    ],
)
def test_own_features_give_the_own_prediction_and_other_features_another(name: str, options: dict[str, object], tap: str) -> None:
    model = network(name, **options)
    outputs = Taps(model, (tap,))(torch.rand(4, *IMAGE))
    features = outputs.maps[tap].clone().requires_grad_()
    tail = Tail(model, tap, IMAGE)
    prediction = tail(features)
    torch.testing.assert_close(prediction, outputs.prediction)
    prediction.sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum(dim=tuple(range(1, features.dim()))).min() > 0
    assert not torch.allclose(tail(torch.randn_like(features)), outputs.prediction)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_tap_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="unknown tap 'stage:9'"):
        Tail(network("tiny_cnn"), "stage:9", IMAGE)


def test_a_tail_can_end_at_a_later_tap() -> None:
    model = network("cifar_resnet8")
    outputs = Taps(model, ("stage:0", "stage:2"))(torch.rand(4, *IMAGE))
    features = outputs.maps["stage:0"].clone().requires_grad_()
    seen = Tail(model, "stage:0", IMAGE, until="stage:2")(features)
    torch.testing.assert_close(seen, outputs.maps["stage:2"])
    seen.sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


def test_features_in_another_precision_come_back_in_theirs() -> None:
    model = network("tiny_cnn")
    features = Taps(model, ("stage:1",))(torch.rand(2, *IMAGE)).maps["stage:1"]
    wide = Tail(model, "stage:1", IMAGE)(features.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), Tail(model, "stage:1", IMAGE)(features))
