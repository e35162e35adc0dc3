"""Data and weights that are cut off or don't fit are refused, and nothing is unpickled on the way."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kdbench.data import fashion_mnist, sources
from kdbench.models.tiny import tiny_cnn
from kdbench.tasks import build as tasks
from kdbench.training.checkpoint import save_weights
from tests.bad_input.tiny_experiment import assert_mistake, run
from tests.console import Kdbench


@pytest.fixture
def nothing_kept_open() -> Iterator[None]:
    """Data sets are opened anew, and forgotten again."""
    sources._opened.cache_clear()
    tasks._built.cache_clear()
    yield
    sources._opened.cache_clear()
    tasks._built.cache_clear()


def test_truncated_data_of_the_package_is_refused(kdbench: Kdbench, nothing_kept_open: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("cut.parquet").write_bytes(fashion_mnist.EMBEDDED.read_bytes()[:-1])
    monkeypatch.setattr(fashion_mnist, "EMBEDDED", Path("cut.parquet"))
    assert_mistake(run(kdbench), "cut.parquet is damaged: 5377004 bytes", "install kdbench again")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_truncated_data_of_the_users_own_is_refused(
    kdbench: Kdbench, nothing_kept_open: None, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    for file in fashion_mnist._FILES.values():
        Path(f"{file.name}{ending}").write_bytes(b"\x1f\x8b\x08\x00" + bytes(100))
    monkeypatch.setenv("KDBENCH_DATA", str(Path.cwd()))
    ended = run(kdbench, {"task.data": {"name": "fashion_mnist", "size": "full"}})
    assert_mistake(ended, f"train-images-idx3-ubyte{ending} is damaged", "let KDBENCH_DATA name a folder with whole files")


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (os.mkdir, ("exploded",))


def _weights(kind: str) -> str:
    """A file of weights with something wrong."""
    if kind == "100 classes":
        save_weights(tiny_cnn(num_classes=100, in_channels=1, width=4).state_dict(), Path("w.safetensors"))
    elif kind == "another model":
        save_weights({"conv.weight": torch.zeros(3)}, Path("w.safetensors"))
    elif kind == "another width":
        save_weights(tiny_cnn(num_classes=10, in_channels=1, width=8).state_dict(), Path("w.safetensors"))
    elif kind == "truncated":
        save_weights(tiny_cnn(num_classes=10, in_channels=1, width=4).state_dict(), Path("w.safetensors"))
        Path("w.safetensors").write_bytes(Path("w.safetensors").read_bytes()[:-10])
    elif kind == "garbage":
        Path("w.pt").write_bytes(b"no weights at all")
        return "w.pt"
    elif kind == "code":
        Path("w.pt").write_bytes(pickle.dumps(_Bomb(), protocol=2))
        return "w.pt"
    return "w.safetensors"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("none", "there is no file"),
        ("100 classes", "the head has 100 classes, the data has 10"),
        ("another model", "do not fit model 'tiny_cnn'"),
        ("another width", "do not fit model 'tiny_cnn'"),
        ("truncated", "not a safetensors file"),
        ("garbage", "not a safetensors file, nor a torch file of plain tensors"),
        ("code", "not a safetensors file, nor a torch file of plain tensors"),
    ],
)
def test_weights_of_a_teacher_that_do_not_fit_are_refused(kdbench: Kdbench, kind: str, said: str) -> None:
    name = _weights(kind)
    assert_mistake(run(kdbench, {"teacher.weights": name}), name, said)
    assert not Path("exploded").exists()
    assert not Path("results").exists()
