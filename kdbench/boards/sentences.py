"""What stands under a board, in sentences: what it shows, what its figures rest on, and what it lacks to show more.

Every output of a board has these sentences, and no others of the kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from kdbench.boards.board import CONTROLS, WITHOUT_DISTILLATION, BesideRow, Board, Row
from kdbench.boards.finals import Finals
from kdbench.boards.simultaneous import seeds_needed, smallest_found
from kdbench.boards.standings import Scale, Standings
from kdbench.boards.stats import LEVEL, POWER
from kdbench.records.plan import MOST_TIMES

_MORE = (2, 4)  # times as many seeds: what these would find is said too


def findings(board: Board) -> tuple[str, ...]:
    """What the board shows, and what it lacks to show more."""
    found = []
    undistilled, control = board.row(board.undistilled), board.row(board.control)
    if board.method is None and undistilled is None:
        found.append("no undistilled student (method none) on this board: gains can't be given; add none to the methods")
    elif undistilled is not None and undistilled.mean is None:
        found.append(f"no seed of the undistilled student ({undistilled.label}) finished: gains can't be given")
    elif undistilled is not None and undistilled.mean is not None and board.teacher_metric is not None:
        sign = 1.0 if board.higher_is_better else -1.0
        if sign * (board.teacher_metric - undistilled.mean) <= 0:
            teacher, student = (f"{value:.{board.decimals}f}" for value in (board.teacher_metric, undistilled.mean))
            found.append(f"the teacher ({teacher}) is no better than the undistilled student ({student})")
    if harm := _harm(board, control):
        found.append(harm)
    ranked = [row for row in board.rows if row.rank is not None]
    if 0 < len(board.leaders) < len(ranked):
        found.append("may be the best: " + ", ".join(row.label for row in board.leaders))
    if board.method is None and control is None:
        return (*found, "no kd on this board: whether a method beats it is not known; add kd to the methods")
    if control is not None and control.mean is None:
        return (*found, f"no seed of {control.label} finished: whether a method beats it is not known")
    for word, verdict in (("worse", -1), ("better", 1)):
        if named := [row.label for row in _rivals(board) if row.verdict == verdict]:
            found.append(f"{word} than {board.control}{_how(board, control)}: " + ", ".join(named))
    return tuple(found)


def _how(board: Board, control: Row | None) -> str:
    """By which parameters the methods of a board are compared: a second search might have found others."""
    if board.method is not None or control is None:
        return ""
    if board.searches is not None:
        return f", over {_searches(board)} searches each"
    return ", each as tuned here" if control.trials else f", each as tuned or configured here ({control.label} is not tuned)"


def _harm(board: Board, control: Row | None) -> str | None:
    """That distilling makes this student worse, as far as the intervals of the gains say so."""
    distilled = [row for row in board.rows if row.method not in WITHOUT_DISTILLATION and row.mean is not None]
    surely = {row.label for row in distilled if row.over_undistilled is not None and row.over_undistilled.high < 0}
    if distilled and len(surely) == len(distilled):
        return "distilling hurts here: every distilled method is surely worse than the undistilled student"
    if control is not None and control.label in surely:
        return f"distilling with {control.label} hurts here: it is surely worse than the undistilled student"
    return None


def _rivals(board: Board) -> list[Row]:
    """The rows that are compared with the control, and that nobody put there to be beaten."""
    return [row for row in board.rows if row.vs_control is not None and (board.method is not None or row.method not in CONTROLS)]


# --- what a reader must know -----------------------------------------------------------------------------------------


def notes(board: Board, groups: Sequence[Finals], found: Standings, scale: Scale, named: str | None = None) -> tuple[str, ...]:
    """What a reader must know to trust the board: seeds, the search's budget, what its intervals rest on, what stays open.

    named: the control that somebody asked for.
    """
    kind, count = board.rows_by, len(found.seeds)
    told = [f"{_seeds(board, count, kind)}; {_search_budget(groups, kind)}"]
    ranked = [row for row in board.rows if row.rank is not None]
    if named is not None and board.control != named:
        held = "misses seeds that others have" if board.row(named) is not None else "is not on this board"
        told.append(f"{named} {held}: no differences are given")
    if found.further:
        richer = sorted(group.label for group in groups if set(found.further) <= group.values.keys())
        told.append(
            f"{_and(richer)} {'have' if len(richer) > 1 else 'has'} {len(found.further)} more seeds, which differences use: "
            "a difference is not that of two printed means"
        )
    if board.errors is not None:
        told += _basis(board, groups, ranked)
    elif count == 1:
        told.append(f"one seed tells nothing apart: all complete {kind}s share rank 1; set seeds to 3 or more")
    elif len(ranked) > 1:
        told.append("all seeds agree exactly: nothing is told apart")
    if board.detectable is not None and found.spreads is not None:
        told.append(_power(board, found, len(ranked)))
    if any(row.looked for row in board.rows):
        told.append(_looks(board))
    if grown := [group.label for group in groups if _grew(group)]:
        told.append(f"seeds were added after a look, and the {LEVEL:.0%} do not hold: {', '.join(grown)}")
    told += map(_beside, board.beside)
    if undecided := [row.label for row in _rivals(board) if row.over_control is not None and row.verdict == 0]:
        told.append(f"no difference from {board.control} was found, which does not show that there is none: " + ", ".join(undecided))
    if _gap_left_out(board):
        lead = "the teacher's lead over the undistilled student"
        told.append(f"{lead} is below {scale.smallest_gap:g} or not told apart from none: no gap is given")
    told += _not_ranked(board.rows, f"not all of the {count} seeds that others have")
    if failed := [f"{row.label} ({row.failed})" for row in board.rows if row.failed and row.mean is not None]:
        stands = "count as the undistilled student of the same seed" if board.method is None else "are left out"
        told.append(f"failed seeds {stands}: " + ", ".join(failed))
    left_out = [f"{group.label} ({group.left_out})" for group in groups if group.left_out]
    if left_out:
        told.append("older final runs with another setting are left out: " + ", ".join(left_out))
    return tuple(told)


def _basis(board: Board, groups: Sequence[Finals], ranked: Sequence[Row]) -> list[str]:
    """What the intervals hold for, and what they rest on."""
    errors, kind = board.errors, board.rows_by
    assert errors is not None
    columns = [name for name, there in (("gain", board.undistilled), (f"vs {board.control}", board.control)) if there]
    what = "ranks" if not columns else f"the intervals of a column ({_and(columns)}) and the ranks"
    told = [
        f"{what} hold all at once with {LEVEL:.0%}; the error is pooled over {len(ranked) - len(errors.wide)} {kind}s "
        f"({errors.degrees} degrees of freedom), a {kind}'s own where that is larger"
    ]
    told.append(_conditions(board, groups))
    for label in errors.wide:
        if label == board.control:
            told.append(f"{label}'s own seeds scatter far more than the others': all differences from it are judged by them; give it more")
        else:
            told.append(f"{label}'s seeds scatter far more than the others': it is judged by its own alone")
    if errors.uneven:
        told.append(f"the {kind}s' spreads differ: intervals are taken wider ({errors.df} degrees of freedom instead of {errors.degrees})")
    return told


def _conditions(board: Board, groups: Sequence[Finals]) -> str:
    """What the intervals are conditional on: all that was done once."""
    right = next((group.right for group in groups if group.right is not None), None)
    rest = f"this teacher, this split and these {'' if right is None else f'{len(right):,} '}test samples"
    if board.searches is not None:
        return f"they speak of new searches with new seeds: of {rest}; {_spread_of_searches(board)}{_other_samples(board)}"
    searched = any(group.newest.trials for group in groups)
    one, second = (" (one search)", "; a second search was not made") if searched else ("", "")
    return f"they speak of new seeds: of these parameters{one}, {rest}{_other_samples(board)}{second}"


def _other_samples(board: Board) -> str:
    """How far other test samples would move what the best distilled row is ahead of the control."""
    best = board.best_distilled
    if best is None or best.moved_by_samples is None:
        best = max((row for row in board.rows if row.moved_by_samples is not None), key=lambda row: row.rank is not None, default=None)
    if best is None or best.moved_by_samples is None:
        return ""
    return f"; other samples alone would move {best.label} - {board.control} by {best.moved_by_samples:.2g}"


def _spread_of_searches(board: Board) -> str:
    assert board.searches is not None
    sds = [math.sqrt(variance) for variance in board.searches]
    if len(sds) == 1:
        return f"another search with another seed moves a value by sd {sds[0]:.2g}"
    return f"between searches sd {sds[0]:.2g}, between seeds {sds[1]:.2g}"


def _searches(board: Board) -> int:
    return board.plan.searches if board.plan is not None else 1


def _seeds(board: Board, count: int, kind: str) -> str:
    """How many finals each row has."""
    plan, plural = board.plan, "" if count == 1 else "s"
    if plan is not None and plan.looks:
        return f"{count} seeds a {kind}, and more until it is decided, up to {max(plan.looks)}"
    if plan is not None and plan.searches > 1:
        return f"{count} search{'' if count == 1 else 'es'} a {kind}, {plan.seeds} final{'' if plan.seeds == 1 else 's'} each"
    return f"{count} seed{plural} a {kind}"


def _looks(board: Board) -> str:
    """Which rows were decided after how many seeds."""
    assert board.plan is not None
    *before, last = zip(board.plan.looks, (f"{100 * level:.4g}%" for level in board.plan.levels), strict=True)
    where = ", ".join(f"{seeds} ({level})" for seeds, level in before) + (" or " if before else "") + f"{last[0]} seeds ({last[1]})"
    rivals = [row for row in board.rows if row.looked and row.label not in (board.control, board.undistilled) and row.over_control]
    decided = [
        f"{', '.join(labels)} at {seeds}"
        for seeds in board.plan.looks
        if (labels := [row.label for row in rivals if row.looked == seeds and not row.undecided])
    ]
    told = f"decided at {where}: {'; '.join(decided) or 'nobody'}"
    if left := [row.label for row in rivals if row.undecided and row.looked == max(board.plan.looks)]:
        told += f"; never decided: {', '.join(left)}"
    if waiting := [row.label for row in rivals if row.undecided and row.looked < max(board.plan.looks)]:
        told += f"; not decided yet: {', '.join(waiting)} (the same command goes on)"
    return f"{told}; ranks are of the first {board.plan.looks[0]} seeds"


def _beside(row: BesideRow) -> str:
    """One difference by itself, among no others: what a search was worth to a method, or the method beside as much plain training."""
    value = "no finished seed" if row.mean is None else f"{row.mean:.2f}"
    who, here = f"{row.label} at its published default", "as tuned it"
    if row.kind == "cost":
        cut = f", cut at {MOST_TIMES} times its epochs" if row.cut else ""
        epochs = f"{row.params.get('recipe.epochs', 0):,} epochs"
        who = f"the undistilled student trained for what teacher, cache, search and finals of {row.label} took ({epochs}{cut})"
        here = row.label
    middle, low, high = row.ahead
    if middle is None:
        return f"{who}: {value}"
    ends = "" if low is None or high is None else f" [{low:+.2f}, {high:+.2f}]"
    return f"{who}: {value}; {here} is {middle:+.2f}{ends} ahead (this difference alone, uncorrected)"


def _grew(group: Finals) -> bool:
    """Whether some finals of a row were planned only after others had been seen."""
    return len({json.dumps(record.plan, sort_keys=True) for record in group.records.values() if record.plan is not None}) > 1


def _power(board: Board, found: Standings, rows: int) -> str:
    """Which differences would be missed, with these seeds and with more."""
    assert found.spreads is not None
    assert board.detectable is not None
    missed = f"a true difference from {board.control} below {board.detectable:.2g} is missed more than one time in {round(1 / (1 - POWER))}"
    if board.plan is not None and any(row.looked for row in board.rows):
        return f"with {max(board.plan.looks)} seeds, {missed}"
    control = board.row(board.control)
    unit = "seeds" if board.searches is None else "searches"
    seeds, further = len(found.seeds), len(found.further) if control is not None and set(found.further) <= control.values.keys() else 0
    more = [
        f"with {times * seeds} {unit} {smallest_found(rows, times * seeds, found.spreads.with_seeds(times * seeds), times * further):.2g}"
        for times in _MORE
    ]
    whole = 1.0 if board.decimals == 2 else 0.01
    wanted = seeds_needed(rows, found.spreads, whole, further / seeds)
    needed = f"; to find {whole:g}: {wanted} {unit}" if wanted is not None else ""
    return f"{missed}; {', '.join(more)}{needed}"


def _gap_left_out(board: Board) -> bool:
    """Whether there is a teacher that is ahead, and a lead too small to say which share of it a method has made up."""
    undistilled = board.row(board.undistilled)
    if undistilled is None or undistilled.mean is None or board.teacher_metric is None or board.lead is not None:
        return False
    return (board.teacher_metric - undistilled.mean) * (1.0 if board.higher_is_better else -1.0) > 0


def _not_ranked(rows: Sequence[Row], why: str) -> list[str]:
    told = []
    if lost := [f"{row.label} ({row.failed})" for row in rows if row.failed and row.mean is None]:
        told.append("not ranked, every seed failed: " + ", ".join(lost))
    if incomplete := [f"{row.label} ({row.seeds})" for row in rows if row.rank is None and row.mean is not None]:
        told.append(f"not ranked, {why}: " + ", ".join(incomplete))
    return told


def _search_budget(groups: Sequence[Finals], kind: str) -> str:
    trials = {group.label: group.newest.trials or 0 for group in groups}
    if not any(trials.values()):
        return "no search, parameters as configured"
    how = ", ".join(sorted({name for group in groups for name in (group.newest.sampler, group.newest.scheduler) if name}))
    suffix = f" ({how})" if how else ""
    told = [group.newest.search_budget for group in groups if group.newest.search_budget]
    if told and all(budget == told[0] for budget in told):
        [(name, value)] = told[0].items()
        each = ", ".join(f"{label} {count}" for label, count in sorted(trials.items()))
        return f"search: {value:g} {name.replace('_', '-')} a {kind}{suffix}, which are trials: {each}"
    if len(set(trials.values())) == 1:
        return f"search: {next(iter(trials.values()))} trials a {kind}{suffix}"
    return f"search budgets DIFFER{suffix}: " + ", ".join(f"{label} {count}" for label, count in sorted(trials.items()))


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
