"""What a hostile case is, and what all groups share: draws from the seed, an experiment around a file, files that are none."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.bad_input.tiny_experiment import TINIER, write

SPARSE = 50_000_000_000  # bytes
SENTINEL = "called"  # what hostile code would make in the working directory; any file that a command leaves fails its case

# What `kdbench run` imports before it looks at an experiment's parts, and what the first optimizer does, by which it checks a recipe.
RUN_IMPORTS = ("torch", "torch._dynamo", "kdbench.benchmark.run", "kdbench.benchmark.dry_run", "kdbench.cli.display", "kdbench.tracking")
FILES_IMPORTS = ("kdbench.records.exchange",)  # what reads records and archives needs no torch


@dataclass(frozen=True)
class Case:
    """A command and how it has to end.

    Attributes:
        arguments: of kdbench.
        imports: modules that the command imports anyway, whose memory is not counted.
        said: a part of what it has to say.
        code: the exit code.
        most_lines: that it may say, where the exit code is 2.
        progress: how the lines begin in which a run tells what it does, until it finds what is wrong. They are not counted.
        environment: variables beside the usual ones; `{here}` is the working directory.
    """

    arguments: tuple[str, ...]
    imports: tuple[str, ...] = RUN_IMPORTS
    said: str = ""
    code: int = 2
    most_lines: int = 1
    progress: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


Option = TypeVar("Option")


class Draws(random.Random):
    """What a case draws from: the same for the same seed, kind and turn.

    turn: how many cases of the kind come before this one. `pick` gives each of them another option while there are enough.
    """

    def __init__(self, seed: int, kind: str, turn: int) -> None:
        super().__init__(f"{seed} {kind} {turn}")
        self._order = random.Random(f"{seed} {kind}")
        self.turn = turn

    def pick(self, options: Sequence[Option]) -> Option:
        """The option of this turn, of the options in an order that the seed decides."""
        order = self._order.sample(range(len(options)), len(options))
        return options[order[self.turn % len(options)]]


Maker = Callable[[Path, Draws], Case]  # fills an empty folder, in which the command then runs
Makers = tuple[tuple[Maker, int], ...]  # each with the number of its cases


def experiment(folder: Path, changes: Mapping[str, Any], raw: str = "", name: str = "hostile.yaml") -> str:
    """An experiment that trains in a moment, with dotted keys changed. The value `RAW` becomes the text `raw`."""
    write({**deepcopy(TINIER), **changes}, str(folder / name))
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("RAW", raw))
    return name


RUNS = (("run", "--results", "results", "--no-mlflow"), ("run", "--dry-run"))


def run(file: str, draws: Draws | None = None, *more: str, **facts: Any) -> Case:
    """`kdbench run` of an experiment; with `draws` one of the commands that read one as run does."""
    command, *options = RUNS[0] if draws is None else draws.choice(RUNS)
    return Case((command, file, *options, *more), **facts)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SPARSE)


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


# What may lie where a file is expected.
ODD: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": _link("/dev/zero"),
    "full device": _link("/dev/full"),
    "dangling link": _link("nowhere"),
    "circular link": lambda path: path.symlink_to(path.name),
    "sparse file": _sparse,
    "endless file": _link("/proc/self/pagemap"),
    "own memory": _link("/proc/self/mem"),
}


def odd_file(path: Path, draws: Draws, but: Sequence[str] = ()) -> str:
    """Put something at `path` that is no readable file, and say what."""
    kind = draws.pick([kind for kind in ODD if kind not in but])
    path.parent.mkdir(parents=True, exist_ok=True)
    ODD[kind](path)
    return kind
