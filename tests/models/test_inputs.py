"""Each model sees images resized and normalised as it was trained to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kdbench.models.inputs import InputSpec, model_inputs


def model_with(spec: InputSpec | None) -> nn.Module:
    model = nn.Flatten()
    if spec is not None:
        model.input_spec = spec  # type: ignore[assignment]  # any object, to torch's eyes a module or a tensor
    return model


def test_images_are_normalised_channel_by_channel() -> None:
    model = model_with(InputSpec((0.5, 0.25, 0.0), (0.5, 0.25, 1.0)))
    images = torch.full((2, 3, 4, 4), 0.75)
    assert model_inputs(model, images)[0, :, 0, 0].tolist() == [0.5, 2.0, 0.75]


def test_images_of_the_right_size_are_not_resampled() -> None:
    images = torch.rand(2, 1, 8, 8)
    assert model_inputs(model_with(InputSpec((0.0,), (1.0,), 8)), images).equal(images)
    assert model_inputs(model_with(InputSpec((0.0,), (1.0,), None)), images).equal(images)


def test_images_are_resized_bilinearly() -> None:
    images = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    resized = model_inputs(model_with(InputSpec((0.0,), (1.0,), 4)), images)
    assert resized.shape == (1, 1, 4, 4)
    assert resized[0, 0, 0].tolist() == [0.0, 0.25, 0.75, 1.0]


def test_shrinking_averages_what_falls_together() -> None:
    every_fourth_column = torch.tensor([1.0, 0.0, 0.0, 0.0] * 4).expand(1, 1, 16, 16)
    resized = model_inputs(model_with(InputSpec((0.0,), (1.0,), 4)), every_fourth_column)
    assert resized.mean().item() == pytest.approx(0.25, abs=0.05)


def test_a_model_without_a_spec_gets_the_images_as_they_are() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert model_inputs(model_with(None), images) is images


def test_the_spec_is_no_part_of_the_weights_and_survives_a_copy() -> None:
    model = model_with(InputSpec((0.5,), (0.5,), 8))
    assert list(model.state_dict()) == []
    assert copy.deepcopy(model).input_spec == model.input_spec


def test_gradients_flow_to_images_after_a_first_use_in_inference_mode() -> None:
    model = model_with(InputSpec((0.123,), (0.456,)))
    with torch.inference_mode():
        model_inputs(model, torch.rand(1, 1, 2, 2))
    images = torch.rand(1, 1, 2, 2, requires_grad=True)
    model_inputs(model, images).sum().backward()
    assert images.grad.unique().item() == pytest.approx(1 / 0.456)


def test_precision_of_the_images_is_kept() -> None:
    model = model_with(InputSpec((0.5,), (0.5,), 8))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert model_inputs(model, torch.rand(1, 1, 8, 8).to(dtype)).dtype == dtype


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5, 0.5)), ((), ()), ((0.5,), (0.0,))])
def test_an_impossible_normalisation_is_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="as many means"):
        InputSpec(mean, std)
