"""What is done with results that are there: choose by them, check them, carry them elsewhere."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kdbench.cli.options import Data, OfExperiment, Results, Student, Task, Teacher, TrustCode, example, within

results_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Records as files: compacted, or with searches, predictions and weights from one results folder into another.",
)


def chosen(**filters: str | None) -> dict[str, str]:
    """The filters that were given."""
    return {name: value for name, value in filters.items() if value is not None}


def recommend(
    min_gain: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            callback=within(-1e6, 1e6),
            help="Only methods with at least so many points over `none` of the same student.",
            show_default=False,
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="For one image, at most: 5ms, 800us. The board's `ms`, measured after training.", show_default=False
        ),
    ] = None,
    params: Annotated[str | None, typer.Option(metavar="COUNT", help="Of the student, at most: 250k, 1M.", show_default=False)] = None,
    hours: Annotated[
        float | None,
        typer.Option(callback=within(0, 1e9), help="Device-hours for one tuned student, its search included, at most.", show_default=False),
    ] = None,
    task: Task = None,
    data: Data = None,
    teacher: Teacher = None,
    student: Student = None,
    experiment: OfExperiment = None,
    results: Results = None,
    format_: Annotated[str, typer.Option("--format", help="table or json.")] = "table",
) -> None:
    """Rank all students, undistilled ones too, by their metric within limits. Exit code 1 where nothing qualifies."""
    import json

    from kdbench.boards.filters import filtered
    from kdbench.boards.leaderboard import boards
    from kdbench.boards.recommendation import Budget, answer_data, milliseconds, parameter_count
    from kdbench.boards.recommendation import recommend as answer
    from kdbench.cli.pages import check_table_or_json, recommendation_page
    from kdbench.records.store import ResultStore
    from kdbench.report.rendering import nothing_to_rank
    from kdbench.storage.layout import results_folder

    check_table_or_json(format_)
    budget = Budget(min_gain, milliseconds(latency) if latency else None, parameter_count(params) if params else None, hours)
    folder = results_folder(results)
    filters = chosen(task=task, data=data, teacher=teacher, student=student, experiment=experiment)
    records = filtered(ResultStore(folder), filters)
    answers = answer(boards(records), records, budget)
    if format_ == "json":
        typer.echo(json.dumps({"answers": [answer_data(each) for each in answers]}, indent=2, allow_nan=False))
    elif answers:
        typer.echo(recommendation_page(answers, budget))
    if not answers:
        typer.echo(nothing_to_rank(str(folder), records), err=True)
    if all(each.verdict == "none" for each in answers):
        raise typer.Exit(1)


def verify(results: Results = None, trust_code: TrustCode = False) -> None:
    """Check records against checksums, seals, predictions and weights. Exit code 1 and a line for each mismatch.

    Every metric is derived again from the stored predictions, every unit key from the record's own fields. What killed commands left behind
    is named too; it makes no figure wrong, and the exit code stays.

    Files can't show whether predictions, record and seal were forged together. Only training again shows it.
    """
    from kdbench.deploy.verification import verify as verify_results
    from kdbench.storage.layout import results_folder

    folder = results_folder(results)
    with typer.progressbar(length=1, label="verify", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        found = verify_results(folder, show)
    for line in (*found.problems, *found.notes):
        typer.echo(line)
    for line in found.left_out:
        typer.echo(f"left out: {line}")
    if found.records:
        typer.echo("not checked, as files can't show it: whether predictions, record and seal were forged together; train again to know")
    typer.echo(
        f"{found.records} records: {found.derived} with metrics derived again, {found.compared} compared with their teacher, "
        f"{found.keyed} with keys derived again ({found.unkeyed} can't be), "
        f"{found.counted} with parameters counted in their weights ({found.uncounted} can't be), {found.sealed} as they were sealed, "
        f"{len(found.problems) or 'no'} problem{'' if len(found.problems) == 1 else 's'}",
        err=bool(found.problems),
    )
    if found.problems:
        raise typer.Exit(1)


@results_app.command("export", epilog=example("results export boards.zip --experiment quickstart"))
def results_export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive to write, a zip.", show_default=False)],
    predictions: Annotated[bool, typer.Option(help="The test predictions too, from which every metric can be derived.")] = True,
    weights: Annotated[bool, typer.Option("--weights", help="The weights of students and teachers too.")] = False,
    task: Task = None,
    data: Data = None,
    teacher: Teacher = None,
    student: Student = None,
    experiment: OfExperiment = None,
    results: Results = None,
) -> None:
    """Write records, and what belongs to them, to one file. Of a training that was done twice, the later record."""
    from kdbench.boards.filters import filtered
    from kdbench.records.exchange import export_results
    from kdbench.records.store import ResultStore
    from kdbench.storage.layout import results_folder

    store = ResultStore(results_folder(results))
    records = filtered(store, chosen(task=task, data=data, teacher=teacher, student=student, experiment=experiment))
    done = export_results(store, records, file, predictions=predictions, weights=weights)
    typer.echo(
        f"{done.path}: {done.records} records, {done.searches} searches, {done.predictions} predictions, {done.weights} weights files, "
        f"{done.nbytes / 1e6:.2f} MB"
    )
    for name in done.missing:
        typer.echo(f"missing, not exported: {name}", err=True)


@results_app.command("import", epilog=example("results import boards.zip --results /data/results"))
def results_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive that `kdbench results export` wrote.", show_default=False)],
    keep_ours: Annotated[bool, typer.Option("--keep-ours", help="Leave out what conflicts with what is here, take in the rest.")] = False,
    results: Results = None,
) -> None:
    """Take in what an archive holds. All of it is checked first; a second import changes nothing; conflicts are listed and refused."""
    from kdbench.records.exchange import import_results
    from kdbench.records.store import ResultStore
    from kdbench.storage.layout import results_folder

    done = import_results(ResultStore(results_folder(results)), file, keep_ours=keep_ours)
    typer.echo(f"{done.records} records and {done.files} files taken in, {done.known} records were here already")
    for reason in done.kept:
        typer.echo(f"left out: {reason}", err=True)


@results_app.command("compact", epilog=example("results compact --results s3://bucket/results"))
def results_compact(results: Results = None) -> None:
    """Merge the files of one record into a few large ones, which are read much faster. Every row is kept; a run may go on meanwhile."""
    from kdbench.records.compaction import compact
    from kdbench.records.store import ResultStore
    from kdbench.storage.layout import results_folder

    store = ResultStore(results_folder(results))
    done = compact(store, lambda files, total: typer.echo(f"{files} of {total} files", err=True))
    typer.echo(f"{done.rows} records in {done.after} files, before in {done.before}" if done.before else "nothing to compact")
