"""What is drawn at random: by rank 0 as by a single worker, by higher ranks their own, and after an interruption what would have come."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.data.columns import tensors
from kdbench.experiment import Unit
from kdbench.methods.base import MAPS_ALONE, Method, Paper, Progress
from kdbench.models.outputs import Outputs
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from tests.each_task import EACH_TASK
from tests.training.gloo import Stopped, free_port, joined
from tests.training.units import DyingSession, Killed, killed_and_continued, layout, saved_teacher, unit

STEPS = 10  # two epochs of 300 samples in batches of 60, of 40 in batches of 8
DROPOUT = {"name": "tests.training.units:smooth_net", "dropout": 0.3}
PAIRS: dict[str, Any] = {
    "task": {**EACH_TASK["image_text"].task, "transfer_size": 40},
    "student": EACH_TASK["image_text"].smooth,
    "recipe": {"precision": "fp64", "batch_size": 8},
}
INPUTS: dict[str, dict[str, Any]] = {"one": {}, "by-name": PAIRS}  # one tensor a sample, and an image with its words
SOURCES = ("dropout", "method", "python", "numpy")


class Noise(Method):
    """Draws from every source of random numbers, and keeps what it drew; the loss depends on it."""

    paper = Paper("a method of the tests")
    reads = MAPS_ALONE
    needs_teacher = False

    class Params(Method.Params):
        folder: str = ""  # where each process writes its draws; nowhere by default

    params: Params

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        drawn = torch.tensor(
            [
                torch.nn.functional.dropout(torch.ones(64)).bool().double().dot(2.0 ** -torch.arange(64).double()).item(),
                torch.rand((), generator=self.generator, dtype=torch.float64).item(),
                random.random(),
                np.random.rand(),  # noqa: NPY002
            ]
        )
        if self.params.folder:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "alone"
            torch.save(drawn, Path(self.params.folder) / f"{rank}-{at.step}.pt")
        prediction = tensors(s.prediction)[-1]
        return {"noise": (drawn.to(prediction) @ prediction[:, :4].T).mean()}


class CoupledNoise(Noise):
    batch_coupled = True


def noisy(kind: str = "Noise", folder: Path | None = None, **changes: Any) -> Unit:
    method = {"name": f"tests.training.test_randomness:{kind}", "folder": str(folder or "")}
    others = {"student": {"name": "tests.training.units:smooth_net"}, "recipe": {"precision": "fp64", "batch_size": 60}}
    return unit(method, **(others | changes))


def worker(rank: int, port: int, text: str, folder: str) -> None:
    with joined(rank, 2, port) as session:
        fit(Unit.model_validate_json(text), session, layout(Path(folder)))


def draws(kind: str, folder: Path, **changes: Any) -> dict[str, Tensor]:
    """What each process drew at each step [STEPS, sources]: of a single worker `alone`, and of two."""
    one = noisy(kind, folder, **changes)
    fit(one, LocalSession(threads=1), layout(folder))
    two = one.model_copy(update={"workers": 2})
    torch.multiprocessing.spawn(worker, (free_port(), two.model_dump_json(), str(folder)), nprocs=2)
    return {name: torch.stack([torch.load(folder / f"{name}-{step}.pt") for step in range(STEPS)]) for name in ("alone", "0", "1")}


@pytest.mark.parametrize("kind", [pytest.param("Noise", marks=pytest.mark.slow), "CoupledNoise"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_rank_0_draws_what_a_single_worker_draws_and_rank_1_something_else(tmp_path: Path, kind: str, inputs: str) -> None:
    found = draws(kind, tmp_path, **INPUTS[inputs])
    assert torch.equal(found["0"], found["alone"])
    for column, source in enumerate(SOURCES):
        first, second = found["0"][:, column], found["1"][:, column]
        if kind == "CoupledNoise" and source == "method":
            assert torch.equal(first, second)  # drawn over the joined batch
        else:
            assert not (first[:, None] == second).any(), source
        assert len(set(second.tolist())) == STEPS, source


def interrupted(rank: int, ports: tuple[int, int], text: str, folder: str) -> None:
    """Two workers train until the seventh checkpoint, in the second epoch, and other processes with other random numbers go on."""
    training, checkpoint = Unit.model_validate_json(text), Path(folder) / "checkpoint.pt"
    with joined(rank, 2, ports[0], checkpoint=checkpoint, stop_after=7) as session, pytest.raises(Stopped):
        fit(training, session, layout(Path(folder)))
    scramble()
    with joined(rank, 2, ports[1], checkpoint=checkpoint) as session:
        fit(training, session, layout(Path(folder)))
    assert session.places == ["epoch 2 of 2, step 3 of 5"]


def scramble() -> None:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(12345)


@pytest.mark.parametrize("method", ["noise", *(pytest.param(name, marks=pytest.mark.slow) for name in ("noise-by-name", "mgd"))])
def test_two_workers_that_are_killed_go_on_to_the_bits_of_two_that_were_not(tmp_path: Path, method: str) -> None:
    both = {
        "noise": lambda: noisy(student=DROPOUT),
        "noise-by-name": lambda: noisy(**PAIRS | {"student": {**PAIRS["student"], "dropout": 0.3}}),
        "mgd": lambda: unit("mgd", saved_teacher(tmp_path), student={"name": "tiny_cnn", "width": 4}),
    }[method]()
    both = both.model_copy(update={"workers": 2, "checkpoint_seconds": 0})
    text, (a, b) = both.model_dump_json(), (tmp_path / "undisturbed", tmp_path / "killed")
    torch.multiprocessing.spawn(worker, (free_port(), text, str(a)), nprocs=2)
    torch.multiprocessing.spawn(interrupted, ((free_port(), free_port()), text, str(b)), nprocs=2)
    whole, continued = (load_file(layout(folder).student(both.key)) for folder in (a, b))
    for name in whole:
        assert torch.equal(whole[name], continued[name]), name


def test_a_killed_training_goes_on_with_the_random_numbers_of_python_and_numpy(tmp_path: Path) -> None:
    asked = noisy(checkpoint_seconds=0)
    fit(asked, LocalSession(), layout(tmp_path / "whole"))
    scramble()
    killed_and_continued(asked, tmp_path / "continued", 3)
    whole, continued = (load_file(layout(tmp_path / name).student(asked.key)) for name in ("whole", "continued"))
    for name in whole:
        assert torch.equal(whole[name], continued[name]), name


def test_a_checkpoint_from_before_python_and_numpy_were_kept_is_continued(tmp_path: Path) -> None:
    asked, checkpoint = unit(student=DROPOUT, checkpoint_seconds=0), tmp_path / "checkpoint.pt"
    fit(asked, LocalSession(), layout(tmp_path / "whole"))
    with pytest.raises(Killed):
        fit(asked, DyingSession(checkpoint, kill_after=3), layout(tmp_path))
    kept = torch.load(checkpoint, weights_only=True)
    for name in ("random_python", "random_numpy"):
        del kept[name]
    torch.save(kept, checkpoint)
    scramble()
    places: list[str] = []
    fit(asked, LocalSession(checkpoint, on_resume=places.append), layout(tmp_path / "continued"))
    assert places == ["epoch 1 of 2, step 4 of 5"]
    whole, continued = (load_file(layout(tmp_path / name).student(asked.key)) for name in ("whole", "continued"))
    for name in whole:
        assert torch.equal(whole[name], continued[name]), name
