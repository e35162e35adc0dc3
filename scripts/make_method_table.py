"""Renew the table of docs/methods.md: `python scripts/make_method_table.py`. The costs stay, unless a bench.json that has them is named."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from kdbench.benchmark.dry_run import dry_run
from kdbench.errors import UserError
from kdbench.experiment import Experiment
from kdbench.methods import METHODS
from kdbench.methods.base import Method
from kdbench.methods.build import MethodSpec, method_class

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
GOLDEN = ROOT / "tests" / "golden"
BEGIN, END = "<!-- methods: begin -->\n", "<!-- methods: end -->\n"
HEADER = ("method", "kind", "paper", "checked against", "vectors", "needs", "batch-coupled", "extra parameters", "cost of a step")

# The folders of golden vectors that are not called as their method is.
FOLDERS = {
    "kd": ("kd", "kd_clskd"),
    "tf_nkd": ("tfnkd",),
    "dist": ("dist", "razor_dist"),
    "dkd": ("dkd", "razor_dkd"),
    "wsld": ("wsld", "razor_wsld"),
}

# The pair that extra parameters are counted on: the first that a method can work on. Task, teacher, student.
PAIRS: tuple[tuple[dict[str, Any], Any, Any], ...] = (
    ({"name": "classification", "data": "cifar100"}, "resnet32x4", "resnet8x4"),
    ({"name": "classification", "data": "imagenet"}, "deit_small_patch16_224", "deit_tiny_patch16_224"),
    (
        {"name": "detection", "data": {"name": "shapes", "target": "boxes", "train": 300, "test": 10}, "val_size": 20},
        {"name": "tiny_fcos", "width": 12, "label": "tiny_fcos of width 12"},
        {"name": "tiny_fcos", "width": 4, "label": "4"},
    ),
)


def table(costs: dict[str, str]) -> str:
    """The table as Markdown. costs: method -> the cell of the last column."""
    rows = [HEADER, ("---",) * len(HEADER), *(_row(name, costs.get(name, "")) for name in METHODS)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def costs_of(page: str) -> dict[str, str]:
    """The last column of the page's table, by method."""
    rows = [line.strip().strip("|").split("|") for line in _between(page).splitlines()[2:]]
    return {row[0].strip(" `"): row[-1].strip() for row in rows}


def renewed(page: str, costs: dict[str, str] | None = None) -> str:
    """The page with its table as it has to be. costs: cells of the last column that were measured anew; the others stay."""
    return page.replace(_between(page), table(costs_of(page) | (costs or {})))


def vectors(name: str) -> int:
    """How many recorded cases of published code the method is held against; a test runs every one of them."""
    return sum(len(list((GOLDEN / folder).glob("*.npz"))) for folder in FOLDERS.get(name, (name,)))


def _between(page: str) -> str:
    return page[page.index(BEGIN) + len(BEGIN) : page.index(END)]


def _row(name: str, cost: str) -> tuple[str, ...]:
    method = method_class(MethodSpec(name=name))
    paper = method.paper
    source = f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.venue or paper.title
    taps, extra = _on_a_pair(name, method)
    coupled = "yes" if method.batch_coupled else ""
    return (
        f"`{name}`",
        _kind(method, taps),
        source,
        paper.checked_against or "its formula",
        str(vectors(name) or "-"),
        _needs(method, taps),
        coupled,
        extra,
        cost,
    )


@cache
def _on_a_pair(name: str, method: type[Method]) -> tuple[tuple[str, ...], str]:
    """The student's taps on the first of PAIRS that the method works on, and its extra parameters there."""
    for task, teacher, student in PAIRS:
        content = {"name": "pair", "task": task, "students": [student], "methods": [name]}
        # On a cluster, whose nodes may have the data: their shapes are enough here.
        content |= {"teacher": {"model": teacher}, "recipe": {"precision": "fp32"}, "runtime": {"address": "auto"}}
        try:
            found = dry_run(Experiment.model_validate(content)).methods[0]
        except UserError:
            if (task, teacher, student) == PAIRS[-1]:
                raise
            continue
        names = [model if isinstance(model, str) else model["label"] for model in (teacher, student)]
        on = "" if (task, teacher, student) == PAIRS[0] else " ({} to {})".format(*(name.split("_patch")[0] for name in names))
        return found.taps, f"{found.extra_params:,}{on}"
    raise AssertionError("the loop returns or raises")


def _kind(method: type[Method], taps: tuple[str, ...]) -> str:
    """What the method compares: nothing of a teacher's, predictions, samples with each other, or features."""
    if not method.needs_teacher:
        return "no teacher"
    if not taps:
        return "logits"
    return "relations" if method.batch_coupled else "features"


def _needs(method: type[Method], taps: tuple[str, ...]) -> str:
    teacher = "teacher's logits" if method.needs_teacher and not taps else ""
    tail = "teacher's tail" if method.needs_teacher_network else ""
    return ", ".join(part for part in (teacher, "taps" if taps else "", tail) if part) or "labels"


def measured(bench: Path) -> dict[str, str]:
    """Method -> cell, from what `python -m benchmarks --only methods` wrote."""
    found = {}
    for part in json.loads(bench.read_text(encoding="utf-8")):
        for row in part["rows"]:
            name, mark, _ = row["what"].partition(": a step / a step of none")
            if mark and row["median"] is not None:
                found[name] = f"{row['median']:.2f}"
    return found


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    if not re.search(f"{BEGIN}.*{END}", text, re.DOTALL):
        raise SystemExit(f"{PAGE} has lost the marks that the table stands between")
    new_costs = measured(Path(sys.argv[1])) if len(sys.argv) > 1 else {}
    PAGE.write_text(renewed(text, new_costs), encoding="utf-8")
