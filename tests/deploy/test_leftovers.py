"""What killed commands leave is named, and cleared away by the next command, but never under a command that runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from kdbench.deploy.leftovers import left_behind
from kdbench.distributed.storage import scratch
from kdbench.experiment import Runtime
from kdbench.storage.layout import Layout
from kdbench.storage.lease import leased
from kdbench.storage.locks import locked
from kdbench.storage.scratch import clear_scratch
from kdbench.storage.working_copy import origin, store_at

REPOSITORY = Path(__file__).parents[2]
ON_A_CLUSTER = Runtime(address="somewhere:6379")
KILLED = """
import os, signal, sys
from pathlib import Path
from kdbench.distributed.storage import files_in, scratch
from kdbench.experiment import Runtime
from kdbench.storage.layout import Layout

places = [scratch(Layout.at(sys.argv[1]), Runtime(address="somewhere:6379"), experiment) for experiment in sys.argv[2:]]
for place in places:
    files_in(place.__enter__()).replace("units/trial/params.json", b"{}")
os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_behind(location: str, *experiments: str) -> None:
    """The scratch of these experiments, of a process that is killed."""
    command = [sys.executable, "-c", KILLED, location, *experiments]
    died = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr


def found(layout: Layout) -> list[str]:
    """The experiments whose scratch is there."""
    address = origin(layout.root)
    names = store_at(address).folders() if address is not None else os.listdir(layout.root)
    return sorted(name.removeprefix(".ray-").rpartition("-")[0] for name in names if name.startswith(".ray-"))


@pytest.fixture(params=["a folder", "an address"])
def layout(request: pytest.FixtureRequest, tmp_path: Path, machine: Callable[[str], Layout]) -> Layout:
    if request.param == "an address":
        return machine("here")
    (tmp_path / "results").mkdir()
    return Layout(tmp_path / "results")


def test_the_next_command_deletes_the_scratch_of_killed_ones_and_of_no_other(layout: Layout) -> None:
    leave_behind(layout.location, "mine", "its-own-name", "running")
    assert found(layout) == ["its-own-name", "mine", "running"]
    with ExitStack() as held:
        for name in ("mine", "running"):
            held.enter_context(locked(layout.lock(name)))
            if (address := origin(layout.root)) is not None:
                held.enter_context(leased(store_at(address), name, name, print))
        lines = left_behind(layout.root)
        assert [".ray-its-own-name-" in line for line in lines] == [True]
        assert lines[0].startswith(f"{layout.location}/.ray-its-own-name-")
        clear_scratch(layout, "mine")
        assert found(layout) == ["running"]
        assert left_behind(layout.root) == []
    assert [".ray-running-" in line for line in left_behind(layout.root)] == [True]


def test_scratch_that_names_no_experiment_stays_while_any_other_command_runs(tmp_path: Path) -> None:
    """As older versions named it."""
    layout = Layout(tmp_path)
    old = tmp_path / ".ray-ab_cd123"
    old.mkdir()
    with locked(layout.lock("mine")):
        with locked(layout.lock("other")):
            clear_scratch(layout, "mine")
            assert old.exists()
        clear_scratch(layout, "mine")
        assert not old.exists()


def test_scratch_is_gone_when_its_command_ends(layout: Layout) -> None:
    with scratch(layout, ON_A_CLUSTER, "mine"):
        pass
    assert found(layout) == []


def test_what_is_no_results_folder_holds_nothing(tmp_path: Path) -> None:
    assert left_behind(tmp_path / "nowhere") == []
    assert not (tmp_path / "nowhere").exists()
