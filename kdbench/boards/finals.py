"""The final runs of a board, grouped into rows: one setting a label, a value a seed."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdbench.boards.board import RowsBy
from kdbench.records.bits import unpacked
from kdbench.records.plan import Plan, control_of
from kdbench.records.record import RunRecord

SPEED_ONLY = frozenset({"memory_format", "compile"})  # keys of a recipe that change how fast it is, not what is trained


@dataclass(frozen=True)
class Finals:
    """The final runs of one label, a record a seed; those of one search have one setting.

    label: of the method, or of the student on a board of students. left_out: older finals of this label with another setting. sign: +1 or
    -1, multiplies a metric so that more is better. searches: of the method, each with its own finals.
    """

    label: str
    records: Mapping[int, RunRecord]
    left_out: int
    sign: float
    searches: int = 1
    values: dict[int, float] = field(default_factory=dict)

    @property
    def newest(self) -> RunRecord:
        return max(self.records.values(), key=age)

    @property
    def told(self) -> RunRecord:
        """The record that stands for the row's parameters: the newest, of several searches of the one with the best validation mean."""
        if self.searches == 1:
            return self.newest
        by_search: dict[int, list[RunRecord]] = defaultdict(list)
        for record in self.records.values():
            by_search[record.search_number or 0].append(record)

        best = max(by_search.values(), key=lambda records: self.sign * fmean(known(records, "val_metric") or [-self.sign * math.inf]))
        return max(best, key=age)

    @property
    def search_device_hours(self) -> float:
        """Of one search; the mean of several."""
        spent = search_hours(self.records.values())
        return fmean(spent.values()) if spent else 0.0

    @property
    def signed(self) -> dict[int, float]:
        """The values by seed, turned so that more is better."""
        return {seed: self.sign * value for seed, value in self.values.items()}

    @property
    def replicates(self) -> dict[int, float]:
        """What rows are compared by, so that more is better: the values by seed; of several searches, by search the mean of its finals.

        A search that lacks one of its finals is not among them.
        """
        if self.searches == 1:
            return self.signed
        return {number: fmean(finals) for number, finals in self.by_search.items()}

    @property
    def by_search(self) -> dict[int, list[float]]:
        """Of each search that has all of its finals their values, more is better."""
        seeds: dict[int, list[int]] = defaultdict(list)
        for seed, record in sorted(self.records.items()):
            seeds[record.search_number or 0].append(seed)
        plan, signed = self.plan, self.signed
        each = plan.seeds if plan is not None else max((len(own) for own in seeds.values()), default=0)
        return {
            number: [signed[seed] for seed in own]
            for number, own in sorted(seeds.items())
            if len(own) == each and all(seed in signed for seed in own)
        }

    @cached_property
    def right(self) -> NDArray[np.float64] | None:
        """Of each test sample, the share of the finals that predict it right, [N]; None where the records don't say."""
        told = [record.samples_right for record in self.records.values() if record.samples_right is not None]
        try:
            bits = [unpacked(text) for text in told]
        except ValueError:
            return None
        return np.mean(bits, axis=0, dtype=float) if len({len(each) for each in bits}) == 1 else None

    @cached_property
    def plan(self) -> Plan | None:
        """What the newest of them was planned as; None of older ones, whose plan nobody kept."""
        told = [record for record in self.records.values() if record.plan is not None]
        return Plan.model_validate(max(told, key=age).plan) if told else None

    @property
    def failed(self) -> int:
        return sum(_failed(record) for record in self.records.values())

    @property
    def network(self) -> tuple[object, ...]:
        """What it deploys, by parameters and FLOPs; where one of them is unknown, a network of its own."""
        measured = tuple(next(iter(known([*self.records.values()], name)), None) for name in ("params_count", "flops"))
        return (self.label,) if None in measured else measured


def search_hours(records: Iterable[RunRecord]) -> dict[int, float]:
    """Device-hours of each search that finals are from; of the first alone where there is one."""
    spent: dict[int, float] = {}
    for record in records:
        if record.search_device_hours is not None:
            number = record.search_number or 0
            spent[number] = max(spent.get(number, 0.0), record.search_device_hours)
    return spent


def grouped(members: Sequence[RunRecord], rows_by: RowsBy) -> list[Finals]:
    """One group a label: of each search the setting that was run last, never a mixture of two settings."""
    sign = 1.0 if members[0].higher_is_better else -1.0
    by_label: dict[str, dict[int, dict[str, list[RunRecord]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in sorted(members, key=age):
        label = record.label if rows_by == "method" else record.student
        by_label[label][record.search_number or 0][_setting(record)].append(record)
    groups = []
    for label, searches in by_label.items():
        latest = [run for settings in searches.values() for run in max(settings.values(), key=lambda runs: age(runs[-1]))]
        left_out = sum(len(runs) for settings in searches.values() for runs in settings.values()) - len(latest)
        planned = max((record.plan.get("searches", 1) for record in latest if record.plan is not None), default=1)
        groups.append(Finals(label, {record.seed: record for record in latest}, left_out, sign, planned))
    return groups


def _setting(record: RunRecord) -> str:
    return json.dumps([record.method, record.method_version, record.params, record.recipe, record.search_hash], sort_keys=True)


def family_of(groups: Sequence[Finals]) -> str:
    """16 hex digits of how a board's students were trained and searched, whatever the data and the networks."""
    records = [group.newest for group in groups]
    budgets = {json.dumps(record.search_budget, sort_keys=True) for record in records if record.search_budget}
    # How many trials a budget pays for depends on the networks and the machine.
    searches = [*sorted({(r.trials, r.sampler or "", r.scheduler or "") for r in records if r.trials and not r.search_budget}), *budgets]
    return _digest([*_trained(records), searches])


def trained_alike(groups: Sequence[Finals]) -> str:
    """16 hex digits of how a board's students were trained, whatever the data, the networks and the search."""
    return _digest(_trained([group.newest for group in groups]))


def _trained(records: Sequence[RunRecord]) -> list[Any]:
    varied = {name.removeprefix("recipe.") for record in records for name in record.space or {} if name.startswith("recipe.")}
    first = records[0]
    recipe = {name: value for name, value in first.recipe.items() if name not in varied | SPEED_ONLY}
    return [first.task, first.task_version, first.primary, recipe, first.global_batch, first.precision, sorted(varied)]


def _digest(told: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def ruleset_of(groups: Sequence[Finals]) -> str:
    """By which rule the parameters of a board were searched, as people read it."""
    records = [group.newest for group in groups if group.newest.trials]
    if not records:
        return "no search"
    budget = next((record.search_budget for record in records if record.search_budget), None)
    if budget is None:
        return f"{max(record.trials or 0 for record in records)} trials a method"
    [(name, value)] = budget.items()
    return f"{value:g} {name.replace('_', '-')} a method"


def chosen(groups: Sequence[Finals], method: str) -> Finals | None:
    """The group that stands for a control, see `control_of`."""
    label = control_of([(group.label, group.newest.method) for group in groups], method)
    return next((group for group in groups if group.label == label), None)


def values_of(group: Finals, undistilled: Finals | None) -> dict[int, float]:
    """The test metric by seed; a failed seed has the undistilled student's of that seed, or none where that is missing too.

    Empty where every seed failed: nothing of the method was measured.
    """
    if group.failed == len(group.records):
        return {}
    values = {}
    for seed, record in sorted(group.records.items()):
        counted = record if not _failed(record) or undistilled is None else undistilled.records.get(seed)
        if counted is not None and counted.test_metric is not None and not _failed(counted):
            values[seed] = counted.test_metric
    return values


def _failed(record: RunRecord) -> bool:
    return record.status == "failed" or record.test_metric is None or not math.isfinite(record.test_metric)


def best_first(groups: Sequence[Finals]) -> list[Finals]:
    """The best mean first; who has none, last."""
    return sorted(groups, key=lambda group: (-group.sign * fmean(group.values.values()) if group.values else math.inf, group.label))


def latencies(groups: Sequence[Finals]) -> dict[tuple[object, ...], float]:
    """By network, the median over all finals that deploy it: their latencies differ by nothing but the noise of measuring."""
    measured: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for group in groups:
        measured[group.network] += known([*group.records.values()], "latency_ms_p50")
    return {network: median(values) for network, values in measured.items() if values}


def known(records: Sequence[RunRecord], name: str) -> list[Any]:
    """The values of a field that are there and finite."""
    return [value for record in records if (value := getattr(record, name)) is not None and math.isfinite(value)]


def age(record: RunRecord) -> tuple[datetime, str]:
    """What sorts records, the oldest first."""
    return record.created_at, record.run_id
