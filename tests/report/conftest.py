"""Results to report on: a board of twelve methods with five seeds each, curves and searches."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from kdbench.records.record import RunRecord, new_run_id
from kdbench.records.store import ResultStore
from kdbench.storage.layout import Layout

GAINS = {
    "none": 0.0,
    "label_smoothing": 0.4,
    "kd": 1.8,
    "nkd": 2.4,
    "dkd": 2.6,
    "tf_nkd": 0.6,
    "dist": 2.2,
    "fitnet": 0.9,
    "at": 1.0,
    "crd": 2.0,
    "reviewkd": 2.9,
    "wsld": 1.9,
}
TRIALS = 24
START = datetime(2030, 1, 1, tzinfo=UTC)


def final(method: str, seed: int, value: float | None, **fields: Any) -> RunRecord:
    """A final training of a board that all these records share unless told otherwise."""
    facts: dict[str, Any] = {
        "run_id": new_run_id(),
        "created_at": START + timedelta(minutes=seed),
        "role": "final",
        "status": "ok" if value is not None else "failed",
        "failure": None if value is not None else "the loss became nan in epoch 3",
        "protocol_hash": "a1b2c3d4e5f60718",
        "experiment": "quick",
        "task": "classification",
        "task_version": 1,
        "data": "fashion_mnist",
        "data_hash": "d",
        "split_hash": "s",
        "recipe": {"epochs": 20, "lr": 0.1},
        "global_batch": 128,
        "world_size": 1,
        "precision": "fp32",
        "teacher": "cifar_resnet56",
        "teacher_sha": "f" * 64,
        "teacher_metric": 94.2,
        "student": "cifar_resnet8",
        "method": method,
        "label": method,
        "method_version": 1,
        "params": {"temperature": 4.123456, "form": "kl"},
        "seed": seed,
        "data_seed": 0,
        "primary": "accuracy",
        "val_metric": value,
        "test_metric": value,
        "params_count": 78042,
        "flops": 25_300_000,
        "latency_ms_p50": 0.5,
        "device_hours": 0.1,
        "versions": {"kdbench": "0.1.0", "torch": "2.14.1"},
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "devices": ["cpu"],
        "host_hash": "ab12cd34ef56",
        "config": "name: quick\nstudents: [cifar_resnet8]\nmethods: [none, kd]\n",
    }
    facts |= fields
    facts.setdefault("unit_key", "-".join(str(facts[name]) for name in ("protocol_hash", "teacher", "student", "label", "seed")))
    return RunRecord.model_validate(facts)


def curve(value: float, epochs: int = 20) -> list[dict[str, float]]:
    return [{"epoch": e, "seconds": 1.0 * e, "val_accuracy": value - 12 * math.exp(-e / 3)} for e in range(1, epochs + 1)]


def write_search(folder: Path, study_id: str, trials: int = TRIALS) -> None:
    """A study as a search leaves it: the learning rate decides, every fourth trial is stopped early, the eighth fails."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = Layout(folder).study(study_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        study_name=study_id,
        direction="maximize",
        sampler=optuna.samplers.RandomSampler(seed=1),
    )
    for number in range(trials):
        trial = study.ask()
        rate, temperature = trial.suggest_float("recipe.lr", 0.02, 0.5, log=True), trial.suggest_float("temperature", 1, 8)
        value = 88 - 3 * abs(math.log(rate / 0.1)) - 0.01 * abs(temperature - 4)
        for epoch in (1, 2):
            trial.report(value - 2 + epoch, epoch)
        if number == 7:
            trial.set_user_attr("reason", "the loss became nan")
            study.tell(trial, state=TrialState.FAIL)
        elif number % 4 == 3:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, value)


def write_board(folder: Path, methods: Sequence[str] = tuple(GAINS), seeds: int = 5, searched: bool = True, **fields: Any) -> None:
    """The finals of `methods`, one seed of fitnet failed; crd has no study, as if it had been deleted."""
    rng, store = random.Random(0), ResultStore(folder)
    for method in methods:
        study = f"study-{method}" if searched else None
        if study and method != "crd":
            write_search(folder, study)
        for seed in range(seeds):
            value = round(86 + GAINS[method] + (0.3, -0.2, 0.1, -0.4, 0.2)[seed % 5] + rng.gauss(0, 0.2), 2)
            failed = method == "fitnet" and seed == 3
            facts = {
                "study_id": study,
                "trials": TRIALS if searched else None,
                "sampler": "tpe" if searched else None,
                "space": {"temperature": {}} if searched else None,
                "curve": curve(value),
                "device_hours": 0.05 * (1 + GAINS[method]),
                "latency_ms_p50": 0.5 + 0.01 * len(method),
                "mlflow_run_id": f"{seed:032x}",
            }
            store.append(final(method, seed, None if failed else value, **(facts | fields)))


@pytest.fixture(scope="session")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with the board of twelve methods. Not to be written to."""
    folder = tmp_path_factory.mktemp("twelve")
    write_board(folder)
    return folder
