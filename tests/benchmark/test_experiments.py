"""The experiments that ship: each passes a dry run, whatever data this machine lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kdbench.benchmark import step_times
from kdbench.benchmark.dry_run import dry_run
from kdbench.boards.published import load_published
from kdbench.data import sources
from kdbench.experiment import load_experiment
from kdbench.methods import METHODS
from tests.data.stamp_share import write_share
from tests.pages import ROOT

FILES = sorted((ROOT / "experiments").glob("*.yaml"))
# Detectors at COCO's size and the largest transformers take half a minute each, many methods with deep networks ten seconds.
LARGEST = ("fgd_coco_faster", "fgd_coco_mask", "mgd_coco", "scalekd_imagenet")
LARGE = (
    *("fgd_coco_retinanet", "norm_imagenet_mobilenet", "ffsd_cifar100", "fashion_mnist_methods"),
    *("cifar100_resnet110", "cifar100_resnet56", "cifar100_wrn_40_2", "cifar100_cross_resnet32x4"),
)


def _marks(path: Path) -> list[pytest.MarkDecorator]:
    if path.stem.startswith(LARGEST):
        return [pytest.mark.nodes]
    return [pytest.mark.slow] if path.stem in LARGE else []


MARKED = [pytest.param(path, id=path.stem, marks=_marks(path)) for path in FILES]


def _methods(path: Path) -> Iterator[str]:
    for method in yaml.safe_load(path.read_text())["methods"]:
        yield from (method if isinstance(method, str) else method["name"]).split("+")


@pytest.mark.parametrize("path", MARKED)
def test_an_experiment_that_ships_passes_a_dry_run(
    path: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_times, "TIMED_FLOPS", 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KDBENCH_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment(path)
    if path.stem.startswith("stamps"):  # whose packages need not be here
        share = tmp_path_factory.mktemp("share")
        write_share(share, {"animals": (250, 10, 10), "food": (10, 250, 10), "vehicles": (10, 10, 250)})
        monkeypatch.setenv("KDBENCH_DATA", str(share))
        sources._opened.cache_clear()
    found = dry_run(experiment)
    assert experiment.name.replace("-", "_") == path.stem
    assert len(found.methods) == len(experiment.methods) * len(experiment.students)
    assert {method.label for method in found.methods if method.own_flops is None} <= {"scalekd"}
    assert all(method.flops > 0 and method.memory > 0 and method.steps > 0 for method in found.methods)
    assert list(tmp_path.iterdir()) == []


def test_every_published_method_of_classification_has_an_experiment() -> None:
    used = {method for path in FILES for method in _methods(path)}
    quoted = {part for figure in load_published() if figure.data in ("ImageNet-1k", "CIFAR-100") for part in figure.method.split("+")}
    assert quoted & set(METHODS) <= used
