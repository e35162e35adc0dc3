"""The house holds: a room imports only from rooms below it, and the heavy libraries stay where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdbench

PACKAGE = Path(kdbench.__file__).parent
ROOMS = (
    "cli",
    "doctor",
    "pages",
    "display",
    "benchmark",
    "distributed",
    "training",
    "experiment",
    "compression",
    "methods",
    "tasks",
    "models",
    "data",
    "results",
    "search_space",
    "catalogue",
    "own_code",
    "yaml12",
    "bounded",
    "errors",
    "account",
    "credentials",
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _imported(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, those inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which room it is from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _id(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_module_is_in_a_known_room() -> None:
    assert {_room(path) for path in MODULES} <= set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_a_module_imports_only_from_its_own_room_and_rooms_below(path: Path) -> None:
    allowed = set(ROOMS[ROOMS.index(_room(path)) :]) | {"__version__"}
    used = {name.split(".")[1] for name in _imported(path) if name.split(".")[0] == "kdbench"}
    assert used <= allowed, f"{_id(path)} imports from above: {sorted(used - allowed)}"


@pytest.mark.parametrize("path", [path for path in MODULES if _room(path) != "distributed"], ids=_id)
def test_only_the_room_distributed_imports_ray(path: Path) -> None:
    assert "ray" not in {name.split(".")[0] for name in _imported(path)}


@pytest.mark.parametrize("path", [path for path in MODULES if _room(path) in ROOMS[ROOMS.index("results") :]], ids=_id)
def test_results_and_the_rooms_below_import_no_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name in _imported(path)} & {"torch", "torchvision", "torchmetrics", "timm"}


def test_nothing_is_called_by_a_name_that_says_nothing() -> None:
    parts = {part.removesuffix(".py") for path in MODULES for part in path.relative_to(PACKAGE).parts}
    assert not parts & {"utils", "util", "common", "helpers", "core", "misc", "manager"}
