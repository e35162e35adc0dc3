"""The house holds: a room imports only from rooms below it, no files import each other, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdbench

PACKAGE = Path(kdbench.__file__).parent
ROOMS = (
    "api",
    "cli",
    "benchmark",
    "distributed",
    "deploy",
    "training",
    "experiment",
    "methods",
    "tasks",
    "models",
    "report",
    "boards",
    "search",
    "tracking",
    "records",
    "data",
    "storage",
    "catalogue",
    "own_code",
    "yaml12",
    "bounded",
    "errors",
    "account",
    "credentials",
)
WITHOUT_TORCH = {"report", "boards", "search", "tracking", "records", "storage", *ROOMS[ROOMS.index("catalogue") :]}
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


def test_every_module_is_in_a_known_room_and_every_room_exists() -> None:
    assert {_room(path) for path in MODULES} == set(ROOMS)


def test_no_two_files_import_each_other() -> None:
    """Nor any longer circle: a file can be read after those that it imports. Imports for type checkers count."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}

    def imports(path: Path) -> set[str]:
        return {found for name in _imported(path) for found in (name, name.rpartition(".")[0]) if found in names}

    order = graphlib.TopologicalSorter({name: imports(path) - {name} for name, path in names.items()})
    try:
        order.prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"files import each other: {' <- '.join(error.args[1])}")


def test_a_package_holds_no_code_but_its_catalogue() -> None:
    """An `__init__.py` is empty, or assigns the one dictionary that `kdbench list` reads."""
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        kinds = [type(node).__name__ for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
        assert kinds in ([], ["Assign"], ["ImportFrom", "AnnAssign"]), _id(path)


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_a_module_imports_only_from_its_own_room_and_rooms_below(path: Path) -> None:
    allowed = set(ROOMS[ROOMS.index(_room(path)) :]) | {"__version__"}
    used = {name.split(".")[1] for name in _imported(path) if name.split(".")[0] == "kdbench"}
    assert used <= allowed, f"{_id(path)} imports from above: {sorted(used - allowed)}"


@pytest.mark.parametrize("path", [path for path in MODULES if _room(path) != "distributed"], ids=_id)
def test_only_the_room_distributed_imports_ray(path: Path) -> None:
    assert "ray" not in {name.split(".")[0] for name in _imported(path)}


@pytest.mark.parametrize("path", [path for path in MODULES if _room(path) in WITHOUT_TORCH], ids=_id)
def test_records_boards_and_searches_need_no_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name in _imported(path)} & {"torch", "torchvision", "torchmetrics", "timm"}


def test_nothing_is_called_by_a_name_that_says_nothing() -> None:
    parts = {part.removesuffix(".py") for path in MODULES for part in path.relative_to(PACKAGE).parts}
    assert not parts & {"utils", "util", "common", "helpers", "core", "misc", "manager"}
