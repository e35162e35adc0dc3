"""Methods of somebody's own with stages and with made batches, from a YAML to a verified board: searched, halved, trained and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from kdbench.own_code import TRUST_VARIABLE
from kdbench.records.store import ResultStore
from tests.conftest import Kdbench
from tests.pages import ROOT

EPOCHS, GRACE = 8, 1
LAST_STAGE = 6  # of a trial whose first stage is 0.75 of 8 epochs long, the longest that the search tries
ALSO = "{recipe.epochs: [8, 12], recipe.lr: {low: 0.001, high: 0.5, log: true}}"
EXPERIMENT = f"""
name: staged
task: {{name: classification, data: {{name: shapes, train: 60, test: 20, size: 28, target: class}}, val_size: 20}}
teacher: {{model: {{name: tiny_cnn, width: 4}}, recipe: {{epochs: 1}}}}
students: ["tests.training.own_methods:PlainNet"]
methods:
  - none
  - {{name: "tests.training.own_methods:FreshHead", label: staged}}
recipe: {{epochs: {EPOCHS}, batch_size: 20, lr: 0.05, precision: fp32, memory_format: contiguous}}
search: {{trials: 6, sampler: random, scheduler: asha, grace_epochs: {GRACE}, reduction: 2, top_k: 1, also: {ALSO}}}
seeds: 1
"""


@pytest.mark.nodes  # a minute
@pytest.mark.ray
def test_a_search_stops_no_trial_before_its_last_stage_is_under_way(kdbench: Kdbench) -> None:
    Path("experiment.yaml").write_text(EXPERIMENT)
    planned = kdbench("run", "experiment.yaml", "--dry-run")
    assert planned.code == 0, planned.err
    assert "trains in stages: distil 4 epochs, head 4 epochs" in planned.out
    # in a process of its own, as the Ray that tests share was started before anybody knew where this method is
    command = [sys.executable, "-m", "kdbench.cli", "run", "experiment.yaml", "--results", "results", "--no-mlflow"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    trials = {}
    for journal in Path("results/studies").glob("*.journal"):
        storage = JournalStorage(JournalFileBackend(str(journal)))
        for name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
            trials["share" in study.trials[0].params] = study.trials
    for staged in (False, True):
        assert len(trials[staged]) == 6
    least = {staged: min(len(trial.intermediate_values) for trial in found) for staged, found in trials.items()}
    assert least[False] < LAST_STAGE, "nothing was stopped early, so this test shows nothing"
    for trial in trials[True]:  # longer ones come to their last stage later
        begins = round(trial.params["share"] * trial.params["recipe.epochs"])
        assert len(trial.intermediate_values) >= max(LAST_STAGE, begins) + GRACE
    assert {trial.state for trial in trials[True]} <= {TrialState.COMPLETE, TrialState.PRUNED}

    [final] = [record for record in ResultStore(Path("results")).scan() if record.role == "final" and record.label == "staged"]
    assert final.stages is not None
    epochs = final.recipe["epochs"]
    first = round(final.params["share"] * epochs)
    assert final.stages == {"distil": first, "head": epochs - first}
    assert ["train_itself" in row for row in final.curve] == [epoch >= first for epoch in range(epochs)]
    kdbench.monkeypatch.setenv(TRUST_VARIABLE, "0")  # put back when the test ends: --trust-code sets it in this process
    verified = kdbench("verify", "--results", "results", "--trust-code")
    assert verified.code == 0, verified.out + verified.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"epochs: 8,": "epochs: 1,", "recipe.epochs: [8, 12], ": ""},
            "recipe.epochs: 1 leaves the stage 'distil' of method tests.training.own_methods:FreshHead without an epoch",
        ),
        (
            {"label: staged}": "label: staged, changes: {batch_size: 3}}"},
            "stage 'head': a stage can't change recipe.batch_size",
        ),
        (
            {"label: staged}": "label: staged}\n  - 'tests.training.own_methods:FreshHead+tests.training.own_methods:Broken'"},
            "both train in stages; combine one of them with other methods",
        ),
    ],
)
@pytest.mark.parametrize("option", ["--dry-run", "--no-mlflow"])
def test_stages_that_can_not_be_are_refused_before_anything_is_trained(
    kdbench: Kdbench, change: dict[str, str], said: str, option: str
) -> None:
    text = EXPERIMENT
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    Path("experiment.yaml").write_text(text)
    ended = kdbench("run", "experiment.yaml", "--results", "results", option)
    assert ended.code == 2
    [line] = ended.err.strip().splitlines()
    assert said in line
    assert not list(Path("results").rglob("*.parquet"))
