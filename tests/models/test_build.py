"""Models are built by name, and whatever is wrong with a name, an option or a file is said in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdbench.errors import RunFailed, UserError
from kdbench.models.build import ModelSpec, build_model, check_model_name
from kdbench.models.cifar_resnet import CifarResNet
from kdbench.models.inputs import InputSpec


def build(spec: Any, **facts: Any) -> nn.Module:
    facts = {"num_classes": 10, "in_channels": 3, "image_size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)} | facts
    return build_model(ModelSpec.model_validate(spec), **facts)


class Mine(nn.Module):
    """A user's model: takes the number of classes, knows its channels."""

    def __init__(self, num_classes: int, hidden: int = 4) -> None:
        super().__init__()
        self.hidden = hidden
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.mean(dim=(2, 3)))


class MineNormalised(Mine):
    input_spec = InputSpec((0.0,), (1.0,))


def takes_anything(**options: Any) -> nn.Module:
    assert "in_channels" not in options
    return Mine(**options)


def needs_depth(num_classes: int, depth: int) -> nn.Module:
    return Mine(num_classes, depth)


def builds_a_number() -> int:
    return 3


instance = Mine(2)
HERE = f"{__name__}:"


def test_options_reach_the_builder_and_the_spec_is_attached() -> None:
    model = build({"name": "cifar_resnet8", "width": 8, "stem_stride": 2}, in_channels=1, mean=[0.5], std=[0.2])
    assert isinstance(model, CifarResNet)
    assert model.conv1.weight.shape == (8, 1, 3, 3)
    assert model.conv1.stride == (2, 2)
    assert model.fc.out_features == 10
    assert model.input_spec == InputSpec((0.5,), (0.2,), None)
    assert "input_spec" not in model.state_dict()


def test_a_users_class_gets_those_facts_that_it_takes() -> None:
    model = build({"name": HERE + "Mine", "hidden": 9})
    assert model.head.out_features == 10
    assert model.hidden == 9
    assert model.input_spec == InputSpec((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def test_a_users_class_may_know_its_own_normalisation() -> None:
    assert build(HERE + "MineNormalised").input_spec == InputSpec((0.0,), (1.0,))


def test_a_builder_of_keywords_gets_the_classes_but_no_channels() -> None:
    assert build(HERE + "takes_anything").head.out_features == 10


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "cifar_resnet8", "widht": 32}, "model 'cifar_resnet8' has no option 'widht'; did you mean 'width'?"),
        ({"name": "vgg8", "width": 32}, "model 'vgg8' has no option 'width'; it has none"),
        ({"name": "cifar_resnet8", "width": 0}, "model 'cifar_resnet8': width = 0, expected a whole number from 1 to 1024"),
        ({"name": "cifar_resnet8", "width": 1.5}, "width = 1.5, expected a whole number"),
        ({"name": "cifar_resnet8", "width": True}, "width = True, expected a whole number"),
        ({"name": "cifar_resnet8", "num_classes": 5}, "'num_classes' is not an option, the data says it"),
        ({"name": "cifar_resnet8", "pretrained": True}, "'pretrained' is for timm's models"),
        ({"name": HERE + "Mine", "hiden": 3}, "has no option 'hiden'; did you mean 'hidden'?"),
        (HERE + "needs_depth", "needs the option 'depth'"),
        (HERE + "Mein", "has no 'Mein'; did you mean 'Mine'?"),
        (HERE + "instance", "found a Mine, which was not called: expected a subclass of nn.Module, or a function"),
        (HERE + "builds_a_number", "the function builds_a_number has the return annotation `-> int`, so it was not called"),
        ("no_such_package.models:Net", "there is no module 'no_such_package' on the Python path"),
    ],
)
def test_a_wrong_spec_is_one_readable_line(spec: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class TestWeights:
    def test_stored_weights_come_back_bit_equal(self, tmp_path: Path) -> None:
        model = build("cifar_resnet8")
        save_file(model.state_dict(), tmp_path / "a.safetensors")
        torch.save(model.state_dict(), tmp_path / "a.pt")
        torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "wrapped.pt")
        for file in ("a.safetensors", "a.pt", "wrapped.pt"):
            loaded = build({"name": "cifar_resnet8", "weights": tmp_path / file})
            assert not loaded.fc.weight.equal(build("cifar_resnet8").fc.weight)
            for key, value in loaded.state_dict().items():
                assert value.equal(model.state_dict()[key]), key

    def test_another_number_of_classes_is_named_as_such(self, tmp_path: Path) -> None:
        save_file(build("cifar_resnet8", num_classes=100).state_dict(), tmp_path / "x.safetensors")
        with pytest.raises(UserError) as caught:
            build({"name": "cifar_resnet8", "weights": tmp_path / "x.safetensors"})
        assert str(caught.value) == f"weights {tmp_path / 'x.safetensors'}: the head has 100 classes, the data has 10"

    @pytest.mark.parametrize(
        ("stored", "message"),
        [
            ("cifar_resnet14", "'layer1.1.bn1.num_batches_tracked' is not part of it (and 35 more)"),
            (
                {"name": "cifar_resnet8", "width": 8},
                "'conv1.weight' has another shape: [8, 3, 3, 3] in the file, [16, 3, 3, 3] in the model",
            ),
            ("vgg8", "'conv1.weight' is missing"),
        ],
    )
    def test_weights_of_another_model_name_the_first_key(self, stored: Any, message: str, tmp_path: Path) -> None:
        save_file(build(stored).state_dict(), tmp_path / "x.safetensors")
        with pytest.raises(UserError) as caught:
            build({"name": "cifar_resnet8", "weights": tmp_path / "x.safetensors"})
        assert message in str(caught.value)
        assert "'cifar_resnet8'" in str(caught.value)

    @pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
    def test_a_broken_or_absent_file_is_named(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="there is no such file"):
            build({"name": "tiny_cnn", "weights": tmp_path / name})
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(UserError, match="not a safetensors file"):
            build({"name": "tiny_cnn", "weights": tmp_path / name})

    def test_nothing_but_tensors_is_unpickled(self, tmp_path: Path) -> None:
        torch.save({"state_dict": Path("a")}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"x\.pt"):
            build({"name": "tiny_cnn", "weights": tmp_path / "x.pt"})
        torch.save({"epoch": 3}, tmp_path / "y.pt")
        with pytest.raises(UserError, match="expected names with tensors"):
            build({"name": "tiny_cnn", "weights": tmp_path / "y.pt"})


class TestTimm:
    def test_a_convolutional_model_takes_classes_channels_and_options(self) -> None:
        model = build({"name": "mobilenetv3_small_050", "drop_rate": 0.3}, in_channels=1, mean=(0.5,), std=(0.2,))
        assert model.classifier.out_features == 10
        assert model.conv_stem.in_channels == 1
        assert model.drop_rate == 0.3
        assert model.input_spec == InputSpec((0.5,), (0.2,), None)

    def test_a_model_of_fixed_size_is_built_for_the_size_of_the_images(self) -> None:
        model = build({"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 1})
        assert model.patch_embed.img_size == (32, 32)
        assert model.input_spec.size == 32
        larger = build({"name": "vit_tiny_patch16_224", "img_size": 64, "depth": 1})
        assert larger.patch_embed.img_size == (64, 64)
        assert larger.input_spec.size == 64

    def test_a_pretrained_model_keeps_its_own_normalisation_and_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import timm

        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, pretrained=False, **options))
        assert build({"name": "resnet18", "pretrained": True}).input_spec == InputSpec((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)
        vit = build({"name": "vit_tiny_patch16_224", "pretrained": True, "depth": 1})
        assert vit.input_spec == InputSpec((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 224)
        assert vit.patch_embed.img_size == (224, 224)
        grey = build({"name": "mobilenetv3_small_050", "pretrained": True}, in_channels=1, mean=(0.5,), std=(0.2,)).input_spec
        assert grey.mean == (pytest.approx(0.449),)
        assert grey.std == (pytest.approx(0.226),)

    def test_weights_that_cannot_be_fetched_fail_the_run_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import timm

        def offline(name: str, **options: Any) -> nn.Module:
            raise OSError("no connection\nand a long story")

        monkeypatch.setattr(timm, "create_model", offline)
        with pytest.raises(RunFailed, match=r"model 'resnet18': timm could not load its pretrained weights: no connection$"):
            build({"name": "resnet18", "pretrained": True})

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("resnet18x", "unknown model 'resnet18x'; did you mean 'resnet18'?"),
            ("cifar_resnet9", "unknown model 'cifar_resnet9'; did you mean 'cifar_resnet8'?"),
            ("resnet18.a9_in1k", "timm model 'resnet18' has no weights called 'a9_in1k'; did you mean 'a3_in1k'?"),
            ({"name": "resnet18", "drop_rat": 0.1}, "model 'resnet18' has no option 'drop_rat'; did you mean 'drop_rate'?"),
        ],
    )
    def test_a_wrong_name_or_option_is_one_readable_line(self, spec: Any, message: str) -> None:
        with pytest.raises(UserError) as caught:
            build(spec)
        assert str(caught.value) == message


def test_names_are_checked_without_building() -> None:
    for name in ("cifar_resnet8", HERE + "Mine", "resnet18", "resnet18.a1_in1k"):
        check_model_name(name)
    for name in ("cifar_resnet9", HERE + "Mein", "no_such_package:Net", "resnet18.a9_in1k"):
        with pytest.raises(UserError):
            check_model_name(name)


def test_our_own_models_do_not_import_timm() -> None:
    program = (
        "import sys; from kdbench.models.build import *; check_model_name('tiny_cnn');"
        "build_model(ModelSpec(name='tiny_cnn'), num_classes=2, in_channels=1, image_size=8, mean=(0.5,), std=(0.5,));"
        "print('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "False"
