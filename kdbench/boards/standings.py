"""Where the rows of a board stand: what a layout of rows by seeds says of their order, and of each against the controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdbench.boards.board import CONTROL, COSTS, UNDISTILLED, Errors, Estimate, Row, RowsBy
from kdbench.boards.finals import Finals, chosen
from kdbench.boards.simultaneous import (
    Difference,
    Spreads,
    better,
    differences,
    fronts,
    gap,
    partial_difference,
    rank_intervals,
    smallest_found,
    spreads,
)
from kdbench.boards.stats import pareto_front

_MEASURED = 0.05  # by how much two measured costs differ before one is called cheaper
_UNKNOWN_GAP: Estimate = (None, None, None)


@dataclass(frozen=True)
class Scale:
    """What a board has to know of its metric on the test part.

    step: the smallest difference that it can show there; 0 where nobody knows. low, high: its bounds. smallest_gap: a lead of the teacher
    below which the share that a student makes up is not given.
    """

    step: float = 0.0
    low: float | None = None
    high: float | None = None
    smallest_gap: float = 0.5


@dataclass(frozen=True)
class Standing:
    """Of one row. variance: of one seed's value, as it enters comparisons; None where nothing is known of it."""

    rank: int | None = None
    rank_high: int | None = None
    better_than: frozenset[str] = frozenset()
    over_undistilled: Difference | None = None
    over_control: Difference | None = None
    gap: Estimate = _UNKNOWN_GAP
    variance: float | None = None


@dataclass(frozen=True)
class Standings:
    """Of all rows, by label. seeds: those that rows are compared on; further: those that only controls have. lead: the teacher's."""

    rows: Mapping[str, Standing]
    seeds: tuple[int, ...]
    further: tuple[int, ...]
    lead: float | None
    errors: Errors | None
    spreads: Spreads | None
    detectable: float | None


def standings(
    groups: Sequence[Finals],
    *,
    rows_by: RowsBy,
    undistilled: Finals | None,
    control: Finals | None,
    teacher: float | None,
    scale: Scale,
    planned: int | None = None,
) -> Standings:
    """Compare the rows.

    Args:
        groups: The rows, with their values.
        rows_by: What a row is.
        undistilled: The row that gains are over.
        control: The row of the other column of differences.
        teacher: Its metric.
        scale: Of the metric.
        planned: The seeds that the plan gives every row but the controls; None where no plan is known.
    """
    seeds = _block(groups, rows_by, planned)
    complete = [group for group in groups if seeds and group.values.keys() >= set(seeds)]
    layout = _Layout(complete, seeds, _further(groups, seeds, complete), scale)
    ranked = dict(zip(layout.labels, layout.standings(), strict=True))
    over_undistilled, over_control = (layout.column(groups, against) for against in (undistilled, control))
    lead, found = layout.lead(undistilled, teacher), {}
    for group in groups:
        gain, gap_made_up = over_undistilled.get(group.label), _UNKNOWN_GAP
        if lead is not None and undistilled is not None and group is not undistilled and teacher is not None:
            gap_made_up = layout.gap(group, gain, undistilled, teacher, lead)
        found[group.label] = replace(
            ranked.get(group.label, Standing()), over_undistilled=gain, over_control=over_control.get(group.label), gap=gap_made_up
        )
    if lead is not None and layout.known is not None and not any(standing.gap != _UNKNOWN_GAP for standing in found.values()):
        lead = None  # no row's interval tells it apart from none
    return Standings(found, seeds, layout.further, lead, layout.errors(), layout.known, layout.detectable(control))


def _block(groups: Sequence[Finals], rows_by: RowsBy, planned: int | None) -> tuple[int, ...]:
    """The seeds that rows are compared on: those that most rows have, of these the lowest, as many as each row but the controls has.

    The controls of a board of methods may have more: what a row beside them has at most is what all are meant to have.
    """
    controls = (chosen(groups, UNDISTILLED), chosen(groups, CONTROL)) if rows_by == "method" else ()
    rivals = [group for group in groups if group not in controls and group.values] or groups
    wanted = planned or max((len(group.records) for group in rivals), default=0)  # a seed that failed was meant to be there
    counts = Counter(seed for group in groups for seed in group.values)
    return tuple(sorted(sorted(counts, key=lambda seed: (-counts[seed], seed))[:wanted]))


def _further(groups: Sequence[Finals], seeds: Sequence[int], complete: Sequence[Finals]) -> dict[str, tuple[int, ...]]:
    """The seeds beside the block that the controls have; the same for both where both have some."""
    controls = [group for name in (UNDISTILLED, CONTROL) if (group := chosen(groups, name)) is not None and group in complete]
    own = {group.label: group.values.keys() - set(seeds) for group in controls if group.values.keys() - set(seeds)}
    if len(own) > 1 and (shared := set.intersection(*map(set, own.values()))):
        own = {label: own[label] & shared for label in own}
    elif len(own) > 1:
        own = dict([max(own.items(), key=lambda item: len(item[1]))])
    return {label: tuple(sorted(extra)) for label, extra in own.items()}


class _Layout:
    """The complete rows by the seeds that all of them have, more is better."""

    def __init__(self, complete: Sequence[Finals], seeds: Sequence[int], further: Mapping[str, tuple[int, ...]], scale: Scale) -> None:
        self.complete, self.seeds, self.scale = complete, seeds, scale
        self.labels = [group.label for group in complete]
        self.block = np.array([[group.signed[seed] for seed in seeds] for group in complete])
        self.known = spreads(self.block, scale.step) if len(complete) > 1 and len(seeds) > 1 else None
        own = {place: further[group.label] for place, group in enumerate(complete) if group.label in further}
        self.extra = {place: [complete[place].signed[seed] for seed in more] for place, more in own.items()}
        self.further = next(iter(further.values()), ())
        rows = len(complete)
        self.told = better(self.block, self.known) if self.known is not None else np.zeros((rows, rows), dtype=bool)

    def standings(self) -> list[Standing]:
        """Ranks alone."""
        variances = [None] * len(self.complete) if self.known is None else [float(each) for each in self.known.variances]
        return [
            Standing(low, high, frozenset(label for label, beaten in zip(self.labels, row, strict=True) if beaten), variance=variance)
            for row, (low, high), variance in zip(self.told, rank_intervals(self.told), variances, strict=True)
        ]

    def column(self, groups: Sequence[Finals], control: Finals | None) -> dict[str, Difference]:
        """Each other row against the control, by label; one that misses seeds, over those that both have. Empty without a control."""
        if control is None or self.known is None:
            return {}
        place, found = self._place(control), {}
        if place is not None:
            made = differences(self.block, place, self.known, extra=self.extra)
            found = {self.labels[row]: difference for row, difference in made.items()}
        variance = None if place is None else float(self.known.variances[place])
        for group in groups:
            if group is control or group.label in found:
                continue
            common = sorted(group.values.keys() & control.values.keys())
            ours, theirs = ([each.signed[seed] for seed in common] for each in (group, control))
            difference = partial_difference(ours, theirs, len(self.complete), self.known, variance)
            if difference is not None:
                found[group.label] = difference
        return found

    def lead(self, undistilled: Finals | None, teacher: float | None) -> float | None:
        """Of the teacher over the undistilled student; None below the smallest that is worth sharing out."""
        if undistilled is None or teacher is None or not undistilled.values:
            return None
        lead = undistilled.sign * teacher - float(np.mean([*undistilled.signed.values()]))
        return lead if lead >= self.scale.smallest_gap else None

    def gap(self, group: Finals, gain: Difference | None, undistilled: Finals, teacher: float, lead: float) -> Estimate:
        """The share of the lead that a row has made up; with an interval for the rows of the block."""
        place = self._place(undistilled)
        if gain is not None and self.known is not None and place is not None and group.label in self.labels:
            return gap(gain, self.block, place, self.known, undistilled.sign * teacher, self.extra) or _UNKNOWN_GAP
        if not group.values:
            return _UNKNOWN_GAP
        middle = float(np.mean([*group.signed.values()]) - np.mean([*undistilled.signed.values()]))
        return middle / lead, None, None

    def errors(self) -> Errors | None:
        if self.known is None:
            return None
        wide = tuple(label for label, scatters in zip(self.labels, self.known.wide, strict=True) if scatters)
        found = self.known
        return Errors(found.pool, found.degrees, found.df, found.uneven, wide, len(self.complete) - 1, len(self.seeds), len(self.further))

    def detectable(self, control: Finals | None) -> float | None:
        place = self._place(control)
        if self.known is None or place is None:
            return None
        return smallest_found(len(self.complete), len(self.seeds), self.known, len(self.extra.get(place, ())))

    def _place(self, group: Finals | None) -> int | None:
        return None if group is None or group.label not in self.labels else self.labels.index(group.label)


# --- Pareto fronts ---------------------------------------------------------------------------------------------------


def with_fronts(rows: Sequence[Row], higher_is_better: bool) -> tuple[Row, ...]:
    """The rows with the costs for which each is on the Pareto front of the ranked ones: by means, surely, and surely not."""
    sign = 1.0 if higher_is_better else -1.0
    found: dict[str, list[list[str]]] = {row.label: [[], [], []] for row in rows}
    for cost in COSTS:
        known = [row for row in rows if row.rank is not None and row.mean is not None and getattr(row, cost) is not None]
        if not known:
            continue
        prices = [float(getattr(row, cost)) for row in known]
        points = [(sign * row.mean, -price) for row, price in zip(known, prices, strict=True) if row.mean is not None]
        told = np.array([[other.label in row.better_than for other in known] for row in known])
        sure, off = fronts(told, *_cheaper(cost, known, prices))
        for row, *places in zip(known, pareto_front(points), sure, off, strict=True):
            for costs, there in zip(found[row.label], places, strict=True):
                if there:
                    costs.append(cost)
    return tuple(
        replace(row, pareto=tuple(by_means), pareto_sure=tuple(surely), pareto_off=tuple(off))
        for row in rows
        for by_means, surely, off in [found[row.label]]
    )


def _cheaper(cost: str, rows: Sequence[Row], prices: Sequence[float]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[K, K] each: whether the second of two rows is surely no dearer than the first, and whether it may be.

    What is counted is known; what is measured is known up to a tolerance, but for the latency of one network, which is one number.
    """
    price = np.array(prices, dtype=float)
    no_dearer: NDArray[np.bool_] = price[None] <= price[:, None]
    if cost == "params_count":
        return no_dearer, no_dearer
    surely: NDArray[np.bool_] = price[None] <= price[:, None] / (1 + _MEASURED)
    possibly: NDArray[np.bool_] = price[None] < price[:, None] * (1 + _MEASURED)
    if cost == "latency_ms_p50":
        same = np.array([[one.network == other.network for other in rows] for one in rows])
        surely, possibly = surely | same, possibly | same
    return surely, possibly
