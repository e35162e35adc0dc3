"""The commands. Each parses its options, calls one function and prints; heavy imports happen inside."""

import errno
import io
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdbench.account import complete_environment
from kdbench.cli.cache import cache_app
from kdbench.cli.options import (
    Data,
    ExperimentFile,
    Format,
    ManyResults,
    MaxHours,
    NoMlflow,
    OfExperiment,
    Overrides,
    Results,
    Student,
    Task,
    Teacher,
    TrustCode,
    example,
    within,
)
from kdbench.cli.results import chosen, recommend, results_app, verify
from kdbench.cli.watching import again, interrupt, say, watched
from kdbench.credentials import keep_out_of_logs, without_secrets
from kdbench.errors import NO_SPACE, KDBenchError, UserError, for_terminal, in_one_line, not_written, printable

if TYPE_CHECKING:
    from kdbench.boards.board import Board, RowsBy
    from kdbench.boards.summary import Summary
    from kdbench.records.folders import Folders
    from kdbench.records.record import RunRecord

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing what draws the boxes would take longer than all the rest of `--help`
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Which way of distilling this teacher into this student is best, and by how much?\n\n"
    "Example: kdbench run experiments/quickstart.yaml",
)

_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
# Where the output is a file or a log there is no width to fit: every column is shown.
_WIDTH_OF_A_FILE = 260
# The modules that read files. Of a damaged one they warn, and then it is refused in a line of our own, or read all the same.
_READERS = r"(PIL|pyarrow)\.|torch\.(serialization|storage)$"
_MANY_FILES = 2_000  # of one record each: reading them takes seconds


@app.command(epilog=example("run experiments/quickstart.yaml --set recipe.epochs=10"))
def run(
    experiment: ExperimentFile,
    set_: Overrides = None,
    results: Results = None,
    no_mlflow: NoMlflow = False,
    max_hours: MaxHours = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Train no student: say where the time of a step goes, method by method, and write traces.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train, download and write nothing: build and check everything, say what it would cost.")
    ] = False,
    trust_code: TrustCode = False,
) -> None:
    """Train the teacher, search every method, train the finals, print the board. Run it again after any interruption: it goes on."""
    if dry_run:
        _dry_run(experiment, set_)
        return
    if profile:
        _profile(experiment, set_, results)
        return
    summary = _run_experiment(experiment, set_, results, no_mlflow, max_hours, search_only=False)
    _end_with(summary.failures)


@app.command(epilog=example("tune experiments/quickstart.yaml --set search.trials=20"))
def tune(
    experiment: ExperimentFile,
    set_: Overrides = None,
    results: Results = None,
    no_mlflow: NoMlflow = False,
    max_hours: MaxHours = None,
    trust_code: TrustCode = False,
) -> None:
    """The search alone: print the best parameters of every method."""
    import json

    summary = _run_experiment(experiment, set_, results, no_mlflow, max_hours, search_only=True)
    for student, methods in summary.tuned.items():
        for label, params in methods.items():
            typer.echo(f"{student}  {label}  {json.dumps(params)}")
    _end_with(summary.failures)


@app.command(epilog=example("submit experiments/quickstart.yaml --address http://127.0.0.1:8265 --results /shared/results"))
def submit(
    experiment: ExperimentFile,
    address: Annotated[
        str, typer.Option("--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    set_: Overrides = None,
    results: Results = None,
    no_mlflow: NoMlflow = False,
    max_hours: MaxHours = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Only start the job: print its id, and how to follow it.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Run the experiment as a job on a Ray cluster: send this folder, follow the log, end with the job's exit code.

    The results folder has to be one that all nodes see. The same command again follows the job while it runs, and goes on where it stopped.
    """
    from kdbench.benchmark.checks import check_choices
    from kdbench.distributed.jobs import Request, followed, relative_file
    from kdbench.distributed.jobs import submit as submit_job
    from kdbench.experiment import load_experiment
    from kdbench.storage.layout import Layout, results_folder
    from kdbench.tasks.build import check_task

    read = load_experiment(experiment, set_ or ())
    check_choices(read, check_task(read.task))
    place = Layout(results_folder(results, read.results)).location
    more = (("--no-mlflow",) if no_mlflow else ()) + (("--max-hours", f"{max_hours!r}") if max_hours is not None else ())
    request = Request(read.name, relative_file(experiment), place, tuple(set_ or ()), more)
    job = submit_job(address, request, say)
    say(f"job {job.id}; results: {place}, on every node of the cluster")
    if no_wait:
        say(job.commands)
        typer.echo(job.id)
        return
    signal.signal(signal.SIGTERM, interrupt)
    raise typer.Exit(followed(job, lambda text: typer.echo(text, nl=False), say, again()))


def _run_experiment(
    path: Path, overrides: list[str] | None, results: str | None, no_mlflow: bool, max_hours: float | None, search_only: bool
) -> Any:
    with watched(path, overrides, results, max_hours) as (experiment, folder, display):
        from kdbench.benchmark.run import run as run_benchmark
        from kdbench.tracking import MlflowTracker, NoTracker, tracking_uri

        tracker = NoTracker() if no_mlflow else MlflowTracker(tracking_uri(folder), experiment.name)
        summary = run_benchmark(experiment, folder, display, tracker, search_only)
    if not search_only:
        from kdbench.boards.summary import summaries
        from kdbench.records.folders import Folders
        from kdbench.records.store import LONG_FIELDS

        folders = Folders([folder])
        ranked = [protocol for protocol in summary.protocols if folders.scan(without=LONG_FIELDS, protocol_hash=protocol)]
        found = [board for protocol in ranked for board in _boards(folders, {"protocol_hash": protocol})]
        _print_boards(found, "table", summaries(found))
        if found:
            from kdbench.report.files import publish

            for path in publish(found, folder, experiment.name, tracker):
                typer.echo(f"{'report' if path.suffix == '.html' else 'picture'}: {path}")
    return summary


def _dry_run(path: Path, overrides: list[str] | None) -> None:
    from kdbench.distributed.cluster import quiet

    quiet()
    from kdbench.benchmark.dry_run import dry_run
    from kdbench.cli.pages import dry_run_page
    from kdbench.experiment import load_experiment
    from kdbench.storage.address import is_address
    from kdbench.storage.layout import results_folder

    experiment = load_experiment(path, overrides or ())
    if experiment.results is not None and not is_address(experiment.results):
        results_folder(None, experiment.results)  # raises UserError for a path that can't be used
    typer.echo(dry_run_page(dry_run(experiment)))


def _profile(path: Path, overrides: list[str] | None, results: str | None) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; its profiler announces every start and stop otherwise
    with watched(path, overrides, results) as (experiment, folder, display):
        from kdbench.benchmark.run import profile
        from kdbench.cli.pages import profile_page

        profiles = profile(experiment, folder, display)
    typer.echo(profile_page(profiles, experiment.recipe.batch_size))
    typer.echo(f"traces for chrome://tracing or ui.perfetto.dev: {folder / 'profiles' / experiment.name}")


def _end_with(failures: tuple[str, ...]) -> None:
    if failures:
        typer.echo(
            "\n".join([f"kdbench: {len(failures)} of the trainings could not be finished:", *(f"  {reason}" for reason in failures)]),
            err=True,
        )
        raise typer.Exit(1)


@app.command(
    epilog=f"{example('leaderboard --data fashion_mnist --html report.html')}\n\n{example('leaderboard --by student --control tiny_cnn')}"
)
def leaderboard(
    results: ManyResults = None,
    format_: Format = "table",
    task: Task = None,
    data: Data = None,
    teacher: Teacher = None,
    student: Student = None,
    method: Annotated[str | None, typer.Option(help="Only this method (its gain over `none` is still shown).", show_default=False)] = None,
    experiment: OfExperiment = None,
    by: Annotated[
        str, typer.Option(metavar="ROWS", help="What a row is: method, or student to compare the students of each method.")
    ] = "method",
    only: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Only these rows; their figures stay those of the whole board.", show_default=False),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(metavar="ROW", help="What differences are over in place of kd; with --by student, a student.", show_default=False),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the gains: FILE.png, .svg or .pdf.", show_default=False)
    ] = None,
    pairwise: Annotated[bool, typer.Option("--pairwise", help="Also print each row against each other.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Also quote the papers' own figures, apart from the ranking.")] = False,
    explain: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="Trace every figure of this method's rows to runs, instead of the board.", show_default=False),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report instead: one HTML file.", show_default=False)] = None,
    site: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a static site instead: an index and a page a board.", show_default=False)
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the report to this machine's browsers; it renews itself as results arrive.")
    ] = False,
    port: Annotated[int, typer.Option(callback=within(0, 65_535), help="Of --serve; 0 takes any that is free.")] = 8230,
) -> None:
    """Rank what the results folder holds: one board for each protocol, never mixed, with intervals that hold all at once."""
    from kdbench.boards.filters import check_row
    from kdbench.boards.summary import of_methods, summaries
    from kdbench.records.folders import Folders
    from kdbench.report.rendering import check_format
    from kdbench.storage.layout import results_folder

    check_format(format_)
    wanted = chosen(task=task, data=data, teacher=teacher, student=student, experiment=experiment)
    pages = any((html, site, serve))
    if pairwise and (pages or explain is not None or format_ not in ("table", "markdown")):
        raise UserError("--pairwise is of boards that are printed as table or markdown; JSON has `better_than` of each row")
    if pages and (others := [name for name, given in (("--format", format_ != "table"), ("--explain", explain)) if given]):
        raise UserError(f"{others[0]} is of what is printed, and --html, --site and --serve print nothing; give one of the two")
    if picture is not None and (pages or explain is not None):
        raise UserError("--picture is of what is printed, and --html, --site, --serve and --explain print no board; give one of the two")
    refused = {"--html": html, "--site": site, "--serve": serve, "--picture": picture, "--explain": explain, "--published": published}
    _check_rows(by, [name for name, given in refused.items() if given])
    if only is not None and method is not None:
        raise UserError("--only and --method both choose rows; give one of the two")
    names = [name.strip() for name in (only or method or "").split(",") if name.strip()]
    folders = Folders([results_folder(folder) for folder in results] if results else [results_folder()])
    if by == "student":
        if only is not None:
            raise UserError("--only is of methods; with --by student, --method chooses boards and --student rows")
        _students(folders, wanted, method, control, format_, pairwise)
        return
    if pages:
        _report(folders, wanted, names, control, html, site, port if serve else None)
        return
    if explain is not None:
        _explain(folders, wanted, explain, control, format_)
        return
    found = _boards(folders, wanted, control=control)
    across = summaries(found) if control is None else []
    for name in names:
        check_row(found, name, "--only" if only is not None else "--method")
    if control is not None:
        check_row(found, control, "--control")
    if names:
        found, across = of_methods(found, names), of_methods(across, names)
    _print_boards(found, format_, across, published, pairwise)
    if picture is not None:
        from kdbench.report.picture import draw

        draw(found, picture)


def _check_rows(by: str, others: Sequence[str]) -> None:
    """Raise UserError for --by and other options that make no sense together."""
    if by not in ("method", "student"):
        raise UserError(f"--by {by}: expected method or student")
    if by == "student" and others:
        report = others[0] in ("--html", "--site", "--serve")
        way_out = "the report has a section for students without --by" if report else "leave one of them out"
        raise UserError(f"{others[0]} is not supported with --by student: {way_out}")


def _students(
    folders: "Folders", filters: Mapping[str, str], method: str | None, control: str | None, format_: str, pairwise: bool
) -> None:
    """The students of each method side by side. A student that is asked for keeps the figures that it has beside all others."""
    from kdbench.boards.filters import check_row, students_by
    from kdbench.boards.summary import of_student

    found = _boards(folders, {name: value for name, value in filters.items() if name != "student"}, "student", control)
    if method is not None:
        found = students_by(found, method)
    for name, option in ((control, "--control"), (filters.get("student"), "--student")):
        if name is not None:
            check_row(found, name, option)
    if "student" in filters:
        found = of_student(found, filters["student"])
    _print_boards(found, format_, with_pairs=pairwise)


def _report(
    folders: "Folders",
    filters: Mapping[str, str],
    methods: Sequence[str],
    control: str | None,
    html: Path | None,
    site: Path | None,
    port: int | None,
) -> None:
    """The boards as HTML: a file, a folder, or on a port until Ctrl-C."""
    from kdbench.report.files import Report

    report = Report(folders, [filters], tuple(methods), control)
    if html is not None:
        typer.echo(f"report: {report.write(html)}")
    if site is not None:
        typer.echo(f"site: {report.write_site(site)}")
    if port is not None:
        try:
            report.check()
        except UserError as error:  # what it names may come while the report is served
            say(f"kdbench: {error}")
        signal.signal(signal.SIGTERM, interrupt)
        report.serve(port, lambda address: typer.echo(f"{address} (Ctrl-C ends it)"))
        typer.echo("stopped")


def _boards(folders: "Folders", filters: Mapping[str, str], rows_by: "RowsBy" = "method", control: str | None = None) -> "list[Board]":
    """The boards of the records that the filters leave; says what to do where there is none. Raises UserError where no record fits."""
    from kdbench.boards.filters import filtered
    from kdbench.boards.leaderboard import boards
    from kdbench.boards.published import load_published
    from kdbench.records.store import LONG_FIELDS
    from kdbench.report.rendering import nothing_to_rank

    records = filtered(folders, filters, without=LONG_FIELDS)
    found = boards(records, load_published(), rows_by=rows_by, control=control)
    if not found:
        typer.echo(nothing_to_rank(str(folders), records, rows_by), err=True)
    if folders.single_files > _MANY_FILES:
        typer.echo(f"kdbench: {folders.single_files} files of one record each: kdbench results compact makes reading faster", err=True)
    return found


def _explain(folders: "Folders", filters: Mapping[str, str], method: str, control: str | None, format_: str) -> None:
    import json

    from kdbench.boards.explanation import explain, explanation_data
    from kdbench.boards.filters import filtered
    from kdbench.boards.leaderboard import boards
    from kdbench.cli.pages import check_table_or_json, explanation_page

    check_table_or_json(format_)
    traced = explain(boards(filtered(folders, filters), control=control), folders.scan(), method)
    if format_ == "json":
        typer.echo(json.dumps({"explanations": [explanation_data(each) for each in traced]}, indent=2, allow_nan=False))
    else:
        typer.echo("\n\n".join(map(explanation_page, traced)))


def _print_boards(
    found: "list[Board]", format_: str, across: "Sequence[Summary]" = (), published: bool = False, with_pairs: bool = False
) -> None:
    from rich.console import Console

    from kdbench.report.rendering import render

    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
    typer.echo(render(found, format_, across=across, with_published=published, with_pairs=with_pairs, console=console), nl=False)


@app.command("list", epilog=example("list methods"))
def list_(
    kind: Annotated[str, typer.Argument(metavar="methods|tasks|data|models", help="What to list.", show_default=False)],
    format_: Annotated[str, typer.Option("--format", help="table or json.")] = "table",
) -> None:
    """What there is to use: every name with a sentence."""
    from kdbench.cli.pages import catalogue_page

    typer.echo(catalogue_page(kind, format_))


@app.command(epilog=example("show dkd"))
def show(
    name: Annotated[str, typer.Argument(help="A method, task, data set or model, as `kdbench list` names it.", show_default=False)],
    trust_code: TrustCode = False,
) -> None:
    """All about one of them. Of a method: paper, loss, parameters with defaults and search ranges, published figures."""
    from kdbench.cli.pages import show_page

    typer.echo(show_page(name))


@app.command(epilog=example("taps resnet18 --image 3x224x224 --classes 1000"))
def taps(
    model: Annotated[
        str,
        typer.Argument(
            help="A model of `kdbench list models` or of timm, or package.module:Class; or an experiment's YAML file, for its networks.",
            show_default=False,
        ),
    ],
    image: Annotated[str, typer.Option(metavar="CxHxW", help="Channels, height and width of an image, for a model.")] = "3x32x32",
    classes: Annotated[int, typer.Option(callback=within(1, 100_000), help="Classes that a model tells apart.")] = 100,
    all_: Annotated[bool, typer.Option("--all", help="Every module, not only those with an alias such as stage:-1.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Names, shapes and strides of the places inside a model that a method can look at."""
    from kdbench.cli.pages import experiment_taps_page, image_shape, taps_page

    if Path(model).suffix in (".yaml", ".yml"):
        typer.echo(experiment_taps_page(Path(model), all_))
    else:
        typer.echo(taps_page(model, image_shape(image), classes, all_))


@app.command(epilog=example("export 01KAMZ3Q --format onnx"))
def export(
    run_id: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run's id or the beginning of it, as `leaderboard --format json` lists them.", show_default=False
        ),
    ],
    format_: Annotated[str, typer.Option("--format", help="safetensors, onnx or pt2, which is torch.export's.")] = "safetensors",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: STUDENT-METHOD-RUN.FORMAT in this folder.", show_default=False)
    ] = None,
    register: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Write no file: register it in MLflow as a version of the model NAME.", show_default=False),
    ] = None,
    results: Results = None,
    trust_code: TrustCode = False,
) -> None:
    """Write a trained network to a file for use elsewhere, checked on test images to give what the original gives."""
    from kdbench.deploy.export import export as export_run
    from kdbench.deploy.export import find_run
    from kdbench.models.outputs import in_words
    from kdbench.records.store import ResultStore
    from kdbench.storage.layout import results_folder

    folder = results_folder(results)
    if register is not None:
        _register(find_run(ResultStore(folder).scan(), run_id), folder, register)
        return
    report = export_run(find_run(ResultStore(folder).scan(), run_id), folder, format_, output)
    typer.echo(f"{report.path}: {report.model}, {report.size_bytes / 1e6:.2f} MB")
    typer.echo(f"input: {report.inputs}")
    typer.echo(f"output: {in_words(report.output_shape)} for each image")
    typer.echo(f"checked on {report.images} test samples: largest difference {report.difference:.1e}, allowed {report.tolerance:.1e}")


def _register(record: "RunRecord", folder: Path, name: str) -> None:
    from kdbench.deploy.register import register
    from kdbench.models.outputs import in_words
    from kdbench.tracking import MlflowTracker, tracking_uri

    made = register(record, folder, name, MlflowTracker(tracking_uri(folder), record.experiment))
    typer.echo(f"{made.uri} {'is new' if made.new else 'was registered before'}, at {made.tracking_uri}")
    typer.echo(f"input: {made.inputs}")
    typer.echo(f"output: {in_words(made.output_shape)} for each image")
    typer.echo(f"checked on {made.images} test samples: largest difference {made.difference:.1e}, allowed {made.tolerance:.1e}")


app.command(epilog=example("recommend --latency 5ms --min-gain 1.0"))(recommend)
app.command(epilog=example("verify --results /data/results"))(verify)
app.add_typer(results_app, name="results", epilog=example("results export boards.zip"))
app.add_typer(cache_app, name="cache", epilog=example("cache ls"))


@app.command(epilog=example("doctor --results /data/results"))
def doctor(results: Results = None) -> None:
    """What this machine has and lacks. Exit code 1 where something is missing that kdbench needs."""
    from kdbench.cli.doctor import examine
    from kdbench.cli.pages import aligned
    from kdbench.storage.layout import results_folder

    findings = examine(results_folder(results))
    colours = {"ok": typer.colors.GREEN, "advice": typer.colors.YELLOW, "missing": typer.colors.RED}
    lines = aligned([(finding.state, finding.subject, finding.text) for finding in findings]).splitlines()
    for finding, line in zip(findings, lines, strict=True):
        typer.echo(typer.style(finding.state, fg=colours[finding.state]) + line.removeprefix(finding.state))
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """The console script. A user's mistake ends in one message and exit code 2, a failed run in one message and exit code 1."""
    _prepare_output()
    keep_out_of_logs()
    _quieten_readers()
    complete_environment()
    try:
        # A dotted path such as my_methods:Mine may name a file in the working directory, which is not on the console script's path.
        # Last, so that nothing that is installed gets hidden; Ray's workers have the folder on theirs anyway.
        sys.path.append(_working_directory())
        app()
    except KDBenchError as error:
        say(f"kdbench: {_safe_lines(for_terminal(error))}")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `kdbench leaderboard | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        say(f"kdbench: {_safe_lines(_unforeseen(error))}")
        sys.exit(1)


def _prepare_output() -> None:
    """Print what the terminal's encoding can't show, such as a file name that is no text, as an escape instead of ending in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _quieten_readers() -> None:
    warnings.filterwarnings("ignore", module=_READERS)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder was deleted: change to one that exists") from None


def _safe_lines(text: str) -> str:
    """A message of one or more lines without credentials, and with control characters as escapes."""
    return "\n".join(printable(line) for line in without_secrets(text).split("\n"))


def _unforeseen(error: Exception) -> str:
    """A full disk or a missing permission in plain words; of anything else, a fault in kdbench or in own code, the traceback in a file."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return str(not_written(error, error.filename or "a file"))
    if isinstance(error, OSError) and error.errno in _FORBIDDEN and error.filename:
        return f"{error.filename} can't be opened: {error.strerror}"
    text = without_secrets("".join(traceback.format_exception(error)))
    try:
        with tempfile.NamedTemporaryFile("wb", prefix="kdbench-", suffix=".log", delete=False) as trace:
            trace.write(text.encode(errors="backslashreplace"))
    except OSError as unwritten:
        return f"{in_one_line(error)}; its traceback could not be kept: {unwritten.strerror or unwritten}"
    return f"{in_one_line(error)}; traceback in {trace.name}"
