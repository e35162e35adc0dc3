"""Names in files call one's own code alone: what belongs to somebody else is neither imported nor called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from kdbench.catalogue import resolve
from kdbench.data.sources import source_maker
from kdbench.errors import CodeRefused, UserError
from kdbench.models.build import ModelSpec, build_model, check_model_name
from kdbench.own_code import TRUST_VARIABLE, check_maker, check_module, names_from_records
from kdbench.tasks.build import TaskSpec, build_task

MINE = """
from __future__ import annotations
from os import system
from typing import TYPE_CHECKING
from torch import nn
from torch.fx.graph_module import reduce_graph_module
from torchvision.models import resnet18
from kdbench.data.sources import Source
if TYPE_CHECKING:
    from nowhere import Width

def net(num_classes: int, in_channels: int, width: Width | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))

def number(num_classes: int) -> int:
    raise AssertionError("called")

def plain(num_classes: int):
    raise AssertionError("called")

def source() -> Source:
    raise AssertionError("called")

class Thing:
    def __init__(self, **options):
        raise AssertionError("called")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of one's own on the Python path."""
    (tmp_path / "mine_here.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("mine_here", None)


@pytest.mark.parametrize("name", ["mine_here:net", "mine_here:resnet18", "torchvision.models:resnet18", "torchvision.models:ResNet"])
def test_own_code_and_torchvisions_networks_are_taken(mine: None, name: str) -> None:
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("os:system", "'os' belongs to the standard library"),
        ("subprocess:Popen", "'subprocess' belongs to the standard library"),
        ("torch.fx.graph_module:reduce_graph_module", "'torch.fx.graph_module' belongs to an installed package"),
        ("mine_here:reduce_graph_module", "'torch.fx.graph_module' belongs to an installed package"),
        ("mine_here:system", "found a builtin_function_or_method (posix.system), which was not called"),
        ("mine_here:number", "the function number has the return annotation `-> int`, so it was not called"),
        ("mine_here:plain", "the function plain has no return annotation, so it was not called: write `def plain(...) -> nn.Module:`"),
        ("mine_here:source", "the function source has the return annotation `-> Source`"),
        ("mine_here:Thing", "the class mine_here.Thing was not called: expected a subclass of nn.Module"),
        ("kdbench.models.build:build_model", "build_model is a function of kdbench's own; use a name that `kdbench list` shows"),
    ],
)
def test_what_is_not_known_to_make_a_network_is_refused_uncalled(mine: None, name: str, said: str) -> None:
    with pytest.raises(CodeRefused) as refused:
        check_model_name(name)
    assert said in str(refused.value)
    assert "--trust-code" in str(refused.value) or "expected a subclass" in str(refused.value) or "kdbench list" in str(refused.value)
    with pytest.raises(CodeRefused):
        build_model(ModelSpec(name=name), num_classes=2, in_channels=1, image_size=8, mean=[0.5], std=[0.5])


@pytest.mark.parametrize("name", ["subprocess:getoutput", "mine_here:net", "mine_here:Thing"])
def test_what_is_not_known_to_make_a_source_is_refused_uncalled(mine: None, name: str) -> None:
    with pytest.raises(CodeRefused):
        source_maker(name)


def test_a_task_of_the_standard_library_is_refused_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)  # importing it would open a browser
    with pytest.raises(CodeRefused):
        build_task(TaskSpec.model_validate({"name": "antigravity:geohash", "cmd": "ls"}))
    assert "antigravity" not in sys.modules


def test_a_name_from_a_record_imports_no_own_code(mine: None) -> None:
    with names_from_records(), pytest.raises(CodeRefused, match="comes from a stored record"):
        resolve("model", "mine_here:net", {})
    assert "mine_here" not in sys.modules
    with names_from_records():
        check_model_name("torchvision.models:resnet18")
        check_model_name("tiny_cnn")


def test_trusted_code_is_called_whoever_wrote_it(mine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    check_module("model", "torch.nn:Linear", "torch.nn")
    with names_from_records():
        check_model_name("mine_here:plain")
    with pytest.raises(UserError, match=r"found a Flatten, expected a class or function that makes a nn\.Module"):
        check_maker("model", "mine_here:net", nn.Flatten(), nn.Module, "nn.Module")


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg", "cache_dir", "weights_backbone"])
@pytest.mark.parametrize("name", ["resnet10t", "torchvision.models.segmentation:fcn_resnet50"])
def test_options_by_which_a_library_reads_files_are_refused(name: str, option: str) -> None:
    spec = ModelSpec.model_validate({"name": name, option: "/etc/passwd"})
    with pytest.raises(UserError, match=f"'{option}' is not an option, since it makes a library read or fetch files"):
        build_model(spec, num_classes=2, in_channels=3, image_size=32, mean=[0.5] * 3, std=[0.5] * 3)


def test_a_network_of_torchvision_fetches_no_backbone() -> None:
    spec = ModelSpec(name="torchvision.models.segmentation:lraspp_mobilenet_v3_large")
    assert isinstance(build_model(spec, num_classes=2, in_channels=3, image_size=32, mean=[0.5] * 3, std=[0.5] * 3), nn.Module)
