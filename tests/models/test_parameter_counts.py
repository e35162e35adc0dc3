"""Our networks are those of the literature: their parameters are counted, their shapes tried."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from kdbench.catalogue import resolve
from kdbench.data.columns import named
from kdbench.models import MODELS

# For 100 classes and 3 channels, as the distillation literature reports them for CIFAR-100.
PUBLISHED = {
    "cifar_resnet20": 278_324,
    "cifar_resnet32": 472_756,
    "cifar_resnet44": 667_188,
    "cifar_resnet56": 861_620,
    "cifar_resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2_half": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}
# Reported in millions, to two decimals.
PUBLISHED_IN_MILLIONS = {"cifar_resnet8": 0.08, "cifar_resnet14": 0.18, "wrn_16_1": 0.18}


# Those of words have tests in test_towers.py, detectors and segmentation networks on backbones by name in detectors/ and segmenters/.
ON_BACKBONES = [name for name, entry in MODELS.items() if re.search(r"one_stage|two_stage|mask_rcnn|ssd|segmenters", entry.target)]
OF_IMAGES = [name for name in MODELS if name not in ("tiny_text", "tiny_towers", *ON_BACKBONES)]


def build(name: str, **options: int) -> nn.Module:
    return resolve("model", name, MODELS)(**({"num_classes": 100, "in_channels": 3} | options))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_are_the_published_number(name: str, parameters: int) -> None:
    assert count(build(name)) == parameters


@pytest.mark.parametrize(("name", "millions"), PUBLISHED_IN_MILLIONS.items())
def test_parameters_are_the_published_number_to_its_two_decimals(name: str, millions: float) -> None:
    assert round(count(build(name)) / 1e6, 2) == millions


def test_depth_adds_the_same_blocks_to_narrow_resnets() -> None:
    # One block more in each stage: two 3x3 convolutions and two norms of 16, 32 and 64 channels.
    one_more_block_a_stage = sum(2 * 9 * w * w + 4 * w for w in (16, 32, 64))
    assert count(build("cifar_resnet14")) - count(build("cifar_resnet8")) == one_more_block_a_stage
    assert count(build("wrn_40_1")) - count(build("wrn_16_1")) == 4 * one_more_block_a_stage


@pytest.mark.parametrize(("name", "parameters"), [("tiny_cnn", 24_058), ("tiny_fcn", 5_442), ("small_fcn", 120_938), ("tiny_fcos", 31_064)])
def test_small_networks_stay_small(name: str, parameters: int) -> None:
    assert count(build(name, num_classes=10, in_channels=1)) == parameters


@pytest.mark.parametrize("name", ON_BACKBONES)
def test_summaries_of_networks_on_backbones_say_their_size(name: str) -> None:
    said = re.search(r", (\d+) M;", MODELS[name].summary)
    with torch.device("meta"):
        millions = count(build(name, num_classes=80)) / 1e6
    assert (said is None) == ("on any backbone" in MODELS[name].summary)
    assert said is None or int(said[1]) == round(millions), millions


@pytest.mark.parametrize("name", ON_BACKBONES)
def test_summaries_of_networks_on_backbones_name_their_options(name: str) -> None:
    taken = list(inspect.signature(resolve("model", name, MODELS)).parameters)
    said = re.search(r"; options? (.*)$", MODELS[name].summary)
    assert said is not None
    assert said[1].split(", ") == [option for option in taken if option not in ("num_classes", "in_channels")]


@pytest.mark.parametrize("name", [name for name in OF_IMAGES if not name.endswith(("fcn", "fcos"))])
def test_classifiers_take_grey_images_of_28_pixels(name: str) -> None:
    model = build(name, num_classes=7, in_channels=1).eval()
    with torch.no_grad():
        logits = model(torch.rand(2, 1, 28, 28))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["tiny_fcn", "small_fcn"])
@pytest.mark.parametrize("size", [(32, 32), (30, 45)])
def test_segmentation_networks_predict_at_the_resolution_of_the_image(name: str, size: tuple[int, int]) -> None:
    model = build(name, num_classes=4, in_channels=3).eval()
    assert model(torch.rand(2, 3, *size)).shape == (2, 4, *size)


def test_width_scales_every_stage() -> None:
    model = build("cifar_resnet8", width=32)
    assert [stage[-1].conv2.out_channels for stage in (model.layer1, model.layer2, model.layer3)] == [32, 64, 128]
    assert model.conv1.out_channels == 32
    assert count(build("resnet8x4", width=64)) == PUBLISHED["resnet8x4"]


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet8x4", "wrn_16_1"])
def test_stem_stride_halves_the_resolution_and_keeps_the_parameters(name: str) -> None:
    plain, strided = build(name), build(name, stem_stride=2)
    assert count(plain) == count(strided)
    assert plain.layer1(plain.conv1(torch.zeros(1, 3, 32, 32))).shape[-1] == 32
    assert strided.layer1(strided.conv1(torch.zeros(1, 3, 32, 32))).shape[-1] == 16


def test_a_wide_resnets_convolved_shortcut_reads_the_activated_input_and_its_identity_the_raw_one() -> None:
    first, second = build("wrn_16_2").eval().layer2
    for block in (first, second):  # without their residual branch only the shortcuts are left
        nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 32, 8, 8)
    shortened = first(x)
    torch.testing.assert_close(shortened, first.shortcut(first.bn1(x).relu()))
    assert second(shortened).equal(shortened)


def test_large_images_are_pooled_once_more_by_vgg() -> None:
    model = build("vgg8").eval()
    sizes = []
    model.block4.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-1]))
    for size in (32, 64):
        model(torch.zeros(1, 3, size, size))
    assert sizes == [4, 4]


def test_every_weight_is_used() -> None:
    for name in OF_IMAGES:
        model = build(name, num_classes=3)
        given = named(model(torch.rand(2, 3, 32, 32)), "prediction")
        sum(values.square().sum() for values in given.values()).backward()
        unused = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert unused == [], name


def test_no_network_changes_its_input_in_place() -> None:
    for name in OF_IMAGES:
        images = torch.rand(2, 3, 32, 32) - 0.5
        before = images.clone()
        build(name, num_classes=3)(images)
        assert images.equal(before), name


def test_convolutions_start_with_the_variance_of_he() -> None:
    weight = build("resnet8x4").layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert weight.mean().abs().item() < 1e-3


def test_shuffling_interleaves_the_groups() -> None:
    from kdbench.models.cifar_mobile import _shuffle

    channels = torch.arange(6.0).view(1, 6, 1, 1)
    assert _shuffle(channels, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_the_catalogue_needs_no_torch() -> None:
    program = "import sys, kdbench.models; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "False"
