"""Which code may be imported and called because somebody wrote its name: one's own, and never a library's by accident.

A name such as `package.module:attribute` comes from a YAML file that somebody else may have written. Importing a module runs it, and
calling what it holds runs that: so where a module lies is found out before it is imported, and what an attribute is before it is called.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import os
import site
import sys
import sysconfig
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from kdbench.errors import CodeRefused, UserError

TRUST_VARIABLE = "KDBENCH_TRUST_CODE"  # what --trust-code sets: worker processes inherit it
TRUST_FLAG = "--trust-code"

# Of an installed library, the builders that YAML files name by convention: each is annotated with the class of the network it builds.
_TAKEN = ("torchvision.models",)
_OF_RECORD: ContextVar[bool] = ContextVar("of_record", default=False)


@contextmanager
def names_from_records() -> Iterator[None]:
    """Inside, names come from a record, an archive or a stored configuration: a file can't say who wrote it, so own code is refused too."""
    token = _OF_RECORD.set(True)
    try:
        yield
    finally:
        _OF_RECORD.reset(token)


def are_from_records() -> bool:
    """Whether names come from a record at the moment: who wrote it is given no more of the machine than looking at it takes."""
    return _OF_RECORD.get()


def trust_code() -> None:
    """Take every name, in this process and in those that it starts: what --trust-code does."""
    os.environ[TRUST_VARIABLE] = "1"


def trust_environment() -> dict[str, str]:
    """What a process on another machine needs in its environment to trust what this one trusts."""
    return {TRUST_VARIABLE: "1"} if code_is_trusted() else {}


def code_is_trusted() -> bool:
    """Whether the user asked, with --trust-code, that every name be taken."""
    return os.environ.get(TRUST_VARIABLE) == "1"


def check_module(kind: str, target: str, module: str) -> None:
    """Raise CodeRefused where code of `module` may not be imported for a name in a YAML file or a record. Imports nothing.

    Args:
        kind: what the name stands for, such as `model`.
        target: the whole name, `package.module:attribute`.
        module: the dotted name of the module.
    """
    if code_is_trusted():
        return
    top = module.partition(".")[0]
    if top == "kdbench" or module in _TAKEN or module.startswith(tuple(f"{name}." for name in _TAKEN)) or top in _plugin_packages():
        return
    where = _origin(top)
    if where is not None:
        raise CodeRefused(
            f"{kind} {target!r}: {module!r} belongs to {where}, and a name in a file may only call your own code; "
            f"put a function or class of your own around it, or pass {TRUST_FLAG}"
        )
    if _OF_RECORD.get():
        raise CodeRefused(
            f"{kind} {target!r}: the name comes from a stored record, which doesn't say who wrote it, so {module!r} is not imported; "
            f"pass {TRUST_FLAG} if you know its code"
        )


def check_maker(kind: str, target: str, found: Any, makes: type, annotation: str) -> None:
    """Raise CodeRefused where `found` is not known, before it is called, to make an instance of `makes`.

    Taken are subclasses of `makes`, and functions whose return annotation is `makes` or a subclass of it. An annotation alone proves
    nothing of a function that some library defines: where the function was defined is checked as its module is.

    Args:
        kind, target: as in `check_module`.
        found: the object behind the name.
        makes: the class whose instance the call must return.
        annotation: how `makes` is usually written in code, such as `nn.Module`.
    """
    if code_is_trusted():
        if not callable(found) or isinstance(found, makes):
            raise UserError(f"{kind} {target!r}: found a {_described(found)}, expected a class or function that makes a {annotation}")
        return
    wanted = f"a subclass of {annotation}, or a function with the return annotation `-> {annotation}`"
    if inspect.isclass(found):
        if not issubclass(found, makes):
            raise CodeRefused(f"{kind} {target!r}: the class {_named(found)} was not called: expected {wanted}")
        return
    if not inspect.isfunction(found):
        raise CodeRefused(f"{kind} {target!r}: found a {_described(found)}, which was not called: expected {wanted}")
    module = inspect.unwrap(found).__module__ or ""
    check_module(kind, target, module)
    # kdbench's own builders have names, and its other functions are not made for a YAML file; a dry run names one of `kdbench.data` itself.
    if module.partition(".")[0] == "kdbench" and not module.startswith("kdbench.data."):
        raise CodeRefused(f"{kind} {target!r}: {found.__name__} is a function of kdbench's own; use a name that `kdbench list` shows")
    returned = _returned(found)
    if not (inspect.isclass(returned) and issubclass(returned, makes)):
        says = (
            "has no return annotation" if returned is None else f"has the return annotation `-> {getattr(returned, '__name__', returned)}`"
        )
        raise CodeRefused(
            f"{kind} {target!r}: the function {found.__name__} {says}, so it was not called: "
            f"write `def {found.__name__}(...) -> {annotation}:`, or pass {TRUST_FLAG}"
        )


def _returned(function: Any) -> Any:
    """The class that a function's return annotation names; None where there is none, the text where it can't be resolved."""
    written = getattr(function, "__annotations__", {}).get("return")
    if not isinstance(written, str):
        return written
    try:
        return typing.get_type_hints(function).get("return")
    except Exception:  # of another parameter's annotation, say, which exists for a type checker alone
        return _looked_up(written, function.__module__)


def _looked_up(name: str, module: str) -> Any:
    """What a dotted name stands for in a module; the name itself where it stands for nothing."""
    names = vars(sys.modules[module])
    found: Any = None
    for place, part in enumerate(name.split(".")):
        found = names.get(part) if place == 0 else getattr(found, part, None)
    return name if found is None else found


def _described(found: Any) -> str:
    return f"{type(found).__name__} ({_named(found)})" if inspect.isbuiltin(found) else type(found).__name__


def _named(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


@lru_cache(maxsize=256)
def _origin(top: str) -> str | None:
    """To whom a top-level package belongs: `the standard library`, `an installed package`; None for one's own, or where there is none."""
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return "the standard library"
    spec = importlib.machinery.PathFinder.find_spec(top)  # of a top-level name this imports nothing
    if spec is None:
        loaded = sys.modules.get(top)
        spec = loaded.__spec__ if loaded is not None else None
    places = [spec.origin] if spec is not None and spec.has_location else list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        if place is not None and _is_installed(Path(place)):
            return "an installed package"
    return None


def _is_installed(place: Path) -> bool:
    place = place.resolve()
    if {"site-packages", "dist-packages"} & set(place.parts):
        return True
    return any(place.is_relative_to(folder) for folder in _installation_folders())


@lru_cache(maxsize=1)
def _installation_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    named = [paths[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    named += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple({Path(name).resolve() for name in named})


@lru_cache(maxsize=1)
def _plugin_packages() -> frozenset[str]:
    """The top-level packages that offer something to kdbench by an entry point: whoever installed them wanted them to be used here."""
    groups = ("kdbench.methods", "kdbench.tasks", "kdbench.models", "kdbench.data")
    return frozenset(point.module.partition(".")[0] for group in groups for point in entry_points(group=group))
