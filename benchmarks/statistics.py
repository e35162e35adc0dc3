"""How often a board is wrong, and how often it finds what is there: simulated boards, judged as `kdbench leaderboard` judges real ones.

    python -m benchmarks.statistics
    python -m benchmarks.statistics --boards 200

Each row of a simulated board draws its seeds around its true mean, and a seed moves all rows alike. It prints the table of
docs/statistics.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdbench.boards.board import verdict
from kdbench.boards.simultaneous import better, differences, spreads

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=1000, help="of each kind; 1000 take about 12 seconds")
    for line in table(parser.parse_args().boards):
        print(line, flush=True)


if __name__ == "__main__":
    main()
