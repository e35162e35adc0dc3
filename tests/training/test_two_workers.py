"""Several workers give what one gives on the joined batches, also where their number changes: real processes, real gloo, float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from kdbench.experiment import Unit
from kdbench.records.record import RunRecord
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from tests.each_task import EACH_TASK
from tests.tolerances import rounding
from tests.training.gloo import Stopped, free_port, joined
from tests.training.own_methods import NAMES
from tests.training.test_shown import METHODS, shown
from tests.training.test_stages import staged
from tests.training.units import layout, pixel_unit, saved_teacher, unit, unit_of

# Two workers add up in another order. The longest sum is of a gradient over a batch of 64 images of 28 x 28 pixels; what it is off by in
# each of up to 12 steps is in the weights that the next begins with, which learning rates as small as these do not magnify.
RELATIVE = rounding(torch.float64, 12 * 64 * 28 * 28)


def workers(rank: int, world: int, port: int, trainings: list[tuple[str, Path]]) -> None:
    """Train one after the other; each leaves its record in its folder."""
    with joined(rank, world, port) as session:
        for text, folder in trainings:
            record = fit(Unit.model_validate_json(text), session, layout(folder))
            if rank == 0:
                (folder / "record.json").write_text(record.model_dump_json())


Asked = Callable[[Path], Unit]  # a training whose files are in a folder
SOME = {"max": 2}  # any number of workers: shares of a batch may differ
LEVELS = {"student_taps": ["level:0", "level:1"], "teacher_taps": ["level:0", "level:1"]}
FGD = {"name": "fgd", **LEVELS, "alpha": 0.01, "gamma": 0.01, "relation": 0.001}
SP = {"name": "sp", "student_taps": ["image.blocks.0"], "teacher_taps": ["image.blocks.0"]}  # it compares the samples of a batch


def on_labels(method: str | dict[str, Any], **recipe: Any) -> Asked:
    """The transfer set of 300 in batches of 64 leaves a rest, and the 2,000 test images are shared out unevenly by no one."""
    recipe = {"precision": "fp64", "batch_size": 64, **recipe}
    return lambda folder: unit(method, saved_teacher(folder, "fp64"), recipe=recipe)


def on_pixels(method: str | dict[str, Any], **recipe: Any) -> Asked:
    return lambda folder: pixel_unit(method, folder, **recipe, epochs=1)


def on(task: str, method: str | dict[str, Any], student: dict[str, Any] | None = None, **recipe: Any) -> Asked:
    return lambda folder: unit_of(task, method, folder, **({"student": student} if student else {}), recipe=recipe)


def looking_inside(task: str) -> dict[str, Any]:
    """With plain distillation beside it, which on some tasks compares samples."""
    method = {name: value for name, value in EACH_TASK[task].looks_inside.items() if name != "name"}
    return {"name": "fitnet+kd", "fitnet": method}


TOWERS = EACH_TASK["image_text"].student
CASES: dict[str, tuple[Asked, int | dict[str, int]]] = {
    "labels": (on_labels("kd"), 2),
    "labels-batch-coupled": (on_labels({"name": "crd", "negatives": 64}), 2),
    "labels-micro-batches": (on_labels("kd", accumulate=2, clip_grad=0.5), 2),
    "pixels": (on_pixels("kd"), 2),
    "pixels-micro-batches": (on_pixels("label_smoothing", accumulate=3, clip_grad=0.5), 2),
    "pixels-unequal-shares": (on_pixels({"name": "cwd+kd", "kd": {"kd_weight": 0.3}}, batch_size=19), SOME),
    "pixels-batch-coupled": (on_pixels("dist"), 2),
    "boxes": (on("detection", "none"), 2),
    "boxes-micro-batches": (on("detection", "kd", accumulate=3, clip_grad=0.5), 2),
    "boxes-unequal-shares": (on("detection", {"name": "kd", "task_weight": 0.5}, batch_size=11), SOME),
    "boxes-focal": (on("detection", FGD, accumulate=3, clip_grad=0.5), 2),
    "boxes-focal-unequal-shares": (on("detection", FGD, batch_size=11), SOME),
    "boxes-generated": (on("detection", {"name": "mgd", **LEVELS, "masked": 0.0, "alpha": 1e-3}, batch_size=11), SOME),
    "boxes-correlated": (on("detection", {"name": "pkd", **LEVELS}), 2),
    "boxes-by-channel": (on("detection", {"name": "cwd", **LEVELS}, batch_size=11), SOME),
    "answers-micro-batches": (on("multi_label", "kd", accumulate=3, clip_grad=0.5), 2),
    "answers-unequal-shares": (on("multi_label", {"name": "kd", "task_weight": 0.5}, batch_size=11), SOME),
    "pairs": (on("image_text", "none"), 2),
    "pairs-clipped": (on("image_text", "kd", clip_grad=0.5), 2),
    "pairs-unequal-shares": (on("image_text", looking_inside("image_text"), TOWERS, batch_size=11), SOME),
    "pairs-batch-coupled": (on("image_text", SP, TOWERS), 2),
    "pairs-with-others": (on("image_text", {"name": NAMES["Hiding"], "more": 3}), 2),
    "stages": (lambda folder: staged(folder, precision="fp64"), 2),
    **{f"shown-{name}": (partial(shown, method=method, batch_size=63), SOME) for name, method in METHODS.items()},
}


class Both(NamedTuple):
    """A training for one worker, and that for two, which is done."""

    one: Unit
    two: Unit
    folder: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """All cases by the same two processes: starting them takes longer than all that they do."""
    found = {}
    for name, (asked, number) in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        one = asked(folder)
        found[name] = Both(one, Unit.model_validate(one.model_dump() | {"workers": number}), folder)
    trainings = [(both.two.model_dump_json(), both.folder) for both in found.values()]
    torch.multiprocessing.spawn(workers, (2, free_port(), trainings), nprocs=2)
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_workers_give_the_weights_of_one_on_the_joined_batches(trained: dict[str, Both], case: str) -> None:
    one, two, folder = trained[case]
    alone = fit(one, LocalSession(threads=1), layout(folder))
    a, b = load_file(layout(folder).student(one.key)), load_file(layout(folder).student(two.key))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=RELATIVE, atol=1e-12)
    together = RunRecord.model_validate_json((folder / "record.json").read_text())
    assert together.metrics == pytest.approx(alone.metrics)
    assert together.world_size == 2
    for mine, ours in zip(alone.curve, together.curve, strict=True):
        figures = {name: value for name, value in mine.items() if name.startswith(("train_", "val_"))}
        assert {name: ours[name] for name in figures} == pytest.approx(figures, rel=RELATIVE, nan_ok=True)


def shrinking(rank: int, ports: tuple[int, int], text: str, folder: str) -> None:
    """Three workers train until the sixth checkpoint, in the middle of the second epoch; two of them go on."""
    training, checkpoint = Unit.model_validate_json(text), Path(folder) / "checkpoint.pt"
    with joined(rank, 3, ports[0], checkpoint=checkpoint, stop_after=6) as session, pytest.raises(Stopped):
        fit(training, session, layout(Path(folder)))
    if rank == 2:
        return
    with joined(rank, 2, ports[1], checkpoint=checkpoint) as session:
        record = fit(training, session, layout(Path(folder)))
    assert session.places == ["epoch 2 of 2, step 3 of 4, with 2 workers instead of 3"]
    if rank == 0:
        (Path(folder) / "record.json").write_text(record.model_dump_json())


def test_a_training_that_loses_a_worker_ends_with_the_weights_of_one_that_never_had_several(tmp_path: Path) -> None:
    # a batch of 64 is cut into 21, 21 and 22 samples: each must count alike, and rkd must see the joined batch
    one = unit("rkd", saved_teacher(tmp_path, "fp64"), recipe={"precision": "fp64", "batch_size": 64})
    several = Unit.model_validate(one.model_dump() | {"workers": {"min": 1, "max": 3}, "checkpoint_seconds": 0})
    alone = fit(one, LocalSession(threads=1), layout(tmp_path))
    ports = free_port(), free_port()
    torch.multiprocessing.spawn(shrinking, (ports, several.model_dump_json(), str(tmp_path)), nprocs=3)
    a, b = load_file(layout(tmp_path).student(one.key)), load_file(layout(tmp_path).student(several.key))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)
    together = RunRecord.model_validate_json((tmp_path / "record.json").read_text())
    assert together.metrics == pytest.approx(alone.metrics)
    assert (together.worker_counts, together.world_size) == ([3, 2], 2)
    for name in ("train_total", "train_cross_entropy", "val_nll"):
        assert [row[name] for row in together.curve] == pytest.approx([row[name] for row in alone.curve])
    assert together.device_hours is not None
    assert together.train_seconds is not None
    assert 2 * together.train_seconds < together.device_hours * 3600 < 3 * together.train_seconds
