"""What kdbench says when something is wrong: one readable message and an exit code, never a traceback for a user's mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


class KDBenchError(Exception):
    """Base of every error that ends a command with one line. `exit_code` is what the shell sees."""

    exit_code = 1


class UserError(KDBenchError):
    """The input is wrong: a file, a key, a name, a value. The message says which, what was expected and what is near."""

    exit_code = 2


class RunFailed(KDBenchError):
    """The input was fine but the work could not be finished: a full disk, a dead worker, a diverged teacher."""


class Diverged(RunFailed):
    """A loss or a metric became nan or infinite. The message says where."""


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` for the most similar of `names`, or a short list of them where nothing is near."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; there is: {shown}"


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """What pydantic found wrong, one line a problem: `where: key.path: what was expected, what came, which valid name is near`.

    where: the file, method or option that was read; model: the class that was validated: its fields, nested ones too, are the valid names.
    """
    problems = error.errors(include_url=False)
    return "\n".join(f"{where}: {_problem(dict(problem), model)}" for problem in problems)


def _problem(problem: dict[str, Any], model: type[BaseModel]) -> str:
    *parents, last = problem["loc"] or ("",)
    path = ".".join(str(part) for part in (*parents, last))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path!r}{nearest(str(last), _names_under(model, parents))}"
    if problem["type"] == "missing":
        return f"key {path!r} is missing"
    given, message = problem["input"], problem["msg"]
    if problem["type"] == "value_error":
        message = message.removeprefix("Value error, ")
    elif problem["type"] == "model_type":
        message = f"expected keys with values, got {given!r:.80}"
    else:
        message = message.replace("Input should be", "expected") + f", got {given!r:.80}"
    if problem["type"] == "literal_error":
        message += nearest(str(given), re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
    return f"{path}: {message}" if path else message


def _names_under(model: type[BaseModel], path: Iterable[int | str]) -> list[str]:
    """The keys that are valid at `path`; list positions, dictionary keys and union tags on the way leave the candidates as they are."""
    models = [model]
    for part in path:
        below = [m for parent in models if part in parent.model_fields for m in _models_in(parent.model_fields[str(part)].annotation)]
        tagged = [m for m in models if m.__name__ == part]
        models = below or tagged or models
    return sorted({name for m in models for name in m.model_fields})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
