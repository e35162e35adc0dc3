"""Names to things: every catalogue (`METHODS`, `TASKS`, `DATA`, `MODELS`) is a dictionary of `Entry`, resolved here and only here.

Nothing is imported until it is asked for, so `kdbench list` needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from kdbench.errors import UserError, in_one_line, shown
from kdbench.errors import nearest as nearest
from kdbench.own_code import check_module


@dataclass(frozen=True)
class Entry:
    """One line of a catalogue: where the thing is (`module:attribute`) and what it is, in a sentence."""

    target: str
    summary: str


def resolve(kind: str, name: str, table: Mapping[str, Entry]) -> Any:
    """The object behind `name`: an entry of `table`, a dotted path `package.module:attribute`, or an entry point of an installed package.

    Raises UserError for a name that is none of them (naming the nearest), for one whose code may not be called (`own_code`; its module is
    not imported), and for one that can't be imported. The caller checks what the object is before calling it.
    """
    if name in table:
        return load(kind, table[name].target)
    if ":" in name:
        check_module(kind, name, name.partition(":")[0])
        return load(kind, name)
    plugins = {point.name: point for point in entry_points(group=entry_point_group(kind))}
    if name in plugins:
        return load(kind, f"{plugins[name].module}:{plugins[name].attr}")
    raise UserError(f"unknown {kind} {shown(name)}{nearest(name, [*table, *plugins])}")


def entry_point_group(kind: str) -> str:
    """Where an installed package offers things of this kind: kdbench.methods, kdbench.tasks, kdbench.models, kdbench.data."""
    return "kdbench.data" if kind == "data" else f"kdbench.{kind}s"


def known(kind: str, name: str, table: Mapping[str, Entry]) -> bool:
    """Whether `resolve` would find `name` without importing it."""
    return name in table or ":" in name or any(p.name == name for p in entry_points(group=entry_point_group(kind)))


def load(kind: str, target: str) -> Any:
    """Import `package.module:attribute`. Raises UserError where that can't be done, whatever the module itself raises."""
    module_name, _, attribute = target.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise UserError(f"{kind} {shown(target)}: expected package.module:attribute")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{kind} {target!r}: there is no module {error.name!r} on the Python path") from error
        raise UserError(f"{kind} {target!r}: importing {module_name!r} failed: {in_one_line(error)}") from error
    if not hasattr(module, attribute):
        raise UserError(f"{kind} {target!r}: module {module_name!r} has no {attribute!r}{nearest(attribute, vars(module))}")
    return getattr(module, attribute)
