"""What kdbench says when something is wrong: one readable message and an exit code, never a traceback for a user's mistake."""

from __future__ import annotations

import difflib
import errno
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from kdbench.credentials import without_secrets

if TYPE_CHECKING:  # every command imports this file; `--help` should not wait for pydantic
    from pydantic import BaseModel, ValidationError

    Valid = type[BaseModel] | Iterable[str]


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


class UnreadableFile(UserError):
    """A file is there, and is not what belongs at its place. Readers of many files say so and leave it out."""


class CodeRefused(UserError):
    """A name stands for code that may not be imported or called; see `kdbench.own_code`."""


class TooMuch(UserError):
    """What somebody asked for takes more memory or time than it may have: more than this machine has, or than a record is given."""


class StorageFailed(RunFailed):
    """Results can't be written or read any more. What would run next would fail as well, so this ends the whole run."""


class DiskFull(StorageFailed):
    """There is no space left."""


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def not_written(error: OSError, path: object) -> RunFailed:
    """What to raise for a write to `path` that failed."""
    if error.errno in NO_SPACE:
        return DiskFull(f"the disk is full: {path} was not written; free some space and run the same command again, finished work is kept")
    return RunFailed(f"{path} could not be written: {error.strerror or error}")


def in_one_line(error: BaseException) -> str:
    """What foreign code raised, and the last line of the user's own files on the way: `KeyError: 'x' (my_model.py, line 7)`."""
    message = without_secrets(next((line.strip() for line in str(error).splitlines() if line.strip()), ""))
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {message[:200]}".removesuffix(": ") + place


def is_users(filename: str) -> bool:
    """Whether a file of code is the user's own: none of Python's, of kdbench's or of an installed package."""
    libraries = (sysconfig.get_path("stdlib"), str(Path(__file__).parent))
    compiled = filename.endswith((".pyx", ".pxi"))  # named without their folder
    return not (compiled or filename.startswith(("<", *libraries)) or "site-packages" in filename or "dist-packages" in filename)


def printable(text: str) -> str:
    """A path or another text as one line of UTF-8: bytes of another encoding become `\\xe9`, and control characters `\\n`, `\\x1b`."""
    return _UNPRINTABLE.sub(lambda found: _escaped(found[0]), text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # what Python makes of a byte that is not UTF-8, PEP 383
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


LONGEST_SHOWN = 100  # characters of a value in a message
LONGEST_LINE = 5_000  # characters of a line of a message: a path in it may have 4,096
MOST_PROBLEMS = 10  # in a message


def cut(text: str, most: int = LONGEST_SHOWN) -> str:
    """The beginning of a text that is too long for a message."""
    return text if len(text) <= most else f"{text[:most]}..."


def shown(value: object) -> str:
    """A value as it is written in a message: its representation, cut."""
    return cut(_represented(value))


def _represented(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # a whole number of more than 4,300 digits; nested without end
        return f"a {type(value).__name__} that is too large to show"


def first_few(values: Iterable[object]) -> str:
    """The first three of some values in order, such as `1, 2, 3, ...`, each cut."""
    few = sorted(values)  # type: ignore[type-var]
    return ", ".join(cut(str(value)) for value in few[:3]) + (", ..." if len(few) > 3 else "")


def for_terminal(error: BaseException) -> str:
    """The message of an error that ends a command. A name or a value of a million characters in it is not printed whole."""
    return "\n".join(cut(line, LONGEST_LINE) for line in str(error).split("\n"))


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` for the most similar of `names`, or a short list of them where nothing is near."""
    names = sorted(names)
    close = difflib.get_close_matches(cut(name), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {shown(close[0])}?"
    first = ", ".join(map(cut, names[:12])) + (", ..." if len(names) > 12 else "")
    return f"; there is: {first}"


_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}
_MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}
_EXPECTED = {
    "model_type": "expected keys with values",
    "model_attributes_type": "expected keys with values",
    "dict_type": "expected keys with values",
    "tuple_type": "expected a list such as [a, b]",
    "list_type": "expected a list such as [a, b]",
    "invalid_key": "expected a name as the key",
    "too_short": "expected at least one entry",
    "int_from_float": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "string_type": "expected a text",
}


def explain(error: ValidationError, where: str, valid: Valid) -> str:
    """What pydantic found wrong, one line a problem: `where: key.path: what was expected, what came, which valid name is near`.

    Of more than ten problems, the first ten are told and the others counted.

    where: the file, method or data set that was read. valid: the class that was validated, whose fields (nested ones too) are the valid
    names, or the names of a function's options.
    """
    names = valid if isinstance(valid, type) else tuple(valid)
    problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors(include_url=False)]
    # Of a list whose entries are wrong, pydantic also says that it is too short.
    inside = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    told = [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in inside]
    lines = [_problem(problem, names) for problem in told[:MOST_PROBLEMS]]
    if more := len(told) - len(lines):
        lines.append(f"and {more:,} more")
    return "\n".join(f"{where}: {line}" for line in lines)


def _problem(problem: dict[str, Any], valid: type[BaseModel] | tuple[str, ...]) -> str:
    kind, given, message = problem["type"], problem["input"], problem["msg"]
    *parents, last = problem["loc"] or ("",)
    path = cut(".".join(str(part) for part in (*parents, last)))
    if kind in _UNKNOWN:
        names = _names_under(valid, parents)
        return f"unknown key {path!r}{nearest(str(last), names) if names else ''}"
    if kind in _MISSING:
        return f"key {path!r} is missing"
    message = message.removeprefix("Value error, ").replace("Input should be", "expected").replace("String should", "expected a text to")
    message = _EXPECTED.get(kind, message)
    whole, short = _represented(given), shown(given)
    message = message.replace(whole, short)
    # A check of our own on several keys at once says itself what it found.
    if kind != "value_error" or (isinstance(given, str | int | float) and ", got " not in message and short not in message):
        message += f", got {short}"
    if kind == "literal_error":
        hint = nearest(str(given), re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
        message += hint if "did you mean" in hint else ""  # all that is valid stands before it
    return f"{path}: {message}" if path else message


def _names_under(valid: type[BaseModel] | tuple[str, ...], path: list[int | str]) -> list[str]:
    """The keys that are valid at `path`; list positions, dictionary keys and union tags on the way leave the candidates as they are."""
    if isinstance(valid, tuple):
        return [] if path else list(valid)
    models = [valid]
    for part in path:
        below = [m for parent in models if part in parent.model_fields for m in _models_in(parent.model_fields[str(part)].annotation)]
        tagged = [m for m in models if m.__name__ == part]
        models = below or tagged or models
    return sorted({name for m in models for name in m.model_fields})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
