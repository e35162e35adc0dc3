"""What is measured is the network that is saved: dropout off, with the batch statistics that every worker has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from kdbench.data.batch import Part
from kdbench.data.columns import named
from kdbench.errors import Diverged
from kdbench.experiment import Unit
from kdbench.tasks.build import build_task
from kdbench.training import evaluate
from kdbench.training.checkpoint import unpack_predictions
from kdbench.training.evaluate import at_once, check_numbers, predict
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from tests.each_task import EACH_TASK
from tests.training.alike import AlikeSession
from tests.training.gloo import free_port, joined
from tests.training.units import layout, unit

CPU = torch.device("cpu")
TASK = build_task(unit().task)


def test_predictions_are_those_of_evaluation_and_leave_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_MOST_SAMPLES", 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))
    images = torch.randint(256, (10, 1, 8, 8), dtype=torch.uint8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = predict(model.train(), Part(images, torch.zeros(10), torch.arange(10)), LocalSession(device=CPU), "fp32", TASK)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        right = torch.cat([model.eval()(part / 255) for part in images.split(4)])
    torch.testing.assert_close(found, right)


def test_large_pictures_are_predicted_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 512 pictures of 800 x 1344 pixels the inputs alone took 6.6 GB, and a detector's levels more than any machine has."""
    assert at_once(TASK, "student") == 512
    for shape, most in (((3, 224, 224), 512), ((3, 800, 1344), 23), ((3, 480, 640), 83), ((3, 16_000, 16_000), 1)):
        monkeypatch.setattr(TASK, "example", lambda role, shape=shape: shape)
        assert at_once(TASK, "student") == most
    monkeypatch.setattr(TASK, "example", lambda role: {"image": torch.zeros(2, 3, 800, 1344), "tokens": torch.zeros(2, 8)})
    assert at_once(TASK, "student") == 23


def test_a_prediction_of_one_number_a_sample_is_looked_at_too() -> None:
    check_numbers({"number": torch.zeros(3), "colour": torch.zeros(3, 2)}, "of its predictions")
    with pytest.raises(Diverged, match="of its predictions, 2 of 3 are nan"):
        check_numbers(
            {"number": torch.tensor([0, math.nan, 0]), "colour": torch.tensor([[0.0, 0], [0, 0], [0, math.nan]])}, "of its predictions"
        )


class SharingSession(AlikeSession):
    """Keeps what this worker hands over; receives `everyones` rows once they are known."""

    own: Tensor
    everyones: Tensor | None = None

    def gather(self, rows: Tensor) -> Tensor:
        self.own = rows
        return super().gather(rows) if self.everyones is None else self.everyones


@pytest.mark.parametrize(("samples", "workers"), [(7, 3), (6, 3), (5, 2), (1, 2)])
def test_workers_share_out_the_samples_and_join_what_they_predict_in_the_order_of_the_part(samples: int, workers: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(2)).double()
    part = Part(torch.randint(256, (samples, 1, 2, 2), dtype=torch.uint8), torch.zeros(samples), torch.arange(samples))
    alone = predict(model, part, LocalSession(device=CPU), "fp64", TASK)
    sessions = [SharingSession(workers, rank) for rank in range(workers)]
    for session in sessions:
        predict(model, part, session, "fp64", TASK)
    assert [len(session.own) for session in sessions] == [math.ceil(samples / workers)] * workers
    for session in sessions:
        session.everyones = torch.cat([each.own for each in sessions])
        torch.testing.assert_close(predict(model, part, session, "fp64", TASK), alone)


@pytest.mark.parametrize(("precision", "kept"), [("fp64", torch.float64), ("bf16", torch.float32), ("fp32", torch.float32)])
def test_predictions_are_float32_or_wider(precision: str, kept: torch.dtype) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).to(torch.float64 if precision == "fp64" else torch.float32)
    part = Part(torch.randint(256, (2, 1, 2, 2), dtype=torch.uint8), torch.zeros(2), torch.arange(2))
    assert predict(model, part, LocalSession(device=CPU), precision, TASK).dtype == kept


def worker(rank: int, port: int, text: str, folder: str) -> None:
    with joined(rank, 2, port) as session:
        fit(Unit.model_validate_json(text), session, layout(Path(folder)))


# until it finds boxes: without any, what is stored is the same whatever the statistics are
BOXES = {"batch_size": 12, "epochs": 8, "optimizer": "adamw", "lr": 0.02}
NORMALIZED: dict[str, dict[str, Any]] = {
    "labels": {},
    "boxes": {"task": EACH_TASK["detection"].task, "student": EACH_TASK["detection"].student, "recipe": BOXES},
    "pairs": {
        "task": EACH_TASK["image_text"].task,
        "student": {**EACH_TASK["image_text"].smooth, "batch_statistics": True},
        "recipe": {"batch_size": 12},
    },
    "average": {"recipe": {"ema": 0.5}},
}


@pytest.mark.parametrize("case", ["labels", *(pytest.param(name, marks=pytest.mark.slow) for name in NORMALIZED if name != "labels")])
def test_two_workers_measure_the_batch_statistics_that_are_saved(tmp_path: Path, case: str) -> None:
    recipe = {"precision": "fp64", "epochs": 1, **NORMALIZED[case].get("recipe", {})}
    both = unit(**{"student": {"name": "tiny_cnn", "width": 4}, "workers": 2, **NORMALIZED[case], "recipe": recipe})
    torch.multiprocessing.spawn(worker, (free_port(), both.model_dump_json(), str(tmp_path)), nprocs=2)
    task, where = build_task(both.task), layout(tmp_path)
    saved = task.build_model(both.student.model_copy(update={"weights": where.student(both.key)})).double()
    assert [module for module in saved.modules() if isinstance(module, nn.BatchNorm2d)]
    alone = named(predict(saved, task.splits().test, LocalSession(device=CPU), "fp64", task), "")
    stored, _ = unpack_predictions((tmp_path / where.predictions(both.key, task.splits().test_hash)).read_bytes())
    # they are rounded to half precision, which two sums of one number in float64 may be to different sides of
    for name, tensor in named(stored, "").items():
        assert tensor.any()
        torch.testing.assert_close(tensor.double(), alone[name].double(), rtol=torch.finfo(torch.half).eps, atol=1e-6)
