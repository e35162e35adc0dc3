"""How far other test samples would move a difference: from the bits of which samples are right."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdbench.boards.finals import grouped
from kdbench.boards.leaderboard import boards
from kdbench.boards.samples import moved_by_samples
from kdbench.records.bits import packed, unpacked


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 2000])
def test_bits_come_back_as_they_were(count: int) -> None:
    bits = np.random.default_rng(count).random(count) < 0.7
    assert np.array_equal(unpacked(packed(bits)), bits)


@pytest.mark.parametrize("text", ["", "x", "8:", "9:/w==", "-1:", "8:?", "1e3:/w==", "99999999999999:/w==", "8:/w==/w=="])
def test_what_holds_no_bits_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no bits"):
        unpacked(text)


def test_the_half_width_is_that_of_the_differences_of_the_samples(make_record) -> None:
    draws = np.random.default_rng(0)
    right = {label: draws.random((3, 500)) < share for label, share in (("kd", 0.8), ("dkd", 0.85))}
    records = [
        make_record(method=label, label=label, seed=seed, test_metric=100 * bits.mean(), samples_right=packed(bits))
        for label, of in right.items()
        for seed, bits in enumerate(of)
    ]
    groups = {group.label: group for group in grouped(records, "method")}
    x = right["dkd"].mean(0) - right["kd"].mean(0)
    expected = 1.959963985 * 100 * x.std(ddof=1) / math.sqrt(500)
    assert moved_by_samples(groups["dkd"], groups["kd"]) == pytest.approx(expected)
    assert groups["kd"].right is not None
    assert len(groups["kd"].right) == 500

    [board] = boards(records)
    assert {row.label: row.moved_by_samples for row in board.rows} == {"dkd": pytest.approx(expected), "kd": None}
    assert any(f"these 500 test samples; other samples alone would move dkd - kd by {expected:.2g}" in note for note in board.notes)


def test_records_that_do_not_say_which_samples_were_right_give_nothing(make_record) -> None:
    told = {"kd": packed([True] * 9), "dkd": None, "odd": "9:?", "other": packed([True] * 8)}
    records = [make_record(method=label, label=label, seed=seed, samples_right=bits) for label, bits in told.items() for seed in (0, 1)]
    groups = {group.label: group for group in grouped(records, "method")}
    for label in ("dkd", "odd", "other"):
        assert moved_by_samples(groups[label], groups["kd"]) is None
    [board] = boards(records)
    assert not any("other samples alone" in note for note in board.notes)
