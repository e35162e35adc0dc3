"""Settings that make a training worthless without an error: a warning before it, and a note on the board after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdbench.records.record import RunRecord

# The most that the first step's weights may count in the average that is evaluated: 0.1 is reached after 2.3 times the average's horizon.
_MOST_OF_THE_FIRST_STEP = 0.1


def ema_caution(decay: float | None, steps: int, whose: str) -> str | None:
    """A warning where a moving average is so slow that what is evaluated is mostly the weights of the first step.

    Args:
        decay: `recipe.ema`.
        steps: Optimizer steps of the whole training.
        whose: `students` or `the teacher`, for the text.

    Returns:
        One sentence, or None where the average forgets its beginning. The average starts at the weights of the first step, whose share
        after n steps is decay ** (n - 1).
    """
    if decay is None or steps < 1 or decay ** (steps - 1) <= _MOST_OF_THE_FIRST_STEP:
        return None
    better = math.floor(1000 * _MOST_OF_THE_FIRST_STEP ** (2 / steps)) / 1000
    return (
        f"recipe.ema {decay:g} is too slow for {whose}: after {steps} steps, {100 * decay ** (steps - 1):.0f}% of the averaged weights are "
        f"those of the first step. Set ema to {better:g} or less, or train longer"
    )


def chance_caution(teacher: str | None, metric: float | None, chance: float | None, higher_is_better: bool) -> str | None:
    """A warning where a teacher is no better than a constant answer.

    Args:
        teacher: The teacher's label.
        metric: Its primary metric on the test set.
        chance: What `Task.chance` gives for the test set; None where the task has no such answer.
        higher_is_better: Of the metric.
    """
    if metric is None or chance is None or (metric > chance if higher_is_better else metric < chance):
        return None
    return (
        f"the teacher {teacher} is no better than chance: it has {metric:.2f}, and always answering with the commonest class reaches up to "
        f"{chance:.2f}. Students can't learn from it; train it longer, or with another learning rate"
    )


def near_duplicates_caution(record: RunRecord) -> str | None:
    """How many test samples training samples nearly equal; None where there are none, or nobody counted them."""
    if not record.near_duplicates:
        return None
    return (
        f"{record.near_duplicates:,} test images of {record.data} ({record.data_hash[:8]}) have a near-duplicate among the training images "
        "(64-bit difference hash, at most 4 bits apart); simple pictures have some that are no copies"
    )


def board_cautions(records: Sequence[RunRecord], teacher: str | None, teacher_metric: float | None) -> list[str]:
    """What the records of a board's runs say against trusting it, each once."""
    found = [ema_caution(_ema(record.recipe), _steps(record), "students") for record in records]
    known = next((record for record in records if record.chance_metric is not None), None)
    if known is not None:
        found.append(chance_caution(teacher, teacher_metric, known.chance_metric, known.higher_is_better))
    found += [near_duplicates_caution(record) for record in records]
    return list(dict.fromkeys(caution for caution in found if caution))


def _ema(recipe: Mapping[str, Any]) -> float | None:
    decay = recipe.get("ema")
    return float(decay) if decay is not None else None


def _steps(record: RunRecord) -> int:
    """Optimizer steps of a finished training; 0 where the record does not say enough."""
    if record.status != "ok" or not record.samples_per_second or not record.train_seconds:
        return 0
    return round(record.samples_per_second * record.train_seconds / record.global_batch)
