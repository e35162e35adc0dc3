"""The teacher of an experiment: from the results folder, from a file of weights, or trained now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdbench.benchmark.emptying import empty
from kdbench.benchmark.ledger import Ledger
from kdbench.benchmark.networks import Networks, memo_of
from kdbench.benchmark.recall import Recall, weights_of
from kdbench.benchmark.watch import Watch
from kdbench.boards.cautions import chance_caution
from kdbench.distributed.cluster import device_here
from kdbench.errors import RunFailed, UserError
from kdbench.experiment import Experiment, Recipe, TeacherRef, TeacherSpec, Unit, content_hash
from kdbench.methods.build import MethodSpec
from kdbench.models.build import ModelSpec
from kdbench.models.weight_files import check_declared
from kdbench.models.weights import state_sha256
from kdbench.records.record import RunRecord
from kdbench.storage.folder import local_path
from kdbench.storage.layout import Layout
from kdbench.storage.working_copy import fetch, origin
from kdbench.tasks.base import Task
from kdbench.tasks.build import task_facts
from kdbench.tasks.networks import outputs_facts
from kdbench.training.checkpoint import file_sha256, save_weights, write_atomically
from kdbench.training.earlier_keys import Asked, draws_noise, has_dropout
from kdbench.training.evaluate import targets_of
from kdbench.training.keys import given_teacher_key, teacher_protocol
from kdbench.training.outcome import measured_teacher
from kdbench.training.precision import settled
from kdbench.training.session import LocalSession


def ready_teacher(asked: Asked, ledger: Ledger, built: Networks, model: nn.Module, may_train: bool) -> tuple[TeacherRef, str | None]:
    """The teacher, trained, and where the store has its predictions for the test part. Its metric is made known first of all.

    It comes from the results folder or from its weights file, or is trained now. One of another task predicts another test part and is
    measured in another unit: its students are told neither. asked: of the teacher's task.
    """
    experiment, splits, task = asked.experiment, asked.data.splits, built.own
    spec = experiment.teacher
    assert spec is not None
    ledger.watch.progress("teacher", 0, 1)
    asked_recipe, device = experiment.teacher_recipe(), device_here(experiment.runtime)
    memo = memo_of(ledger, experiment.task_of("teacher"), experiment, spec.model, asked_recipe)
    with built.explaining():
        recipe = settled(asked_recipe, model, task.example("teacher"), len(splits.learned_by("teacher")), device, memo)
    unit = teacher_unit(experiment, spec, recipe, task, model)
    fits = partial(_ready_to_train, built, ledger.watch) if may_train else partial(_refuse, experiment, ledger)
    given = _saved(model, ledger.layout.teacher(unit.key)) if spec.weights == "pretrained" else spec.weights
    check_first: Callable[[], None] = built.rehearse if may_train else _nothing
    recall = Recall(asked, ledger)
    record, weights = _given(recall, given, unit, task, check_first) if given else _trained(recall, unit, task, model, fits)
    ledger.watch.progress("teacher", 1, 1)
    other = "" if task is built.task else f" on its own task, {task.name} on {task.data_name}"
    ledger.watch.note(f"teacher {spec.model.label}: test {task.primary} {record.test_metric:.2f}{other}")
    chance = task.chance(targets_of(splits.test)) if record.chance_metric is None else record.chance_metric
    if caution := chance_caution(spec.model.label, record.test_metric, chance, task.higher_is_better):
        ledger.watch.note(f"warning: {caution}")
    assert record.teacher_sha is not None
    reference = _reference(unit, weights, record.teacher_sha, record.teacher_state)
    if not other:
        return reference.model_copy(update={"metric": record.test_metric}), record.predictions_uri
    return reference.model_copy(update={"task": unit.task, "task_facts": content_hash(outputs_facts(task, unit.task))}), None


def _reference(unit: Unit, weights: Path, sha: str, state: str | None) -> TeacherRef:
    """A teacher as its students name it. unit: its training, or what that would have been."""
    recipe = unit.recipe
    return TeacherRef(
        model=unit.student, weights=weights, sha=sha, state=state, precision=recipe.precision, memory_format=recipe.memory_format
    )


def _loaded_state(unit: Unit, weights: Path, task: Task) -> str:
    """What a file of weights is in the teacher's network. Raises UserError where it does not fit."""
    with torch.random.fork_rng(devices=[]):
        return state_sha256(task.build_model(unit.student.model_copy(update={"weights": weights})))


def _ready_to_train(built: Networks, watch: Watch) -> None:
    """Look at what the teacher's training needs. Raises UserError for what can't work."""
    built.rehearse(teacher_too=True)
    built.check_images(watch)


def _refuse(experiment: Experiment, ledger: Ledger) -> None:
    raise UserError(
        f"{experiment.name}: its teacher is not trained yet in {ledger.layout.location}; "
        "train it with kdbench run, or name a file with teacher.weights"
    )


def teacher_unit(experiment: Experiment, spec: TeacherSpec, recipe: Recipe, task: Task, model: nn.Module) -> Unit:
    learned, of_task = task.splits().learned_hash_of("teacher"), experiment.task_of("teacher")
    return Unit(
        role="teacher",
        experiment=experiment.name,
        protocol_hash=teacher_protocol(task_facts(of_task, "teacher"), task.data_name, learned, recipe),
        data_hash=learned,
        task=of_task,
        task_version=task.version,
        student=spec.model,
        student_init=initial_content(spec.model, model),
        method=MethodSpec(name="none", label="teacher"),
        recipe=recipe,
        seed=spec.seed,
        data_seed=experiment.data_seed,
        workers=experiment.runtime.workers,
        checkpoint_seconds=experiment.runtime.checkpoint_seconds,
    )


def initial_content(spec: ModelSpec, model: nn.Module) -> str | None:
    """What a network of `spec` begins with, where that was read from a file."""
    return state_sha256(model) if spec.weights is not None else None


def _trained(recall: Recall, unit: Unit, task: Task, model: nn.Module, check_first: Callable[[], None]) -> tuple[RunRecord, Path]:
    ledger = recall.ledger
    noise, told = draws_noise(has_dropout(model), unit.method), partial(_reloaded, unit, task, ledger.layout)
    record = recall.find(unit, recall.asked.rule.teacher_key(unit), noise=noise, teacher_of=told)
    if record is not None:
        ledger.found_again(unit, record)
        return record, weights_of(record, ledger.layout)
    check_first()
    work = TeacherWork(unit, task, ledger)
    empty(work, recall.asked.experiment, ledger, searching=False)
    assert work.record is not None, "a queue that was emptied without an error has its record"
    return work.record, weights_of(work.record, ledger.layout)


def _saved(pretrained: nn.Module, path: Path) -> Path:
    """timm's weights as they are, in a file like any teacher's, so that they stay what they are."""
    if not fetch(path).exists():
        save_weights(pretrained.state_dict(), path)
    return path


def _nothing() -> None:
    """Nothing is trained, so nothing is rehearsed."""


def _reloaded(unit: Unit, task: Task, layout: Layout, record: RunRecord) -> dict[str, Any]:
    """What a record says of the teacher whose training it is, which takes loading what that left."""
    assert record.teacher_sha is not None
    weights = weights_of(record, layout)
    state = _loaded_state(unit, weights, task)
    return {"teacher_state": state, "teacher_id": _reference(unit, weights, record.teacher_sha, state).identity}


def _given(recall: Recall, path: Path, unit: Unit, task: Task, check_first: Callable[[], None]) -> tuple[RunRecord, Path]:
    ledger = recall.ledger
    weights = existing_weights(path)
    state = _loaded_state(unit, weights, task)  # first: what holds no weights is not read to its end
    sha = file_sha256(weights)
    identity = _reference(unit, weights, sha, state).identity
    key = given_teacher_key(task_facts(unit.task, "teacher"), identity, unit.student.label)
    weights = _reachable(weights, ledger.layout, content_hash([key, sha]))
    told = {"teacher_sha": sha, "teacher_state": state, "teacher_id": identity}
    record = recall.given(unit, key, recall.asked.rule.teacher_key(unit, sha), **told)
    if record is None:
        check_first()
        session = LocalSession(device=device_here(recall.asked.experiment.runtime))
        measured = measured_teacher(unit, weights, session, ledger.layout, key)
        record = ledger.append(unit, measured.model_copy(update=told))
    return record.model_copy(update={"teacher_sha": sha}), weights  # the same tensors may have come in another file


def existing_weights(path: Path) -> Path:
    """Where a file of weights is. Raises UserError where there is none, or no regular file."""
    weights = local_path(path, "teacher.weights").resolve()
    if not weights.exists():
        raise UserError(f"teacher.weights: there is no file {weights}")
    check_declared(weights)
    return weights


def _reachable(weights: Path, layout: Layout, key: str) -> Path:
    """A file of this machine's as all machines find it: where results are at an address, a copy of it goes there."""
    copy_ = layout.teacher(key).with_suffix(weights.suffix)
    if origin(layout.root) is None or weights.is_relative_to(layout.root):
        return weights
    if not fetch(copy_).exists():
        write_atomically(copy_, lambda temporary: temporary.write_bytes(weights.read_bytes()))
    return copy_


class TeacherWork:
    """A queue of one (`training.work.Work`). Without a teacher nothing can go on, so its failure is the run's."""

    def __init__(self, unit: Unit, task: Task, ledger: Ledger) -> None:
        self.unit, self.task, self.ledger = unit, task, ledger
        self.started = False
        self.record: RunRecord | None = None

    @property
    def done(self) -> bool:
        return self.record is not None

    def next(self) -> Unit | None:
        self.started, before = True, self.started
        return None if before else self.unit

    def report(self, unit: Unit, metrics: Mapping[str, float]) -> bool:
        self.ledger.epoch(unit, metrics, self.task.primary)
        return False

    def resumed(self, unit: Unit, place: str) -> None:
        self.ledger.resumed(unit, place)

    def finish(self, unit: Unit, record: RunRecord) -> None:
        if record.status != "ok":
            raise RunFailed(f"{record.failure}; lower teacher.recipe.lr, or set teacher.recipe.clip_grad")
        self.record = self.ledger.append(unit, record, **_reloaded(unit, self.task, self.ledger.layout, record))

    def crash(self, unit: Unit, reason: str, died: bool = False) -> None:
        raise RunFailed(reason)
