"""Hostile files, made from a seed: each ends in one line and exit code 2, in little memory, and leaves nothing behind."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_input.hostile_case import Case
from tests.bad_input.hostile_files import MOST_MEGABYTES, MOST_SECONDS, SEED, Ended, Numbered, all_cases, problems, tried

TIME_LIMIT = 240.0  # seconds: only ends a command that hangs. The script measures the ten seconds that a command may take
CASES = all_cases()
QUICK = 4  # kinds of each group that are tried by every run of the tests


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for all, so that the results that are damaged are made once."""
    folder = tmp_path_factory.mktemp("hostile")
    yield folder
    # Some of it is nested deeper than Python's own `rmtree` can follow, and pytest, which cleans up after three sessions, uses that.
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def first_of_kinds() -> list[Numbered]:
    """One case of some kinds, evenly chosen, of each group."""
    found = []
    for group in dict.fromkeys(case.group for case in CASES):
        firsts = [case for case in CASES if case.group == group and case.turn == 0]
        found += firsts[:: -(-len(firsts) // QUICK)]
    return found


FIRST = first_of_kinds()


def title(case: Numbered) -> str:
    return f"{case.number}-{case.kind}"


def assert_ends_well(case: Numbered, base: Path) -> None:
    made, ended = tried(case, base, SEED, TIME_LIMIT)
    assert list(problems(made, ended, most_seconds=TIME_LIMIT, most_megabytes=2 * MOST_MEGABYTES)) == [], ended


@pytest.mark.parametrize("case", FIRST, ids=title)
def test_a_hostile_file_of_each_group_ends_in_one_line(base: Path, case: Numbered) -> None:
    assert_ends_well(case, base)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in FIRST], ids=title)
def test_every_hostile_file_ends_in_one_line(base: Path, case: Numbered) -> None:
    assert_ends_well(case, base)


def test_there_are_two_hundred_that_end_with_exit_code_2() -> None:
    counted = Counter(case.group for case in CASES)
    assert counted == {"experiment": 60, "archive": 40, "weights": 30, "data": 40, "results": 30, "left out": 10}
    assert [case.number for case in CASES] == list(range(1, 211))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("group", ["experiment", "archive", "weights", "data"])
def test_a_seed_decides_the_files(tmp_path: Path, group: str) -> None:
    case = next(case for case in reversed(CASES) if case.group == group)
    made = {}
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        made[name] = case.made(tmp_path / name, seed), files(tmp_path / name)
    assert made["one"] == made["same"]
    assert made["one"] != made["other"]


WELL = Ended(2, ("kdbench: hostile.yaml: wrong",), 1.0, 20.0, ())


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (WELL, []),
        (WELL._replace(code=1), ["exit code 1, expected 2"]),
        (WELL._replace(lines=()), ["0 lines, expected one", "it does not begin as errors do", "it does not say 'hostile'"]),
        (WELL._replace(lines=(*WELL.lines, "more")), ["2 lines, expected one"]),
        (WELL._replace(lines=("hostile",)), ["it does not begin as errors do"]),
        (WELL._replace(lines=("kdbench: hostile; traceback in /tmp/x",)), ["a traceback"]),
        (WELL._replace(lines=("kdbench: hostile: RecursionError: x",)), ["a fault of the program, RecursionError, and not of the file"]),
        (WELL._replace(lines=("kdbench: hostile " + "x" * 2_000,)), ["a line of 2,017 characters"]),
        (WELL._replace(seconds=MOST_SECONDS + 1), ["11.0 s"]),
        (WELL._replace(megabytes=MOST_MEGABYTES + 1), ["301 MB"]),
        (WELL._replace(seconds=None), ["it was killed before it could say what it took"]),
        (WELL._replace(left=("here/results",)), ["left behind: here/results"]),
        (WELL._replace(stopped="it did not end in 60 s"), ["it did not end in 60 s"]),
    ],
)
def test_what_is_wrong_with_an_end_is_said(ended: Ended, said: list[str]) -> None:
    assert list(problems(Case(("run", "hostile.yaml"), said="hostile"), ended)) == said
