"""What a method shows the student beside the loader's batch, or in its place, and parts that it steps itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from kdbench.data.batch import Batch
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.errors import UserError
from kdbench.experiment import Unit
from kdbench.methods.base import Method, Progress
from kdbench.training.assembly import assemble
from kdbench.training.loop import fit, train_epoch, train_step
from kdbench.training.session import LocalSession
from tests.training.alike import losses_of_workers
from tests.training.own_methods import NAMES, Imagined, Zooming
from tests.training.units import killed_and_continued, layout, saved_teacher, unit

PLAIN = {"name": "tests.training.own_methods:PlainNet"}


def shown(folder: Path, method: str | dict[str, Any], **recipe: Any) -> Unit:
    recipe = {"precision": "fp64", "batch_size": 64, **recipe}
    return unit(method, saved_teacher(folder, "fp64"), student=PLAIN, recipe=recipe)


METHODS: dict[str, str | dict[str, Any]] = {
    "others": NAMES["Zooming"],
    "by-method": NAMES["Imagined"],
    "instead": {"name": NAMES["Imagined"], "instead": True, "times": 1},
    "more-instead": {"name": NAMES["Imagined"], "instead": True, "times": 3},
    "both": f"{NAMES['Imagined']}+{NAMES['Zooming']}",
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_kill_changes_nothing(tmp_path: Path, method: str | dict[str, Any]) -> None:
    of = shown(tmp_path, method).model_copy(update={"checkpoint_seconds": 0})
    fit(of, LocalSession(), layout(tmp_path / "whole"))
    killed_and_continued(of, tmp_path / "continued", 6)
    a, b = (load_file(layout(tmp_path / folder).student(of.key)) for folder in ("whole", "continued"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_micro_batches_are_shown_as_the_whole_is(tmp_path: Path) -> None:
    whole, cut = shown(tmp_path, NAMES["Zooming"]), shown(tmp_path, NAMES["Zooming"], accumulate=2)
    for of in (whole, cut):
        fit(of, LocalSession(), layout(tmp_path))
    a, b = (load_file(layout(tmp_path).student(of.key)) for of in (whole, cut))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)


def test_the_student_learns_from_what_it_is_shown_and_the_method_steps_its_own_part(tmp_path: Path) -> None:
    run = assemble(shown(tmp_path, NAMES["Imagined"]), LocalSession())
    method = run.distiller.method
    assert isinstance(method, Imagined)
    maker = method.maker.weight.detach().clone()
    assert len(run.optimizers) == 2
    assert run.stepped == run.optimizers[:1]
    train_epoch(run, 0)
    steps = run.loader.steps_per_epoch
    assert not torch.equal(method.maker.weight, maker)
    assert {state["step"].item() for state in run.optimizers[1].state.values()} == {steps}, "once a step, and by the method alone"
    assert method.made.item() == 2 * 64 * steps
    assert all("maker" not in name for name in run.distiller.student.state_dict())


def test_the_task_has_no_loss_on_a_batch_without_a_target(tmp_path: Path) -> None:
    record = fit(shown(tmp_path, METHODS["instead"]), LocalSession(), layout(tmp_path))
    assert {name for name in record.curve[0] if name.startswith("train_")} == {"train_imagined", "train_total"}
    assert record.curve[0]["train_imagined"] == record.curve[0]["train_total"] > 0


def test_a_part_that_the_method_steps_needs_the_joined_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Imagined, "batch_coupled", False)
    with pytest.raises(UserError, match="method Imagined steps a part of its own, which all workers must do alike; let it say `batch_coup"):
        assemble(shown(tmp_path, NAMES["Imagined"]), LocalSession())


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda batch: batch.changed(lambda tensor: tensor[1:]),
            "returned 63 samples in its place for a batch of 64; return a multiple of",
        ),
        (lambda batch: replace(batch, others={"few": batch.changed(lambda tensor: tensor[:3])}), "returned 3 samples as 'few' for a batch"),
        (lambda batch: replace(batch, others={"none": batch.changed(lambda tensor: tensor[:0])}), "returned 0 samples as 'none' for a"),
        (lambda batch: None, "returned a NoneType in its place; return a Batch"),
        (lambda batch: replace(batch, others={"bare": batch.inputs}), "returned a Tensor as 'bare'; return a Batch"),
    ],
)
def test_what_a_method_can_not_show_is_an_error_on_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Any, said: str
) -> None:
    monkeypatch.setattr(Imagined, "shown", lambda _, batch, at: made(batch))
    with pytest.raises(UserError, match=rf"`shown` {said}"):
        fit(shown(tmp_path, METHODS["instead"]), LocalSession(), layout(tmp_path))


def test_only_a_method_that_shows_something_is_asked() -> None:
    assert Zooming().makes_batches
    assert not Method().makes_batches


@pytest.mark.parametrize("pieces", [2, 4])
def test_what_is_shown_is_what_the_task_counts_in_micro_batches(tmp_path: Path, pieces: int) -> None:
    """The labelled pixels of what the student sees, not of what the loader gave."""
    runs = [assemble(hiding(tmp_path, accumulate=number), LocalSession()) for number in (1, pieces)]
    (a, b) = (train_step(run, next(iter(run.loader.batches(0)))) for run in runs)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    one, other = (dict(run.distiller.student.named_parameters()) for run in runs)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("workers", [2, 3])
def test_what_is_shown_is_what_the_task_counts_over_workers(tmp_path: Path, workers: int) -> None:
    run = assemble(hiding(tmp_path), LocalSession())
    whole = train_step(run, next(iter(run.loader.batches(0))))
    losses = losses_of_workers(hiding(tmp_path).model_copy(update={"workers": {"max": workers}}), workers, lambda batch: batch)
    torch.testing.assert_close(losses, whole, rtol=1e-10, atol=1e-12)


def hiding(folder: Path, **recipe: Any) -> Unit:
    """Scenes of which each shows another share of labels in its right part."""
    task = {"name": "segmentation", "data": {"name": f"{__name__}:unevenly_labelled"}, "val_size": 10}
    recipe = {"precision": "fp64", "batch_size": 12, "lr": 0.01, **recipe}
    return unit(NAMES["Hiding"], None, task=task, student={"name": "tests.training.units:dense_net"}, recipe=recipe)


def unevenly_labelled() -> Source:
    source = open_source(DataSpec.model_validate({"name": "shapes", "train": 40, "test": 10}))
    masks = source.train.labels.clone()
    for image, mask in enumerate(masks):
        mask[image % 30 :, :28] = 255
    return replace(source, train=replace(source.train, target=masks), ignore_index=255)


class Loud(Imagined):
    """It leaves large gradients in the part that it stepped itself."""

    def shown(self, batch: Batch, at: Progress) -> Batch:
        found = super().shown(batch, at)
        for parameter in self.maker.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(1e4)
        return found


def test_what_a_method_steps_itself_does_not_count_where_gradients_are_clipped(tmp_path: Path) -> None:
    """The student's step is as long whatever gradients of its own loss the method's part still holds."""
    moved = []
    for method in (NAMES["Imagined"], f"{__name__}:Loud"):
        run = assemble(shown(tmp_path, method, clip_grad=1e-3), LocalSession())
        before = [parameter.detach().clone() for parameter in run.distiller.student.parameters()]
        train_step(run, next(iter(run.loader.batches(0))))
        moved.append([parameter.detach() - old for parameter, old in zip(run.distiller.student.parameters(), before, strict=True)])
    for quiet, loud in zip(*moved, strict=True):
        assert quiet.abs().max() > 0
        torch.testing.assert_close(loud, quiet)
