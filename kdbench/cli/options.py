"""Options that several commands take, and how an example is shown below a command's help."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kdbench.errors import UserError


def within(low: float, high: float) -> Callable[[typer.CallbackParam, float | None], float | None]:
    """A callback for an option with a number: refuses what is outside low .. high, and nan, in one line."""

    def check(param: typer.CallbackParam, value: float | None) -> float | None:
        if value is not None and not low <= value <= high:
            raise UserError(f"{param.opts[0]} {value:.12g}: expected a number from {low:,.12g} to {high:,.12g}")
        return value

    return check


ExperimentFile = Annotated[Path, typer.Argument(help="The experiment, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a dotted key, such as recipe.epochs=3 or method.temperature=2. May be repeated."
    ),
]
Results = Annotated[
    str | None,
    typer.Option(
        "--results",
        metavar="DIR",
        help="Where results are kept: a folder, or s3://bucket/folder. Default: `results:` in the file, KDBENCH_RESULTS, or ./results.",
        show_default=False,
    ),
]
ManyResults = Annotated[
    list[str] | None,
    typer.Option(
        "--results",
        metavar="DIR",
        help="Where results are kept; may be repeated to read several folders as one. Default: KDBENCH_RESULTS, or ./results.",
        show_default=False,
    ),
]
MaxHours = Annotated[
    float | None,
    typer.Option(
        "--max-hours",
        metavar="N",
        callback=within(1e-6, 1e5),
        help="Stop after so long, as Ctrl-C does; the same command goes on. By default, until all is done.",
        show_default=False,
    ),
]
NoMlflow = Annotated[bool, typer.Option("--no-mlflow", help="Do not log to MLflow.")]
Task = Annotated[str | None, typer.Option(help="Only this task.", show_default=False)]
Data = Annotated[str | None, typer.Option(help="Only this data set.", show_default=False)]
Teacher = Annotated[str | None, typer.Option(help="Only this teacher.", show_default=False)]
Student = Annotated[str | None, typer.Option(help="Only this student.", show_default=False)]
OfExperiment = Annotated[str | None, typer.Option("--experiment", help="Only this experiment.", show_default=False)]
Format = Annotated[str, typer.Option("--format", help="table, markdown, latex, csv or json.")]


def _trusted(value: bool) -> bool:
    if value:
        from kdbench.own_code import trust_code

        trust_code()
    return value


TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        callback=_trusted,
        help="Import and call every name that the file or the records give, also of installed packages.",
    ),
]


def example(command: str) -> str:
    return f"Example: kdbench {command}"
