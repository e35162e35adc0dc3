"""A few logits in place of all: what they become again, how much a loss changes by it, and what a cache of them gives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdbench.data.loader import in_order
from kdbench.experiment import CacheOptions
from kdbench.methods.kd import softened_divergence
from kdbench.tasks.build import build_task
from kdbench.training.cache.build import Builder
from kdbench.training.cache.outputs import CacheSpec, open_cache
from kdbench.training.cache.streams import Stream
from kdbench.training.cache.top_k import BOUND, TEMPERATURES, change, densified, largest, smallest_faithful
from kdbench.training.teacher import load_teacher
from tests.training.units import saved_teacher, unit, with_cache

CPU = torch.device("cpu")


def peaked(samples: int = 64, classes: int = 200, spread: float = 8.0) -> torch.Tensor:
    """Logits of a teacher that is sure of a few classes."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(samples, classes, generator=generator) * 0.1
    return logits.scatter_add(1, logits.topk(3, dim=1).indices, torch.full((samples, 3), spread))


def test_the_rest_is_spread_evenly_and_the_kept_probabilities_are_exact() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    back = densified(*largest(logits, 7), 50)
    p, q = logits.softmax(1), back.softmax(1)
    top = logits.topk(7, dim=1).indices
    torch.testing.assert_close(q.gather(1, top), p.gather(1, top))
    torch.testing.assert_close(back.logsumexp(1), logits.logsumexp(1))
    others = q.scatter(1, top, math.nan)
    others = others[~others.isnan()].reshape(20, 43)
    torch.testing.assert_close(others, others[:, :1].expand_as(others))
    torch.testing.assert_close(others.sum(1), 1 - p.gather(1, top).sum(1))


def test_at_higher_temperatures_the_others_get_too_much_and_never_too_little() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)).double() * 3
    back = densified(*largest(logits, 7), 50)
    top = logits.topk(7, dim=1).indices
    for temperature, sign in ((4.0, 1), (0.5, -1)):
        p, q = ((z / temperature).softmax(1).gather(1, top).sum(1) for z in (logits, back))
        assert bool((sign * (p - q) > 0).all())


def test_all_but_one_class_lose_nothing() -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(densified(*largest(logits, 5), 6), logits)


def test_the_change_is_that_of_kds_loss_and_gradient() -> None:
    logits = peaked(classes=20, spread=2.0)
    back = densified(*largest(logits, 2), 20)
    students = (torch.zeros_like(logits), logits + logits.std() * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)))
    worst = 0.0
    for student in students:
        for temperature in TEMPERATURES:
            losses, gradients = [], []
            for teacher in (logits, back):
                z = student.double().requires_grad_()
                loss = softened_divergence(z, teacher.double(), temperature)
                losses.append(loss.item())
                gradients.append(torch.autograd.grad(loss, z)[0])
            worst = max(worst, abs(losses[1] / losses[0] - 1), ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item())
    assert change(logits, back) == pytest.approx(worst, rel=1e-6)


def test_auto_keeps_the_fewest_that_stay_below_the_bound() -> None:
    logits = torch.full((32, 512), -12.0)  # others of one height lose nothing by being spread evenly
    logits[:, :6] = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)) * 2
    k, measured = smallest_faithful(logits)
    assert k == 8
    assert list(measured) == ["1", "2", "4", "8"]
    assert measured["8"] < BOUND <= min(measured[name] for name in ("1", "2", "4"))


def test_auto_measures_logits_that_half_precision_has_no_room_for() -> None:
    """Only a cache in fp32 holds such logits, so they are not rounded to half precision here."""
    logits = torch.full((32, 512), -2e5)
    logits[:, 0] = 1e5
    k, measured = smallest_faithful(logits)
    assert k == 1
    assert measured["1"] < BOUND


def test_auto_keeps_all_of_a_teacher_that_is_sure_of_nothing() -> None:
    k, measured = smallest_faithful(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    assert k is None
    assert min(measured.values()) > BOUND
    assert list(measured) == ["1", "2", "4", "8", "16"]


@pytest.mark.parametrize(("classes", "width"), [(100, "<i2"), (32767, "<i2"), (40_000, "<i4")])
def test_classes_are_stored_in_as_few_bytes_as_they_need(classes: int, width: str) -> None:
    stream = Stream(name="logits", kind="prediction", shape=(classes,), views=1, images=2, precision="fp16", top_k=3)
    assert stream.dtype["classes"].base.str == width
    logits = torch.zeros(2, classes)
    logits[:, -3:] = torch.tensor([5.0, 6.0, 7.0])
    assert torch.equal(
        stream.unpacked(stream.packed(logits), CPU).topk(3).indices, torch.tensor([[classes - 1, classes - 2, classes - 3]] * 2)
    )


@pytest.mark.parametrize("top_k", [3, "auto"])
def test_a_cache_of_the_largest_gives_their_probabilities_and_the_rest_evenly(tmp_path: Path, top_k: int | str) -> None:
    plain = unit("kd", saved_teacher(tmp_path))
    assert plain.teacher is not None
    folder = tmp_path / "cache"
    with_cache(plain.teacher, plain, folder, options={"top_k": top_k, "precision": "fp32"})
    cache = open_cache(folder)
    assert cache is not None
    task = build_task(plain.task)
    (batch,) = in_order(task.splits().transfer, 300)
    live = load_teacher(plain.teacher, task, CPU)
    expected = live((batch.inputs - live.input_spec.mean[0]) / live.input_spec.std[0])  # type: ignore[union-attr, index, operator]
    got = cache(batch).logits
    if top_k == "auto":  # ten classes of an untrained teacher: no few of them will do, and that is on record
        assert cache.logits.stream.top_k is None
        spec = CacheSpec(teacher=plain.teacher, task=plain.task, recipe=plain.recipe, data_seed=0, options=CacheOptions(top_k="auto"))
        plan = Builder(spec, tmp_path / "other", CPU).plan([])
        assert plan.measured is not None
        assert list(plan.measured) == ["1", "2", "4"]
        torch.testing.assert_close(got, expected)
    else:
        torch.testing.assert_close(got, densified(*largest(expected, 3), 10))
        assert not torch.allclose(F.softmax(got, 1), F.softmax(expected, 1), atol=1e-4)
        assert cache.shapes.prediction == (10,)
