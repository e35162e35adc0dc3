"""What a term of a part of a batch counts, and what is added up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import MAPS_ALONE, Method, Paper, Progress
from kdbench.models.outputs import Outputs
from kdbench.training.distiller import Distiller, Weights

OFF = torch.autocast("cpu", enabled=False)


class Mean(Method):
    """The mean logit."""

    paper = Paper("a method of the tests")
    reads = MAPS_ALONE
    needs_teacher = False

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        return {"mean": s.logits.mean()}


class Coupled(Mean):
    batch_coupled = True


class AsTask(Mean):
    weighs_as_task = frozenset({"mean"})


class Rows(Mean):
    """One number for each sample, which is no loss."""

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        return {"rows": s.logits.mean(1)}


class Labels:
    """The part of a task that a distiller asks for."""

    name = "labels"
    batch_coupled = False

    def inputs_for(self, role: str, inputs: Tensor) -> Tensor:
        return inputs

    def truth(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def learned_by(self, network: nn.Module) -> Any:
        return self

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"largest": outputs.logits.max()}


IMAGES = torch.tensor([[1.0, 3.0], [4.0, 8.0]])  # the mean is 4, the largest 8
BATCH = Batch(IMAGES, torch.zeros(2), torch.arange(2))


def terms(method: Method, **options: Any) -> dict[str, float]:
    task: Any = Labels()
    found = Distiller(nn.Identity(), method, task)(BATCH, None, Progress(0, 1, 1), OFF, **options)
    return {name: value.item() for name, value in found.items()}


def test_a_term_is_multiplied_by_its_share_of_the_samples_or_of_what_the_task_counts() -> None:
    term, three = torch.tensor(2.0), torch.tensor(3.0, dtype=torch.float64)
    assert Weights().by_samples(term) == Weights().as_task("kd", term) == 2
    assert Weights(0.25).by_samples(term) == Weights(0.25).as_task("kd", term) == 0.5
    for counted in (three, {"kd": three}):
        weighed = Weights(0.25, counted)
        assert weighed.as_task("kd", term) == 6
        assert weighed.as_task("kd", term).dtype == torch.float32
        assert weighed.by_samples(term) == 0.5
    with pytest.raises(UserError, match=r"the task's `weight` says nothing of 'cross_entropy'; it has: kd"):
        Weights(0.25, {"kd": three}).as_task("cross_entropy", term)


def test_the_total_is_the_sum_of_the_weighted_terms() -> None:
    assert terms(Mean()) == {"largest": 8, "mean": 4, "total": 12}
    assert terms(Mean(Mean.Params(task_weight=0.5))) == {"largest": 4, "mean": 4, "total": 8}
    weighed = Weights(0.25, {"largest": torch.tensor(2.0), "imitation": torch.tensor(3.0)})
    assert terms(Mean(), weights=weighed) == {"largest": 16, "mean": 1, "total": 17}
    assert terms(AsTask(), weights=weighed) == {"largest": 16, "mean": 12, "total": 28}


@pytest.mark.parametrize("method", [Mean, Coupled])
def test_a_single_worker_joins_nothing(method: type[Method]) -> None:
    assert terms(method(), shares=(2,), weights=Weights(0.25)) == {"largest": 2, "mean": 1, "total": 3}


def test_errors_call_a_method_by_its_class_unless_it_was_named() -> None:
    task: Any = Labels()
    for options, called in (({}, "Rows"), ({"name": "mine"}, "mine")):
        with pytest.raises(UserError, match=rf"^method {called}: its loss term 'rows' has the shape \[2\]"):
            Distiller(nn.Identity(), Rows(), task, **options)(BATCH, None, Progress(0, 1, 1), OFF)
