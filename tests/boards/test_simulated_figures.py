"""The figures that docs/statistics.md gives are what its command measures, and keep to what is promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.statistics import (
    BY_SEARCH,
    PLANS,
    SEARCHES,
    SHAPES,
    false_by_search,
    figures,
    of_plan,
    table,
    table_of_plans,
    table_of_searches,
)

PAGE = Path(__file__).parents[2] / "docs" / "statistics.md"
BOARDS = 150


def told() -> dict[tuple[int, int], list[float]]:
    """By seeds and rows, the shares of the page, in per cent."""
    return {(int(cells[0]), int(cells[1])): shares(cells[2:]) for cells in lines_below(next(table(1)))}


def lines_below(titles: str) -> list[list[str]]:
    """The cells of the page's table with these titles."""
    text = PAGE.read_text().partition(titles)[2].lstrip("\n").partition("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in text.splitlines()[1:]]


def shares(cells: list[str]) -> list[float]:
    return [float(cell.rstrip("%")) for cell in cells]


def near(measured: float, said: float, boards: int) -> bool:
    """Within four standard errors of so many boards, those of the page's own thousand included."""
    share = min(max(said, 1.0), 99.0) / 100
    return abs(measured - said) <= 400 * (share * (1 - share) * (1 / boards + 1 / 1000)) ** 0.5


def test_the_page_has_a_row_of_each_shape_under_the_titles_of_the_command() -> None:
    assert tuple(told()) == SHAPES
    assert next(table(1)) in PAGE.read_text()


@pytest.mark.parametrize(("seeds", "rows"), [(3, 6), (3, 12), (5, 6)])
def test_the_figures_of_the_page_are_measured_again(seeds: int, rows: int) -> None:
    one = figures(BOARDS, seeds, rows, seed=1)
    found = (one.false, one.false_uneven, one.shared, one.found, one.found_beside_a_failure)
    for measured, said in zip(found, told()[seeds, rows], strict=True):
        assert near(measured, said, BOARDS)


def test_equal_rows_are_told_apart_on_fewer_boards_than_is_promised() -> None:
    assert all(shares[0] <= 5 for shares in told().values())


def test_plans_of_seeds_are_told_as_they_are_measured() -> None:
    """Seeds until decided, and more for the controls: as often wrong as is promised, and as often right as the page says."""
    told_of = {cells[0]: shares(cells[1:]) for cells in lines_below(next(table_of_plans(1)))}
    assert tuple(told_of) == PLANS
    for plan in (PLANS[0], PLANS[1], PLANS[-1]):
        one, (false, seeds, *found) = of_plan(60, plan, seed=1), told_of[plan]
        assert near(one.false, false, 60)
        assert one.seeds == pytest.approx(seeds, abs=0.6)
        for measured, said in zip(one.found, found, strict=True):
            assert near(measured, said, 60)
    assert all(false <= 5 for false, *_ in told_of.values())


def test_what_one_search_hides_is_told_as_it_is_measured() -> None:
    told_of = {(int(cells[0]), int(cells[1])): shares(cells[2:]) for cells in lines_below(next(table_of_searches(1)))}
    assert tuple(told_of) == SEARCHES
    for searches, finals in ((1, 5), (3, 1)):
        for ratio, said in zip(BY_SEARCH, told_of[searches, finals], strict=True):
            assert near(false_by_search(100, searches, finals, ratio, seed=1), said, 100)
    assert all(share <= 5 for (searches, _), of in told_of.items() if searches > 1 for share in of)
