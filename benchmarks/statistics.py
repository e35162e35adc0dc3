"""How often a board is wrong, and how often it finds what is there: simulated boards, judged as `kdbench leaderboard` judges real ones.

    python -m benchmarks.statistics
    python -m benchmarks.statistics --boards 200

Each row of a simulated board draws its seeds around its true mean, and a seed moves all rows alike. It prints the tables of
docs/statistics.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kdbench.boards.board import verdict
from kdbench.boards.finals import Finals
from kdbench.boards.simultaneous import better, differences, spreads
from kdbench.boards.standings import Scale, standings
from kdbench.records.plan import Plan
from kdbench.records.record import RunRecord

SHAPES = ((3, 6), (3, 12), (3, 35), (5, 6), (5, 12), (5, 35), (10, 12))  # seeds and rows
FAR = 2 * np.sqrt(2.0)  # two standard deviations of a paired difference, in standard deviations of a row
FAILED = 20.0  # by how many standard deviations a seed that failed is below the others
_BESIDE = "2 sd found beside a failed seed"
SHARED = 0.3  # correlation of two rows over seeds


@dataclass(frozen=True)
class Figures:
    """Per cent of boards.

    false, false_uneven: any verdict against the first row though all rows are equal, with equal spreads and with lognormal ones (standard
    deviation of the logarithm 0.5). shared: all rows may be the best where they are equal. found: a difference of two standard deviations
    is found. found_beside_a_failure: the same where a seed of another row failed.
    """

    seeds: int
    rows: int
    false: float
    false_uneven: float
    shared: float
    found: float
    found_beside_a_failure: float


def simulated(generator: np.random.Generator, rows: int, seeds: int, log_sd: float = 0.0) -> NDArray[np.float64]:
    """[rows, seeds] of rows with equal means."""
    own: NDArray[np.float64] = generator.normal(size=(rows, seeds)) * np.exp(log_sd * generator.normal(size=(rows, 1)))
    values: NDArray[np.float64] = own + np.sqrt(SHARED / (1 - SHARED)) * generator.normal(size=seeds)
    return values


def figures(boards: int, seeds: int, rows: int, seed: int = 0) -> Figures:
    """Of so many boards of each kind."""
    generator = np.random.default_rng([seed, seeds, rows])
    false, uneven, shared, found, beside = [], [], [], [], []
    for _ in range(boards):
        equal = simulated(generator, rows, seeds)
        false.append(_verdicts(equal).any())
        known = spreads(equal)
        shared.append(known is None or not better(equal, known).any())
        uneven.append(_verdicts(simulated(generator, rows, seeds, 0.5)).any())
        equal[1] += FAR
        found.append(_verdicts(equal)[0] > 0)
        equal[2, 0] -= FAILED
        beside.append(_verdicts(equal)[0] > 0)
    return Figures(seeds, rows, *(100 * float(np.mean(each)) for each in (false, uneven, shared, found, beside)))


def _verdicts(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Of each row but the first against the first: 1 better, -1 worse, 0 open."""
    known = spreads(values)
    if known is None:
        return np.zeros(len(values) - 1, dtype=np.int64)
    return np.array([verdict(one) for one in differences(values, 0, known).values()])


def table(boards: int) -> Iterator[str]:
    """The lines of a Markdown table, as they come."""
    titles = ("seeds", "rows", "false verdict", "false, uneven spreads", "equal rows share rank 1", "2 sd found", _BESIDE)
    yield "| " + " | ".join(titles) + " |"
    yield "| " + " | ".join(["---"] * len(titles)) + " |"
    for seeds, rows in SHAPES:
        one = figures(boards, seeds, rows)
        shares = (one.false, one.false_uneven, one.shared, one.found, one.found_beside_a_failure)
        yield f"| {seeds} | {rows} | " + " | ".join(f"{share:.1f}%" for share in shares) + " |"


# --- plans of more than one number of seeds --------------------------------------------------------------------------

PLANS = ("3 seeds", "3 seeds, 6 of `kd` and `none`", "6 seeds", "12 seeds", "until decided: 3, 6, 12 seeds")
_TRUE = (0, 0, 0, 0, 0, 1, -1, 2, -2, 3)  # of ten rivals of kd, in standard deviations of a paired difference
_LOOKS = Plan(seeds=3, control_seeds=3, looks=(3, 6, 12))


@dataclass(frozen=True)
class PlanFigures:
    """false: per cent of boards of equal rows with any false verdict against kd. seeds: a rival's, where they differ, the mean. found: per
    cent of rivals that are truly one, two and three standard deviations better and are called so.
    """

    plan: str
    false: float
    seeds: float
    found: tuple[float, float, float]


def of_plan(boards: int, plan: str, seed: int = 0) -> PlanFigures:
    """Of boards of `none`, kd and ten rivals, judged by `boards.standings` as real ones are."""
    generator = np.random.default_rng([seed, PLANS.index(plan)])
    false, seeds, found = [], [], []
    for _ in range(boards):
        equal, _ = _judged(plan, simulated(generator, len(_TRUE) + 2, 12))
        false.append(any(equal.values()))
        mixed = simulated(generator, len(_TRUE) + 2, 12)
        mixed[2:] += np.sqrt(2.0) * np.array(_TRUE)[:, None]
        verdicts, used = _judged(plan, mixed)
        seeds.append(np.mean([used[label] for label in verdicts]))
        found.append([verdicts[f"m{_TRUE.index(far)}"] > 0 for far in (1, 2, 3)])
    one, two, three = (100 * np.mean(found, axis=0)).tolist()
    return PlanFigures(plan, 100 * float(np.mean(false)), float(np.mean(seeds)), (one, two, three))


def _judged(plan: str, values: NDArray[np.float64]) -> tuple[dict[str, int], dict[str, int]]:
    """The verdict on each rival, and how many seeds it took."""
    labels = ["none", "kd", *(f"m{place}" for place in range(len(values) - 2))]
    if plan == PLANS[-1]:
        given, asked = [values.shape[1]] * len(values), _LOOKS
    else:
        count = int(plan.split()[0])
        controls = 6 if plan == PLANS[1] else count
        given, asked = [controls, controls, *[count] * (len(values) - 2)], Plan(seeds=count, control_seeds=controls)
    rows = [_row(label, of_row[:seeds]) for label, of_row, seeds in zip(labels, values, given, strict=True)]
    found = standings(rows, rows_by="method", undistilled=rows[0], control=rows[1], teacher=None, scale=Scale(), plan=asked)
    verdicts = {label: verdict(found.rows[label].over_control) for label in labels[2:]}
    return verdicts, {label: found.rows[label].looked or seeds for label, seeds in zip(labels, given, strict=True)}


def _row(label: str, values: NDArray[np.float64]) -> Finals:
    made = datetime(2030, 1, 1, tzinfo=UTC)
    record: RunRecord = cast(Any, RunRecord).model_construct(method=label, label=label, created_at=made, run_id=label)
    return Finals(label, dict.fromkeys(range(len(values)), record), 0, 1.0, 1, dict(enumerate(values.tolist())))


def table_of_plans(boards: int) -> Iterator[str]:
    """The lines of a Markdown table, as they come."""
    titles = ("plan", "false verdict", "seeds a method", "1 sd found", "2 sd found", "3 sd found")
    yield "| " + " | ".join(titles) + " |"
    yield "| " + " | ".join(["---"] * len(titles)) + " |"
    for plan in PLANS:
        one = of_plan(boards, plan)
        yield f"| {plan} | {one.false:.1f}% | {one.seeds:.1f} | " + " | ".join(f"{share:.1f}%" for share in one.found) + " |"


# --- what one search hides -------------------------------------------------------------------------------------------

SEARCHES = ((1, 3), (1, 5), (1, 10), (3, 1), (3, 3))  # searches of each method, and finals of each
BY_SEARCH = (0.0, 0.5, 1.0)  # the variance of what another search would give, in variances of what another seed would


def false_by_search(boards: int, searches: int, finals: int, ratio: float, seed: int = 0) -> float:
    """Per cent of boards of 12 equal methods with any false verdict, where each search finds another point."""
    generator = np.random.default_rng([seed, searches, finals, int(10 * ratio)])
    false = []
    for _ in range(boards):
        point = np.sqrt(ratio) * generator.normal(size=(12, searches))
        values = np.stack([simulated(generator, 12, finals) for _ in range(searches)], axis=1) + point[:, :, None]
        columns = values.mean(axis=2) if searches > 1 else values[:, 0]
        false.append(_verdicts(columns).any())
    return 100 * float(np.mean(false))


def table_of_searches(boards: int) -> Iterator[str]:
    """The lines of a Markdown table, as they come."""
    titles = ("searches", "finals of each", *(f"searches vary {ratio:g} times as much as seeds" for ratio in BY_SEARCH))
    yield "| " + " | ".join(titles) + " |"
    yield "| " + " | ".join(["---"] * len(titles)) + " |"
    for searches, finals in SEARCHES:
        shares = (false_by_search(boards, searches, finals, ratio) for ratio in BY_SEARCH)
        yield f"| {searches} | {finals} | " + " | ".join(f"{share:.1f}%" for share in shares) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=1000, help="of each kind; 1000 take a minute or two")
    boards = parser.parse_args().boards
    for lines in (table(boards), table_of_plans(boards), table_of_searches(boards)):
        for line in lines:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
