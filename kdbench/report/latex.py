"""Boards as LaTeX tables in the style of booktabs, to paste into a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kdbench import __version__
from kdbench.boards.board import Board, Row
from kdbench.boards.formatting import UNKNOWN, ranks, scaled, short
from kdbench.records.plan import CONTROL

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_NONE = "--"


def latex(boards: Sequence[Board]) -> str:
    r"""One `table` a board: means, ranks, gains, differences to kd, with intervals. It needs \usepackage{booktabs} and nothing else."""
    return "\n\n".join([f"% made by kdbench {__version__}; needs \\usepackage{{booktabs}}", *map(_table, boards)]) + "\n"


def escaped(text: str) -> str:
    """`text` for LaTeX to print as it is, in one paragraph."""
    return "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))


def _table(board: Board) -> str:
    decimals = board.decimals
    rows = [[_name(row, board), *_figures(row, board, decimals)] for row in board.rows]
    if board.rows_by == "method":
        heads = ["Method", escaped(board.primary), "Rank", "Gain", f"vs.\\ {escaped(board.control or CONTROL)}", "Gap", "Seeds"]
    else:
        costs = ["Parameters", "FLOPs", "ms", "Device-h"]
        heads = ["Student", escaped(board.primary), "Rank", f"vs.\\ {escaped(board.control or '')}", "Seeds", *costs]
    used = [place for place in range(len(heads)) if place < 2 or any(row[place] != _NONE for row in rows)]
    lines = [" & ".join(row[place] for place in used) + r" \\" for row in [heads, *rows]]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{_caption(board, decimals)}}}",
            rf"\label{{tab:{re.sub(r'[^A-Za-z0-9-]+', '-', f'kdbench-{board.protocol_hash}-{board.method or board.student}')}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(used) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _name(row: Row, board: Board) -> str:
    return escaped(row.label) + ("$^{*}$" if row.verdict > 0 else "")


def _figures(row: Row, board: Board, decimals: int) -> list[str]:
    best = row.rank == 1
    if board.rows_by == "student":
        return [
            _interval(row.mean, row.low, row.high, f".{decimals}f", best),
            _rank(row),
            _interval(*row.shown_difference, f"+.{decimals}f"),
            _seeds(row),
            *map(_shown, (scaled(row.params_count), scaled(row.flops), short(row.latency_ms_p50), short(row.device_hours))),
        ]
    return [
        _interval(row.mean, row.low, row.high, f".{decimals}f", best),
        _rank(row),
        _interval(*row.shown_gain, f"+.{decimals}f"),
        _interval(*row.shown_difference, f"+.{decimals}f"),
        _NONE if row.gap_recovered is None else f"${100 * row.gap_recovered:.0f}$\\,\\%",
        _seeds(row),
    ]


def _rank(row: Row) -> str:
    return _NONE if row.rank is None else ranks(row.rank, row.rank_high).replace("-", "--")


def _shown(text: str) -> str:
    return _NONE if text == UNKNOWN else text


def _seeds(row: Row) -> str:
    return f"{row.seeds}" + (f" ({row.failed} failed)" if row.failed else "")


def _interval(middle: float | None, low: float | None, high: float | None, spec: str, bold: bool = False) -> str:
    """In mathematics, where a minus is no hyphen."""
    if middle is None:
        return _NONE
    shown = f"\\mathbf{{{middle:{spec}}}}" if bold else f"{middle:{spec}}"
    return f"${shown}$" if low is None or high is None else f"${shown}\\;{{\\scriptstyle[{low:{spec}},\\,{high:{spec}}]}}$"


def _caption(board: Board, decimals: int) -> str:
    teacher = "no teacher" if board.teacher is None else f"teacher {escaped(board.teacher)}"
    if board.teacher_metric is not None:
        teacher += f" (${board.teacher_metric:.{decimals}f}$)"
    seeds = board.errors.seeds if board.errors is not None else max((row.seeds for row in board.rows), default=0)
    further = f", {board.errors.further} more of the controls" if board.errors is not None and board.errors.further else ""
    shared = f"student {escaped(board.student)}" if board.method is None else f"method {escaped(board.method)}"
    told = [
        f"{escaped(board.task)} on {escaped(board.data)}, {teacher}, {shared}:",
        f"{escaped(board.primary)} ({'higher' if board.higher_is_better else 'lower'} is better),",
    ]
    columns = [*(["gains"] if board.undistilled else []), *([f"differences to {escaped(board.control)}"] if board.control else [])]
    what = " and ".join(["ranks", *(f"all {name}" for name in columns)])
    told += [
        f"mean over {seeds} seeds{further} with 95\\,\\% $t$-intervals; {what} hold all at once with 95\\,\\% each.",
        f"Bold: {board.rows_by}s that may be the best.",
    ]
    if any(row.verdict > 0 for row in board.rows):
        told.append(f"$^{{*}}$: better than {escaped(board.control or CONTROL)}: the interval leaves out 0.")
    return " ".join([*told, f"Protocol {escaped(board.protocol_hash)}."])
