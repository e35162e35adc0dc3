"""The fenced blocks of this project's Markdown pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"# ([\w.-]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class Block:
    """language: what stands behind the fence; empty where nothing does."""

    page: str
    language: str
    text: str

    @property
    def file_name(self) -> str | None:
        """The name that a first line such as `# mimic.py` gives the block."""
        found = _FILE_NAME.match(self.text)
        return found[1] if found else None


def page_text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fenced(page: str) -> list[Block]:
    """The blocks of a page, its path relative to the checkout, from top to bottom."""
    return [Block(page, language, text) for language, text in _FENCE.findall(page_text(page))]
