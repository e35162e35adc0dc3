"""Searches and finals through Ray: what ends how, what is on record, and what a dead process costs."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import optuna
import pytest
import ray.train
import torch
from mlflow import MlflowClient
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file

from kdbench.benchmark import emptying
from kdbench.benchmark.pair import FIRST_CANDIDATE_SEED, TRIAL_SEED
from kdbench.benchmark.run import Summary, run
from kdbench.benchmark.watch import Phase, Unwatched
from kdbench.boards.leaderboard import boards
from kdbench.data.shapes import shapes
from kdbench.data.sources import Source
from kdbench.distributed.cluster import slots_of
from kdbench.distributed.train import WorkerFailed, _to_tune, lost_peer, train_with_workers
from kdbench.distributed.tune import _Desk
from kdbench.experiment import Experiment, Runtime, Unit
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.storage.layout import Layout
from kdbench.tracking import MlflowTracker, NoTracker, Tracker, tracking_uri
from kdbench.training.work import ENDING, Ending, pack_death, pack_ending, pack_epoch, pack_resumed
from tests.each_task import EACH_TASK
from tests.training.units import unit as training

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray")]

TASK = {"name": "classification", "data": "fashion_mnist", "transfer_size": 200, "val_size": 200}
STUDENT = {"name": "tests.training.units:smooth_net"}
RECIPE = {"epochs": 4, "batch_size": 50, "lr": 0.1, "precision": "fp32", "memory_format": "contiguous", "compile": False}
TEACHER = {"model": {"name": "tiny_cnn", "width": 6}, "recipe": {"epochs": 1, "batch_size": 500, "weight_decay": 5e-4}}
WILD = RECIPE | {"weight_decay": 1.0}  # diverges where the learning rate is in the thousands


def experiment(**parts: Any) -> Experiment:
    base = {"name": "test", "task": TASK, "students": [STUDENT], "methods": ["none"], "recipe": RECIPE, "seeds": 2}
    parts = base | parts
    return Experiment.model_validate({"control_seeds": parts["seeds"], **parts})


def also_lr(low: float, high: float) -> dict[str, Any]:
    return {"recipe.lr": {"low": low, "high": high, "log": True}}


class Watch(Unwatched):
    """Remembers what ran."""

    def __init__(self) -> None:
        self.records: list[tuple[Unit, RunRecord]] = []
        self.notes: list[str] = []

    def finished(self, unit: Unit, record: RunRecord) -> None:
        self.records.append((unit, record))

    def note(self, text: str) -> None:
        self.notes.append(text)


class Ran(NamedTuple):
    folder: Path
    watch: Watch
    summary: Summary

    @property
    def finals(self) -> list[RunRecord]:
        return sorted(ResultStore(self.folder).scan(role="final"), key=lambda record: (record.label, record.seed))


def run_in(folder: Path, of: Experiment, tracker: Tracker | None = None) -> Ran:
    watch = Watch()
    return Ran(folder, watch, run(of, folder, watch, tracker or NoTracker()))


def studies(folder: Path) -> dict[str, list[FrozenTrial]]:
    """The trials of every study of a results folder."""
    found = {}
    for journal in (folder / "studies").glob("*.journal"):
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
        found[journal.stem] = optuna.load_study(study_name=None, storage=storage).trials
    return found


# --- one search, looked at from all sides ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(ray: None, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two methods, eight trials each, of learning rates from none to far too high; half of the trials go on at each rung.

    One trial at a time: which of them a rung stops then follows from their numbers, and not from who reports first.
    """
    folder = tmp_path_factory.mktemp("searched")
    search = {"trials": 8, "sampler": "random", "reduction": 2, "grace_epochs": 1, "also": also_lr(1e-4, 1e4)}
    of = experiment(teacher=TEACHER, methods=["none", "kd"], recipe=WILD, search=search, runtime={"concurrent": 1})
    return run_in(folder, of, MlflowTracker(tracking_uri(folder), of.name))


def test_every_method_has_exactly_the_trials_that_were_asked_for(searched: Ran) -> None:
    trials = studies(searched.folder)
    assert [len(of_one) for of_one in trials.values()] == [8, 8]  # `none` is searched like any other
    assert {trial.state for of_one in trials.values() for trial in of_one} == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    assert [of_one[0].params["recipe.lr"] for of_one in trials.values()] == [0.1, 0.1]
    ran = [(unit.method.label, unit.number) for unit, _ in searched.watch.records if unit.role == "trial"]
    assert sorted(ran) == [(label, number) for label in ("kd", "none") for number in range(8)]


def test_a_trial_that_was_stopped_early_is_pruned_with_its_intermediate_values(searched: Ran) -> None:
    stopped = [trial for trials in studies(searched.folder).values() for trial in trials if trial.state == TrialState.PRUNED]
    shown = {unit.number: record for unit, record in searched.watch.records if record.status == "stopped"}
    assert stopped
    for trial in stopped:
        assert sorted(trial.intermediate_values) == list(range(1, len(trial.intermediate_values) + 1))
        assert len(trial.intermediate_values) in (1, 2)  # the rungs of four epochs
        assert trial.user_attrs["epochs"] == len(trial.intermediate_values)
        assert trial.user_attrs["seconds"] > 0
    assert all(row.keys() == record.curve[0].keys() and "val_accuracy" in row for record in shown.values() for row in record.curve)
    assert not any("time_total_s" in row for record in shown.values() for row in record.curve)  # Ray's own measures stay Ray's


def test_a_finished_trial_has_the_value_of_its_last_epoch(searched: Ran) -> None:
    for trials in studies(searched.folder).values():
        for trial in trials:
            if trial.state == TrialState.COMPLETE:
                assert sorted(trial.intermediate_values) == [1, 2, 3, 4]
                assert trial.value == trial.intermediate_values[4]


def test_a_trial_that_diverges_is_failed_with_its_reason_and_the_sweep_goes_on(searched: Ran) -> None:
    failed = [trial for trials in studies(searched.folder).values() for trial in trials if trial.state == TrialState.FAIL]
    assert failed
    assert all("the loss became" in trial.user_attrs["reason"] and "(lr " in trial.user_attrs["reason"] for trial in failed)
    assert [record.status for record in searched.finals] == ["ok"] * 4
    assert searched.summary.failures == ()


def test_the_tuned_parameters_are_one_of_the_best_trials_and_the_finals_have_them(searched: Ran) -> None:
    trials = studies(searched.folder)
    for record in searched.finals:
        best = sorted((trial for trial in trials[record.study_id or ""] if trial.state == TrialState.COMPLETE), key=lambda t: -t.value)[:2]
        assert record.recipe["lr"] in [trial.params["recipe.lr"] for trial in best]
        assert record.trials == 8


def test_the_seeds_of_the_finals_were_never_used_before(searched: Ran) -> None:
    seeds: dict[str, set[int]] = {}
    for unit, _ in searched.watch.records:
        seeds.setdefault(unit.role, set()).add(unit.seed)
    assert seeds["final"] == {0, 1}
    assert seeds["trial"] == {TRIAL_SEED}
    assert seeds.get("candidate", {FIRST_CANDIDATE_SEED}) == {
        FIRST_CANDIDATE_SEED
    }  # how many trials ASHA leaves to check depends on their timing


def test_only_finals_saw_the_test_set(searched: Ran) -> None:
    for unit, record in searched.watch.records:
        assert (record.test_metric is not None) == (unit.role in ("final", "teacher"))


def test_mlflow_shows_the_search_as_a_tree_in_which_nothing_runs(searched: Ran) -> None:
    client = MlflowClient(tracking_uri=tracking_uri(searched.folder))
    runs = client.search_runs([client.get_experiment_by_name("test").experiment_id], max_results=1000)
    by_parent: dict[str | None, list[Any]] = {}
    for entry in runs:
        by_parent.setdefault(entry.data.tags.get("mlflow.parentRunId"), []).append(entry)
    parents = {entry.info.run_name.split(" ")[0]: entry for entry in by_parent[None]}
    assert parents.keys() == {"teacher", "none", "kd"}
    for label in ("none", "kd"):
        children = by_parent[parents[label].info.run_id]
        roles = Counter(entry.data.tags["kdbench.role"] for entry in children)
        assert roles == Counter(unit.role for unit, _ in searched.watch.records if unit.role != "teacher" and unit.method.label == label)
        trials = studies(searched.folder)[next(record.study_id or "" for record in searched.finals if record.label == label)]
        alone = sum(trial.state == TrialState.COMPLETE for trial in trials) == 1  # which depends on when ASHA hears of whom
        assert (roles["trial"], roles["candidate"], roles["final"]) == (8, 0 if alone else 2, 2)
        for entry in children:
            assert entry.info.status == ("FAILED" if entry.data.tags["kdbench.status"] == "failed" else "FINISHED")
    assert not [entry for entry in runs if entry.info.status == "RUNNING"]
    assert {entry.data.params["seed"] for entry in runs if entry.data.tags.get("kdbench.role") == "final"} == {"0", "1"}
    final = next(entry for entry in runs if entry.info.run_id == searched.finals[0].mlflow_run_id)
    assert [point.step for point in client.get_metric_history(final.info.run_id, "val_accuracy")] == [1, 2, 3, 4]
    stopped = next(entry for entry in runs if entry.data.tags.get("kdbench.status") == "stopped")
    assert client.get_metric_history(stopped.info.run_id, "val_accuracy")


def test_a_finished_search_is_not_searched_again(searched: Ran) -> None:
    search = {"trials": 8, "sampler": "random", "reduction": 2, "grace_epochs": 1, "also": also_lr(1e-4, 1e4)}
    again = run_in(searched.folder, experiment(teacher=TEACHER, methods=["none", "kd"], recipe=WILD, search=search))
    assert again.summary.trained == 0
    assert again.watch.records == []


# --- searches that go wrong ------------------------------------------------------------------------------------------


def test_a_method_all_of_whose_trials_fail_is_on_the_board_as_failed(tmp_path: Path) -> None:
    search = {"trials": 2, "sampler": "random", "top_k": 1, "also": also_lr(1e3, 1e4)}
    ran = run_in(tmp_path, experiment(recipe=RECIPE | {"lr": 1e3, "weight_decay": 1e4}, search=search))
    assert [record.status for record in ran.finals] == ["failed", "failed"]
    assert all("all 2 trials failed; the first: none trial 0: the loss became" in (record.failure or "") for record in ran.finals)
    assert len(ran.summary.failures) == 2
    (board,) = boards(ran.finals, [])
    assert (board.rows[0].label, board.rows[0].failed) == ("none", 2)


def test_a_trial_whose_process_is_killed_goes_on_in_another(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    mark = tmp_path / "kill"
    mark.write_text(str(os.getpid()))
    student = {"name": "tests.distributed.models:fragile", "mark": str(mark), "step": 9}  # in the third epoch of four steps
    search = {"trials": 3, "sampler": "random", "scheduler": "none", "top_k": 1, "also": also_lr(0.01, 0.3)}
    of = experiment(students=[student], search=search, seeds=1, runtime={"checkpoint_seconds": 0})
    ran = run_in(tmp_path / "killed", of)
    assert not mark.exists()
    (trials,) = studies(ran.folder).values()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert [sorted(trial.intermediate_values) for trial in trials] == [[1, 2, 3, 4]] * 3
    assert ran.summary.failures == ()
    undisturbed = run_in(tmp_path / "undisturbed", of)
    (others,) = studies(undisturbed.folder).values()
    assert [trial.intermediate_values for trial in trials] == [trial.intermediate_values for trial in others]
    assert [record.metrics for record in ran.finals] == [record.metrics for record in undisturbed.finals]
    assert [message.split(":")[1] for message in caplog.messages] == [" its process died; another one goes on with it"]
    assert capfd.readouterr() == ("", "")  # a death that was made good is worth one line


class Killer(Watch):
    """Kills processes that trained, right after each trial that ended: those that left a note of themselves since the last time.

    A process in the middle of its trial is killed with them twice and no more: a third death would be one too many for that trial.
    """

    def __init__(self, marks: Path) -> None:
        super().__init__()
        self.marks, self.killed, self.ended, self.interrupted = marks, 0, 0, 0

    def progress(self, phase: Phase, done: int, total: int) -> None:
        if phase != "search" or done == self.ended:
            return
        ended, self.ended = done - self.ended, done
        notes = list(self.marks.iterdir())
        evaluated = [note for note in notes if note.read_text()]
        for note in notes:
            if note not in evaluated or len(evaluated) > ended:  # which of those that were evaluated have ended too is not known then
                if self.interrupted == 2:
                    continue
                self.interrupted += 1
            if int(note.name) != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(int(note.name), signal.SIGKILL)
                    self.killed += 1
            note.unlink()


def between_trials(notes: Path, trials: int, sampler: str, concurrent: int) -> Experiment:
    notes.mkdir(exist_ok=True)
    search = {"trials": trials, "sampler": sampler, "scheduler": "none", "top_k": 1, "also": also_lr(0.01, 0.3)}
    return experiment(
        task={"name": "classification", "data": {"name": "shapes", "size": 28, "train": 60, "test": 20, "target": "class"}, "val_size": 20},
        students=[{"name": "tests.distributed.models:noted", "folder": str(notes), "label": "noted"}],
        recipe=RECIPE | {"epochs": 1, "batch_size": 20},
        search=search,
        seeds=1,
        runtime={"concurrent": concurrent},
    )


@pytest.mark.nodes  # some minutes
@pytest.mark.timeout(460)
def test_a_process_killed_between_any_two_trials_changes_nothing_of_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune uses it for the next trial, of which none has begun when it dies. TPE draws from what ended, so it tells the order too."""
    killer, of = Killer(tmp_path / "notes"), between_trials(tmp_path / "notes", trials=21, sampler="tpe", concurrent=1)
    summary = run(of, tmp_path / "killed", killer)
    assert killer.killed >= 20
    assert summary.failures == ()
    monkeypatch.setattr(emptying, "needs_ray", lambda *_: False)
    run(of, tmp_path / "undisturbed", Watch())
    (trials,), (others,) = (studies(tmp_path / name).values() for name in ("killed", "undisturbed"))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert [(trial.params, trial.value) for trial in trials] == [(trial.params, trial.value) for trial in others]
    assert [unit.number for unit, _ in killer.records if unit.role == "trial"] == [*range(21)]


@pytest.mark.timeout(200)
def test_processes_killed_between_trials_of_several_slots_lose_no_trial(tmp_path: Path) -> None:
    """The one that ended waits for its next trial; the other one is in the middle of its own."""
    killer, of = Killer(tmp_path / "notes"), between_trials(tmp_path / "notes", trials=6, sampler="random", concurrent=2)
    assert run(of, tmp_path / "killed", killer).failures == ()
    assert killer.killed >= 2
    (trials,) = studies(tmp_path / "killed").values()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 6
    assert sorted(unit.number or 0 for unit, _ in killer.records if unit.role == "trial") == [*range(6)]


@pytest.mark.timeout(200)
def test_a_trial_whose_process_dies_at_once_is_given_up_after_three_and_tried_again_by_the_next_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    mark = tmp_path / "kill"
    mark.write_text(str(os.getpid()))
    student = {"name": "tests.distributed.models:fragile", "mark": str(mark), "step": 0, "for_good": True}
    search = {"trials": 3, "sampler": "random", "scheduler": "none", "top_k": 1, "also": also_lr(0.01, 0.3)}
    of = experiment(students=[student], recipe=RECIPE | {"epochs": 1}, search=search, seeds=1, runtime={"concurrent": 1})
    given_up = run_in(tmp_path / "killed", of)
    assert given_up.summary.failures == (
        "none trial 0: its process died 3 times without an epoch in between; is there enough memory? The same command tries again",
    )
    assert [message.split(":")[1] for message in caplog.messages] == [" its process died; another one goes on with it"] * 2
    assert (given_up.watch.records, given_up.finals) == ([], [])
    assert capfd.readouterr() == ("", "")
    mark.unlink()
    ran, undisturbed = run_in(tmp_path / "killed", of), run_in(tmp_path / "undisturbed", of)
    assert ran.summary.failures == ()
    (trials,), (others,) = studies(ran.folder).values(), studies(undisturbed.folder).values()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert [(trial.params, trial.value) for trial in trials] == [(trial.params, trial.value) for trial in others]
    assert [record.metrics for record in ran.finals] == [record.metrics for record in undisturbed.finals]


def test_several_objectives_keep_the_pareto_front(tmp_path: Path) -> None:
    search = {
        "trials": 4,
        "sampler": "nsgaii",
        "scheduler": "none",
        "top_k": 1,
        "objectives": ["train_seconds", "nll"],
        "also": {"recipe.batch_size": [20, 50], **also_lr(0.01, 0.3)},
    }
    ran = run_in(tmp_path, experiment(search=search, seeds=1))
    (trials,) = studies(ran.folder).values()
    by_number = {unit.number: record for unit, record in ran.watch.records if unit.role == "trial"}
    for trial in trials:
        record = by_number[trial.number]
        assert trial.values == [record.val_metric, record.train_seconds, record.curve[-1]["val_nll"]]
    front = [t for t in trials if not any(u.values[0] >= t.values[0] and u.values[1:] < t.values[1:] and u is not t for u in trials)]
    assert ran.finals[0].recipe["lr"] in [trial.params["recipe.lr"] for trial in front]


# --- several workers -------------------------------------------------------------------------------------------------

FP64 = RECIPE | {"epochs": 2, "precision": "fp64"}


def weights_of(ran: Ran) -> dict[str, torch.Tensor]:
    (record,) = ran.finals
    return load_file(ran.folder / (record.artifacts_uri or ""))


def of_task(task: str) -> dict[str, Any]:
    """What an experiment says of data, teacher, student and recipe; `labels` is the one of the other tests."""
    if task == "labels":
        return {"teacher": TEACHER, "recipe": FP64}
    tiny = EACH_TASK[task]
    teacher = {"model": tiny.teacher, "recipe": {"epochs": 1}}
    return {"task": tiny.task, "students": [tiny.smooth], "teacher": teacher, "recipe": FP64 | {"batch_size": 12, "lr": 0.01}}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("task", ["labels", *(pytest.param(task, marks=pytest.mark.nodes) for task in ("detection", "image_text"))])
def test_two_workers_search_without_deadlock_and_end_with_the_weights_of_one(tmp_path: Path, task: str) -> None:
    search = {"trials": 2, "sampler": "random", "scheduler": "none", "top_k": 1, "also": also_lr(0.01, 0.1)}
    asked = of_task(task)
    two = experiment(**asked, methods=["kd"], search=search, seeds=1, runtime={"workers": 2})
    ran = run_in(tmp_path / "two", two)
    assert ran.summary.failures == ()
    (trials,) = studies(ran.folder).values()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert [sorted(trial.intermediate_values) for trial in trials] == [[1, 2]] * 2
    (final,) = ran.finals
    (taught,) = ResultStore(ran.folder).scan(role="teacher")
    assert (final.world_size, taught.world_size, len(final.devices)) == (2, 2, 2)

    weights = Layout(ran.folder).teacher(taught.unit_key)
    recipe = asked["recipe"] | {"lr": final.recipe["lr"]}
    given = {"model": asked["teacher"]["model"], "weights": str(weights)}
    method = {"name": "kd", **{name: value for name, value in final.params.items() if not name.startswith("recipe.")}}
    alone = run_in(tmp_path / "one", experiment(**asked | {"teacher": given, "recipe": recipe}, methods=[method], seeds=1))
    one, joined = weights_of(alone), weights_of(ran)
    for name in one:
        torch.testing.assert_close(joined[name], one[name], rtol=1e-6, atol=1e-9)  # the cached teacher's outputs are float32
    assert alone.finals[0].world_size == 1


@pytest.mark.timeout(300)
def test_one_worker_that_fails_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    student = {"name": "tests.distributed.models:broken", "rank": 1, "step": 5}
    ran = run_in(tmp_path, experiment(students=[student], recipe=RECIPE | {"epochs": 2}, seeds=1, runtime={"workers": 2}))
    assert len(ran.summary.failures) == 1
    assert "none seed 0: ValueError: a mistake of this worker's" in ran.summary.failures[0]
    assert ran.finals == []


def where_the_command_was_started(file: Path) -> Source:
    """Data that need a file, named relative to the working directory."""
    assert file.is_file(), f"{Path.cwd()} is another folder"
    return shapes(train=60, test=20, target="class")


def test_a_relative_path_means_the_same_inside_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    experiment = Experiment.model_validate(
        {
            "name": "relative",
            "task": {"name": "classification", "data": {"name": f"{__name__}:where_the_command_was_started", "file": "pyproject.toml"}},
            "students": [{"name": "tiny_cnn", "width": 2}],
            "methods": ["none"],
            "recipe": {"epochs": 1, "batch_size": 10, "precision": "fp32", "memory_format": "contiguous", "compile": False},
            "search": {"trials": 1, "sampler": "random", "scheduler": "none", "also": {"recipe.lr": {"low": 0.01, "high": 0.2}}},
            "seeds": 1,
        }
    )
    assert run(experiment, tmp_path, Unwatched()).failures == ()


def test_trials_shorter_than_the_start_of_a_process_still_use_every_slot(tmp_path: Path) -> None:
    notes = tmp_path / "processes"
    notes.mkdir()
    student = {"name": "tests.distributed.models:noted", "folder": str(notes), "label": "noted"}
    search = {"trials": 6, "sampler": "random", "scheduler": "none", "top_k": 1, "also": also_lr(0.01, 0.2)}
    short = RECIPE | {"epochs": 1}
    assert run(experiment(students=[student], recipe=short, search=search, seeds=1), tmp_path / "results", Unwatched()).failures == ()
    assert len({int(path.name) for path in notes.iterdir()} - {os.getpid()}) == 2


@pytest.mark.parametrize(
    ("runtime", "nodes", "concurrent"),
    [
        ({}, [{"CPU": 8}], 8),
        ({"cpus_per_worker": 3}, [{"CPU": 8}], 2),
        ({"concurrent": 3}, [{"CPU": 8}], 3),
        ({"concurrent": 30}, [{"CPU": 8}], 8),
        ({"concurrent": 30, "address": "auto"}, [{"CPU": 8}], 30),  # a cluster may grow
        ({"address": "auto"}, [{"CPU": 64, "GPU": 4}], 4),
        ({"address": "auto", "gpus_per_worker": 0}, [{"CPU": 64, "GPU": 4}], 64),
        ({"address": "auto", "gpus_per_worker": 0.25}, [{"CPU": 64, "GPU": 4}], 16),
        ({"gpus_per_worker": 0.6}, [{"CPU": 64, "GPU": 4}], 4),  # no worker has parts of two GPUs
        ({"gpus_per_worker": 0.1}, [{"CPU": 64, "GPU": 1}], 10),
        ({"gpus_per_worker": 1, "workers": 2}, [{"CPU": 64, "GPU": 4}], 2),
        ({"workers": 4}, [{"CPU": 2}], 1),
        ({"address": "auto", "cpus_per_worker": 3}, [{"CPU": 4}, {"CPU": 4}, {"object_store_memory": 1}], 2),  # 8 CPUs, but not 6 in a row
        ({"address": "auto", "workers": 2, "cpus_per_worker": 3}, [{"CPU": 4}, {"CPU": 4}], 1),  # one training on two nodes
        ({"address": "auto", "workers": {"min": 1, "max": 4}}, [{"CPU": 4}, {"CPU": 5}], 2),
        ({"address": "auto", "workers": {"min": 1, "max": 8}}, [{"CPU": 4}], 1),
        ({"address": "auto", "gpus_per_worker": 1}, [{"CPU": 2, "GPU": 8}, {"CPU": 8}], 2),
    ],
)
def test_as_many_trainings_run_at_once_as_fit(runtime: dict[str, Any], nodes: list[dict[str, float]], concurrent: int) -> None:
    assert slots_of(Runtime.model_validate(runtime), nodes).concurrent == concurrent


def test_a_trial_that_only_waits_for_its_workers_keeps_no_cpu_from_them() -> None:
    assert slots_of(Runtime(cpus_per_worker=2, gpus_per_worker=0.5), []).trial_resources == {"CPU": 2, "GPU": 0.5}
    for workers in (2, {"min": 1, "max": 2}):
        assert slots_of(Runtime.model_validate({"workers": workers}), []).trial_resources.keys() == {"memory"}


class Told:
    """A queue of one unit that remembers what it is told."""

    def __init__(self, of: Unit) -> None:
        self.unit: Unit | None = of
        self.crashes: list[tuple[str, bool]] = []
        self.done = False

    def next(self) -> Unit | None:
        unit, self.unit = self.unit, None
        return unit

    def report(self, unit: Unit, metrics: Any) -> bool:
        return False

    def resumed(self, unit: Unit, place: str) -> None:
        pass

    def finish(self, unit: Unit, record: RunRecord) -> None:
        raise AssertionError("nothing is finished here")

    def crash(self, unit: Unit, reason: str, died: bool = False) -> None:
        self.crashes.append((reason, died))


class Trials:
    """What Tune tells the desk of trials whose process dies, one trial after the other."""

    def __init__(self, concurrent: int = 1) -> None:
        self.work = Told(training())
        self.desk = _Desk(cast(Any, self.work), Layout(Path()), concurrent)
        self.count = 0

    def dies(self, *reports: dict[str, Any], begun: bool = True) -> bool:
        """Whether another one takes the unit up."""
        self.count += 1
        trial = f"trial {self.count}"
        assert self.desk.next(trial) is not None
        if begun:
            self.desk.begin(trial)
        for report in reports:
            self.desk.report(trial, report)
        self.desk.finish(trial, crashed=True)
        return not self.work.crashes


def test_only_deaths_without_an_epoch_in_between_count() -> None:
    """A node may be lost every hour of a week; a training that dies at its first step is given up soon."""
    trials = Trials()
    for epoch in range(1, 9):
        assert trials.dies(pack_resumed("epoch 1 of 9"))
        assert trials.dies(pack_epoch({"epoch": float(epoch)}))
    assert trials.dies(pack_epoch({"epoch": 8.0}))  # the same one again is no progress
    assert not trials.dies()
    [(reason, died)] = trials.work.crashes
    assert "its process died 3 times without an epoch in between" in reason
    assert died


def test_a_process_that_dies_before_it_takes_a_unit_up_is_no_death_of_that_unit() -> None:
    trials = Trials(concurrent=2)
    for _ in range(20):
        assert trials.dies(begun=False)
        assert trials.dies(begun=False)
        assert trials.dies(pack_epoch({"epoch": float(trials.count)}))
    assert trials.dies()
    assert trials.dies(begun=False)
    assert not trials.dies()


def test_processes_that_die_as_they_start_are_given_up_all_the_same() -> None:
    """As many as wait for their next unit may die for another reason; what comes after those can only be a new process."""
    trials = Trials(concurrent=4)
    died = 1
    while trials.dies(begun=False):
        died += 1
    assert died == 4 + 3
    [(reason, gave_up)] = trials.work.crashes
    assert "its process died 3 times before the training began; is there enough memory?" in reason
    assert gave_up


def test_deaths_before_a_training_began_and_deaths_under_way_count_apart() -> None:
    trials = Trials()
    for _ in range(2):
        for _ in range(3):
            assert trials.dies(begun=False)  # the first one waited perhaps
        assert trials.dies()
    for _ in range(3):
        assert trials.dies(begun=False)
    assert not trials.dies()  # the third under way, after nine others
    assert "its process died 3 times without an epoch in between" in trials.work.crashes[0][0]


def test_only_deaths_in_a_row_before_a_training_began_give_it_up() -> None:
    trials = Trials()
    for epoch in range(1, 9):
        for _ in range(3):
            assert trials.dies(begun=False)
        assert trials.dies(pack_epoch({"epoch": float(epoch)}))
    for _ in range(3):
        assert trials.dies(begun=False)
    assert not trials.dies(begun=False)
    assert "its process died 3 times before the training began" in trials.work.crashes[0][0]


def test_a_process_that_dies_after_it_said_how_its_training_ended_costs_nothing() -> None:
    trials = Trials()
    assert not trials.dies(pack_ending(Ending(crash="a mistake in its code")))
    assert trials.work.crashes == [("a mistake in its code", False)]


def test_workers_that_keep_dying_are_given_up_and_one_that_made_a_mistake_is_not_tried_again() -> None:
    sent: list[dict[str, Any]] = []
    reports = SimpleNamespace(put=sent.append)
    callback = _to_tune("kd seed 0", reports)
    death = {0: RuntimeError("Connection closed by peer"), 1: OSError("killed")}
    for _ in range(2):
        callback.after_exception(None, death)
    callback.after_report(None, [pack_epoch({"epoch": 1.0}), {}], None)
    for _ in range(2):
        callback.after_exception(None, death)
    with pytest.raises(WorkerFailed, match="kd seed 0: workers died 3 times without an epoch in between"):
        callback.after_exception(None, death)
    assert sent == [pack_death(), pack_death(), pack_epoch({"epoch": 1.0}), pack_death(), pack_death()]
    mistake = WorkerFailed("its ending")
    with pytest.raises(WorkerFailed) as raised:
        _to_tune("kd seed 0", reports).after_exception(None, {0: RuntimeError("Connection closed by peer"), 1: mistake})
    assert raised.value is mistake


def test_reports_that_wait_when_a_training_fails_reach_tune_before_its_ending(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []

    def slowly(metrics: dict[str, Any]) -> None:
        time.sleep(0.05)
        told.append(metrics)

    class Waiting(queue.Queue[Any]):
        def __init__(self, size: int, actor_options: Any) -> None:
            super().__init__(size)

        def shutdown(self) -> None:
            pass

    class Failing:
        """Workers that make three epochs before Tune has taken up the first; then one of them fails."""

        def __init__(self, *loop: Any, run_config: Any, **options: Any) -> None:
            self.callback = run_config.callbacks[0]

        def fit(self) -> None:
            for epoch in (1.0, 2.0, 3.0):
                self.callback.after_report(None, [pack_epoch({"epoch": epoch})], None)
            raise ray.train.ControllerError(WorkerFailed("its ending"))

    monkeypatch.setattr("ray.util.queue.Queue", Waiting)
    monkeypatch.setattr("ray.train.torch.TorchTrainer", Failing)
    monkeypatch.setattr("ray.tune.report", slowly)
    train_with_workers(training(workers=2), Runtime(workers=2, gpus_per_worker=0), Layout.at(tmp_path), str(tmp_path))
    assert told == [pack_epoch({"epoch": epoch}) for epoch in (1.0, 2.0, 3.0)] + [{ENDING: "its ending"}]


def test_that_another_worker_is_gone_is_no_mistake_of_this_one() -> None:
    assert lost_peer(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40123"))
    assert lost_peer(torch.distributed.DistBackendError("NCCL error"))
    assert not lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_peer(ValueError("gloo"))
