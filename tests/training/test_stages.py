"""A training in stages: what each begins with and learns by, that a kill in any of them changes nothing, and that workers agree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdbench.errors import UserError
from kdbench.experiment import Recipe, Unit
from kdbench.methods.base import Stage
from kdbench.methods.build import method_class
from kdbench.methods.combination import combined
from kdbench.methods.kd import KD
from kdbench.training.assembly import assemble
from kdbench.training.loop import close_epoch, fit, train_epoch
from kdbench.training.session import LocalSession
from kdbench.training.stages import epochs_of, recipe_of
from tests.training.own_methods import NAMES, FreshHead
from tests.training.units import killed_and_continued, layout, saved_teacher, unit

PLAIN = {"name": "tests.training.own_methods:PlainNet"}
NORMED = {"name": "tests.training.own_methods:NormedNet"}


def staged(
    folder: Path, student: dict[str, Any] = PLAIN, precision: str = "fp32", params: dict[str, Any] | None = None, **recipe: Any
) -> Unit:
    """Four epochs of five steps, two in each stage."""
    method = {"name": NAMES["FreshHead"], **(params or {})}
    return unit(method, saved_teacher(folder, precision), student=student, recipe={"epochs": 4, "precision": precision, **recipe})


def cosine(rate: float, done: float) -> float:
    return rate * 0.5 * (1 + math.cos(math.pi * done))


def test_each_stage_has_its_epochs_its_optimizer_and_its_schedule(tmp_path: Path) -> None:
    run = assemble(staged(tmp_path, momentum=0.9), LocalSession())
    assert run.stages == (range(2), range(2, 4))
    for epoch in range(2):
        train_epoch(run, epoch)
        close_epoch(run)
    body = {name: tensor.clone() for name, tensor in run.distiller.student.state_dict().items() if name.startswith("body")}
    head = run.distiller.student.state_dict()["head.weight"].clone()
    before = run.optimizers
    run.begin_next_stage()
    assert all(optimizer not in before for optimizer in run.optimizers)
    assert not any(optimizer.state for optimizer in run.optimizers), "momentum of the first stage"
    train_epoch(run, 2)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(cosine(0.02, 4 / 10))
    row = close_epoch(run)
    train_epoch(run, 3)
    close_epoch(run)
    assert row["train_cross_entropy"] == 0, "the task's loss has no weight in the second stage"
    assert {"train_itself", "train_wide"} <= row.keys()
    assert "train_kd" not in row
    assert all(torch.equal(run.distiller.student.state_dict()[name], tensor) for name, tensor in body.items()), "the body is frozen"
    assert not torch.equal(run.distiller.student.state_dict()["head.weight"], head)
    seen = run.distiller.method.seen
    assert [at.stage for at in seen] == [0] * 10 + [1] * 10
    assert [at.stage_done for at in seen] == pytest.approx([step / 10 for step in range(10)] * 2)
    assert [at.step for at in seen] == list(range(20))
    assert {at.total_steps for at in seen} == {20}


def test_a_record_says_the_stages_and_that_of_a_training_without_any_says_none(tmp_path: Path) -> None:
    record = fit(staged(tmp_path, params={"share": 0.25}), LocalSession(), layout(tmp_path))
    assert record.stages == {"distil": 1, "head": 3}
    # the rate of each epoch's last step: the fifth of five, then the fifth, tenth and fifteenth of fifteen
    assert [row["lr"] for row in record.curve] == pytest.approx([cosine(0.1, 4 / 5), *(cosine(0.02, step / 15) for step in (4, 9, 14))])
    assert fit(unit("kd", saved_teacher(tmp_path)), LocalSession(), layout(tmp_path)).stages is None


@pytest.mark.parametrize("kill_after", [9, 11, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 10, 12, 17))])
@pytest.mark.parametrize("recipe", [{}, {"ema": 0.8, "weights": "best"}], ids=["last", "average-and-best"])
def test_a_training_killed_in_any_stage_ends_bit_for_bit_as_one_that_was_not(
    tmp_path: Path, kill_after: int, recipe: dict[str, Any]
) -> None:
    # a checkpoint at every step but the last: the tenth closes the first stage, the eleventh is in the second
    of = staged(tmp_path, NORMED, **recipe).model_copy(update={"checkpoint_seconds": 0})
    whole = fit(of, LocalSession(), layout(tmp_path / "whole"))
    continued = killed_and_continued(of, tmp_path / "continued", kill_after)
    a, b = (load_file(layout(tmp_path / folder).student(of.key)) for folder in ("whole", "continued"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    same = [name for name in whole.curve[0] if name != "seconds" and not name.startswith("train_")]
    assert [[row[name] for name in same] for row in whole.curve] == [[row[name] for name in same] for row in continued.curve]


def test_the_next_stage_begins_with_the_weights_that_would_be_kept(tmp_path: Path) -> None:
    run = assemble(staged(tmp_path, ema=0.8), LocalSession())
    for epoch in range(2):
        train_epoch(run, epoch)
        close_epoch(run)
    kept = {name: tensor.clone() for name, tensor in run.evaluated.state_dict().items()}
    assert not torch.equal(kept["body.0.weight"], run.distiller.student.state_dict()["body.0.weight"])
    run.begin_next_stage()
    for network in (run.distiller.student, run.evaluated):
        assert torch.equal(network.state_dict()["body.0.weight"], kept["body.0.weight"])


def test_what_a_stage_draws_follows_from_the_seed_and_the_stage_alone(tmp_path: Path) -> None:
    """So a continued training, and every worker, draws the same; and nothing that is drawn afterwards moves."""
    heads, afterwards = [], []
    for steps in (0, 3):
        run = assemble(staged(tmp_path), LocalSession())
        torch.rand(steps)
        torch.rand(steps, generator=run.generator)
        drawn = torch.get_rng_state(), run.generator.get_state()
        run.begin_next_stage()
        afterwards.append([torch.equal(a, b) for a, b in zip(drawn, (torch.get_rng_state(), run.generator.get_state()), strict=True)])
        heads.append([tensor.clone() for name, tensor in run.distiller.state_dict().items() if "head" in name or "adapter" in name])
    assert all(torch.equal(one, other) for one, other in zip(*heads, strict=True))
    assert afterwards == [[True, True]] * 2


def test_the_best_weights_are_those_of_the_last_stage(tmp_path: Path) -> None:
    """A head that learns nothing is worse than all of the first stage, and its network is kept all the same."""
    method = {"share": 0.5, "changes": {"lr": 1e-12}}
    of = staged(tmp_path, params=method, weights="best", lr=0.5)
    record = fit(of, LocalSession(), layout(tmp_path))
    accuracies = [row["val_accuracy"] for row in record.curve]
    assert max(accuracies[:2]) > max(accuracies[2:]), "the first stage is no better, so this test shows nothing"
    assert record.val_metric == max(accuracies[2:])
    fresh = load_file(layout(tmp_path).student(of.key))["head.bias"]
    assert (fresh > -1e-6).all(), "a fresh head has positive biases"


def test_a_combination_trains_in_the_stages_of_its_one_part(tmp_path: Path) -> None:
    kind = combined((("fresh", FreshHead), ("kd", KD)))
    method = kind(kind.Params.model_validate({"fresh": {"share": 0.25}, "task_weight": 0.5}))
    assert [stage.name for stage in method.stages()] == ["distil", "head"]
    of = staged(tmp_path).model_copy(update={"method": unit({"name": f"{NAMES['FreshHead']}+kd"}).method})
    record = fit(of, LocalSession(), layout(tmp_path))
    assert record.stages == {"distil": 2, "head": 2}
    assert all("train_cross_entropy" in row for row in record.curve)
    assert record.curve[-1]["train_cross_entropy"] == 0


def test_two_parts_with_stages_are_refused() -> None:
    with pytest.raises(UserError, match=r"^method a\+b: a and b both train in stages; combine one of them with other methods$"):
        combined((("a", FreshHead), ("b", FreshHead)))


@pytest.mark.parametrize(
    ("shares", "epochs", "expected"),
    [((0.5, 0.5), 4, [2, 2]), ((1 / 3, 1 / 3, 1 / 3), 10, [3, 4, 3]), ((0.1, 0.9), 10, [1, 9]), ((1.0,), 7, [7])],
)
def test_shares_become_epochs_that_add_up(shares: tuple[float, ...], epochs: int, expected: list[int]) -> None:
    found = epochs_of([Stage(str(number), share) for number, share in enumerate(shares)], epochs, "m")
    assert [len(stage) for stage in found] == expected
    assert [epoch for stage in found for epoch in stage] == list(range(epochs))


def test_a_schedule_is_as_short_as_its_stage() -> None:
    recipe = Recipe(epochs=40, lr=0.1, warmup_epochs=4, schedule="multistep", milestones=(20, 30))
    stages = (Stage("a", 0.25), Stage("b", 0.75, {"lr": 0.01, "milestones": (10,)}))
    first, second = (recipe_of(recipe, stages, number, "m") for number in range(2))
    assert (first.epochs, first.lr, first.warmup_epochs, first.milestones) == (10, 0.1, 1.0, (5.0, 7.5))
    assert (second.epochs, second.lr, second.warmup_epochs, second.milestones) == (30, 0.01, 3.0, (7.5,))
    assert recipe_of(recipe, (Stage("all", 1.0),), 0, "m") is recipe


@pytest.mark.parametrize(
    ("stages", "epochs", "said"),
    [
        ((Stage("a", 0.5), Stage("b", 0.4)), 10, r"method m: the shares of its stages \(a 0.5, b 0.4\) do not add up to 1"),
        ((Stage("a", 0.5), Stage("a", 0.5)), 10, r"method m: two of its stages are called 'a'; give each a name of its own"),
        ((Stage("a", 1.5), Stage("b", -0.5)), 10, r"method m: the stage 'a' has the share 1.5; expected a number above 0 and at most 1"),
        ((Stage("a", float("nan")), Stage("b", 0.5)), 10, r"method m: the stage 'a' has the share nan; expected a number above 0"),
        ((("a", 1.0),), 10, r"method m: `stages` must return Stages, one of them is a tuple"),
        ((), 10, r"method m: the shares of its stages \(\) do not add up to 1"),
        ((Stage("a", 0.1), Stage("b", 0.9)), 3, r"recipe.epochs: 3 leave the stage 'a' of method m without an epoch; raise epochs, or"),
        ((Stage("a", 0.5, {"batch_size": 3}), Stage("b", 0.5)), 4, r"method m: stage 'a': a stage can't change recipe.batch_size; it can"),
        ((Stage("a", 0.5, {"lr": -1}), Stage("b", 0.5)), 4, r"method m: stage 'a'.*lr.*greater than"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stages: tuple[Stage, ...], epochs: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe_of(Recipe(epochs=epochs), stages, 0, "m")


def test_the_methods_of_kdbench_train_in_one_stage() -> None:
    from kdbench.methods import METHODS

    kinds = [method_class(unit(name).method) for name in METHODS]
    assert all(len(kind.stages(kind.__new__(kind))) == 1 for kind in kinds)
