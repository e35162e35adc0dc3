"""The files of clusters/, read strictly: a key that stands twice is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kdbench
from kdbench.experiment import parse_yaml

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
IMAGE = re.compile(rf"REPLACE_REGISTRY/kdbench:{re.escape(kdbench.__version__)}-(cpu|gpu)")


def documents(path: Path) -> list[dict[str, Any]]:
    """All YAML documents of a file."""
    return [parse_yaml(part, path.name) for part in re.split(r"^---$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)]


def pinned(package: str) -> str:
    """The version that constraints.txt has."""
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def values(tree: Any, key: str) -> Iterator[Any]:
    """Every value that stands under `key`, however deep."""
    for name, inner in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if name == key:
            yield inner
        yield from values(inner, key)
