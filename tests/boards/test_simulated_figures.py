"""The figures that docs/statistics.md gives are what its command measures, and keep to what is promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.statistics import SHAPES, figures, table

PAGE = Path(__file__).parents[2] / "docs" / "statistics.md"
BOARDS = 150


def told() -> dict[tuple[int, int], list[float]]:
    """By seeds and rows, the shares of the page, in per cent."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {(int(cells[0]), int(cells[1])): [float(cell.rstrip("%")) for cell in cells[2:]] for cells in lines if cells[0].isdigit()}


def test_the_page_has_a_row_of_each_shape_under_the_titles_of_the_command() -> None:
    assert tuple(told()) == SHAPES
    assert next(table(1)) in PAGE.read_text()


@pytest.mark.parametrize(("seeds", "rows"), [(3, 6), (3, 12), (5, 6)])
def test_the_figures_of_the_page_are_measured_again(seeds: int, rows: int) -> None:
    """Within four standard errors of so many boards, those of the page's own thousand included."""
    one = figures(BOARDS, seeds, rows, seed=1)
    found = (one.false, one.false_uneven, one.shared, one.found, one.found_beside_a_failure)
    for measured, said in zip(found, told()[seeds, rows], strict=True):
        share = min(max(said, 1.0), 99.0) / 100
        assert abs(measured - said) <= 400 * (share * (1 - share) * (1 / BOARDS + 1 / 1000)) ** 0.5


def test_equal_rows_are_told_apart_on_fewer_boards_than_is_promised() -> None:
    assert all(shares[0] <= 5 for shares in told().values())
