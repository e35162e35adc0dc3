"""`kdbench cache`: the teacher's outputs that are kept."""

from typing import Annotated

import typer

from kdbench.cli.options import ExperimentFile, Overrides, Results, TrustCode, example, within
from kdbench.cli.watching import watched

cache_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The teacher's outputs, kept for all trainings: see, build, verify, prune."
)


@cache_app.command("ls", epilog=example("cache ls"))
def cache_ls(results: Results = None) -> None:
    """Every entry: whose outputs, of which data, which streams, how large, when it was last used."""
    from kdbench.cli.pages import cache_page
    from kdbench.storage.layout import Layout, results_folder
    from kdbench.training.cache.entries import entries

    typer.echo(cache_page(entries(Layout(results_folder(results)))))


@cache_app.command("build", epilog=example("cache build experiments/quickstart.yaml"))
def cache_build(experiment: ExperimentFile, set_: Overrides = None, results: Results = None, trust_code: TrustCode = False) -> None:
    """Write what the experiment's methods need of its teacher, which must be there already. Trains nothing; `run` does this by itself."""
    with watched(experiment, set_, results) as (read, folder, display):
        from kdbench.benchmark.run import build_cache

        build_cache(read, folder, display)


@cache_app.command("verify", epilog=example("cache verify 8ee9e9"))
def cache_verify(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="An entry's key or the beginning of it. Default: all.")] = None,
    results: Results = None,
) -> None:
    """Make all checksums anew. Exit code 1 where something is damaged; it is taken out, and the next run writes it again."""
    from kdbench.storage.layout import Layout, results_folder
    from kdbench.training.cache.entries import chosen, verify

    layout = Layout(results_folder(results))
    damage = 0
    for listed in chosen(layout, key):
        problems = list(verify(layout, listed))
        damage += len(problems)
        typer.echo("\n".join(f"{listed.key}  {problem}" for problem in problems) or f"{listed.key}  ok")
    if damage:
        typer.echo("kdbench: what is damaged was taken out; the next run, or kdbench cache build, writes it again", err=True)
        raise typer.Exit(1)


@cache_app.command("prune", epilog=example("cache prune --older-than 30 --dry-run"))
def cache_prune(
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", callback=within(0, 1e6), help="Also what was not used for so long.", show_default=False)
    ] = None,
    keep_gb: Annotated[
        float | None,
        typer.Option(callback=within(0, 1e9), help="Also the least recently used, until no more than this is left.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    results: Results = None,
) -> None:
    """Delete entries that no run can read or whose teacher is in no record. None that a run is using; what goes can be built again."""
    from kdbench.records.store import ResultStore
    from kdbench.storage.layout import Layout, results_folder
    from kdbench.training.cache.entries import disposable, entries, remove

    layout = Layout(results_folder(results))
    records = ResultStore(layout.root).scan(role="teacher")
    teachers = {name for record in records for name in (record.teacher_sha, record.teacher_state) if name is not None}
    freed = 0
    for listed, reason in disposable(entries(layout), teachers, older_than, keep_gb):
        gone = dry_run or remove(layout, listed)
        freed += listed.nbytes if gone else 0
        typer.echo(f"{listed.key}  {listed.nbytes / 1e6:.2f} MB  {reason}{'' if gone else ': in use, kept'}")
    typer.echo(f"{freed / 1e6:.2f} MB {'would be freed' if dry_run else 'freed'}")
