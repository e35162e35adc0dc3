"""How much a difference hangs on which samples the test part happens to hold: a spread that no seed shows."""

from __future__ import annotations

import math

from kdbench.boards.finals import Finals
from kdbench.boards.stats import LEVEL

_PERCENT = 100.0


def moved_by_samples(row: Finals, control: Finals) -> float | None:
    """How far other test samples alone would move the difference of two rows: half of a 95% interval, in points of a percentage.

    From which samples each final predicts right: of a sample's share of right seeds, the difference of the rows; its standard error over
    the samples. None where the records don't say which were right, as of metrics that are no share of right samples.
    """
    ours, theirs = row.right, control.right
    if ours is None or theirs is None or len(ours) != len(theirs) or len(ours) < 2:
        return None
    from scipy.special import ndtri

    error = float((ours - theirs).std(ddof=1)) / math.sqrt(len(ours))
    return _PERCENT * float(ndtri(0.5 + LEVEL / 2)) * error
