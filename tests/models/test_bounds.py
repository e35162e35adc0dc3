"""Networks of too many parts are refused while they are built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kdbench.errors import TooMuch, UserError
from kdbench.models import bounds
from kdbench.models.bounds import MOST_MODULES, at_most, bounded
from kdbench.models.build import ModelSpec, build_model

FACTS: dict[str, Any] = {"num_classes": 5, "in_channels": 3, "image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"name": "vit_tiny_patch16_224", "depth": 100_000}, f"more than {MOST_MODULES:,} modules"),
        ({"name": "resnet50", "layers": [1_000_000, 1, 1, 1]}, f"more than {MOST_MODULES:,} modules"),
        ({"name": "torchvision.models:resnet50", "width_per_group": 20_000}, "parameters with these options|can.t allocate memory"),
    ],
)
def test_options_of_a_library_that_ask_for_too_much_are_refused(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_model(ModelSpec.model_validate(spec), **FACTS)


def test_as_many_parameters_as_are_allowed_are_built_and_no_more() -> None:
    with at_most(30), bounded("ours"):
        nn.Linear(5, 5)
    with pytest.raises(TooMuch, match="model 'ours' has more than 29 parameters"), at_most(29), bounded("ours"):
        nn.Linear(5, 5)
    with at_most(29), bounded("ours"), torch.device("meta"):
        nn.Linear(5, 5)  # takes no memory
    with at_most(1), bounded("ours"):
        nn.LazyLinear(5)  # has no size yet
    nn.Linear(5, 5)  # the bound ends with its block


def test_of_a_backbone_that_is_cut_only_what_is_kept_counts() -> None:
    spec = ModelSpec.model_validate({"name": "retinanet", "backbone": "resnet18", "width": 8, "finest": 4, "levels": 1, "anchor": 16})
    parameters = sum(parameter.numel() for parameter in build_model(spec, **FACTS).parameters())
    assert parameters < 500_000  # ResNet-18 has 11.7 million
    with at_most(parameters):
        build_model(spec, **FACTS)
    with at_most(parameters - 1), pytest.raises(TooMuch, match=f"more than {parameters - 1:,} parameters"):
        build_model(spec, **FACTS)


def test_a_backbone_that_is_cut_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_PASSING", 10_000_000)
    spec = ModelSpec.model_validate({"name": "retinanet", "backbone": "resnet18", "width": 8, "finest": 4, "levels": 1, "anchor": 16})
    with pytest.raises(TooMuch, match="more than 10,000,000 parameters"):
        build_model(spec, **FACTS)
