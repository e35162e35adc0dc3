"""The loop: it learns, it resumes to the bit, it leaves the teacher alone, and what it writes can be re-derived."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import accumulate, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.data.batch import Batch
from kdbench.errors import Diverged, KDBenchError, UserError
from kdbench.experiment import Unit
from kdbench.methods.base import MAPS_ALONE, Method, OwnOptimizer, Paper, Progress
from kdbench.models.outputs import Outputs, Shapes, predicted
from kdbench.tasks.base import TaskInfo
from kdbench.tasks.build import build_task
from kdbench.tasks.classification import Classification
from kdbench.tasks.segmentation import Segmentation
from kdbench.training import loop
from kdbench.training.assembly import Training, assemble, share_buffers
from kdbench.training.checkpoint import load_checkpoint, save_checkpoint
from kdbench.training.loop import close_epoch, fit, mean_losses, train_epoch, train_step
from kdbench.training.outcome import rederive
from kdbench.training.precision import placed_inputs
from kdbench.training.session import LocalSession, State
from kdbench.training.teacher import LiveTeacher
from kdbench.training.work import attempt
from tests.training.alike import AlikeSession
from tests.training.units import Killed, killed_and_continued, layout, pixel_unit, saved_teacher, unit, with_cache


def weights_of(folder: Path, of: Unit) -> dict[str, torch.Tensor]:
    return load_file(layout(folder).student(of.key))


def assert_equal_weights(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_training_lowers_the_loss_and_beats_chance(tmp_path: Path) -> None:
    record = fit(unit(recipe={"epochs": 6}), LocalSession(), layout(tmp_path))
    assert record.curve[-1]["train_total"] < 0.7 * record.curve[0]["train_total"]
    assert record.test_metric is not None
    assert record.test_metric > 40
    assert record.val_metric == record.curve[-1]["val_accuracy"]
    assert len(record.curve) == 6


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"ema": 0.9, "weights": "best"},
        {"optimizer": "adamw", "lr": 0.01, "warmup_epochs": 0.5},
        {"augment": {"crop": 2, "flip": True}, "accumulate": 2, "clip_grad": 1.0},
        {"no_decay_on_norms": True, "weight_decay": 0.1, "schedule": "multistep", "milestones": [0.4, 1]},
    ],
    ids=["plain", "average-and-best", "adamw-warmup", "augmented-micro-batches", "two-groups-and-milestones"],
)
@pytest.mark.parametrize("kill_after", [1, 3, 7])
def test_a_killed_training_continues_to_the_same_bits(tmp_path: Path, recipe: dict, kill_after: int) -> None:
    whole = unit(recipe={"epochs": 2, **recipe}, student={"name": "tests.training.units:smooth_net", "dropout": 0.3}, checkpoint_seconds=0)
    fit(whole, LocalSession(), layout(tmp_path / "whole"))
    record = killed_and_continued(whole, tmp_path / "continued", kill_after)
    assert_equal_weights(weights_of(tmp_path / "whole", whole), weights_of(tmp_path / "continued", whole))
    assert [row["epoch"] for row in record.curve] == [1, 2]


def test_the_moving_average_is_that_of_the_weights_and_buffers_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's are copied; the decay is the recipe's. Batch norms have buffers, which two micro-batches change twice a step."""
    decay = 0.75
    recipe = {"ema": decay, "accumulate": 2, "batch_size": 50, "lr": 0.1}
    run = assemble(unit(student={"name": "tiny_cnn", "width": 4}, recipe=recipe), LocalSession())
    assert run.average is not None
    average, step = run.average.module, loop.train_step
    by_hand: dict[str, Tensor] = {}  # in float64
    largest: dict[str, float] = {}
    compared = 0

    def numbers(of: nn.Module) -> dict[str, Tensor]:
        return {name: tensor.double() for name, tensor in of.state_dict().items() if tensor.is_floating_point()}

    def noted(run: Training, batch: Batch) -> Tensor:
        nonlocal compared
        losses = step(run, batch)
        for name, now in numbers(run.distiller.student).items():
            by_hand[name] = decay * by_hand[name] + (1 - decay) * now if name in by_hand else now
            largest[name] = max(largest.get(name, 0.0), now.abs().max().item())
        assert any(name.endswith("running_mean") for name in by_hand)
        for name, found in numbers(average).items():
            # a step rounds thrice, and is forgotten with the decay
            rounding = 3 * torch.finfo(torch.float32).eps / (1 - decay)
            torch.testing.assert_close(found, by_hand[name], rtol=0, atol=rounding * largest[name], msg=f"step {compared + 1}: {name}")
        compared += 1
        return losses

    monkeypatch.setattr(loop, "train_step", noted)
    train_epoch(run, 0)
    assert compared == run.loader.steps_per_epoch == 6


def test_a_checkpoint_of_another_unit_is_not_continued(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    fit(unit(seed=1, recipe={"epochs": 2}, checkpoint_seconds=0), LocalSession(checkpoint), layout(tmp_path / "a"))
    assert checkpoint.exists()
    fit(unit(), LocalSession(checkpoint), layout(tmp_path / "b"))
    fit(unit(), LocalSession(), layout(tmp_path / "c"))
    assert_equal_weights(weights_of(tmp_path / "b", unit()), weights_of(tmp_path / "c", unit()))


def test_a_truncated_checkpoint_means_a_fresh_start(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    fit(unit(checkpoint_seconds=0), LocalSession(checkpoint), layout(tmp_path / "a"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    fit(unit(), LocalSession(checkpoint), layout(tmp_path / "b"))
    assert_equal_weights(weights_of(tmp_path / "a", unit()), weights_of(tmp_path / "b", unit()))


def test_the_teacher_is_bit_equal_after_training(tmp_path: Path) -> None:
    run = assemble(unit("kd", saved_teacher(tmp_path)), LocalSession())
    assert isinstance(run.teacher, LiveTeacher)
    before = {name: tensor.clone() for name, tensor in run.teacher.model.state_dict().items()}
    train_epoch(run, 0)
    assert_equal_weights(before, run.teacher.model.state_dict())
    assert not run.teacher.model.training


def test_metrics_are_rederived_from_the_stored_predictions(tmp_path: Path) -> None:
    record = fit(unit(), LocalSession(), layout(tmp_path))
    assert record.predictions_uri is not None
    stored = (tmp_path / record.predictions_uri).read_bytes()
    task = build_task(unit().task)
    assert rederive(record, task, stored) == record.metrics
    with pytest.raises(KDBenchError, match="SHA-256 differs"):
        rederive(record, task, stored[:-1] + bytes([stored[-1] ^ 1]))


def test_a_final_says_how_alike_student_and_teacher_are(tmp_path: Path) -> None:
    plain = unit("kd", saved_teacher(tmp_path))
    assert plain.teacher is not None
    record = fit(
        plain.model_copy(update={"teacher": with_cache(plain.teacher, plain, tmp_path / "cache")}), LocalSession(), layout(tmp_path)
    )
    assert record.agreement is not None
    assert record.teacher_kl is not None
    assert 0 <= record.agreement <= 1
    assert record.teacher_kl > 0


def test_only_final_units_touch_the_test_set(tmp_path: Path) -> None:
    record = fit(unit(role="trial", number=0), LocalSession(), layout(tmp_path))
    assert record.test_metric is None
    assert record.val_metric is not None
    assert not list(tmp_path.iterdir())


def test_a_diverging_training_says_where(tmp_path: Path) -> None:
    wild = unit(recipe={"lr": 1e4, "weight_decay": 1e4, "epochs": 2})
    with pytest.raises(Diverged, match=r"none seed 0: the loss became (nan|inf) in epoch \d of 2 \(lr 10000\)"):
        fit(wild, LocalSession(), layout(tmp_path))
    ending = attempt(wild, LocalSession(), layout(tmp_path))
    assert ending.record is not None
    assert ending.record.status == "failed"
    assert "lr 10000" in (ending.record.failure or "")


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    plain = unit(recipe={"precision": "fp64", "epochs": 1})
    cut = unit(recipe={"precision": "fp64", "epochs": 1, "accumulate": 4})
    fit(plain, LocalSession(), layout(tmp_path))
    fit(cut, LocalSession(), layout(tmp_path))
    a, b = weights_of(tmp_path, plain), weights_of(tmp_path, cut)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", ["none", "label_smoothing", {"name": "cwd+kd", "kd": {"kd_weight": 0.3}}])
def test_micro_batches_of_pixels_give_the_gradient_of_the_whole_batch(tmp_path: Path, method: str | dict) -> None:
    plain, cut = (pixel_unit(method, tmp_path, epochs=1, accumulate=pieces) for pieces in (1, 3))  # 20 images: 7, 7 and 6
    whole, pieces = (fit(each, LocalSession(), layout(tmp_path)) for each in (plain, cut))
    a, b = weights_of(tmp_path, plain), weights_of(tmp_path, cut)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)
    losses = [name for name in whole.curve[0] if name.startswith("train_")]
    assert [pieces.curve[0][name] for name in losses] == pytest.approx([whole.curve[0][name] for name in losses], rel=1e-10)


def test_a_task_may_weigh_each_term_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pixel_unit("kd", tmp_path, epochs=1, accumulate=2)
    counted = Segmentation.weight
    one = fit(pixels, LocalSession(), layout(tmp_path)).curve[0]

    monkeypatch.setattr(Segmentation, "weight", lambda task, batch: dict.fromkeys(("imitation", "cross_entropy"), counted(task, batch)))
    alike = fit(pixels, LocalSession(), layout(tmp_path)).curve[0]
    for name in ("train_kd", "train_cross_entropy"):
        assert alike[name] == pytest.approx(one[name], rel=1e-10)

    def by_name(task: Segmentation, batch: Batch) -> dict[str, torch.Tensor]:
        return {"imitation": torch.tensor(len(batch)), "cross_entropy": counted(task, batch)}

    monkeypatch.setattr(Segmentation, "weight", by_name)
    two = fit(pixels, LocalSession(), layout(tmp_path)).curve[0]
    assert two["train_kd"] != pytest.approx(one["train_kd"], rel=1e-6)
    monkeypatch.setattr(Segmentation, "weight", lambda task, batch: {"cross_entropy": counted(task, batch)})
    with pytest.raises(UserError, match=r"says nothing of 'imitation'; it has: cross_entropy"):
        fit(pixels, LocalSession(), layout(tmp_path))


def test_a_batch_coupled_loss_refuses_micro_batches(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="accumulate: 1"):
        assemble(unit("tf_nkd", recipe={"accumulate": 2}), LocalSession())


def test_best_weights_are_those_of_the_best_epoch(tmp_path: Path) -> None:
    chosen = unit(recipe={"epochs": 5, "lr": 1.5, "schedule": "constant", "weights": "best"})
    record = fit(chosen, LocalSession(), layout(tmp_path))
    assert record.val_metric == max(row["val_accuracy"] for row in record.curve)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp64"])
def test_every_precision_trains(tmp_path: Path, precision: str) -> None:
    record = fit(unit(recipe={"precision": precision, "memory_format": "channels_last", "epochs": 3}), LocalSession(), layout(tmp_path))
    assert record.curve[-1]["train_total"] < record.curve[0]["train_total"]
    assert record.precision == precision


def test_a_compiled_student_trains_to_the_same_bits_where_its_kernels_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def traced(model: nn.Module, **options: object) -> object:
        compiled.append(model)
        return compile_model(model, backend="eager")  # the graph is captured, and run by the kernels that ran before

    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    plain, fast = (unit(recipe={"compile": compile_}) for compile_ in (False, True))
    for one, folder in ((plain, "plain"), (fast, "fast")):
        fit(one, LocalSession(), layout(tmp_path / folder))
    assert len(compiled) == 1
    assert_equal_weights(weights_of(tmp_path / "plain", plain), weights_of(tmp_path / "fast", fast))


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> Unit:
    """A unit in fp16, whose gradient scaler begins low and doubles the scale after every second step."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=128.0, growth_interval=2))
    student = {"name": "tests.training.units:smooth_net", "dropout": 0.3}
    return unit(student=student, recipe={"precision": "fp16", "lr": 1.0, "momentum": 0, "weight_decay": 0, "clip_grad": 0.01})


def test_a_checkpoint_brings_back_the_gradient_scaler(tmp_path: Path, half: Unit) -> None:
    one, two = (assemble(half, LocalSession()) for _ in range(2))
    batches = list(one.loader.batches(0))
    for batch in batches[:3]:
        train_step(one, batch)
        one.step += 1
    save_checkpoint(one.state(), tmp_path / "checkpoint.pt")
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    assert kept is not None
    two.restore(kept)
    assert two.scaler.state_dict() == one.scaler.state_dict()
    assert one.scaler.get_scale() == 256
    for run in (one, two):
        torch.set_rng_state(kept["random"])
        train_step(run, batches[3])
    assert two.scaler.get_scale() == one.scaler.get_scale() == 512
    assert_equal_weights(one.distiller.state_dict(), two.distiller.state_dict())


def test_gradients_are_clipped_at_their_own_size_and_not_at_that_of_the_scaled_loss(half: Unit) -> None:
    run = assemble(half, LocalSession())
    before = [weight.detach().double() for weight in run.distiller.parameters()]
    train_step(run, next(iter(run.loader.batches(0))))
    steps = [weight.detach().double() - old for weight, old in zip(run.distiller.parameters(), before, strict=True)]
    size = torch.cat([step.flatten() for step in steps]).norm().item()
    # weights are at most 1 and rounded to float32 once: so much of a step of 0.01 may be lost in each of them
    lost = torch.finfo(torch.float32).eps / 2 * sum(step.numel() for step in steps) ** 0.5
    assert size == pytest.approx(0.01, abs=lost + 0.01 * 1e-3)


def clocked(monkeypatch: pytest.MonkeyPatch, durations: Iterable[float]) -> None:
    """The loop looks at its clock as an epoch begins, after each step and twice at its end: each time so many seconds after the last."""
    moments = accumulate(durations)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(moments)))


def test_a_training_keeps_its_state_when_so_many_seconds_have_passed_and_not_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked(monkeypatch, repeat(1.0))  # 5 seconds for the steps of an epoch, 1 for its end
    session = AlikeSession(1)
    record = fit(unit(role="trial", number=0, checkpoint_seconds=2), session, layout(tmp_path))
    assert [(kept["epoch"], kept["step"]) for _, kept in session.kept] == [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4)]
    for name in ("seconds", "device_seconds", "kept_at"):
        assert [kept[name] for _, kept in session.kept] == [2, 4, 6, 8, 10], name
    assert [row["seconds"] for row in record.curve] == [6, 12]
    assert record.train_seconds == 12
    assert session.clocks == []


def test_several_workers_compare_their_clocks_when_a_checkpoint_may_be_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [1, 0.5, 0.25, 0.25, *[0.5] * 12, *[0.25] * 7, 2, *[0.5] * 6]  # 4 seconds have passed after steps 8 and 16, and in step 25
    clocked(monkeypatch, [0, *steps, 0, 0])
    session = AlikeSession(2)
    recipe = {"epochs": 1, "batch_size": 10}
    fit(unit(role="trial", number=0, checkpoint_seconds=4, workers=2, recipe=recipe), session, layout(tmp_path))
    # they compare them after steps 1, 4, 8, 16, 24 and 25: each time when it is due if steps go on to take what they took so far
    assert [(kept["step"], clocks) for clocks, kept in session.kept] == [(8, 3), (16, 4), (25, 6)]
    assert session.clocks == [1, 2, 4, 4, 3.75, 4.25]  # seconds since the last checkpoint
    for _, kept in session.kept:
        assert kept["device_seconds"] == 2 * kept["seconds"]


def test_the_losses_of_a_checkpoint_and_of_an_epoch_are_the_mean_over_the_workers(tmp_path: Path) -> None:
    one, two = AlikeSession(2), AlikeSession(2, others=lambda rows: 3 * rows)
    asked = unit(role="trial", number=0, checkpoint_seconds=0, workers=2, recipe={"epochs": 1})
    a, b = (fit(asked, session, layout(tmp_path)).curve[0] for session in (one, two))
    assert len(one.kept) == len(two.kept) == 4
    for (_, kept), (_, tripled) in zip(one.kept, two.kept, strict=True):
        torch.testing.assert_close(tripled["sums"], 2 * kept["sums"])
    for name in ("train_total", "train_cross_entropy"):
        assert b[name] == pytest.approx(2 * a[name])


def test_an_epochs_loss_is_the_mean_of_its_steps_losses() -> None:
    run = assemble(unit(), LocalSession())
    total = 0.0
    for batch in run.loader.batches(0):
        losses = train_step(run, batch)
        total += losses[run.terms.index("total")].item()
        run.sums = losses if run.sums is None else run.sums + losses
        run.step += 1
    assert run.step == 5
    assert mean_losses(run)["train_total"] == pytest.approx(total / 5)


@pytest.mark.parametrize(("rank", "added"), [(0, 0), (1, 1)])
def test_all_workers_measure_with_the_batch_statistics_of_the_first(rank: int, added: int) -> None:
    session = AlikeSession(2, rank, others=lambda rows: rows + 1)
    run = assemble(unit(student={"name": "tiny_cnn", "width": 4}, workers=2), session)
    before = {name: buffer.clone() for name, buffer in run.distiller.student.named_buffers()}
    share_buffers(run.evaluated, run.session)
    after = dict(run.distiller.student.named_buffers())
    assert any(name.endswith("running_mean") for name in before)
    for name, buffer in before.items():
        assert torch.equal(after[name], buffer + added), name


class DyingAlikeSession(AlikeSession):
    """Dies right after it has kept a training's state for the `kill_after`-th time."""

    kill_after = 0

    def report(self, metrics: Mapping[str, float], state: Callable[[], State] | None) -> None:
        super().report(metrics, state)
        if state is not None and len(self.kept) == self.kill_after:
            raise Killed


def test_a_record_says_how_many_workers_took_part_and_each_resumption_where_it_goes_on(tmp_path: Path) -> None:
    asked, places = unit(role="trial", number=0, checkpoint_seconds=0, workers={"min": 1, "max": 2}), []
    for world_size in (1, 2, 2):
        session = DyingAlikeSession(world_size, checkpoint=tmp_path / "checkpoint.pt")
        session.kill_after = 2
        with pytest.raises(Killed):
            fit(asked, session, layout(tmp_path))
        places += session.places
    session = DyingAlikeSession(1, checkpoint=tmp_path / "checkpoint.pt")
    record = fit(asked, session, layout(tmp_path))
    assert places + session.places == [
        "epoch 1 of 2, step 3 of 5, with 2 workers instead of 1",
        "epoch 1 of 2, step 5 of 5",
        "epoch 2 of 2, step 2 of 5, with 1 worker instead of 2",
    ]
    assert record.worker_counts == [1, 2, 1]


def test_where_less_is_better_the_best_weights_are_those_of_the_lowest_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of two equal epochs the first one's."""
    costs = iter([3.0, 2.0, 2.0, 2.5])
    monkeypatch.setattr(Classification, "higher_is_better", False)
    run = assemble(unit(recipe={"epochs": 4, "weights": "best"}), LocalSession())
    monkeypatch.setattr(Classification, "metrics", lambda task, prediction, target: {task.primary: next(costs)})
    found = []
    for epoch in range(4):
        train_epoch(run, epoch)
        close_epoch(run)
        found.append({name: tensor.clone() for name, tensor in run.distiller.student.state_dict().items()})
    assert run.best is not None
    assert run.best_value == -2
    assert_equal_weights(run.best, found[1])
    assert not torch.equal(found[1]["head.weight"], found[2]["head.weight"])


class Apart(Method):
    """Has a part with a learning rate of its own, and remembers how far the training was."""

    paper = Paper("a method of the tests")
    reads = MAPS_ALONE
    needs_teacher = False

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.part = nn.Linear(1, 1)
        self.seen: list[Progress] = []

    def own_optimizers(self) -> tuple[OwnOptimizer, ...]:
        return (OwnOptimizer(self.part, {"lr": 0.5}),)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        self.seen.append(at)
        return {"apart": self.part.weight.square().sum()}


def test_a_method_is_told_how_far_the_training_is_and_its_own_optimizer_follows_the_schedule() -> None:
    run = assemble(unit("tests.training.test_loop:Apart", recipe={"epochs": 3, "schedule": "step"}), LocalSession())
    rates = []
    for epoch in range(3):
        for batch in run.loader.batches(epoch):
            train_step(run, batch)
            run.step += 1
            rates.append([optimizer.param_groups[0]["lr"] for optimizer in run.optimizers])
        run.sums = torch.zeros(len(run.terms))
        assert close_epoch(run)["lr"] == rates[-1][0]
    seen = run.distiller.method.seen
    assert [(at.epoch, at.step, at.total_steps) for at in seen] == [(pytest.approx(step / 5), step, 15) for step in range(15)]
    factors = [1] * 5 + [0.1] * 5 + [0.01] * 5
    assert [rate for pair in rates for rate in pair] == pytest.approx([rate * factor for factor in factors for rate in (0.1, 0.5)])


@pytest.mark.parametrize(("precision", "dtype"), [("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.float32)])
def test_the_weights_of_a_method_are_float32_or_wider(precision: str, dtype: torch.dtype) -> None:
    run = assemble(unit("tests.training.test_loop:Apart", recipe={"precision": precision}), LocalSession())
    assert {weight.dtype for weight in run.distiller.parameters()} == {dtype}


def test_a_teacher_learns_from_the_training_part_and_sees_a_new_view_each_epoch_a_student_as_many_as_are_cached() -> None:
    recipe = {"augment": {"crop": 2}, "views": 2}
    teacher, student = (assemble(unit(role=role, recipe=recipe), LocalSession()).loader for role in ("teacher", "final"))
    splits = build_task(unit().task).splits()
    assert (len(teacher.part), len(student.part)) == (len(splits.train), len(splits.transfer))
    assert len(splits.train) != len(splits.transfer) == 300
    assert [teacher.view(epoch) for epoch in range(4)] == [0, 1, 2, 3]
    assert [student.view(epoch) for epoch in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_workers_with_unequal_shares_of_a_batch_give_its_loss_as_their_mean(accumulate: int) -> None:
    recipe = {"precision": "fp64", "batch_size": 25, "accumulate": accumulate}
    alone = assemble(unit(recipe=recipe), LocalSession())
    batch = next(iter(alone.loader.batches(0)))
    with torch.no_grad():
        right = F.cross_entropy(predicted(alone.distiller.student, placed_inputs(batch.inputs, "fp64")), batch.target)
    whole = train_step(alone, batch)
    torch.testing.assert_close(whole, right.expand(2), rtol=1e-12, atol=1e-12)  # the task's loss, and the sum of all terms
    losses = []
    for rank in range(2):
        session = AlikeSession(2, rank)
        run = assemble(unit(recipe=recipe, workers={"max": 2}), session)
        assert run.loader.shares == (12, 13)
        losses.append(train_step(run, next(iter(run.loader.batches(0)))))
        assert session.alone == accumulate - 1  # gradients are exchanged in the last backward pass of a step
    torch.testing.assert_close(torch.stack(losses).mean(0), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counted", [[], [(0, 0, 0)], [(0, 3, 3), (7, 0, 0), (7, 0, 1), (7, 0, 2)]])
def test_micro_batches_of_few_labelled_pixels_or_none_count_as_in_the_whole_batch(tmp_path: Path, counted: list[tuple[int, ...]]) -> None:
    found = []
    for pieces in (1, 3):
        run = assemble(pixel_unit("none", tmp_path, accumulate=pieces), LocalSession())
        batch = next(iter(run.loader.batches(0)))
        target = torch.full_like(batch.target, 255)
        for place in counted:
            target[place] = 1
        found.append(train_step(run, replace(batch, target=target)))
    assert torch.isfinite(found[0]).all()
    assert bool(found[0].any()) == bool(counted)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_a_batch_coupled_loss_takes_whole_batches() -> None:
    assert assemble(unit("tf_nkd"), LocalSession()).distiller.method.batch_coupled
