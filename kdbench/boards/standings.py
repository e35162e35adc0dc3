"""Where the rows of a board stand: what a layout of rows by seeds says of their order, and of each against the controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdbench.boards.board import COSTS, Errors, Estimate, Row, RowsBy
from kdbench.boards.finals import Finals, age, chosen
from kdbench.boards.simultaneous import (
    Difference,
    Spreads,
    better,
    differences,
    fronts,
    gap,
    partial_difference,
    rank_intervals,
    search_variances,
    smallest_found,
    spreads,
)
from kdbench.boards.stats import LEVEL, pareto_front
from kdbench.records.plan import CONTROL, UNDISTILLED, Plan

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


def scale_of(groups: Sequence[Finals]) -> Scale:
    """Of the metric, as the newest record that tells it does."""
    told = [record for group in groups for record in group.records.values() if record.primary_scale is not None]
    newest = max(told, key=age, default=None)
    return Scale() if newest is None or newest.primary_scale is None else Scale(**newest.primary_scale)


@dataclass(frozen=True)
class Standing:
    """Of one row.

    variance: of one seed's value, as it enters comparisons; None where nothing is known of it. looked: the seeds of its last look, where
    seeds are added until it is decided, and 0 where they are not. open: whether it is still undecided after that look.
    """

    rank: int | None = None
    rank_high: int | None = None
    better_than: frozenset[str] = frozenset()
    over_undistilled: Difference | None = None
    over_control: Difference | None = None
    gap: Estimate = _UNKNOWN_GAP
    variance: float | None = None
    looked: int = 0
    open: bool = False


@dataclass(frozen=True)
class Standings:
    """Of all rows, by label.

    seeds: those that rows are compared on, or the searches, where methods have several; further: seeds that only controls have. lead: the
    teacher's. searches: the variances between searches and between the seeds of one, or their sum alone where a search has one final;
    None where there is one search.
    """

    rows: Mapping[str, Standing]
    seeds: tuple[int, ...]
    further: tuple[int, ...]
    lead: float | None
    errors: Errors | None
    spreads: Spreads | None
    detectable: float | None
    searches: tuple[float, ...] | None = None


def standings(
    groups: Sequence[Finals],
    *,
    rows_by: RowsBy,
    undistilled: Finals | None,
    control: Finals | None,
    teacher: float | None,
    scale: Scale,
    plan: Plan | None = None,
) -> Standings:
    """Compare the rows.

    Args:
        groups: The rows, with their values.
        rows_by: What a row is.
        undistilled: The row that gains are over.
        control: The row of the other column of differences.
        teacher: Its metric.
        scale: Of the metric.
        plan: How many finals the rows are meant to have; None where nobody knows.
    """
    seeds = _block(groups, rows_by, plan)
    complete = [group for group in groups if seeds and group.replicates.keys() >= set(seeds)]
    further = {} if plan is not None and plan.looks else _further(groups, seeds, complete)
    looking = plan is not None and bool(plan.looks) and control in complete and control is chosen(groups, CONTROL)
    layout = _Layout(complete, seeds, further, scale, plan.levels[0] if plan is not None and looking else LEVEL)
    ranked = dict(zip(layout.labels, layout.standings(), strict=True))
    lead, found = layout.lead(undistilled, teacher), {}
    looks = _looks(groups, layout, undistilled, control, scale, plan) if plan is not None and looking else None
    over = looks or {group.label: _Look(layout, *layout.over(group, undistilled, control)) for group in groups}
    for group in groups:
        look, gap_made_up = over[group.label], _UNKNOWN_GAP
        if lead is not None and undistilled is not None and group is not undistilled and teacher is not None:
            gap_made_up = look.layout.gap(group, look.over_undistilled, undistilled, teacher, lead)
        found[group.label] = replace(
            ranked.get(group.label, Standing()),
            over_undistilled=look.over_undistilled,
            over_control=look.over_control,
            gap=gap_made_up,
            looked=len(look.layout.seeds) if looks is not None else 0,
            open=look.open,
        )
    if lead is not None and layout.known is not None and not any(standing.gap != _UNKNOWN_GAP for standing in found.values()):
        lead = None  # no row's interval tells it apart from none
    last = (max(plan.looks), plan.levels[-1]) if plan is not None and looking else ()
    detectable = layout.detectable(control, *last)
    return Standings(found, seeds, layout.further, lead, layout.errors(), layout.known, detectable, _searches(complete))


def _block(groups: Sequence[Finals], rows_by: RowsBy, plan: Plan | None) -> tuple[int, ...]:
    """The seeds that rows are compared on: those that most rows have, of these the lowest, as many as each row but the controls has.

    The controls of a board of methods may have more: without a plan, what a row beside them has at most is what all are meant to have.
    """
    if plan is not None and plan.looks:
        return tuple(range(plan.looks[0]))
    controls = (chosen(groups, UNDISTILLED), chosen(groups, CONTROL)) if rows_by == "method" else ()
    rivals = [group for group in groups if group not in controls and group.values] or groups
    # A seed that failed was meant to be there.
    most = max((group.searches if group.searches > 1 else len(group.records) for group in rivals), default=0)
    wanted = most if plan is None else plan.seeds if plan.searches == 1 else plan.searches
    counts = Counter(replicate for group in groups for replicate in group.replicates)
    return tuple(sorted(sorted(counts, key=lambda replicate: (-counts[replicate], replicate))[:wanted]))


def _further(groups: Sequence[Finals], seeds: Sequence[int], complete: Sequence[Finals]) -> dict[str, tuple[int, ...]]:
    """The seeds beside the block that the controls have; the same for both where both have some."""
    controls = [group for name in (UNDISTILLED, CONTROL) if (group := chosen(groups, name)) is not None and group in complete]
    own = {group.label: more for group in controls if (more := group.replicates.keys() - set(seeds))}
    if len(own) > 1 and (shared := set.intersection(*map(set, own.values()))):
        own = {label: own[label] & shared for label in own}
    elif len(own) > 1:
        own = dict([max(own.items(), key=lambda item: len(item[1]))])
    return {label: tuple(sorted(extra)) for label, extra in own.items()}


def _searches(complete: Sequence[Finals]) -> tuple[float, ...] | None:
    """What another search would change, and what another seed would; their sum where each search has one final."""
    if len(complete) < 2 or any(group.searches < 2 for group in complete):
        return None
    numbers = set.intersection(*(set(group.by_search) for group in complete))
    finals = [[group.by_search[number] for number in sorted(numbers)] for group in complete]
    if len(numbers) < 2:
        return None
    if len(finals[0][0]) > 1:
        return search_variances(finals)
    found = spreads([[values[0] for values in of_row] for of_row in finals])
    return None if found is None else (found.pool,)


class _Layout:
    """The complete rows by the seeds that all of them have, or by the searches; more is better."""

    def __init__(
        self,
        complete: Sequence[Finals],
        seeds: Sequence[int],
        further: Mapping[str, tuple[int, ...]],
        scale: Scale,
        level: float = LEVEL,
        comparisons: int | None = None,
    ) -> None:
        """level: of the differences. comparisons: of a column; by default, each row but the control."""
        self.complete, self.seeds, self.scale, self.level = complete, seeds, scale, level
        self.comparisons = len(complete) - 1 if comparisons is None else comparisons
        self.labels = [group.label for group in complete]
        values = [group.replicates for group in complete]
        self.block = np.array([[of_row[seed] for seed in seeds] for of_row in values])
        self.known = spreads(self.block, scale.step) if len(complete) > 1 and len(seeds) > 1 else None
        own = {place: further[group.label] for place, group in enumerate(complete) if group.label in further}
        self.extra = {place: [values[place][seed] for seed in more] for place, more in own.items()}
        self.further = next(iter(further.values()), ())
        self._columns: dict[int | None, dict[str, Difference]] = {}

    def standings(self) -> list[Standing]:
        """Ranks alone."""
        rows = len(self.complete)
        told = better(self.block, self.known) if self.known is not None else np.zeros((rows, rows), dtype=bool)
        variances = [None] * rows if self.known is None else [float(each) for each in self.known.variances]
        return [
            Standing(low, high, frozenset(label for label, beaten in zip(self.labels, row, strict=True) if beaten), variance=variance)
            for row, (low, high), variance in zip(told, rank_intervals(told), variances, strict=True)
        ]

    def over(self, group: Finals, undistilled: Finals | None, control: Finals | None) -> tuple[Difference | None, Difference | None]:
        """How much better the row is than either."""
        return self.column(undistilled, group).get(group.label), self.column(control, group).get(group.label)

    def column(self, control: Finals | None, partial: Finals | None = None) -> dict[str, Difference]:
        """Each other row against the control, by label. Empty without a control.

        partial: a row that may miss seeds: then over those that both have.
        """
        if control is None or self.known is None:
            return {}
        place = self._place(control)
        if place not in self._columns:
            self._columns[place] = self._complete_column(place)
        found = self._columns[place]
        if partial is None or partial is control or partial.label in found:
            return found
        both = partial.replicates, control.replicates
        common = sorted(both[0].keys() & both[1].keys())
        ours, theirs = ([each[seed] for seed in common] for each in both)
        variance = None if place is None else float(self.known.variances[place])
        difference = partial_difference(ours, theirs, self.comparisons + 1, self.known, variance, self.level)
        return found if difference is None else {**found, partial.label: difference}

    def _complete_column(self, place: int | None) -> dict[str, Difference]:
        if place is None or self.known is None:
            return {}
        made = differences(self.block, place, self.known, extra=self.extra, level=self.level, comparisons=self.comparisons)
        return {self.labels[row]: difference for row, difference in made.items()}

    def lead(self, undistilled: Finals | None, teacher: float | None) -> float | None:
        """Of the teacher over the undistilled student; None below the smallest that is worth sharing out."""
        if undistilled is None or teacher is None or not undistilled.values:
            return None
        lead = undistilled.sign * teacher - float(np.mean([*undistilled.replicates.values()]))
        return lead if lead >= self.scale.smallest_gap else None

    def gap(self, group: Finals, gain: Difference | None, undistilled: Finals, teacher: float, lead: float) -> Estimate:
        """The share of the lead that a row has made up; with an interval for the rows of the block."""
        place = self._place(undistilled)
        if gain is not None and self.known is not None and place is not None and group.label in self.labels:
            return gap(gain, self.block, place, self.known, undistilled.sign * teacher, self.extra) or _UNKNOWN_GAP
        if not group.values:
            return _UNKNOWN_GAP
        middle = float(np.mean([*group.replicates.values()]) - np.mean([*undistilled.replicates.values()]))
        return middle / lead, None, None

    def errors(self) -> Errors | None:
        if self.known is None:
            return None
        wide = tuple(label for label, scatters in zip(self.labels, self.known.wide, strict=True) if scatters)
        found = self.known
        return Errors(found.pool, found.degrees, found.df, found.uneven, wide, len(self.complete) - 1, len(self.seeds), len(self.further))

    def detectable(self, control: Finals | None, seeds: int | None = None, level: float = LEVEL) -> float | None:
        """seeds: of the last look, where this layout is that of the first."""
        place = self._place(control)
        if self.known is None or place is None:
            return None
        if seeds is not None:
            return smallest_found(self.comparisons + 1, seeds, self.known.with_seeds(seeds), level=level)
        return smallest_found(len(self.complete), len(self.seeds), self.known, len(self.extra.get(place, ())))

    def _place(self, group: Finals | None) -> int | None:
        return None if group is None or group.label not in self.labels else self.labels.index(group.label)


# --- seeds until decided ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """At one row. open: whether it is still undecided."""

    layout: _Layout
    over_undistilled: Difference | None
    over_control: Difference | None
    open: bool = False


def _looks(
    groups: Sequence[Finals], first: _Layout, undistilled: Finals | None, control: Finals | None, scale: Scale, plan: Plan
) -> dict[str, _Look]:
    """The last look at each row.

    Those at which a row is decided, better than the control, worse, or not better by what matters, are its last. The others are looked at
    again with more seeds, together with the controls alone, once all of them have these.
    """
    assert control is not None
    found = {group.label: _Look(first, *first.over(group, undistilled, control)) for group in groups}
    controls = [group for group in (control, undistilled) if group is not None]
    open_rows = [group for group in first.complete if group not in controls]
    for seeds, level in zip(plan.looks, plan.levels, strict=True):
        members, wanted = [*open_rows, *controls], set(range(seeds))
        block = [group for group in members if group.replicates.keys() >= wanted]
        if not all(group.records.keys() >= wanted for group in members) or control not in block:
            break
        layout = first if seeds == plan.looks[0] else _Layout(block, range(seeds), {}, scale, level, first.comparisons)
        over_undistilled, over_control = layout.column(undistilled), layout.column(control)
        for group in block:
            difference = over_control.get(group.label)
            undecided = group in open_rows and (difference is None or not _is_decided(difference, plan.matters))
            found[group.label] = _Look(layout, over_undistilled.get(group.label), difference, undecided)
        for group in open_rows:
            if group not in block:  # one of its seeds failed, and nothing stands for it: it stays where it was, and nobody waits for it
                found[group.label] = replace(found[group.label], open=False)
        open_rows = [group for group in open_rows if found[group.label].open]
        if not open_rows:
            break
    return found


def _is_decided(difference: Difference, matters: float | None) -> bool:
    return difference.low > 0 or difference.high < (matters or 0.0)


def seeds_wanted(found: Standings, plan: Plan, controls: Collection[str]) -> dict[str, int]:
    """How many finals each row should have after the looks that were taken, by label; none of a row that is decided or was looked at last.

    controls: labels of the rows that the others are compared with.
    """
    wanted = {}
    for label, standing in found.rows.items():
        later = [seeds for seeds in plan.looks if seeds > standing.looked]
        if standing.open and later:
            wanted[label] = later[0]
    if wanted:
        wanted |= dict.fromkeys(controls, max(wanted.values()))
    return wanted


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
