"""Part g: the time between trials is read from what the trials noted, and listing is held against what it stands on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.part import child_environment, kdbench_command
from benchmarks.start import ONE_WORD, gaps


def test_a_gap_lies_between_the_last_measurement_of_a_trial_and_the_next_one_of_its_process() -> None:
    log = "7 10.0 made\n8 10.5 made\n7 11.0 measured\n7 12.0 measured\n8 12.5 measured\n7 12.25 made\n8 14.5 made\n7 15.0 measured\n"
    assert gaps(log) == pytest.approx([0.25, 2.0])


def test_a_process_that_trains_once_has_no_gap() -> None:
    assert gaps("7 10.0 made\n7 11.0 measured\n") == []


def test_listing_methods_imports_little_that_a_command_of_typer_and_rich_does_not_import() -> None:
    """Seconds depend on the machine; what is imported does not, and it is nearly all of what a short command costs."""
    listed = "import sys\nfor name in sys.modules: print(name, file=sys.stderr)"
    one_word = _ended_with(listed, [sys.executable, "-c", ONE_WORD])
    listing = _ended_with(listed, [*kdbench_command("list", "methods")])
    others = {name.partition(".")[0] for name in listing - one_word}
    for_credentials = {"logging", "atexit", "pwd"}  # messages of libraries are logged without them; a user may have no name
    assert others <= {"kdbench", "json", "_json", "shlex", "runpy", "pkgutil"} | for_credentials, others


def _ended_with(statements: str, command: list[str]) -> set[str]:
    """What a Python command prints on stderr where these statements run at its end."""
    if command[1] == "-m":
        start = f"import runpy, sys\nsys.argv = {command[2:]!r}\nrun = lambda: runpy.run_module({command[2]!r}, run_name='__main__')"
    else:
        start = f"run = lambda: exec({command[2]!r}, {{'__name__': '__main__'}})"
    script = f"{start}\ntry:\n    run()\nexcept SystemExit as end:\n    assert not end.code\n{statements}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=child_environment(), check=True)
    assert done.stdout
    return set(done.stderr.split())
