"""Students that learn from samples without labels, all or some of them: what counts, on any number of workers and micro-batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kdbench.data.batch import Batch
from kdbench.methods import METHODS
from kdbench.methods.build import MethodSpec, method_class
from kdbench.models.outputs import predicted
from kdbench.training.assembly import assemble
from kdbench.training.loop import fit, train_step
from kdbench.training.session import LocalSession
from tests.methods.test_every_method_trains import CNN, PAIRS, SMALL_CNN
from tests.training.alike import losses_of_workers
from tests.training.gloo import free_port
from tests.training.test_two_workers import workers
from tests.training.units import TASK, layout, saved_teacher, unit, with_cache

NOISE = {**TASK, "transfer": "noise", "transfer_size": 60}
PARTLY = {**TASK, "transfer_size": 60, "labelled": 12}
RECIPE = {"precision": "fp64", "batch_size": 60}
AT = {"name": "at", "student_taps": ["features.0"], "teacher_taps": ["stage:0"]}


def partly(method: Any, folder: Path, **recipe: Any) -> Any:
    return unit(method, saved_teacher(folder, "fp64"), task=PARTLY, recipe=RECIPE | recipe)


@pytest.mark.parametrize("method", ["none", "kd"])
@pytest.mark.parametrize("labelled", [[], [0], [3, 4, 5, 6], list(range(0, 60, 7))])
def test_labelled_samples_count_alike_for_any_number_of_workers_and_micro_batches(tmp_path: Path, method: str, labelled: list[int]) -> None:
    """The labelled samples count in the task's loss, all samples in distillation, of all micro-batches and workers together."""
    alone = assemble(partly(method, tmp_path), LocalSession())
    everything = next(iter(alone.loader.batches(0)))
    label_of = {int(index): row % 10 if row in labelled else -1 for row, index in enumerate(everything.index)}

    def with_labels(batch: Batch) -> Batch:
        return replace(batch, target=torch.tensor([label_of[int(index)] for index in batch.index]))

    with torch.no_grad():
        logits = predicted(alone.distiller.student, everything.inputs.double())
    expected = F.cross_entropy(logits[labelled], with_labels(everything).labels[labelled]).item() if labelled else 0.0
    whole = train_step(alone, with_labels(everything))
    weights = dict(alone.distiller.student.named_parameters())
    assert whole[0].item() == pytest.approx(alone.distiller.method.params.task_weight * expected, rel=1e-10)
    assert len(whole) == (2 if method == "none" else 3)
    for pieces in (2, 4):
        run = assemble(partly(method, tmp_path, accumulate=pieces), LocalSession())
        torch.testing.assert_close(train_step(run, with_labels(next(iter(run.loader.batches(0))))), whole, rtol=1e-10, atol=1e-12)
        for name, weight in run.distiller.student.named_parameters():
            torch.testing.assert_close(weight, weights[name], rtol=1e-9, atol=1e-11)
    for several, pieces in ((2, 1), (3, 1), (2, 2), (3, 4)):
        losses = losses_of_workers(
            partly(method, tmp_path, accumulate=pieces).model_copy(update={"workers": several}), several, with_labels
        )
        torch.testing.assert_close(losses, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("task", "method", "accumulate"), [(PARTLY, "kd", 2), (NOISE, AT, 1)], ids=["partly", "noise"])
def test_two_workers_give_the_weights_of_one(tmp_path: Path, task: dict[str, Any], method: Any, accumulate: int) -> None:
    """On noise the method looks at the middle of the student: what lies behind it gets no gradient from it."""
    recipe = {"precision": "fp64", "batch_size": 20, "epochs": 1, "accumulate": accumulate}
    one = unit(method, saved_teacher(tmp_path, "fp64"), task=task, recipe=recipe)
    two = one.model_copy(update={"workers": 2})
    fit(one, LocalSession(threads=1), layout(tmp_path))
    torch.multiprocessing.spawn(workers, (2, free_port(), [(two.model_dump_json(), tmp_path)]), nprocs=2)
    a, b = load_file(layout(tmp_path).student(one.key)), load_file(layout(tmp_path).student(two.key))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)


READS_LABELS = {"crd", "dkd", "ffsd", "fgd", "label_smoothing", "nkd", "norm", "ofa", "tf_nkd", "uskd", "wsld"}


def test_methods_say_whether_they_read_labels() -> None:
    kinds = {name: method_class(MethodSpec(name=name)) for name in METHODS}
    assert {name for name, kind in kinds.items() if kind.needs_labels} == READS_LABELS
    assert method_class(MethodSpec(name="kd+dkd")).needs_labels
    assert not method_class(MethodSpec(name="kd+fitnet")).needs_labels


@pytest.mark.parametrize("name", sorted(METHODS.keys() - READS_LABELS))
def test_a_method_that_reads_no_labels_trains_on_samples_without_any(tmp_path: Path, name: str) -> None:
    student, teacher = PAIRS.get(name, (SMALL_CNN, CNN))
    of = unit(
        name,
        saved_teacher(tmp_path, model=teacher),
        task=NOISE,
        student=student,
        recipe={"batch_size": 20, "lr": 0.02, "weight_decay": 0.0},
    )
    run = assemble(of, LocalSession())
    batch = next(iter(run.loader.batches(0)))
    assert batch.target is None
    before = {key: value.clone() for key, value in run.distiller.student.state_dict().items()}
    run.step = 1  # at the very first some weigh nothing
    losses = train_step(run, batch)
    assert "cross_entropy" not in run.terms
    assert bool(losses.isfinite().all())
    assert any(not torch.equal(before[key], value) for key, value in run.distiller.student.named_parameters()) == (name != "none")
    assert (losses[-1].item() != 0) == (name != "none")


def test_none_on_noise_learns_nothing(tmp_path: Path) -> None:
    of = unit(task=NOISE, recipe={"batch_size": 20, "weight_decay": 0.0})
    before = {name: weight.clone() for name, weight in assemble(of, LocalSession()).distiller.student.named_parameters()}
    record = fit(of, LocalSession(), layout(tmp_path))
    after = load_file(layout(tmp_path).student(of.key))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert {row["train_total"] for row in record.curve} == {0.0}
    assert not any("cross_entropy" in row for row in record.curve)


@pytest.mark.parametrize("method", ["kd", {"name": "kd+at", "at": {"student_taps": ["features.0"], "teacher_taps": ["stage:0"]}}])
def test_noise_is_augmented_and_cached_like_any_image(tmp_path: Path, method: Any) -> None:
    """A cached and a live teacher give the same weights, in views with crops and mirror images."""
    recipe = {"epochs": 3, "batch_size": 20, "augment": {"crop": 2, "flip": True}, "views": 2}
    live = unit(method, saved_teacher(tmp_path), task=NOISE, recipe=recipe)
    taps = () if method == "kd" else ("stage:0",)
    cached = live.model_copy(update={"teacher": with_cache(live.teacher, live, tmp_path / "cache", taps, {"precision": "fp32"}), "seed": 0})
    one, other = tmp_path / "one", tmp_path / "other"
    fit(live, LocalSession(), layout(one))
    record = fit(cached, LocalSession(), layout(other))
    a, b = load_file(layout(one).student(live.key)), load_file(layout(other).student(cached.key))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    assert record.agreement is not None
    run = assemble(cached, LocalSession())
    first, second = (next(iter(run.loader.batches(epoch))) for epoch in (0, 1))
    assert (first.view, second.view) == (0, 1)


@pytest.mark.parametrize(("accumulate", "exchanges"), [(1, 0), (2, 1), (4, 1)])
def test_what_micro_batches_count_is_exchanged_once_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, exchanges: int
) -> None:
    run = assemble(partly("kd", tmp_path, accumulate=accumulate), LocalSession())
    batches = list(run.loader.batches(0))
    asked: list[tuple[int, ...]] = []

    def counting(session: LocalSession, rows: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(rows.shape))
        return rows

    monkeypatch.setattr(LocalSession, "gather", counting)
    for batch in batches:
        train_step(run, batch)
    assert len(asked) == exchanges * len(batches)
