"""A board as a picture: what each method gains over the undistilled student, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdbench.boards.board import Board, verdict
from kdbench.errors import RunFailed, UserError

SUFFIXES = (".png", ".svg", ".pdf")
_COLOURS = {1: "#1b7837", -1: "#b2182b", 0: "#5a5a5a"}  # of a verdict


def draw(boards: Sequence[Board], path: Path) -> None:
    """One panel a board, best method on top; green is surely better than `none`, red surely worse, grey can't be told.

    Raises UserError for a suffix that is none of SUFFIXES and where there is nothing to draw, RunFailed where `path` can't be written.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"--picture {path}: the name must end in one of {', '.join(SUFFIXES)}")
    drawable = [board for board in boards if worth_drawing(board)]
    if not drawable:
        raise UserError("there is nothing to draw: no board has a method beside `none`")
    from matplotlib.figure import Figure

    heights = [1.2 + 0.34 * len(board.rows) for board in drawable]
    figure = Figure(figsize=(7.2, sum(heights)), layout="constrained")
    panels = figure.subplots(len(drawable), 1, squeeze=False, height_ratios=heights)
    for axes, board in zip(panels[:, 0], drawable, strict=True):
        _panel(axes, board)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise RunFailed(f"{path} could not be written: {error.strerror or error}") from error


def worth_drawing(board: Board) -> bool:
    """Whether any method's gain is known."""
    return any(row.shown_gain[0] is not None for row in board.rows)


def _panel(axes: object, board: Board) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    rows, figures = [row for row in board.rows if row.shown_gain[0] is not None][::-1], f".{board.decimals}f"
    for height, row in enumerate(rows):
        colour, (middle, low, high) = _COLOURS[verdict(row.over_undistilled)], row.shown_gain
        if low is not None and high is not None:
            axes.plot([low, high], [height, height], color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot(middle or 0.0, height, "o", color=colour, markersize=6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row.label}  {row.mean:{figures}}" for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"gain in {board.primary} over the undistilled student, points; all intervals hold at once with 95%", fontsize=9)
    teacher = f"{board.teacher} ({board.teacher_metric:{figures}})" if board.teacher_metric is not None else board.teacher or "no teacher"
    student = board.row(board.undistilled)
    undistilled = f", undistilled {student.mean:{figures}}" if student is not None and student.mean is not None else ""
    axes.set_title(f"{board.data}: {teacher} → {board.student}{undistilled}", loc="left", fontsize=10)
