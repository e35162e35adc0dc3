"""What a finished training leaves: its weights, its test predictions, and a record of how good and how dear it is."""

from __future__ import annotations

import hashlib
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdbench.data.columns import Columns, mapped, rounded, tensors, widened
from kdbench.errors import Diverged, KDBenchError, UserError
from kdbench.experiment import Unit, board_hash, worker_bounds
from kdbench.methods.build import method_code
from kdbench.models.build import model_code
from kdbench.records.bits import packed
from kdbench.records.environment import own_code
from kdbench.records.record import RunRecord, new_run_id
from kdbench.search.space import dotted
from kdbench.storage.layout import Layout
from kdbench.tasks.base import Splits, Task, role_of
from kdbench.tasks.build import build_task, task_code
from kdbench.tasks.networks import rebuilt
from kdbench.training.assembly import Training
from kdbench.training.cache.copies import bring
from kdbench.training.cache.outputs import TEST, cached_test
from kdbench.training.checkpoint import pack_predictions, save_weights, unpack_predictions, write_atomically
from kdbench.training.cost import measure, peak_memory_mb
from kdbench.training.evaluate import check_numbers, predict, targets_of
from kdbench.training.precision import to_device
from kdbench.training.session import Session
from kdbench.training.stages import epochs_by_stage


def finished_record(run: Training, layout: Layout) -> RunRecord:
    """Measure the trained network; for units that are final, write weights and predictions and touch the test set, once.

    Every worker calls it (prediction is shared work); the files are rank 0's.
    """
    unit, task = run.unit, run.task
    model = _deployed(run)
    record = base_record(unit, task, run.splits).model_copy(update=_training_facts(run, model))
    if not unit.evaluates_test:
        return record
    facts = _test_facts(model, unit, task, run.splits, run.session, layout, unit.key)
    if run.session.rank != 0:
        return record
    weights = layout.teacher(unit.key) if unit.role == "teacher" else layout.student(unit.key)
    sha = save_weights(model.state_dict(), weights)
    facts["artifacts_uri"] = str(weights.relative_to(layout.root))
    if unit.role == "teacher":
        facts["teacher_sha"] = sha
    return record.model_copy(update=facts)


def _test_facts(model: nn.Module, unit: Unit, task: Task, splits: Splits, session: Session, layout: Layout, key: str) -> dict[str, Any]:
    """Predict the test set, keep the predictions under `key`, measure quality and cost. All workers predict; rank 0 does the rest."""
    predicted = predict(model, splits.test, session, unit.recipe.precision, task, role_of(unit.role))
    if unit.role == "teacher" and not all(bool(tensor.isfinite().all()) for tensor in tensors(predicted)):
        raise Diverged(f"{unit.title}: its predictions of the test set are not finite")
    check_numbers(predicted, f"{unit.title}: of its predictions of the test set")
    if session.rank != 0:
        return {}
    teacher = _cached_test(unit.teacher.cache) if unit.teacher is not None and unit.teacher.cache is not None else None
    cost = measure(model, task.example(role_of(unit.role)), session.device)
    return {
        **_quality(predicted, teacher, task, splits, layout, key),
        "params_count": cost.params,
        "flops": cost.flops,
        "latency_ms_p50": cost.latency_ms_p50,
        "latency_ms_p95": cost.latency_ms_p95,
        "latency_device": cost.device,
        "latency_batch": cost.batch,
    }


def _quality(predicted: Columns, teacher: Columns | None, task: Task, splits: Splits, layout: Layout, key: str) -> dict[str, Any]:
    """Keep predictions of the test part under `key` and measure them, and how alike they are to the teacher's where these are known."""
    prediction, quality = _as_stored(predicted, targets_of(splits.test), task)
    packed = pack_predictions(prediction, splits.test.index)
    alike = task.agreement(widened(prediction), teacher) if teacher is not None else {}
    where = layout.predictions(key, splits.test_hash)
    write_atomically(layout.root / where, lambda temporary: temporary.write_bytes(packed))
    return {
        "test_metric": quality[task.primary],
        "metrics": quality,
        "primary_scale": _scale(task, splits),
        "samples_right": samples_right(prediction, targets_of(splits.test), task),
        "chance_metric": task.chance(targets_of(splits.test)),
        "nll": quality.get("nll"),
        "ece": quality.get("ece"),
        "agreement": alike.get("agreement"),
        "teacher_kl": alike.get("teacher_kl"),
        "predictions_uri": where,
        "predictions_sha256": hashlib.sha256(packed).hexdigest(),
    }


def samples_right(prediction: Columns, target: Columns, task: Task) -> str | None:
    """A record's bits of which samples are predicted right, from predictions as they are stored."""
    right = task.right(widened(prediction), target)
    return None if right is None else packed(right.cpu().numpy())


def _scale(task: Task, splits: Splits) -> dict[str, float]:
    """What a board has to know of the primary metric on the test part."""
    low, high = task.bounds
    known = {"step": task.step(targets_of(splits.test)), "low": low, "high": high, "smallest_gap": task.smallest_gap}
    return {name: value for name, value in known.items() if value is not None}


def _as_stored(prediction: Columns, target: Columns, task: Task) -> tuple[Columns, dict[str, float]]:
    """Test predictions as the results folder keeps them, and the metrics of these very numbers, so that anyone can derive them again.

    Half precision, unless the task keeps its predictions exactly, or rounding makes a number infinite or changes the primary metric;
    float32 then.
    """
    half, exact = rounded(prediction), mapped(prediction, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    quality = task.metrics(exact, target)
    infinite = any(bool((less.isinf() & more.isfinite()).any()) for less, more in zip(tensors(half), tensors(exact), strict=True))
    if task.kept_exactly or infinite:
        return exact, quality
    of_half = task.metrics(widened(half), target)
    same = of_half[task.primary] == quality[task.primary] or math.isnan(quality[task.primary])
    return (half, of_half) if same else (exact, quality)


def _cached_test(folder: Path) -> Columns | None:
    bring(folder, [TEST])
    return cached_test(folder)


def measured_teacher(unit: Unit, weights: Path, session: Session, layout: Layout, key: str) -> RunRecord:
    """The record, under `key`, of a teacher that was trained elsewhere, measured on the test set.

    Raises UserError where its weights don't fit, or give nan.
    """
    task = build_task(unit.task)
    splits = task.splits()
    try:
        facts = _test_facts(_finished(unit, weights, task, session), unit, task, splits, session, layout, key)
    except Diverged as error:
        raise UserError(f"teacher.weights {weights}: {error}; use weights of a network that was trained without nan") from error
    return base_record(unit, task, splits).model_copy(update={"unit_key": key, **facts})


def measured_again(
    record: RunRecord, unit: Unit, weights: Path, session: Session, layout: Layout, teacher: bytes | None = None
) -> RunRecord:
    """The record of a finished network on the test part as it is now: a new run of the same training, of which nothing is trained.

    Args:
        record: of the training, measured on another test part.
        unit: the training.
        weights: the file that the training left.
        session: where to predict.
        layout: where predictions are kept.
        teacher: the teacher's stored predictions of the new test part; None where they are not known.

    Raises UserError where the weights don't fit.
    """
    task = build_task(unit.task)
    splits = task.splits()
    alike = widened(unpack_predictions(teacher)[0]) if teacher is not None and record.agreement is not None else None
    predicted = predict(_finished(unit, weights, task, session), splits.test, session, unit.recipe.precision, task, role_of(unit.role))
    quality = _quality(predicted, alike, task, splits, layout, record.unit_key)
    teacher_metric = unit.teacher.metric if unit.teacher is not None else None
    return record.model_copy(update={**of_now(unit, splits), **quality, "created_at": datetime.now(UTC), "teacher_metric": teacher_metric})


def of_now(unit: Unit, splits: Splits) -> dict[str, Any]:
    """What a row says of itself and of the data where an earlier one of the same training is taken up again."""
    return {
        "run_id": new_run_id(),
        "protocol_hash": board_hash(unit.protocol_hash, splits.test_hash),
        "data_hash": splits.data_hash,
        "split_hash": splits.hash,
        "learned_hash": splits.learned_hash_of(role_of(unit.role)),
        "test_hash": splits.test_hash if unit.evaluates_test else None,
        "mlflow_run_id": None,
    }


def _finished(unit: Unit, weights: Path, task: Task, session: Session) -> nn.Module:
    """The network of a unit with these weights."""
    model = rebuilt(task, unit.student, weights, role_of(unit.role))
    return to_device(model, unit.recipe.precision, unit.recipe.memory_format, session.device)


def code_of(unit: Unit) -> dict[str, str]:
    """The user's own modules that take part in a training, each with a hash of its code; empty where all is kdbench's or installed."""
    models = [unit.student, *([unit.teacher.model] if unit.teacher is not None else [])]
    tasks = [unit.task, *([unit.teacher.task] if unit.teacher is not None and unit.teacher.task is not None else [])]
    of_tasks, of_models = (thing for task in tasks for thing in task_code(task)), (thing for spec in models for thing in model_code(spec))
    return own_code([*of_tasks, *method_code(unit.method), *of_models])


def failed_record(unit: Unit, reason: str) -> RunRecord:
    """The record of a training that could not be finished, with its reason: the board counts it as the undistilled student."""
    task = build_task(unit.task)
    return base_record(unit, task, task.splits()).model_copy(update={"status": "failed", "failure": reason})


def base_record(unit: Unit, task: Task, splits: Splits) -> RunRecord:
    """What is known of a unit before it is trained."""
    teacher = unit.teacher
    return RunRecord(
        run_id=new_run_id(),
        unit_key=unit.key,
        created_at=datetime.now(UTC),
        role=unit.role,
        protocol_hash=board_hash(unit.protocol_hash, splits.test_hash),
        experiment=unit.experiment,
        task=task.name,
        task_version=task.version,
        data=task.data_name,
        data_hash=splits.data_hash,
        split_hash=splits.hash,
        learned_hash=splits.learned_hash_of(role_of(unit.role)),
        test_hash=splits.test_hash if unit.evaluates_test else None,
        recipe=unit.recipe.model_dump(mode="json"),
        global_batch=unit.recipe.batch_size,
        world_size=worker_bounds(unit.workers)[1],
        precision=unit.recipe.precision,
        teacher=teacher.model.label if teacher else None,
        teacher_sha=teacher.sha if teacher else None,
        teacher_state=teacher.state if teacher else None,
        teacher_id=teacher.identity if teacher else None,
        teacher_metric=teacher.metric if teacher else None,
        student=unit.student.label,
        student_init=unit.student_init,
        method=unit.method.name,
        label=unit.method.label,
        method_version=unit.method_version,
        params=dotted(unit.method.pinned),
        seed=unit.seed,
        data_seed=unit.data_seed,
        code=code_of(unit),
        primary=task.primary,
        higher_is_better=task.higher_is_better,
    )


def _training_facts(run: Training, deployed: nn.Module) -> dict[str, object]:
    """Validation and cost of the training itself."""
    trained, kept = (sum(p.numel() for p in module.parameters()) for module in (run.distiller, deployed))
    recipe, curve = run.unit.recipe, run.curve
    values = [row[f"val_{run.task.primary}"] for row in curve[run.stage.start :]]
    best = max(values) if run.task.higher_is_better else min(values)
    images = run.loader.steps_per_epoch * recipe.batch_size * recipe.epochs
    return {
        "val_metric": best if recipe.weights == "best" else values[-1],
        "curve": curve,
        "stages": epochs_by_stage(run.distiller.method, recipe.epochs, run.unit.method.name) or None,
        "train_seconds": run.seconds,
        "device_hours": run.device_seconds / 3600,
        "world_size": run.session.world_size,
        "worker_counts": run.worker_counts,
        "samples_per_second": images / run.seconds,
        "peak_memory_mb": peak_memory_mb(run.session.device),
        "adapter_params": trained - kept,
        "devices": [torch.cuda.get_device_name(run.session.device) if run.session.device.type == "cuda" else "cpu"]
        * run.session.world_size,
    }


def _deployed(run: Training) -> nn.Module:
    """The network that is kept: the last epoch's weights or the best epoch's, as the recipe says, without what the method had put in."""
    model = run.evaluated
    if run.best is not None:
        model.load_state_dict(run.best)
    return run.distiller.method.export_student(model)


def rederive(record: RunRecord, task: Task, predictions: bytes) -> dict[str, float]:
    """A record's test metrics from its stored predictions. Raises KDBenchError where they are not the ones it was made from."""
    if hashlib.sha256(predictions).hexdigest() != record.predictions_sha256:
        raise KDBenchError(f"{record.predictions_uri}: not the predictions that run {record.run_id} was measured on (its SHA-256 differs)")
    prediction, index = unpack_predictions(predictions)
    test = task.splits().test
    if not torch.equal(index, test.index):
        raise KDBenchError(f"{record.predictions_uri}: predictions of other samples than the test split of {record.data}")
    return task.metrics(widened(prediction), targets_of(test))
