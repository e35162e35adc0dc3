"""A loss term that can't be added up ends the training with one line, which names the term and the method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import MAPS_ALONE, Method, Paper, Progress
from kdbench.models.outputs import Outputs
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from kdbench.training.work import attempt
from tests.training.units import DyingSession, Killed, layout, unit


class Own(Method):
    """A method of a user's; `kind` says what is wrong with its terms."""

    paper = Paper("a method of the tests")
    reads = MAPS_ALONE
    needs_teacher = False

    class Params(Method.Params):
        kind: str

    params: Params

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        per_sample = s.logits.square().mean(1)
        mean = per_sample.mean()
        match self.params.kind:
            case "task's name":
                return {"cross_entropy": mean}
            case "total":
                return {"total": mean}
            case "per sample":
                return {"own": per_sample}
            case "one-element":
                return {"own": mean[None]}
            case "float":
                return {"own": 1.5}  # type: ignore[dict-item]
            case "appears":
                return {"own": mean} | ({"late": mean} if at.step >= 3 else {})
            case "goes":
                return {"own": mean} | ({"early": mean} if at.step < 3 else {})
            case "changes":
                return {"early" if at.step < 3 else "late": mean}
        return {"own": mean, "zero": torch.zeros(())}


NAME = "tests.training.test_terms:Own"


def own(kind: str) -> dict[str, str]:
    return {"name": NAME, "kind": kind}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("task's name", "its loss term 'cross_entropy' has the name of the task's own loss, which it would replace"),
        ("total", "its loss term 'total' has the name of the sum of all terms"),
        ("per sample", "its loss term 'own' has the shape [60]; return one number"),
        ("one-element", "its loss term 'own' has the shape [1]; return one number"),
        ("float", "its loss term 'own' is a float; return a tensor"),
    ],
)
def test_a_term_that_can_not_be_added_is_named_at_the_first_step(tmp_path: Path, kind: str, message: str) -> None:
    ending = attempt(unit(own(kind)), LocalSession(), layout(tmp_path))
    assert ending.record is None
    assert f"method {NAME}: {message}" in (ending.crash or "")
    assert "\n" not in (ending.crash or "")


@pytest.mark.parametrize(
    ("kind", "term"),
    [("appears", "'late' is new"), ("goes", "'early' is missing"), ("changes", "'early' is missing")],
)
def test_a_term_that_comes_or_goes_is_named_with_its_step(tmp_path: Path, kind: str, term: str) -> None:
    with pytest.raises(UserError, match=rf"method {NAME} on task classification, step 4: the loss term {term} at this step"):
        fit(unit(own(kind)), LocalSession(), layout(tmp_path))


def test_a_training_that_is_continued_still_knows_the_terms(tmp_path: Path) -> None:
    asked, checkpoint = unit(own("goes"), checkpoint_seconds=0), tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        fit(asked, DyingSession(checkpoint, kill_after=3), layout(tmp_path))
    with pytest.raises(UserError, match=r"step 4: the loss term 'early' is missing"):
        fit(asked, LocalSession(checkpoint), layout(tmp_path))


def test_terms_that_are_numbers_are_added(tmp_path: Path) -> None:
    row = fit(unit(own("right")), LocalSession(), layout(tmp_path)).curve[-1]
    assert row["train_zero"] == 0
    assert row["train_total"] == pytest.approx(row["train_cross_entropy"] + row["train_own"])


def test_two_parts_of_a_combination_can_not_have_one_name(tmp_path: Path) -> None:
    from kdbench.methods.combination import combined

    class Dotted(Method):
        paper = Paper("a method of the tests")
        reads = MAPS_ALONE
        needs_teacher = False

        def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
            return {"loss": s.logits.mean(), "second.loss": s.logits.mean()}

    class Plain(Method):
        paper = Paper("a method of the tests")
        reads = MAPS_ALONE
        needs_teacher = False

        def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
            return {"loss": s.logits.mean()}

    method = combined((("first", Dotted), ("second", Plain)))()
    index = torch.arange(2)
    message = "method first+second: two loss terms are called 'second.loss'; rename the term 'loss' of second"
    with pytest.raises(UserError, match=re.escape(message)):
        method(Outputs(torch.zeros(2, 3)), None, Batch(index, index, index), Progress(0, 0, 1))
