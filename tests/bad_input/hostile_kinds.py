"""The kinds of hostile cases, by group: functions that fill a folder with files drawn from a seed, each with the number of its cases."""

from __future__ import annotations

from tests.bad_input.hostile_archives import ARCHIVES
from tests.bad_input.hostile_case import Makers
from tests.bad_input.hostile_data import DATA
from tests.bad_input.hostile_experiments import EXPERIMENTS
from tests.bad_input.hostile_results import LEFT_OUT, RESULTS
from tests.bad_input.hostile_weights import WEIGHTS

GROUPS: dict[str, Makers] = {
    "experiment": EXPERIMENTS,
    "archive": ARCHIVES,
    "weights": WEIGHTS,
    "data": DATA,
    "results": RESULTS,
    "left out": LEFT_OUT,
}
