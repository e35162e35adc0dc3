"""The console script, called in the test's own process."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from kdbench.cli import app as cli


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Kdbench:
    """Calls the console script's function in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ended:
        self.monkeypatch.setattr(sys, "argv", ["kdbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, *self.capsys.readouterr())
