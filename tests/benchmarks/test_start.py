"""Part g: the time between trials is read from what the trials noted."""

from __future__ import annotations

import pytest

from benchmarks.start import gaps


def test_a_gap_lies_between_the_last_measurement_of_a_trial_and_the_next_one_of_its_process() -> None:
    log = "7 10.0 made\n8 10.5 made\n7 11.0 measured\n7 12.0 measured\n8 12.5 measured\n7 12.25 made\n8 14.5 made\n7 15.0 measured\n"
    assert gaps(log) == pytest.approx([0.25, 2.0])


def test_a_process_that_trains_once_has_no_gap() -> None:
    assert gaps("7 10.0 made\n7 11.0 measured\n") == []
