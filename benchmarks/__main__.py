"""The command: which parts, how long, where the tables go."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
for _variable in _THREADS:  # before torch is imported: two threads on a busy machine are slower than one, and far noisier
    os.environ.setdefault(_variable, "1")

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.part import ROOT, Bench, Scale  # noqa: E402
from benchmarks.report import PartTable, Row, describe_machine, not_measured, print_table, put_into, write  # noqa: E402
from kdbench.distributed.cluster import quiet  # noqa: E402
from kdbench.errors import in_one_line  # noqa: E402


@dataclass(frozen=True)
class Part:
    """A module with `measure(Bench) -> Iterator[Row]`, and how many seconds it has by default and with --quick, on two idle cores."""

    title: str
    module: str
    usual: float
    quick: float
    asked_for: bool = False  # measured only where --only names it


PARTS = {
    "a": Part("kdbench's loop against a hand-written one", "benchmarks.loop", 60, 10),
    "b": Part("the teacher's cache", "benchmarks.cache", 90, 10),
    "c": Part("a trial in kdbench, torchdistill and timm", "benchmarks.peers", 90, 15),
    "d": Part("a sweep against torchdistill in an Optuna loop", "benchmarks.sweep", 330, 50),
    "views": Part("frozen views against fresh ones", "benchmarks.views", 90, 8),
    "e": Part("growth", "benchmarks.growth", 110, 12),
    "f": Part("memory", "benchmarks.memory", 70, 20),
    "g": Part("start", "benchmarks.start", 110, 15),
    "begin": Part("from a process that is warm to the first step", "benchmarks.begin", 90, 15, asked_for=True),
    "boxes": Part("detectors: a step, cached pyramids, average precision", "benchmarks.boxes", 120, 20, asked_for=True),
    "methods": Part("what a step of each method costs", "benchmarks.methods", 150, 15, asked_for=True),
    "store": Part("records: one file each, and compacted", "benchmarks.store", 120, 20, asked_for=True),
    "scaling": Part("Ray's share of a trial, a report and a checkpoint", "benchmarks.scaling", 420, 90, asked_for=True),
}
FULL_FACTOR = 6.0  # how much longer each ratio is measured with --full


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 1 where a part failed, else 0: a goal that is not met is a result, and no error."""
    options = _parser().parse_args(arguments)
    quiet()
    torch.set_num_threads(1)
    console = Console()
    machine = describe_machine()
    command = "python -m benchmarks " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    scale: Scale = "quick" if options.quick else "full" if options.full else "usual"
    kept = options.output / "kept" / scale
    kept.mkdir(parents=True, exist_ok=True)
    tables: list[PartTable] = []
    failed = False
    for key in options.only:
        part = PARTS[key]
        begun = time.monotonic()
        rows: list[Row] = []
        console.rule(f"{key}. {part.title}")
        with tempfile.TemporaryDirectory(prefix="kdbench-benchmark-") as scratch:
            seconds = _seconds(options.only, key, scale, options.seconds)
            bench = Bench(scale, seconds, Path(scratch), kept, lambda text: _say(console, text))
            failed |= not _collected(importlib.import_module(part.module).measure(bench), rows, console)
        tables.append(PartTable(key, part.title, tuple(rows), time.monotonic() - begun, machine, command.strip()))
        write(tables, options.output)
        print_table(tables[-1], console)
    _summary(tables, options.output, console)
    if options.docs:
        put_into(ROOT / "docs" / "benchmarks.md", tables)
    return int(failed)


def _collected(found: Iterator[Row], rows: list[Row], console: Console) -> bool:
    """Gather a part's rows. One that breaks keeps the rows it had, says what broke, and leaves the other parts their turn."""
    try:
        for row in found:
            rows.append(row)
            _say(console, f"  {row.what}: {row.value.median:.3g} {row.unit} {row.verdict}" if row.value else f"  {row.what}: {row.note}")
    except Exception as error:
        console.print_exception()
        rows.append(not_measured("the rest of this part", f"it failed: {in_one_line(error)}"))
        return False
    return True


def _seconds(chosen: Sequence[str], key: str, scale: Scale, total: float | None) -> float:
    """A part's seconds: from the table above, or its share of `total`."""
    planned = {name: PARTS[name].quick if scale == "quick" else PARTS[name].usual for name in chosen}
    if total is not None:
        return planned[key] * total / sum(planned.values())
    return planned[key] * (FULL_FACTOR if scale == "full" else 1)


def _say(console: Console, text: str) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}", highlight=False, soft_wrap=True)


def _summary(tables: Sequence[PartTable], folder: Path, console: Console) -> None:
    verdicts = [row.verdict for table in tables for row in table.rows]
    counts = {verdict: verdicts.count(verdict) for verdict in ("met", "NOT MET", "not measured")}
    console.rule("all parts")
    for table in tables:
        print_table(table, console)
    console.print(f"goals met: {counts['met']}, not met: {counts['NOT MET']}, rows not measured: {counts['not measured']}")
    console.print(f"{folder / 'bench.md'}, {folder / 'bench.json'}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small sizes, a few minutes: shows that all works, and little more")
    size.add_argument("--full", action="store_true", help="nothing extrapolated, more rounds: hours")
    parser.add_argument(
        "--only",
        type=_keys,
        default=[key for key in PARTS if not PARTS[key].asked_for],
        metavar="a,b",
        help=f"some of the parts: {', '.join(PARTS)}",
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="for all parts together, instead of what each has by default")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks", metavar="DIR", help="for bench.json and bench.md")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/benchmarks.md, each in its part's place")
    return parser


def _keys(text: str) -> list[str]:
    keys = [key.strip() for key in text.split(",")]
    for key in keys:
        if key not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {key!r}; there is: {', '.join(PARTS)}")
    return keys


if __name__ == "__main__":
    sys.exit(main())
