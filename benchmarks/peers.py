"""Part c: a trial in kdbench against the same trial in torchdistill and with timm's distillation task, as each is commonly used.

kdbench: cached teacher, batches from tensors, the precision that it measures to be fastest. The peers: PIL images through a DataLoader,
the teacher at every step, float32, as their own examples have it. Teacher, student, images, batch size and loss are the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.cache import RESNETS, RESNETS_X4
from benchmarks.part import Bench
from benchmarks.pil_images import PilImages, usual_loader, usual_transform
from benchmarks.report import Goal, Row, at_least, not_measured
from benchmarks.timing import Arm, arm, interleave
from benchmarks.torchdistill_peer import PeerMissing, TorchdistillProcess, peer_python, save_images
from benchmarks.trainings import (
    BIG_TEACHER,
    CPU,
    QUICKSTART,
    ModelPair,
    begun,
    epochs,
    fastest_precision,
    image_task,
    random_teacher,
    unit,
    with_cache,
)
from kdbench.models.inputs import InputSpec
from kdbench.training.assembly import Training
from kdbench.training.teacher import load_teacher

_VIT = {"name": "vit_tiny_patch16_224", "patch_size": 4}
VITS = ModelPair(
    "ViT-tiny of 12 -> 3 blocks, patch 4, 32 px", {**_VIT, "depth": 12}, {**_VIT, "label": "vit_student", "depth": 3}, batch=32
)
PAIRS = ((QUICKSTART, at_least(8)), (BIG_TEACHER, at_least(8)), (RESNETS, at_least(3)), (RESNETS_X4, at_least(5)), (VITS, at_least(2.5)))


def measure(bench: Bench) -> Iterator[Row]:
    """Three kinds of trial side by side, for each pair of models."""
    pairs = bench.pick(quick=(PAIRS[0], PAIRS[2]), usual=PAIRS, full=PAIRS)
    for pair, goal in pairs:
        bench.say(f"peers: {pair.title}")
        what = f"{pair.title}: kdbench / torchdistill, samples/s"
        try:
            yield from _side_by_side(bench, peer_python(bench.kept), pair, what, goal, bench.seconds / len(pairs))
        except PeerMissing as reason:
            yield not_measured(what, str(reason), goal)


def _side_by_side(bench: Bench, python: Path, pair: ModelPair, what: str, goal: Goal, seconds: float) -> Iterator[Row]:
    folder = bench.scratch / pair.title.replace(" ", "_")
    folder.mkdir()
    end = time.monotonic() + seconds
    steps = bench.pick(quick=4, usual=8, full=8)
    task = image_task(pair, pair.batch * steps)
    recipe = fastest_precision(task, pair.student, pair.batch, folder / "student.json") | {"batch_size": pair.batch}
    live = random_teacher(folder, task, pair.teacher, **fastest_precision(task, pair.teacher, pair.batch, folder / "teacher.json"))
    one = unit(task, pair.student, "kd", live, **recipe)
    run = begun(unit(task, pair.student, "kd", with_cache(live, one, folder / "cache"), **recipe))
    few = 2 if pair.batch <= 64 else 1  # the peers' arm is the longer one: fewer steps of it make a round
    said = f"kdbench in {recipe['precision']}, {recipe['memory_format']}, teacher cached; peers in fp32, teacher live"
    with TorchdistillProcess(python, job_of(run, folder), folder) as peer:
        arms = {"kdbench": epochs(run), "torchdistill": peer.steps(few), "timm": _timm(run, few)}
        rounds = interleave(arms, end - time.monotonic())
    yield Row(
        what, rounds.ratio("torchdistill", "kdbench"), goal=goal, wall=rounds.ratio("torchdistill", "kdbench", "wall").median, note=said
    )
    yield Row(
        f"{pair.title}: kdbench / timm LogitDistillationTask, samples/s",
        rounds.ratio("timm", "kdbench"),
        wall=rounds.ratio("timm", "kdbench", "wall").median,
        note=f"kdbench {1 / rounds.seconds('kdbench').median:,.0f} samples a CPU second",
    )


def job_of(run: Training, folder: Path) -> dict[str, Any]:
    """What torchdistill's process has to know to run the same training."""
    recipe, method = run.unit.recipe, run.distiller.method.params.model_dump()
    teacher, spec = run.unit.teacher, _input_spec(run)
    assert teacher is not None
    return {
        "images": str(save_images(folder / "images.npz", run.splits.transfer, run.splits.val)),
        "teacher": teacher.model.model_dump(mode="json", exclude={"weights"}),
        "teacher_weights": str(teacher.weights),
        "student": run.unit.student.model_dump(mode="json", exclude={"weights"}),
        "classes": run.task.info.num_classes,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "crop": recipe.augment.crop,
        "flip": recipe.augment.flip,
        "batch_size": recipe.batch_size,
        "epochs": recipe.epochs,
        "lr": recipe.lr,
        "momentum": recipe.momentum,
        "weight_decay": recipe.weight_decay,
        "task_weight": method["task_weight"],
        "threads": 1,
    }


def _input_spec(run: Training) -> InputSpec:
    spec = run.distiller.student.input_spec
    assert isinstance(spec, InputSpec)
    return spec


def _timm(run: Training, steps: int) -> Arm:
    """timm's task in the plain loop that its documentation shows, over PIL images; seconds a sample."""
    from timm.task import LogitDistillationTask

    teacher_ref, recipe, spec = run.unit.teacher, run.unit.recipe, _input_spec(run)
    assert teacher_ref is not None
    teacher = load_teacher(teacher_ref.model_copy(update={"precision": "fp32", "memory_format": "contiguous"}), run.task, CPU)
    student = run.task.build_model(run.unit.student)
    for model in (teacher, student):  # what timm's task reads off timm's own models
        model.pretrained_cfg = {"mean": spec.mean, "std": spec.std}  # type: ignore[assignment]
        model.num_classes, model.in_chans = run.task.info.num_classes, len(spec.mean)  # type: ignore[assignment]
    weights = run.distiller.method.params.model_dump()
    task = LogitDistillationTask(
        student,
        teacher,
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=weights["kd_weight"],
        task_loss_weight=weights["task_weight"],
        temperature=weights["temperature"],
        verbose=False,
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    part = run.splits.transfer
    transform = usual_transform(part.pixels.shape[-1], recipe.augment.crop, recipe.augment.flip, list(spec.mean), list(spec.std))
    endless = _endless(usual_loader(PilImages(part.pixels, part.labels, transform), recipe.batch_size))

    def some_steps() -> None:
        task.train()
        for _ in range(steps):
            images, labels = next(endless)
            task(images, labels)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    return arm(some_steps, steps * recipe.batch_size)


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader
