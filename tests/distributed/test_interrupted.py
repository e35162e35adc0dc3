"""Ctrl-C and SIGTERM in the middle of a search: a quick end, one line, nobody left behind, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState

from tests.listening import descendants

REPOSITORY = Path(__file__).parents[2]
EXPERIMENT = {
    "name": "interrupted",
    "task": {"name": "classification", "data": "fashion_mnist", "transfer_size": 400, "val_size": 200},
    "students": [{"name": "tiny_cnn", "width": 8}],
    "methods": ["none"],
    "recipe": {"epochs": 16, "batch_size": 20, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "search": {
        "trials": 3,
        "sampler": "random",
        "scheduler": "none",
        "top_k": 1,
        "also": {"recipe.lr": {"low": 0.01, "high": 1.0e4, "log": True}},
    },
    "seeds": 1,
    "runtime": {"checkpoint_seconds": 0},
}


def started(folder: Path) -> subprocess.Popen[str]:
    """`kdbench run` in a process group of its own, as a shell starts it."""
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(EXPERIMENT))
    command = [sys.executable, "-m", "kdbench.cli", "run", str(file), "--results", str(folder / "results")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
    )


def trials_in(folder: Path) -> list[FrozenTrial]:
    journals = list((folder / "results" / "studies").glob("*.journal"))
    if not journals or not journals[0].stat().st_size:
        return []
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journals[0])))
    return optuna.load_study(study_name=None, storage=storage).trials


def wait_for_a_trial(folder: Path, process: subprocess.Popen[str], epochs: int) -> None:
    """Until a trial that runs has this many epochs behind it."""
    while process.poll() is None:
        running = [trial for trial in trials_in(folder) if trial.state == TrialState.RUNNING]
        if any(len(trial.intermediate_values) >= epochs for trial in running):
            return
        time.sleep(0.1)
    pytest.fail(f"it ended: {process.communicate()}")


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()}


@pytest.mark.ray
@pytest.mark.nodes
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_an_interrupted_search_ends_with_all_its_processes_and_goes_on(tmp_path: Path) -> None:
    for number, epochs in ((signal.SIGINT, 2), (signal.SIGTERM, 5)):
        process = started(tmp_path)
        wait_for_a_trial(tmp_path, process, epochs)
        workers = descendants(process.pid) - {process.pid}
        assert workers
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # Ctrl-C reaches the whole group
        else:
            process.send_signal(number)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 130
        assert error.strip().splitlines() == [f"Stopped. What is finished is kept; to go on: kdbench {' '.join(process.args[3:])}"]
        deadline = time.monotonic() + 60
        while alive(workers) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not alive(workers)
        assert TrialState.RUNNING in {trial.state for trial in trials_in(tmp_path)}

    process = started(tmp_path)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert error == ""  # nor does anything of Ray's reach those who look at it
    ours = ("search trials ", "final seeds ", "none ")
    lines = out.split("classification on fashion_mnist")[0].splitlines()
    assert [line for line in lines if not line.startswith(ours)] == []
    trials = trials_in(tmp_path)
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.FAIL}
    assert all(len(trial.intermediate_values) == 16 for trial in trials if trial.state == TrialState.COMPLETE)
