"""Optimizers, schedules and averages by name; the precision that a measurement chose."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdbench.errors import UserError
from kdbench.experiment import Recipe
from kdbench.methods.base import OwnOptimizer
from kdbench.training import precision
from kdbench.training.optimization import check_optimization, make_average, make_optimizer, make_optimizers, make_schedule
from kdbench.training.precision import Memo, question, settled


def recipe(**changes: object) -> Recipe:
    return Recipe.model_validate({"epochs": 10, "lr": 0.5, **changes})


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False)]


def test_optimizers_take_the_recipe_and_leave_frozen_parameters_alone() -> None:
    sgd = make_optimizer(parameters(), recipe(momentum=0.8, weight_decay=0.01, nesterov=True))
    assert isinstance(sgd, torch.optim.SGD)
    (group,) = sgd.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"], len(group["params"])) == (0.5, 0.8, 0.01, True, 1)
    adamw = make_optimizer(parameters(), recipe(optimizer="AdamW"))
    assert isinstance(adamw, torch.optim.AdamW)
    assert sgd.defaults["fused"] is adamw.defaults["fused"] is True  # another kernel would round otherwise


def test_timm_optimizers_and_schedules_work_by_name() -> None:
    lamb = make_optimizer(parameters(), recipe(optimizer="lamb", weight_decay=0.02))
    assert type(lamb).__name__ == "Lamb"
    assert lamb.param_groups[0]["lr"] == 0.5
    factor = make_schedule(recipe(schedule="step", epochs=9), 10, lamb)
    assert factor(0) == pytest.approx(1.0)
    assert factor(89) < factor(45) < factor(0)
    assert factor(45) == make_schedule(recipe(schedule="step", epochs=9), 10, lamb)(45)  # of the step alone: resuming needs no state


def factors(steps: int, **changes: object) -> list[float]:
    """The learning rate's factors of a training of one epoch."""
    asked = recipe(epochs=1, **changes)
    factor = make_schedule(asked, steps, make_optimizer(parameters(), asked))
    return [factor(step) for step in range(steps)]


def test_timms_schedules_fall_where_thirds_of_the_training_end() -> None:
    assert factors(30, schedule="step") == pytest.approx([1.0] * 10 + [0.1] * 10 + [0.01] * 10)
    assert factors(3, schedule="step") == pytest.approx([1.0, 0.1, 0.01])
    assert factors(2, schedule="step") == pytest.approx([1.0, 0.1])
    assert factors(30, schedule="multistep") == pytest.approx([1.0] * 9 + [0.1] * 10 + [0.01] * 11)  # timm's milestones come a step early
    assert factors(30, schedule="poly") == pytest.approx([(1 - step / 30) ** 0.1 for step in range(30)])


def test_timms_schedules_warm_up_from_the_first_step_as_ours_do() -> None:
    assert factors(30, schedule="step", warmup_epochs=1 / 6)[:6] == pytest.approx([0.2, 0.36, 0.52, 0.68, 0.84, 1.0])
    assert factors(30, schedule="step", warmup_epochs=1 / 30)[:2] == pytest.approx([1.0, 1.0])


def test_settings_of_an_optimizer_that_do_not_go_together_are_the_users_to_mend() -> None:
    check_optimization(recipe(nesterov=True, momentum=0.9))
    with pytest.raises(UserError, match=r"recipe.optimizer: 'sgd' with schedule 'cosine' can't be made: ValueError: Nesterov momentum"):
        check_optimization(recipe(nesterov=True, momentum=0.0))


@pytest.mark.parametrize(("key", "near"), [({"optimizer": "adamww"}, "adamw"), ({"schedule": "cosinus"}, "cosine")])
def test_an_unknown_name_offers_the_nearest(key: dict[str, str], near: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{near}'"):
        make_schedule(recipe(**key), 10, make_optimizer(parameters(), recipe(**key)))


def test_a_part_with_an_optimizer_of_its_own_is_in_no_other() -> None:
    first, second, third = model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    own = [OwnOptimizer(second, {"weight_decay": 0.25}), OwnOptimizer(third, {"optimizer": "adam", "lr": 0.125})]
    optimizers = make_optimizers(model, own, recipe(weight_decay=0.5))
    groups = [optimizer.param_groups[0] for optimizer in optimizers]
    assert [group["params"] for group in groups] == [list(part.parameters()) for part in (first, second, third)]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.5, 0.5), (0.5, 0.25), (0.125, 0.5)]
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["SGD", "SGD", "Adam"]
    (lone,) = make_optimizers(model, (), recipe())
    assert lone.param_groups[0]["params"] == list(model.parameters())


def test_schedules_warm_up_and_end_where_they_should() -> None:
    optimizer = make_optimizer(parameters(), recipe())
    cosine = make_schedule(recipe(warmup_epochs=2), 10, optimizer)
    assert [cosine(step) for step in (0, 9, 19)] == pytest.approx([0.05, 0.5, 1.0])
    assert cosine(20) == 1.0
    assert cosine(60) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    linear = make_schedule(recipe(schedule="linear"), 10, optimizer)
    assert [linear(0), linear(50)] == pytest.approx([1.0, 0.5])
    assert linear(99) == pytest.approx(0.01)
    assert make_schedule(recipe(schedule="constant"), 10, optimizer)(99) == 1.0


def test_milestones_are_epochs_after_which_the_learning_rate_is_divided() -> None:
    published = recipe(epochs=240, schedule="multistep", milestones=[150, 180, 210])
    factor = make_schedule(published, 7, make_optimizer(parameters(), published))
    at = [factor(7 * epoch + step) for epoch, step in [(0, 0), (149, 6), (150, 0), (179, 6), (180, 0), (209, 6), (210, 0), (239, 6)]]
    assert at == [1, 1, 0.1, 0.1, 0.1**2, 0.1**2, 0.1**3, 0.1**3]
    assert factor(7 * 150) == 0.1  # of the step alone: resuming needs no state


def test_milestones_count_from_the_start_and_a_warm_up_comes_first() -> None:
    warm = recipe(schedule="multistep", milestones=[2, 2.5], decay_rate=0.5, warmup_epochs=1)
    factor = make_schedule(warm, 10, make_optimizer(parameters(), warm))
    assert [factor(step) for step in (0, 4, 9, 10, 19, 20, 24, 25, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize("schedule", ["step", "multistep"])
def test_a_decay_rate_replaces_that_of_timm(schedule: str) -> None:
    # timm's own milestones come a step early, so a step within each third is looked at.
    for rate, changes in ((0.1, {}), (0.5, {"decay_rate": 0.5})):
        spec = recipe(epochs=9, schedule=schedule, **changes)
        factor = make_schedule(spec, 10, make_optimizer(parameters(), spec))
        assert [factor(step) for step in (0, 45, 75)] == pytest.approx([1, rate, rate**2])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"milestones": [1, 2]}, "recipe.milestones is for schedule multistep, not for cosine"),
        ({"decay_rate": 0.5}, "recipe.decay_rate is for the schedules step and multistep, not for cosine"),
        (
            {"schedule": "multistep", "milestones": [5, 10]},
            "recipe.milestones: 10 is not before the end of the training, recipe.epochs: 10",
        ),
    ],
)
def test_keys_that_the_schedule_would_not_use_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_optimization(recipe(**changes))
    assert said in str(caught.value)


@pytest.mark.parametrize("milestones", [[], [2, 1], [1, 1], [0, 1]])
def test_milestones_ascend(milestones: list[float]) -> None:
    with pytest.raises(ValueError, match="milestones"):
        recipe(schedule="multistep", milestones=milestones)


class Net(nn.Module):
    """A network as transformers are: norms, biases, and embeddings that it names itself."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 4))
        self.fc = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_norms_biases_and_what_a_network_names_may_be_kept_from_weight_decay(optimizer: str) -> None:
    module = nn.ModuleDict({"student": Net(), "adapter": nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), "peer": Net()})
    own = [OwnOptimizer(module["peer"], {"weight_decay": 0.25})]
    spec = recipe(optimizer=optimizer, weight_decay=0.5, no_decay_on_norms=True)
    names = {parameter: name for name, parameter in module.named_parameters()}
    optimizers = make_optimizers(module, own, spec)
    found = [[(group["weight_decay"], {names[p] for p in group["params"]}) for group in one.param_groups] for one in optimizers]
    rest = {"student.pos_embed", "student.fc.bias", "student.norm.weight", "student.norm.bias"}
    rest |= {"adapter.0.bias", "adapter.1.weight", "adapter.1.bias"}
    assert found == [
        [(0.5, {"student.fc.weight", "adapter.0.weight"}), (0.0, rest)],
        [(0.25, {"peer.fc.weight"}), (0.0, {"peer.pos_embed", "peer.fc.bias", "peer.norm.weight", "peer.norm.bias"})],
    ]


def test_a_norm_that_is_kept_from_weight_decay_does_not_shrink() -> None:
    for spared, left in ((True, 1.0), (False, 1 - 0.5 * 0.1)):
        norm = nn.LayerNorm(3)
        (optimizer,) = make_optimizers(norm, (), recipe(weight_decay=0.1, no_decay_on_norms=spared))
        for parameter in norm.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert norm.weight.tolist() == pytest.approx([left] * 3)


def test_the_keys_of_weight_decay_and_milestones_stay_out_of_dumps_while_unset() -> None:
    new = {"no_decay_on_norms", "milestones", "decay_rate"}
    assert not new & set(recipe().model_dump(mode="json"))
    assert not new & set(recipe(no_decay_on_norms=False, milestones=None, decay_rate=None).model_dump(mode="json"))
    given = {"no_decay_on_norms": True, "milestones": [1.0], "decay_rate": 0.5}
    assert {key: value for key, value in recipe(**given).model_dump(mode="json").items() if key in new} == given


def test_the_average_follows_weights_and_buffers_with_its_decay() -> None:
    model = nn.BatchNorm1d(2)
    average = make_average(model, recipe(ema=0.75))
    assert average is not None
    average.update_parameters(model)  # the first update copies
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(4.0)  # type: ignore[union-attr, operator]
    average.update_parameters(model)
    assert average.module.weight.tolist() == [2.0, 2.0]
    assert average.module.running_mean.tolist() == [1.0, 1.0]
    assert make_average(model, recipe()) is None


def test_a_measured_precision_is_written_down_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {("fp32", "contiguous"): 1.0, ("fp32", "channels_last"): 0.9, ("bf16", "channels_last"): 0.5}
    measured: list[tuple[str, str]] = []

    def pretend(
        model: nn.Module, images: torch.Tensor, name: str, memory_format: str, device: torch.device, compiled: bool = False
    ) -> float:
        measured.append((name, memory_format))
        return seconds[name, memory_format]

    monkeypatch.setattr(precision, "_step_seconds", pretend)
    memo, device = Memo(tmp_path / "choices" / "a.json"), torch.device("cpu")
    chosen = settled(recipe(batch_size=50), nn.Linear(1, 1), (1, 2, 2), 100, device, memo)
    assert (chosen.precision, chosen.memory_format) == ("bf16", "channels_last")
    assert json.loads(memo.path.read_text()) == {"precision": "bf16", "memory_format": "channels_last", "compile": {"20": False}}
    count = len(measured)
    seconds["bf16", "channels_last"] = 5.0
    assert settled(recipe(batch_size=50), nn.Linear(1, 1), (1, 2, 2), 100, device, memo) == chosen
    assert len(measured) == count


def test_a_small_advantage_is_not_worth_another_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {("fp32", "contiguous"): 1.0, ("fp32", "channels_last"): 0.9, ("bf16", "channels_last"): 0.86}
    monkeypatch.setattr(precision, "_step_seconds", lambda model, images, name, memory_format, device: seconds[name, memory_format])
    asked = recipe(compile=False)
    chosen = settled(asked, nn.Linear(1, 1), (1, 2, 2), 100, torch.device("cpu"), Memo(tmp_path / "a.json"))
    assert (chosen.precision, chosen.memory_format) == ("fp32", "contiguous")


# What code before the memo knew its question kept after an all-automatic run, after `precision: fp64` and by somebody else.
EARLIER = [
    {"precision": "bf16", "memory_format": "channels_last", "compile": {"20": True}},
    {"precision": "fp64", "memory_format": "contiguous", "compile": {"20": True}},
    {"precision": ["?"], "compile": {"20": "yes"}},
]


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("precision_", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "auto"])
@pytest.mark.parametrize("compile_", [True, False, "auto"])
def test_what_was_asked_for_is_never_overridden(
    precision_: str, memory_format: str, compile_: object, earlier: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_step_seconds", lambda *_, **__: 1e-6)
    explicit = recipe(batch_size=50, precision=precision_, memory_format=memory_format, compile=compile_)
    memo = Memo(tmp_path / "new.json", tmp_path / "old.json")
    for path in (memo.path, tmp_path / "old.json"):
        path.write_text(json.dumps(earlier))
    chosen = settled(explicit, nn.Linear(1, 1), (1, 2, 2), 100, torch.device("cpu"), memo)
    assert chosen.precision == precision_
    assert chosen.memory_format in (("contiguous", "channels_last") if memory_format == "auto" else (memory_format,))
    assert chosen.compile in ((True, False) if compile_ == "auto" else (compile_,))


def test_a_memo_holds_only_what_was_measured(tmp_path: Path) -> None:
    memo, device = Memo(tmp_path / "a.json"), torch.device("cpu")
    forced = recipe(batch_size=50, precision="fp64")
    assert settled(forced, nn.Linear(4, 1), (1, 2, 4), 100, device, memo) == forced.model_copy(
        update={"memory_format": "contiguous", "compile": False}
    )
    assert json.loads(memo.path.read_text()) == {"compile": {"20": False}}
    whole = recipe(precision="bf16", memory_format="channels_last", compile=False)
    assert settled(whole, nn.Linear(1, 1), (1, 2, 2), 100, device, Memo(tmp_path / "b.json")) == whole
    only = recipe(precision="fp16", compile=False)
    assert settled(only, nn.Linear(1, 1), (1, 2, 2), 100, device, Memo(tmp_path / "b.json")).memory_format == "contiguous"
    assert not (tmp_path / "b.json").exists()


def test_each_question_about_precision_has_a_memo_of_its_own() -> None:
    asked = [recipe(), recipe(precision="fp32"), recipe(memory_format="contiguous"), recipe(batch_size=50)]
    questions = [question(one) for one in asked]
    assert all(questions.count(one) == 1 for one in questions)
    assert question(recipe(compile=False, epochs=3, lr=0.1)) == question(recipe())


def test_what_earlier_code_kept_for_an_automatic_recipe_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another measurement might choose another precision, which is another protocol, and would train everything again."""
    monkeypatch.setattr(precision, "_step_seconds", None)  # nothing may be measured
    old = tmp_path / "old.json"
    old.write_text(json.dumps(EARLIER[0]))
    memo = Memo(tmp_path / "new.json", old)
    chosen = settled(recipe(batch_size=50), nn.Linear(1, 1), (1, 2, 2), 100, torch.device("cpu"), memo)
    assert (chosen.precision, chosen.memory_format, chosen.compile) == ("bf16", "channels_last", True)
    assert not memo.path.exists()


def test_what_earlier_code_kept_after_an_explicit_precision_is_not_taken_for_automatic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_step_seconds", lambda *_, **__: 1e-6)
    old = tmp_path / "old.json"
    old.write_text(json.dumps(EARLIER[1]))
    memo = Memo(tmp_path / "new.json", old)
    chosen = settled(recipe(batch_size=50), nn.Linear(1, 1), (1, 2, 2), 100, torch.device("cpu"), memo)
    assert (chosen.precision, chosen.memory_format, chosen.compile) == ("fp32", "contiguous", False)


@pytest.mark.parametrize(
    ("epochs", "compiled_step", "measures", "pays"),
    [(1, 0.1, False, False), (100, 0.7, True, True), (100, 0.99, True, False), (100, 1.2, True, False)],
)
def test_compiling_is_chosen_where_its_own_time_is_won_back(
    epochs: int, compiled_step: float, measures: bool, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 50))  # a measurement of the compiled model takes 50 seconds
    tried: list[bool] = []

    def pretend(
        model: nn.Module, images: torch.Tensor, name: str, memory_format: str, device: torch.device, compiled: bool = False
    ) -> float:
        tried.append(compiled)
        return compiled_step if compiled else 1.0

    monkeypatch.setattr(precision, "_step_seconds", pretend)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(clock))
    asked = recipe(epochs=epochs, batch_size=10, precision="fp32", memory_format="contiguous")
    memo, device = Memo(tmp_path / "a.json"), torch.device("cpu")
    assert settled(asked, nn.Linear(1, 1), (1, 2, 2), 100, device, memo).compile is pays
    assert (True in tried) == measures
    tried.clear()
    assert settled(asked, nn.Linear(1, 1), (1, 2, 2), 100, device, memo).compile is pays
    assert not tried
    longer = asked.model_copy(update={"epochs": 1000})
    assert settled(longer, nn.Linear(1, 1), (1, 2, 2), 100, device, memo).compile is (compiled_step < 1.0)
