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


class _TimeIsOver(KeyboardInterrupt):
    """It ends a command as Ctrl-C does."""


@contextmanager
def _ended_after(hours: float | None) -> Iterator[None]:
    """Raise _TimeIsOver in what is done inside, once so many hours are over; never for None."""
    if hours is None:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TimeIsOver

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 3600 * hours)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def watched(
    path: Path, overrides: list[str] | None, results: str | None, max_hours: float | None = None
) -> "Iterator[tuple[Experiment, Path, Display]]":
    """The experiment, its results folder and a display, for work that can be interrupted and gone on with.

    max_hours: after so many it ends as by Ctrl-C; by default it is not interrupted.
    """
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
        with _ended_after(max_hours), Display(Console(stderr=False)) as display:
            yield experiment, folder, display
    except _TimeIsOver:
        say(f"\nThe {max_hours:g} hours of --max-hours are over. What is finished is kept; to go on: {again()}")
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        say(f"\nStopped. What is finished is kept; to go on: {again()}")
        raise typer.Exit(130) from None
