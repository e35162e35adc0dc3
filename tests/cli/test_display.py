"""What a run shows while it runs: a small board that grows with every final, and lines where there is no terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from kdbench.cli.display import Display
from kdbench.experiment import Experiment, Unit
from kdbench.records.record import RunRecord
from tests.report.conftest import GAINS, final

EXPERIMENT = Experiment.model_validate({"name": "tiny", "task": {"name": "classification"}, "students": ["tiny_cnn"], "methods": ["none"]})


def unit_of(record: RunRecord) -> Unit:
    return Unit.model_validate(
        {
            "role": "final",
            "experiment": "tiny",
            "protocol_hash": record.protocol_hash,
            "task": {"name": "classification"},
            "student": {"name": "tiny_cnn"},
            "method": {"name": record.method, "label": record.label},
            "recipe": EXPERIMENT.recipe.model_dump(),
            "seed": record.seed,
            "data_seed": 0,
        }
    )


def finals(methods: tuple[str, ...] = ("none", "kd", "dkd"), seeds: int = 2, **fields: Any) -> list[RunRecord]:
    return [final(method, seed, 86 + GAINS[method] + 0.1 * seed, **fields) for method in methods for seed in range(seeds)]


def console(width: int, height: int = 30, terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal, color_system=None)


def shown(display: Display, width: int, height: int = 30) -> list[str]:
    """The lines of the screen as they are now."""
    paper = console(width, height)
    with paper.capture() as captured:
        paper.print(display._screen.get_renderable())
    return [line.rstrip() for line in captured.get().splitlines()]


def show(display: Display, records: list[RunRecord]) -> None:
    display.progress("final", 0, len(records))
    for done, record in enumerate(records, start=1):
        display.finished(unit_of(record), record)
        display.progress("final", done, len(records))


def test_the_board_grows_with_every_final_and_ranks_what_is_complete() -> None:
    with Display(console(100)) as display:
        assert not any("so far" in line for line in shown(display, 100))
        show(display, finals()[:3])
        rows = [line.split() for line in shown(display, 100)]
        assert ["1", "none", "86.05", "±0.64", "-", "2"] in rows
        assert ["-", "kd", "87.80", "+1.80", "1"] in rows
        show(display, finals())
        rows = [line.split() for line in shown(display, 100)]
        assert ["1-3", "dkd", "88.65", "±0.64", "+2.60", "2"] in rows
        assert "2/3" not in str(rows)
        assert any("cifar_resnet56 -> cifar_resnet8, so far" in line for line in shown(display, 100))


def test_what_an_earlier_run_finished_is_on_the_board_too() -> None:
    with Display(console(100)) as display:
        for record in finals(("none", "kd")):
            display.found(record)
        display.found(final("at", 0, 99.0, role="candidate"))
        lines = "\n".join(shown(display, 100))
        assert re.search(r"1-2\s+kd\s+87\.85", lines)
        assert " at " not in lines


@pytest.mark.parametrize("width", [16, 24, 40, 60, 100, 200])
def test_no_width_makes_a_line_run_over(width: int) -> None:
    with Display(console(width)) as display:
        show(display, finals(label="a_method_with_a_name_as_long_as_a_sentence [bold]"))
        show(display, finals())
        lines = shown(display, width)
        assert all(len(line) <= width for line in lines)
        assert sum("final" in line for line in lines) == 1  # the bar keeps to one line
        assert any("6/6" in line for line in lines) or width < 24


@pytest.mark.parametrize("height", [6, 8, 12, 30])
def test_the_screen_is_never_higher_than_the_terminal(height: int) -> None:
    with Display(console(100, height)) as display:
        show(display, finals(tuple(GAINS)))
        lines = shown(display, 100, height)
        assert len(lines) <= height
        more = [int(found[1]) for line in lines if (found := re.search(r"so far \((\d+) more\)", line))]
        assert more == {6: [11], 8: [9], 12: [5], 30: []}[height]


def test_the_board_is_gone_when_the_run_ends_and_only_the_bars_stay() -> None:
    paper = console(100)
    with Display(paper) as display:
        show(display, finals())
    assert isinstance(paper.file, io.StringIO)
    last = paper.file.getvalue().rpartition("final seeds")[2]
    assert "so far" not in last


def test_without_a_terminal_a_line_says_where_the_method_stands() -> None:
    paper = console(200, terminal=False)
    with Display(paper) as display:
        show(display, finals())
    assert isinstance(paper.file, io.StringIO)
    lines = paper.file.getvalue().splitlines()
    assert len(lines) == 6
    assert "; none so far 86.00 over 1 seed, rank 1 of 1" in lines[0]
    assert "; dkd so far 88.65 ±0.64 over 2 seeds, rank 1-3 of 3" in lines[5]
    assert "\x1b" not in paper.file.getvalue()
