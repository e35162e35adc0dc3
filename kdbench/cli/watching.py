"""A command that a person watches, interrupts and repeats. Heavy imports happen inside."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from kdbench.credentials import without_secrets
from kdbench.errors import printable

if TYPE_CHECKING:
    from kdbench.cli.display import Display
    from kdbench.experiment import Experiment


def say(text: str) -> None:
    """Print a line to stderr."""
    typer.echo(without_secrets(text), err=True)


def again() -> str:
    """The command to repeat, without credentials that were typed into it."""
    return printable(without_secrets(shlex.join(["kdbench", *sys.argv[1:]])))


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of SIGTERM: it ends a command as Ctrl-C does."""
    raise KeyboardInterrupt


@contextmanager
def watched(path: Path, overrides: list[str] | None, results: str | None) -> "Iterator[tuple[Experiment, Path, Display]]":
    """The experiment, its results folder and a display, for work that can be interrupted and gone on with."""
    from kdbench.distributed.cluster import quiet

    quiet()
    signal.signal(signal.SIGTERM, interrupt)
    from rich.console import Console

    from kdbench.cli.display import Display
    from kdbench.distributed.jobs import check_lasting
    from kdbench.experiment import load_experiment
    from kdbench.storage.layout import results_folder

    experiment = load_experiment(path, overrides or ())
    folder = results_folder(results, experiment.results)
    check_lasting(folder)
    try:
        with Display(Console(stderr=False)) as display:
            yield experiment, folder, display
    except KeyboardInterrupt:
        say(f"\nStopped. What is finished is kept; to go on: {again()}")
        raise typer.Exit(130) from None
