"""Taps resolve by names that hold for every model, give what the module gave, and leave the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdbench.errors import UserError
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.inputs import InputSpec
from kdbench.models.outputs import TapShape
from kdbench.models.taps import TapRow, Taps, probe, tap_shapes, tap_table
from kdbench.models.trace import describe
from tests.models.test_parameter_counts import OF_IMAGES

GREY = (1, 28, 28)


def build(spec: Any, channels: int = 3, size: int = 32) -> nn.Module:
    facts = {"num_classes": 10, "in_channels": channels, "image_size": size, "mean": (0.5,) * channels, "std": (0.25,) * channels}
    return build_model(ModelSpec.model_validate(spec), **facts)


def aliased(rows: list[TapRow]) -> dict[str, TapRow]:
    return {alias: row for row in rows for alias in row.aliases}


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class SqueezeNetwork(nn.Module):
    """A network that declares nothing: two blocks that expand before they shrink, with squeeze-and-excitation, and a pooled head."""

    class Block(nn.Module):
        def __init__(self, before: int, after: int) -> None:
            super().__init__()
            expand, shrink = nn.Conv2d(before, 6, 1), nn.Conv2d(6, after, 3, 2, 1)
            self.body = nn.Sequential(expand, shrink, nn.ReLU(), SqueezeNetwork.Squeeze(after))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    class Squeeze(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.up(self.down(self.pool(x))).sigmoid()

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(self.Block(3, 4), self.Block(4, 8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.never = nn.Linear(8, 8)
        self.pair = Pair()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.drop(self.pair(self.pool(self.features(images)).flatten(1))[0]))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Normless(nn.Module):
    """A map, then its sum; gives logits in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.conv(images).sum(dim=(2, 3))}


class TestNames:
    @pytest.mark.parametrize("name", OF_IMAGES)
    def test_stages_of_our_models_are_the_last_modules_at_each_resolution(self, name: str) -> None:
        rows = aliased(tap_table(build(name, 1, 28), GREY))
        stages = [rows[f"stage:{i}"] for i in range(sum(alias.startswith("stage:") for alias in rows) // 2)]
        assert len(stages) >= 2
        assert [row.kind for row in stages] == ["map"] * len(stages)
        assert all(fine.shape[1] > coarse.shape[1] for fine, coarse in pairwise(stages))
        assert rows["stage:-1"] == stages[-1]
        assert all(row.path in build(name, 1, 28).stage_modules for row in stages)

    def test_shapes_strides_and_blocks_of_a_residual_network(self) -> None:
        rows = aliased(tap_table(build("cifar_resnet14", 1, 28), GREY))
        assert rows["stage:0"] == TapRow("layer1", ("stage:0", "stage:-3"), "map", (16, 28, 28), 1)
        assert rows["stage:-1"] == TapRow("layer3", ("stage:2", "stage:-1"), "map", (64, 7, 7), 4)
        assert [rows[f"block:{i}"].path for i in range(6)] == [f"layer{s}.{b}" for s in (1, 2, 3) for b in (0, 1)]
        assert rows["block:-2"].path == "layer3.0"
        assert rows["pooled"] == TapRow("fc", ("pooled",), "vector", (64,), None, side="input")

    def test_an_encoder_decoders_stages_are_its_encoder(self) -> None:
        rows = aliased(tap_table(build("small_fcn", 1, 28), GREY))
        assert (rows["stage:0"].path, rows["stage:-1"].path) == ("down1", "context")
        assert "pooled" not in rows

    @pytest.mark.parametrize(
        ("name", "stages", "last", "blocks", "pooled"),
        [
            ("resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"], ("map", (512, 2, 2)), 8, 512),
            ("mobilenetv3_small_050", ["bn1", "blocks.0", "blocks.1", "blocks.3", "blocks.5"], ("map", (288, 2, 2)), 11, 1024),
            ("efficientnet_lite0", ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"], ("map", (320, 2, 2)), 16, 1280),
            ("convnext_tiny", ["stages.0", "stages.1", "stages.2", "stages.3"], ("map", (768, 2, 2)), 18, 768),
            ("vit_tiny_patch16_224", ["blocks.11"], ("tokens", (17, 192)), 12, 192),
            ("deit_tiny_patch16_224", ["blocks.11"], ("tokens", (17, 192)), 12, 192),
            ("swin_tiny_patch4_window7_224", ["layers.0", "layers.1", "layers.2", "layers.3"], ("map", (768, 2, 2)), 12, 768),
            ("mixer_s16_224", ["blocks.7"], ("tokens", (16, 512)), 8, 512),
        ],
    )
    def test_aliases_hold_for_timms_models(self, name: str, stages: list[str], last: tuple[Any, ...], blocks: int, pooled: int) -> None:
        model = build(name, size=64)
        rows = aliased(tap_table(model, (3, 64, 64)))
        assert [rows[f"stage:{i}"].path for i in range(len(stages))] == stages
        assert f"stage:{len(stages)}" not in rows
        assert (rows["stage:-1"].kind, rows["stage:-1"].shape) == last
        assert f"block:{blocks - 1}" in rows
        assert f"block:{blocks}" not in rows
        assert rows["pooled"].shape == (pooled,)
        shapes = probe(model, (3, 64, 64), ("stage:0", "stage:-1", "block:-2", "pooled"))
        images = torch.rand(3, 3, 64, 64)
        with torch.no_grad():
            outputs = Taps(model.eval(), shapes.taps)(images)
        assert outputs.logits.shape == (3, *shapes.prediction) == (3, 10)
        assert {name: (3, *tap.shape) for name, tap in shapes.taps.items()} == {name: m.shape for name, m in outputs.maps.items()}

    def test_a_model_that_declares_nothing_is_probed(self) -> None:
        rows = aliased(tap_table(SqueezeNetwork(), (3, 32, 32)))
        assert [rows[f"stage:{i}"].path for i in range(2)] == ["features.0", "features"]
        assert "stage:2" not in rows
        assert [rows["block:0"].path, rows["block:-1"].path] == ["features.0", "features.1"]
        assert "block:2" not in rows
        assert rows["pooled"].shape == (8,)

    def test_single_positions_are_a_stage_where_the_trunk_itself_gets_there(self) -> None:
        trunk = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4, 3))
        rows = aliased(tap_table(trunk, (1, 4, 4)))
        assert [rows["stage:0"].shape, rows["stage:-1"].shape] == [(2, 2, 2), (4, 1, 1)]

    @pytest.mark.parametrize(
        ("tap", "message"),
        [
            ("stage:7", "unknown tap 'stage:7'; the model has stage:0 to stage:1"),
            ("stage:-3", "unknown tap 'stage:-3'; the model has stage:0 to stage:1"),
            ("stage:last", "unknown tap 'stage:last'; the model has stage:0 to stage:1"),
            ("features.0.boddy", "unknown tap 'features.0.boddy'; did you mean 'features.0.body'?"),
            ("poooled", "unknown tap 'poooled'; did you mean 'pooled'?"),
            ("pair", "tap 'pair': module 'pair' gives a tuple, not a tensor"),
            ("never", "tap 'never': module 'never' does not run in a forward pass"),
        ],
    )
    def test_a_wrong_tap_is_one_readable_line(self, tap: str, message: str) -> None:
        for attempt in (lambda: probe(SqueezeNetwork(), (3, 32, 32), (tap,)), lambda: Taps(SqueezeNetwork(), (tap,), (3, 32, 32))):
            with pytest.raises(UserError) as caught:
                attempt()
            assert str(caught.value) == message

    def test_a_prediction_that_is_no_tensor_is_refused(self) -> None:
        with pytest.raises(UserError, match="the model gives a tuple; expected a tensor, a dictionary with 'logits'"):
            probe(Pair(), GREY)

    def test_logits_in_a_dictionary_are_the_prediction(self) -> None:
        assert probe(Normless(), GREY).prediction == (2,)
        assert Taps(Normless(), ["conv"])(torch.rand(3, *GREY)).logits.shape == (3, 2)


class TestValues:
    def test_maps_are_what_the_modules_gave_for_normalised_images(self) -> None:
        model = build("cifar_resnet8", 1, 28).eval()
        images = torch.rand(4, *GREY)
        outputs = Taps(model, ["stage:-1", "stage:0", "pooled", "layer2.0.bn2"])(images)
        normalised = (images - 0.5) / 0.25
        stage = model.layer1(model.bn1(model.conv1(normalised)).relu())
        assert outputs.maps["stage:0"].equal(stage)
        last = model.layer3(model.layer2(stage))
        assert outputs.maps["stage:-1"].equal(last)
        assert outputs.maps["pooled"].equal(last.mean(dim=(2, 3)))
        assert outputs.logits.equal(model.fc(last.mean(dim=(2, 3))))
        assert set(outputs.maps) == {"stage:-1", "stage:0", "pooled", "layer2.0.bn2"}

    @pytest.mark.parametrize("inplace", [False, True])
    def test_what_an_activation_reads_is_tapped_before_it_acts(self, inplace: bool) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        )
        images = torch.rand(2, 3, 8, 8)
        outputs = Taps(model, ("before:1", "1"))(images)
        torch.testing.assert_close(outputs.maps["before:1"], model[0](images), rtol=0, atol=0)
        torch.testing.assert_close(outputs.maps["1"], model[0](images).relu(), rtol=0, atol=0)
        assert outputs.maps["before:1"].min() < 0
        torch.testing.assert_close(outputs.prediction, model(images), rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["cifar_resnet14", "wrn_16_1", "vgg8"])
    def test_our_networks_show_what_the_last_activation_of_each_stage_reads(self, name: str) -> None:
        found = tap_shapes(build(name, 1, 28), GREY)
        stages = [shape for tap, shape in found.taps.items() if tap.startswith("stage:") and "-" not in tap]
        before = [shape for tap, shape in found.taps.items() if tap.startswith("before:")]
        assert all(shape in before for shape in stages)

    def test_only_an_activations_input_can_be_tapped(self) -> None:
        with pytest.raises(UserError, match="unknown tap 'before:layer1'"):
            probe(build("tiny_cnn", 1, 28), GREY, ("before:layer1",))

    def test_gradients_flow_through_maps_to_weights_before_them_only(self) -> None:
        model = build("cifar_resnet8", 1, 28)
        Taps(model, ["stage:1"])(torch.rand(2, *GREY)).maps["stage:1"].square().sum().backward()
        assert model.conv1.weight.grad.abs().sum() > 0
        assert model.layer3[0].conv1.weight.grad is None

    def test_channels_last_maps_come_channels_first(self) -> None:
        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mix = nn.Linear(1, 5)

            def forward(self, images: Tensor) -> Tensor:
                return self.mix(images.permute(0, 2, 3, 1)).mean(dim=(1, 2))

        model = Last()
        images = torch.rand(2, *GREY)
        taps = Taps(model, ["mix"])
        assert taps(images).maps["mix"].equal(model.mix(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    def test_images_are_resized_for_a_model_that_wants_another_size(self) -> None:
        model = build("tiny_cnn", 1, 28)
        model.input_spec = InputSpec((0.5,), (0.5,), 56)  # type: ignore[assignment]  # any object, to torch's eyes a module or a tensor
        assert Taps(model, ["stage:0"])(torch.rand(1, *GREY)).maps["stage:0"].shape == (1, 16, 28, 28)
        assert aliased(tap_table(model, GREY))["stage:0"].stride == 2

    def test_names_found_at_the_first_call_are_those_found_at_once(self) -> None:
        model = build("wrn_16_1", 1, 28).eval()
        images = torch.rand(2, *GREY)
        late, early = Taps(model, ["block:-1"])(images), Taps(model, ["block:-1"], GREY)(images)
        assert late.maps["block:-1"].equal(early.maps["block:-1"])


class TestLeavesNoMark:
    def test_a_probe_leaves_buffers_flags_random_state_and_hooks(self) -> None:
        model = SqueezeNetwork()
        model.norm = nn.BatchNorm2d(3)
        model.features.insert(0, model.norm)
        model.features[1].eval()
        flags = [module.training for module in model.modules()]
        state = copy.deepcopy(model.state_dict())
        generator = torch.get_rng_state()
        tap_table(model, (3, 32, 32))
        assert [module.training for module in model.modules()] == flags
        assert all(value.equal(state[key]) for key, value in model.state_dict().items())
        assert torch.get_rng_state().equal(generator)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert hook_count(model) == 0

    def test_a_failed_probe_restores_the_training_flags_and_removes_its_hooks(self) -> None:
        model = build("cifar_resnet8", 1, 28)
        with pytest.raises(RuntimeError):
            probe(model, (5, 28, 28))
        assert all(module.training for module in model.modules())
        assert hook_count(model) == 0

    def test_random_layers_draw_the_same_with_and_without_a_probe(self) -> None:
        class Noisy(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return images.mean(dim=(2, 3)) + torch.rand(1)

        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        probe(Noisy(), GREY)
        assert torch.rand(1).equal(expected)

    def test_hooks_exist_during_a_call_only(self) -> None:
        model = build("cifar_resnet8", 1, 28)
        taps = Taps(model, ["stage:-1", "pooled"], GREY)
        assert hook_count(model) == 0
        during = []
        model.layer3.register_forward_hook(lambda module, args, output: during.append(hook_count(model)))
        taps(torch.rand(2, *GREY))
        assert during == [3]
        assert hook_count(model) == 1

    def test_a_failed_call_removes_its_hooks(self) -> None:
        model = build("cifar_resnet8", 1, 28)
        taps = Taps(model, ["stage:0"], GREY)
        with pytest.raises(RuntimeError):
            taps(torch.rand(2, 5, 28, 28))
        assert hook_count(model) == 0

    def test_without_names_nothing_is_probed_or_hooked(self) -> None:
        model = build("cifar_resnet8", 1, 28)
        calls = []
        model.register_forward_hook(lambda module, args, output: calls.append(hook_count(model)))
        outputs = Taps(model)(torch.rand(2, *GREY))
        assert calls == [1]
        assert outputs.maps == {}


class TestElsewhere:
    def test_autocast_gives_half_precision_maps(self) -> None:
        model = build("cifar_resnet8", 1, 28)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = Taps(model, ["layer3.0.conv1"])(torch.rand(2, *GREY))
        assert outputs.maps["layer3.0.conv1"].dtype == torch.bfloat16

    def test_a_copied_pair_taps_its_own_model(self) -> None:
        model = build("tiny_cnn", 1, 28).eval()
        taps = Taps(model, ["stage:-1"], GREY)
        copied = copy.deepcopy(taps)
        nn.init.zeros_(copied.model.layer1[0].weight)
        images = torch.rand(2, *GREY)
        assert not copied(images).maps["stage:-1"].equal(taps(images).maps["stage:-1"])

    @pytest.fixture
    def one_process_group(self, tmp_path: Path) -> Iterator[None]:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    @pytest.mark.usefixtures("one_process_group")
    def test_maps_give_gradients_inside_distributed_data_parallel(self) -> None:
        class Distilled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.student = build("cifar_resnet8", 1, 28)
                self.taps = Taps(self.student, ["stage:-1"])

            def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
                outputs = self.taps(images)
                return outputs.logits, outputs.maps["stage:-1"]

        images = torch.rand(4, *GREY)
        plain = Distilled()
        wrapped = DistributedDataParallel(copy.deepcopy(plain))
        for module in (plain, wrapped):
            for _ in range(2):
                logits, last = module(images)
                (logits.square().sum() + last.sum()).backward()
        for alone, shared in zip(plain.parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(alone.grad, shared.grad)


@pytest.mark.parametrize(
    ("shape", "image", "expected", "channels_last"),
    [
        ((2, 8, 4, 4), (32, 32), TapShape("map", (8, 4, 4)), False),
        ((2, 4, 4, 8), (32, 32), TapShape("map", (8, 4, 4)), True),
        ((2, 4, 4, 4), (32, 32), TapShape("map", (4, 4, 4)), False),
        ((2, 3, 4, 7), (28, 56), TapShape("map", (3, 4, 7)), False),
        ((2, 4, 7, 3), (28, 56), TapShape("map", (3, 4, 7)), True),
        ((2, 8, 4, 1), (32, 32), None, False),
        ((2, 17, 192), (32, 32), TapShape("tokens", (17, 192)), False),
        ((2, 10), (32, 32), TapShape("vector", (10,)), False),
        ((8, 49, 96), (32, 32), None, False),
        ((2,), (32, 32), None, False),
        ((2, 1, 2, 3, 4), (32, 32), None, False),
    ],
)
def test_maps_tokens_and_vectors_are_told_apart_by_shape(
    shape: tuple[int, ...], image: tuple[int, int], expected: TapShape | None, channels_last: bool
) -> None:
    seen = describe(shape, image)
    assert (seen and seen.shape) == expected
    assert (seen is not None and seen.channels_last) == channels_last


def test_a_models_declaration_settles_a_cube() -> None:
    cube = (2, 16, 16, 16)
    assert describe(cube, (64, 64), prefers_channels_last=True).channels_last
    assert not describe(cube, (64, 64)).channels_last
    assert not describe((2, 8, 4, 4), (32, 32), prefers_channels_last=True).channels_last
