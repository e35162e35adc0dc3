"""Boards of one pair whose searches had different rules, trials or device-hours a method: where these come to different answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from kdbench.boards.board import Board

_WORDS = {1: "better", 0: "not told apart", -1: "worse"}


def with_rulesets_compared(found: Sequence[Board]) -> list[Board]:
    """The boards, each with a finding for every other board of its pair that was searched by another rule and disagrees with it.

    They disagree where a method is surely better than the control by one rule and not by the other, or surely worse.
    """
    groups: dict[str, list[Board]] = defaultdict(list)
    for board in found:
        groups[_pair(board)].append(board)
    told: dict[int, list[str]] = defaultdict(list)
    for boards in groups.values():
        for one in boards:
            for other in boards:
                if one.ruleset != other.ruleset and (line := _disagreement(one, other)):
                    told[id(one)].append(line)
    return [replace(board, findings=(*board.findings, *told[id(board)])) if told[id(board)] else board for board in found]


def _pair(board: Board) -> str:
    """What two boards share that differ in how parameters were searched alone."""
    shared = [board.task, board.data_hash, board.teacher, board.teacher_sha, board.student, board.method, board.primary, board.control]
    return json.dumps([*shared, board.trained])


def _disagreement(one: Board, other: Board) -> str | None:
    """Which verdicts against the control differ."""
    differing = [
        f"{row.label} ({_WORDS[row.verdict]} here, {_WORDS[beside.verdict]} there)"
        for row in one.rows
        if (beside := other.row(row.label)) is not None
        and row.over_control is not None
        and beside.over_control is not None
        and row.verdict != beside.verdict
    ]
    if not differing:
        return None
    return (
        f"another rule of search, {other.ruleset}, comes to another answer against {one.control} "
        f"(board {other.protocol_hash[:8]}): {', '.join(differing)}"
    )
