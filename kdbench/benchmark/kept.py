"""Small facts that a run measures or decides once and keeps in its results folder, so that the next one goes by the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdbench.bounded import parse_json, read_file
from kdbench.storage.working_copy import fetch
from kdbench.training.checkpoint import write_atomically

_LARGEST = 1_000  # bytes


def read_kept(path: Path) -> dict[str, Any]:
    """What was kept there; empty where nothing was, or nothing that `keep` wrote."""
    try:
        kept = parse_json(read_file(fetch(path, newest=True), _LARGEST))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def keep(path: Path, facts: Mapping[str, Any]) -> None:
    content = json.dumps(dict(facts))
    write_atomically(path, lambda temporary: temporary.write_text(content))
