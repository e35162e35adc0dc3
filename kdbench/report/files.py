"""The report of some results folders: one file, a folder with a page for each board, or a page that a server renews."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kdbench.boards.board import Board
from kdbench.boards.filters import check_row, filtered
from kdbench.boards.leaderboard import boards as boards_of
from kdbench.boards.published import load_published
from kdbench.errors import UserError, not_written
from kdbench.records.folders import Folders
from kdbench.records.record import RunRecord
from kdbench.report.content import Page, pages
from kdbench.report.page import render_index, render_report
from kdbench.report.picture import draw, worth_drawing
from kdbench.report.rendering import nothing_to_rank
from kdbench.report.serve import LOOPBACK, LivePage, report_server
from kdbench.tracking import Interface, Tracker, interface

INDEX = "index.html"
TITLE = "Leaderboard"


@dataclass(frozen=True)
class Report:
    """What is reported: the records of `folders` that one of the `filters` leaves; where `methods` are given, their rows alone.

    control: the method that the others are compared with; None for kd.
    """

    folders: Folders
    filters: Sequence[Mapping[str, str]] = ({},)
    methods: tuple[str, ...] = ()
    control: str | None = None

    def write(self, path: Path) -> Path:
        """All boards in one file. Raises UserError for a folder and where there is no board, RunFailed where it can't be written."""
        if path.is_dir():
            raise UserError(f"--html {path}: is a folder, expected a file name such as report.html")
        made, students = self._boards()
        _write(path, render_report(made, self._interface, title=TITLE, students=students))
        return path

    def write_site(self, folder: Path) -> Path:
        """An index, which is returned, and a page for each board; their links need no server.

        Pages of an earlier time are replaced, other files stay. Raises UserError for a file and where there is no board, RunFailed where
        the folder can't be written.
        """
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--site {folder}: is a file, expected a folder")
        made, students = self._boards()
        files = {page.anchor: f"{page.anchor}.html" for page in made}
        for page in made:
            title = f"{page.board.data}: {page.board.teacher or 'no teacher'} → {page.board.student}"
            _write(folder / files[page.anchor], render_report([page], self._interface, title=title, home=INDEX))
        _write(folder / INDEX, render_index(made, files, title=TITLE, students=students))
        return folder / INDEX

    @property
    def source(self) -> LivePage:
        """What a server gives: a page that is renewed with every record; of no board too, since there may be one soon."""
        return LivePage(self._records, self._live)

    def serve(self, port: int, announce: Callable[[str], object]) -> None:
        """Serve to this machine's browsers until Ctrl-C; `announce` is told the address. Raises UserError where the port can't be had."""
        with report_server(self.source, port) as server:
            announce(f"http://{LOOPBACK}:{server.server_port}/")
            try:
                server.serve_forever(poll_interval=0.2)
            except KeyboardInterrupt:
                return

    def _live(self, records: Sequence[RunRecord], version: str) -> str:
        return render_report(self._pages(records), self._interface, title=TITLE, live=version, students=self._students(records))

    def _boards(self) -> tuple[list[Page], list[Board]]:
        """A page for each board, and the boards of students."""
        records = self._records()
        found = self._pages(records)
        if not found:
            self.check()
            raise UserError(nothing_to_rank(str(self.folders), records))
        return found, self._students(records)

    def _records(self) -> list[RunRecord]:
        found = {record.run_id: record for wanted in self.filters for record in self.folders.scan(**wanted)}
        return list(found.values())

    def check(self) -> None:
        """Raise UserError where there are records, and a filter or the method that no record has leaves none of them."""
        for wanted in self.filters:
            filtered(self.folders, wanted)
        if self.methods or self.control is not None:
            found = boards_of(self._records())
            for method in self.methods:
                check_row(found, method)
            if self.control is not None:
                check_row(found, self.control, "--control")

    def _pages(self, records: Sequence[RunRecord]) -> list[Page]:
        return pages(records, load_published(), self.folders.paths, self._interface, self.methods, self.control)

    def _students(self, records: Sequence[RunRecord]) -> list[Board]:
        found = boards_of(records, rows_by="student")
        return [board for board in found if not self.methods or any(map(board.trained_by, self.methods))]

    @property
    def _interface(self) -> Interface:
        return interface(self.folders.paths[0])


def publish(boards: Sequence[Board], folder: Path, name: str, tracker: Tracker) -> list[Path]:
    """What a run leaves to look at, under `folder`/boards and in MLflow: a picture, where there is something to draw, and the report."""
    report, picture = (folder / "boards" / f"{name}.{suffix}" for suffix in ("html", "png"))
    drawn = [picture] if any(worth_drawing(board) for board in boards) else []
    for path in drawn:
        draw(boards, path)
    protocols = list(dict.fromkeys(board.protocol_hash for board in boards))
    Report(Folders([folder]), [{"protocol_hash": protocol} for protocol in protocols]).write(report)
    tracker.publish(protocols, report, drawn)
    return [*drawn, report]


def _write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise not_written(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
