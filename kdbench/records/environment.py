"""What a result was made with: versions, commit, devices, and a hash of the host's name (the name itself is nobody's business)."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from kdbench import __version__
from kdbench.errors import is_users

# `<hash>` or `<hash>-dirty`: of the checkout that a job was sent from; the copy that it runs in has no .git.
COMMIT_VARIABLE = "KDBENCH_COMMIT"
DIRTY = "-dirty"
PACKAGES = ("torch", "torchvision", "timm", "ray", "optuna", "mlflow", "pyarrow", "numpy")


@cache
def describe_environment() -> dict[str, Any]:
    """The environment columns of a record: git_commit, git_dirty, versions, host_hash."""
    commit = recorded_commit()
    return {
        "git_commit": commit.removesuffix(DIRTY) if commit else None,
        "git_dirty": commit.endswith(DIRTY) if commit else None,
        "versions": {"kdbench": __version__, "python": platform.python_version(), **_versions()},
        "host_hash": hashlib.sha256(platform.node().encode()).hexdigest()[:12],
    }


def recorded_commit() -> str | None:
    """What records of this process name as their commit, ending in `-dirty` where the checkout holds changes; None where it has none."""
    return commit_of(Path.cwd()) or os.environ.get(COMMIT_VARIABLE)


def own_code(things: Iterable[Any]) -> dict[str, str]:
    """The user's own modules that these classes and functions are from, and those of their own that they import: name -> hash of the code.

    Comments, layout and docstrings do not count. Installed packages and kdbench itself are left out, as versions name them, and so is what
    has no source.
    """
    found: dict[str, str] = {}
    todo = [sys.modules.get(getattr(thing, "__module__", None) or "") for thing in things]
    while todo:
        module = todo.pop()
        if module is None or module.__name__ in found or not is_users(getattr(module, "__file__", None) or "<none>"):
            continue
        digest, imported = _code_of(module)
        if digest is not None:
            found[module.__name__] = digest
            todo += [sys.modules.get(name) for name in imported]
    return dict(sorted(found.items()))


# By module, as it was when it was first looked at: a file that is edited while a run is under way is not the code that runs.
_codes: WeakKeyDictionary[ModuleType, tuple[str | None, tuple[str, ...]]] = WeakKeyDictionary()


def _code_of(module: ModuleType) -> tuple[str | None, tuple[str, ...]]:
    """The hash of a module's code, None where its source can't be read, and the names of what it may import."""
    if module not in _codes:
        try:
            tree = ast.parse(Path(str(module.__file__)).read_bytes())
        except (OSError, SyntaxError, ValueError):
            _codes[module] = None, ()
        else:
            text = json.dumps(_bare(tree))
            _codes[module] = hashlib.sha256(text.encode()).hexdigest()[:16], tuple(_imports(tree, module))
    return _codes[module]


def _bare(node: Any) -> Any:
    """A tree of code as plain lists, without what differs between versions of Python: places, empty fields and docstrings."""
    if isinstance(node, list):
        return [_bare(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        (name, value) for name, value in ast.iter_fields(node) if value not in (None, []) and name not in ("ctx", "kind", "type_comment")
    ]
    if (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    ):
        fields = [(name, value[1:] if name == "body" else value) for name, value in fields]
    return [type(node).__name__, *([name, _bare(value)] for name, value in fields)]


def _imports(tree: ast.Module, module: ModuleType) -> Iterator[str]:
    package = module.__package__ or ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            name = ".".join(part for part in (above, node.module) if part)
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit_of(folder: Path) -> str | None:
    """The commit of a checkout, ending in `-dirty` where it holds changes; None where the folder is no checkout or there is no git."""
    commit = _git(folder, "rev-parse", "HEAD")
    return commit and commit + (DIRTY if _git(folder, "status", "--porcelain") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
