"""What `kdbench list`, `show` and `taps` print: plain aligned text, one thing a line, so that it can be searched and cut."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from kdbench.boards.formatting import interval, scaled, short
from kdbench.catalogue import Entry, entry_point_group, known, load, nearest, resolve
from kdbench.data import DATA
from kdbench.errors import UserError
from kdbench.methods import METHODS
from kdbench.models import MODELS
from kdbench.tasks import TASKS

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from kdbench.benchmark.dry_run import DryRun
    from kdbench.boards.explanation import Explanation
    from kdbench.boards.recommendation import Answer, Budget, Option
    from kdbench.methods.base import Method
    from kdbench.models.build import ModelSpec
    from kdbench.models.taps import TapRow
    from kdbench.models.trace import Example
    from kdbench.search.space import Dimension
    from kdbench.tasks.base import Task
    from kdbench.training.cache.entries import Listed
    from kdbench.training.profiling import StepProfile

KINDS: dict[str, tuple[str, Mapping[str, Entry]]] = {
    "methods": ("method", METHODS),
    "tasks": ("task", TASKS),
    "data": ("data", DATA),
    "models": ("model", MODELS),
}
_ALSO = {
    "methods": "Also: your own subclass of kdbench.methods.base.Method, by dotted path `package.module:Class`; several at once: kd+nkd.",
    "tasks": "Also: your own subclass of kdbench.tasks.base.Task, by dotted path `package.module:Class`.",
    "data": "Also: your own function that returns a kdbench.data.sources.Source, by dotted path `package.module:function`.",
    "models": "Also: any name that timm knows, such as resnet18, and any nn.Module by dotted path `package.module:Class`.",
}
LARGEST_SIDE = 4096  # of an image of `taps`, and its most channels
_TOLD_BY_THE_DATA = ("num_classes", "in_channels")  # a model's arguments that are no options
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """The rows as lines with columns of equal width, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def check_table_or_json(format: str) -> None:
    """Raise UserError for another format."""
    if format not in ("table", "json"):
        raise UserError(f"unknown format {format!r}{nearest(format, ('table', 'json'))}")


# --- cache ls --------------------------------------------------------------------------------------------------------


def cache_page(found: Sequence[Listed]) -> str:
    """The entries of a teacher cache, one a line, and their size together."""
    if not found:
        return "the cache is empty; kdbench run fills it, and so does kdbench cache build"
    rows: list[tuple[str, ...]] = [("key", "teacher", "data", "views", "images", "kept as", "size", "last used (UTC)", "holds")]
    for listed in found:
        used = datetime.fromtimestamp(listed.used, UTC).strftime("%Y-%m-%d %H:%M")
        holds = ", ".join([*listed.streams, *(f"{name} (unfinished)" for name in listed.unfinished)])
        rows.append((listed.key, *_entry_cells(listed), f"{listed.nbytes / 1e6:.2f} MB", used, holds))
    return f"{aligned(rows)}\n{len(found)} in all, {sum(listed.nbytes for listed in found) / 1e9:.3f} GB"


def _entry_cells(listed: Listed) -> tuple[str, ...]:
    entry = listed.entry
    if entry is None:
        return ("can't be read", "", "", "", "")
    kept = entry.facts["kept"]
    top = f", top {kept['top_k']}" if kept["top_k"] is not None else ""
    return entry.teacher, entry.data, str(entry.facts["views"]), str(entry.images), f"{kept['precision']}{top}"


# --- list ------------------------------------------------------------------------------------------------------------


def catalogue_page(kind: str, format: str = "table") -> str:
    """The names of one of KINDS with a sentence each, as `table` or `json`. Nothing that is named gets imported.

    Raises UserError for another kind or format.
    """
    if kind not in KINDS:
        raise UserError(f"there is no list of {kind!r}{nearest(kind, KINDS)}")
    check_table_or_json(format)
    entries = _entries(kind)
    if format == "json":
        return json.dumps([{"name": name, "summary": entry.summary, "target": entry.target} for name, entry in entries.items()], indent=2)
    return aligned([(name, entry.summary) for name, entry in entries.items()]) + f"\n\n{_ALSO[kind]}"


def _entries(kind: str) -> dict[str, Entry]:
    """Ours, then those of installed packages."""
    singular, table = KINDS[kind]
    plugins = sorted(entry_points(group=entry_point_group(singular)), key=lambda point: point.name)
    theirs = {point.name: Entry(point.value, f"from {point.dist.name if point.dist else point.module}") for point in plugins}
    return {**table, **{name: entry for name, entry in theirs.items() if name not in table}}


# --- show ------------------------------------------------------------------------------------------------------------


def show_page(name: str) -> str:
    """All that is known of a method, task, data set or model. Raises UserError for a name that none of them has, naming the nearest."""
    kind, thing, summary = _find(name)
    if kind == "methods":
        return _method_page(name, thing)
    if kind == "tasks":
        return _task_page(name, thing, summary)
    return _function_page(name, thing, summary, kind)


def _find(name: str) -> tuple[str, Any, str]:
    """Which kind of thing the name is, the thing, and its sentence in the catalogue."""
    if "+" in name:
        from kdbench.methods.build import MethodSpec, method_class

        return "methods", method_class(MethodSpec(name=name)), ""
    if ":" in name:
        return _told_apart(load("name", name))
    for kind, (singular, table) in KINDS.items():
        if known(singular, name, table):
            return kind, resolve(singular, name, table), _entries(kind)[name].summary
    everything = [entry for kind in KINDS for entry in _entries(kind)]
    raise UserError(f"there is no method, task, data set or model {name!r}{nearest(name, everything)}; models of timm: kdbench taps NAME")


def _told_apart(thing: Any) -> tuple[str, Any, str]:
    """A user's own class or function, as what it can be used for."""
    from kdbench.methods.base import Method
    from kdbench.tasks.base import Task

    if isinstance(thing, type) and issubclass(thing, Method):
        return "methods", thing, ""
    if isinstance(thing, type) and issubclass(thing, Task):
        return "tasks", thing, ""
    if not callable(thing):
        raise UserError(f"expected a class or a function, found a {type(thing).__name__}")
    return "", thing, ""


def _method_page(name: str, method: type[Method]) -> str:
    paper = method.paper
    source = ", ".join(text for text in (paper.title, paper.venue, f"arXiv {paper.arxiv}" if paper.arxiv else None) if text)
    teacher = "needed" if method.needs_teacher else "not needed"
    facts = [
        ("paper", source),
        ("loss", paper.formula),
        ("checked against", paper.checked_against or "its formula"),
        ("reads", " or ".join(sorted(method.reads)) or "maps alone"),
        ("teacher", teacher),
        ("labels", "needed" if method.needs_labels else "not needed"),
        ("student's taps", _taps_of(method, "student_taps")),
        ("teacher's taps", _taps_of(method, "teacher_taps") if method.needs_teacher else "none"),
    ]
    stages = method(None).stages()
    if len(stages) > 1:
        facts.append(("stages", ", ".join(f"{stage.name} {stage.share:.0%} of the epochs" for stage in stages)))
    if method.batch_coupled:
        facts.append(("batch", "the loss compares samples: workers exchange theirs"))
    parts = [name, _documentation(method), aligned(facts), _parameters(method), _presets(method), _published(name)]
    return "\n\n".join(part for part in parts if part)


def _taps_of(method: type[Method], side: Literal["student_taps", "teacher_taps"]) -> str:
    if any(name.rpartition(".")[2] == side for name, _ in _fields(method.Params)):
        return "chosen for the pair, unless the experiment names them"
    return ", ".join(getattr(method, side)) or "the prediction alone"


def _parameters(method: type[Method]) -> str:
    """The table of a method's parameters, their defaults, where a search looks and what makes sense at all."""
    searched = _searched(method)
    rows = [("parameter", "default", "searched", "allowed")]
    for name, field in _fields(method.Params):
        default = _value(field.get_default(call_default_factory=True))
        rows.append((name, default, searched.get(name, "no"), _allowed(field.annotation, field.metadata)))
    return aligned(rows) + (f"\n{inspect.cleandoc(method.Params.__doc__)}" if method.Params.__doc__ else "")


def _presets(method: type[Method]) -> str:
    """The table of the defaults that a method has where a task's networks give this or that; empty for a method without such."""
    from kdbench.methods.combination import Combination
    from kdbench.methods.presets import PerElement

    parts = method.kinds if issubclass(method, Combination) else {"": method}
    rows = [("where networks give", "parameter", "default", "searched")]
    for part, kind in parts.items():
        searched = _searched(kind)
        for given, values in kind.presets.items():
            for name, value in values.items():
                default, range_ = _value(value), searched.get(name, "no")
                if isinstance(value, PerElement):
                    default = f"{_value(value.weight)} x {value.of:,} / {value.counted}"
                    range_ = f"default / {_value(value.within)} .. default x {_value(value.within)}, logarithmic"
                rows.append((given, f"{part}.{name}" if part else name, default, range_))
    if len(rows) == 1:
        return ""
    about = "defaults for networks of one kind (the first kind that fits; of the teacher's finest map that is compared)"
    return f"{about}\n{aligned(rows)}"


def _searched(method: type[Method]) -> dict[str, str]:
    """Where a search looks for each parameter that it varies, for people."""
    from kdbench.search.space import space_of

    return {axis.name: _dimension(axis.dimension) for axis in space_of(method.Params())}


def _fields(params: type[BaseModel], part: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every parameter by its dotted name, those of a combination's parts too."""
    from pydantic import BaseModel

    for name, field in params.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{part}{name}.")
        elif not field.exclude:
            yield f"{part}{name}", field


def _dimension(dimension: Dimension) -> str:
    from kdbench.search.space import Choice

    if isinstance(dimension, Choice):
        text = " | ".join(_value(option) for option in dimension.options)
    else:
        text = f"{_value(dimension.low)} .. {_value(dimension.high)}"
        text += ", logarithmic" if dimension.log else f", step {_value(dimension.step)}" if dimension.step is not None else ""
    if dimension.when is not None:
        text += f", where {dimension.when.name} is {' or '.join(_value(value) for value in dimension.when.values)}"
    return text


def _allowed(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """What a value may be: literal values, else the type with its bounds (`int >= 1`); `limits` are what stands beside it in Annotated."""
    if get_origin(annotation) is Annotated:
        inner, *extras = get_args(annotation)
        return _allowed(inner, [*limits, *extras])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return "list of " + ", ".join(dict.fromkeys(_allowed(entry) for entry in get_args(annotation) if entry is not Ellipsis))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_allowed(option, limits) for option in get_args(annotation))
    flat = [limit for item in limits for limit in getattr(item, "metadata", (item,))]
    bounds = [f"{sign} {_value(getattr(limit, name))}" for limit in flat for name, sign in _BOUNDS.items() if hasattr(limit, name)]
    return " ".join([_type_name(annotation), ", ".join(bounds)]).strip()


def _type_name(annotation: Any) -> str:
    if annotation in (NoneType, inspect.Parameter.empty):
        return "none" if annotation is NoneType else ""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _published(name: str) -> str:
    """Figures of papers, apart from anything that kdbench measured."""
    from kdbench.boards.published import load_published

    figures = [figure for figure in load_published() if figure.method == name]
    if not figures:
        return ""
    lines = [("teacher", "student", "data", "metric", "undistilled", "distilled", "gain", "source", "protocol")]
    for figure in figures:
        before, after = ("-" if value is None else f"{value:.2f}" for value in (figure.before, figure.distilled))
        gain = "-" if figure.points is None else f"{figure.points:+.2f}"
        teacher = figure.teacher or "no teacher"
        lines.append((teacher, figure.student, figure.data, figure.metric, before, after, gain, figure.citation, figure.protocol))
    return "published (other protocols than ours)\n" + aligned(lines, indent="  ")


def _task_page(name: str, task: type[Task], summary: str) -> str:
    direction = "higher" if task.higher_is_better else "lower"
    facts = aligned([("ranked by", f"{task.primary}, {direction} is better"), ("version", str(task.version))])
    rows = [("option", "default", "allowed")]
    for key, field in task.Options.model_fields.items():
        rows.append((key, _value(field.get_default(call_default_factory=True)), _allowed(field.annotation, field.metadata)))
    return "\n\n".join(part for part in (name, _documentation(task) or summary, facts, aligned(rows) if len(rows) > 1 else "") if part)


def _function_page(name: str, make: Callable[..., Any], summary: str, kind: str) -> str:
    rows, types = [("option", "default", "allowed")], _types(make)
    for key, parameter in inspect.signature(make).parameters.items():
        if key not in _TOLD_BY_THE_DATA and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            default = "needed" if parameter.default is parameter.empty else _value(parameter.default)
            rows.append((key, default, _allowed(types.get(key, parameter.annotation))))
    options = aligned(rows) if len(rows) > 1 else "no options"
    further = f"what a method can look at: kdbench taps {name}" if kind == "models" else ""
    return "\n\n".join(part for part in (name, summary, _documentation(make), options, further) if part)


def _types(make: Callable[..., Any]) -> dict[str, Any]:
    """The types of its arguments; none where an annotation names what only a type checker imports."""
    try:
        return get_type_hints(make.__init__ if isinstance(make, type) else make, include_extras=True)  # type: ignore[misc]
    except NameError:
        return {}


def _documentation(thing: Any) -> str:
    """Its own docstring, without the indentation; not one that it inherits."""
    own = thing.__doc__ if not isinstance(thing, type) else vars(thing).get("__doc__")
    return inspect.cleandoc(own) if own else ""


def _value(value: Any) -> str:
    if value == ():
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if hasattr(value, "model_dump"):
        options = value.model_dump(mode="json")
        return str(options["name"]) if set(options) == {"name"} else json.dumps(options)
    return str(value)


# --- profile ---------------------------------------------------------------------------------------------------------


def profile_page(profiles: Mapping[str, StepProfile], batch_size: int) -> str:
    """Milliseconds of a step and of its parts, a line each method, with each part's share."""
    from kdbench.training.profiling import PARTS

    rows: list[tuple[str, ...]] = [("method", "samples/s", "ms a step", *PARTS)]
    for name, profile in profiles.items():
        cells = [f"{profile.milliseconds[part]:.2f} {profile.milliseconds[part] / profile.total:4.0%}" for part in PARTS]
        rows.append((name, f"{1e3 * batch_size / profile.total:.0f}", f"{profile.total:.2f}", *cells))
    return aligned(rows)


# --- dry run ---------------------------------------------------------------------------------------------------------


def dry_run_page(found: DryRun) -> str:
    """What an experiment would do and cost: what is missing, the networks, a line each method, the sum."""
    sizes = f"{found.data}: a teacher learns from {found.teacher_images:,} samples, a student from {found.student_images:,}"
    networks = [("network", "", "parameters", "FLOPs a sample", "weights")]
    networks += [(n.role, n.label, f"{n.params:,}", f"{n.flops:.3g}", n.fact) for n in found.networks]
    lines = [("method", "student", "looks at", "extra parameters", "searched", "GB", "FLOPs a step", "ms a step", "trainings", "hours")]
    for m in found.methods:
        own = "" if m.own_flops is not None else " + its own"
        cells = (m.label, m.student, " ".join(m.taps) or "prediction", f"{m.extra_params:,}", " ".join(m.searched) or "nothing")
        milliseconds = "-" if m.step_seconds is None else f"{1e3 * m.step_seconds:.1f}"
        lines.append((*cells, f"{m.memory / 1e9:.2f}", f"{m.flops:.3g}{own}", milliseconds, str(m.trainings), _hours(m.total_seconds)))
    footer = [_cost(found), "GB: weights, gradients, optimizer, activations and network of one worker"]
    left = [f"not rehearsed: {what}" for what in found.not_rehearsed]
    for m in found.methods:
        if m.stages:
            epochs = ", ".join(f"{name} {count} epoch{'s'[: count > 1]}" for name, count in m.stages.items())
            left.append(f"method {m.label!r} with student {m.student!r} trains in stages: {epochs}; a step was timed in the first one")
    parts = (found.name, sizes, found.reading, "\n".join([*found.notes, *left]), aligned(networks), aligned(lines), "\n".join(footer))
    return "\n\n".join(part for part in parts if part)


def _cost(found: DryRun) -> str:
    """The sum, and what it assumes."""
    trainings, flops = sum(m.trainings for m in found.methods), sum(m.total_flops for m in found.methods)
    counted = f"{trainings} trainings, {flops:.3g} FLOPs"
    teacher = f", and {found.teacher_flops:.3g} FLOPs for the teacher" if found.teacher_flops else ""
    if found.seconds is None:
        return (
            f"{counted}{teacher}. No hours: steps are timed where this machine does the work (no runtime.address) and networks have up to "
            "30 million parameters. No trial is counted as stopped early"
        )
    trained = f" after {_hours(found.teacher_seconds)} hours for the teacher" if found.teacher_seconds else ""
    return (
        f"{counted}{teacher}. About {_hours(found.seconds)} hours on this machine, {found.slots} at once{trained}. The estimate counts "
        "training steps, timed here on noise with no other load, and validation; it leaves out starting processes, reading and augmenting "
        "images, the teacher's cache and the test set, and counts no trial as stopped early"
    )


def _hours(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds / 3600:.3g}"


# --- taps ------------------------------------------------------------------------------------------------------------


def taps_page(name: str, image_shape: tuple[int, int, int], num_classes: int, every_module: bool = False) -> str:
    """The places inside a model that a method can look at, in forward order: those with an alias, or every module.

    image_shape: [C, H, W]. Raises UserError for an unknown model, and for one that does not run on such an image.
    """
    from kdbench.models.build import ModelSpec, OptionNeeded, build_model
    from kdbench.models.outputs import in_words
    from kdbench.models.taps import probe, tap_table

    channels, height, width = image_shape
    mean, std = (0.0,) * channels, (1.0,) * channels  # neutral
    facts: dict[str, Any] = {
        "num_classes": num_classes,
        "in_channels": channels,
        "image_size": max(height, width),
        "mean": mean,
        "std": std,
    }
    try:
        model = build_model(ModelSpec(name=name), **facts)
    except OptionNeeded as error:
        raise UserError(f"{error}; kdbench taps EXPERIMENT.yaml shows the networks of an experiment with their options") from error
    try:
        prediction = probe(model, image_shape).prediction
        table = tap_table(model, image_shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"model {name!r} doesn't work on an image {in_words(image_shape)}: {reason}; try a larger --image") from error
    title = f"{name} on images {in_words(image_shape)}: prediction {in_words(prediction)}"
    return f"{title}\n\n{_places(table, every_module, name)}"


def experiment_taps_page(path: Path, every_module: bool = False) -> str:
    """The same of every network of an experiment, on samples of its data, which may be several tensors by name. Downloads nothing.

    Raises UserError as reading the experiment, its data and building its networks do.
    """
    from kdbench.data.download import without_downloads
    from kdbench.experiment import load_experiment
    from kdbench.models.build import without_weights
    from kdbench.models.outputs import in_words
    from kdbench.models.taps import probe, tap_table
    from kdbench.tasks.base import Role
    from kdbench.tasks.build import build_task
    from kdbench.tasks.networks import as_teacher

    experiment = load_experiment(path)
    pages = []
    with without_downloads("kdbench taps downloads nothing"), without_weights():
        task = build_task(experiment.task)
        networks: list[tuple[Role, ModelSpec, Task]] = [("student", spec, task) for spec in experiment.students]
        if experiment.teacher is not None:
            own = task if experiment.teacher.task is None else build_task(experiment.teacher.task)
            networks.insert(0, ("teacher", experiment.teacher.model, own))
        for role, spec, own in networks:
            model, example = own.build_model(spec), task.example(role)
            model = model if own is task else as_teacher(model, own, task)
            title = f"{role} {spec.label} on {_sample_in_words(example)}: prediction {in_words(probe(model, example).prediction)}"
            pages.append(f"{title}\n\n{_places(tap_table(model, example), every_module, str(path))}")
    return "\n\n".join(pages)


def _sample_in_words(example: Example) -> str:
    """`images 3x32x32`, or `image 3x32x32, tokens 13`."""
    from kdbench.data.columns import named
    from kdbench.models.outputs import in_words

    shapes = {"images": example} if isinstance(example, tuple) else {name: t.shape[1:] for name, t in named(example, "inputs").items()}
    return ", ".join(f"{name} {in_words(tuple(shape))}" for name, shape in shapes.items())


def _places(table: Sequence[TapRow], every_module: bool, of: str) -> str:
    """A line each place. of: what the command was asked for."""
    from kdbench.models.outputs import in_words

    shown = [row for row in table if row.aliases or every_module]
    lines = [("module", "aliases", "kind", "shape", "stride")]
    for row in shown:
        place = f"{row.path} (its input)" if row.side == "input" else row.path
        lines.append((place, " ".join(row.aliases), row.kind, in_words(row.shape), "" if row.stride is None else str(row.stride)))
    hidden = len(table) - len(shown)
    footer = f"\n\n{hidden} more modules can be tapped by their path: kdbench taps {of} --all" if hidden else ""
    return f"{aligned(lines)}{footer}"


def image_shape(text: str) -> tuple[int, int, int]:
    """`3x32x32` as channels, height and width. Raises UserError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--image {text:.80}: expected CHANNELSxHEIGHTxWIDTH, such as 3x32x32")
    if any(len(number) > 4 or int(number) > LARGEST_SIDE for number in match.groups()):
        raise UserError(f"--image {text:.80}: expected at most {LARGEST_SIDE} channels, and as many pixels a side")
    channels, height, width = map(int, match.groups())
    return channels, height, width


# --- leaderboard --explain -------------------------------------------------------------------------------------------


def explanation_page(explanation: Explanation) -> str:
    """The runs of a board's row, one a line, then every figure of it with how it follows and from which runs, and the board's findings."""
    runs = [("seed", "run", "counts", "undistilled", "kd", "")]
    for run in explanation.runs:
        note = "" if run.counted == run.run_id else f"{run.status}: {run.failure or 'no metric'}; counts as {run.counted or 'nothing'}"
        runs.append((str(run.seed), run.run_id, short(run.value), _of(run.undistilled), _of(run.control), note))
    figures = []
    for figure in explanation.figures:
        ids = " ".join(dict.fromkeys(figure.run_ids))
        figures.append(f"  {figure.name}  {figure.value}\n    = {figure.how}\n    of {ids}")
    predictions = [(run.predictions, f"sha256 {run.predictions_sha256}") for run in explanation.runs if run.predictions]
    return "\n".join(
        [
            f"{explanation.method}: {explanation.title} (protocol {explanation.protocol_hash})",
            aligned(runs, "  "),
            *figures,
            *(["  predictions, of which `kdbench verify` derives the metrics again", aligned(predictions, "    ")] if predictions else []),
            *(f"  finding of this board: {finding}" for finding in explanation.findings),
        ]
    )


def _of(other: tuple[str, float] | None) -> str:
    return "-" if other is None else f"{short(other[1])} ({other[0]})"


# --- recommend -------------------------------------------------------------------------------------------------------


MOST_OPTIONS = 20  # lines of the table; JSON has all


def recommendation_page(answers: Sequence[Answer], budget: Budget) -> str:
    """What to take for the budget, one part a task, data set and teacher; where nothing qualifies, what comes nearest."""
    contents = {
        (answer.task, answer.data): {a.data_hash for a in answers if (a.task, a.data) == (answer.task, answer.data)} for answer in answers
    }
    return "\n\n".join("\n".join(_answer_lines(answer, budget, len(contents[answer.task, answer.data]) > 1)) for answer in answers)


def _answer_lines(answer: Answer, budget: Budget, several_contents: bool) -> Iterator[str]:
    content = f" (content {answer.data_hash[:8]})" if several_contents else ""
    yield f"{answer.task} on {answer.data}{content}, {f'teacher {answer.teacher}' if answer.teacher else 'no teacher'}"
    if answer.options:
        yield from _option_lines(answer.options[0], answer, budget)
        yield f"  within the limits, best {answer.primary} first:"
        yield aligned(_option_table(answer.options[:MOST_OPTIONS], answer.primary), "    ")
        if len(answer.options) > MOST_OPTIONS:
            yield f"    and {len(answer.options) - MOST_OPTIONS} more: --format json"
    elif answer.nearest is None:
        yield "  nothing qualifies"
    else:
        yield "  nothing qualifies; the nearest misses it: " + ", ".join(answer.nearest.missed)
        yield from _option_lines(answer.nearest, answer, budget)
    yield from (f"  note: {note}" for note in answer.notes)


def _option_lines(option: Option, answer: Answer, budget: Budget) -> Iterator[str]:
    row, decimals = option.row, option.board.decimals
    yield f"  {row.label} for {option.board.student}: {_sureness(option, budget)}"
    mean = interval(row.mean, row.low, row.high, f".{decimals}f")
    gain = "" if row.shown_gain[0] is None else f", gain {_gain(option)} over {option.board.undistilled}"
    yield f"    {answer.primary} {mean}{gain}, {row.seeds} seed{'' if row.seeds == 1 else 's'}"
    latency = "latency not known" if row.latency_ms_p50 is None else f"{short(row.latency_ms_p50)} ms for one image"
    on = f" on {option.latency_device}" if option.latency_device else ""
    yield f"    {latency}{on}, {scaled(row.params_count)} parameters, {short(row.device_hours)} device-hours with its search"
    yield "    parameters: " + (", ".join(f"{name}={short(value)}" for name, value in row.params.items()) or "none")
    if option.alike:
        yield f"    no difference was found from: {', '.join(option.alike)}"
    yield f"    kdbench export {row.run_ids[0]}"


def _option_table(options: Sequence[Option], primary: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("student", "method", f"{primary} [95%]", "gain [all at once]", "seeds", "ms", "params", "device-h")]
    for option in options:
        row = option.row
        mean = interval(row.mean, row.low, row.high, f".{option.board.decimals}f")
        costs = (short(row.latency_ms_p50), scaled(row.params_count), short(row.device_hours))
        rows.append((option.board.student, row.label, mean, _gain(option), str(row.seeds), *costs))
    return rows


def _gain(option: Option) -> str:
    return interval(*option.row.shown_gain, f"+.{option.board.decimals}f")


def _sureness(option: Option, budget: Budget) -> str:
    """How sure the seeds are of the gain that is asked for; of any gain where none is."""
    if option.undistilled:
        return "the undistilled student"
    if option.row.shown_gain[0] is None:
        return "its gain is not known"
    asked = "a gain" if budget.min_gain is None else f"a gain of at least {budget.min_gain:g}"
    if option.confidence is None:
        why = "one seed tells nothing" if option.row.seeds == 1 else "seeds that agree exactly tell nothing of the error"
        return f"not known how sure {asked} is: {why}"
    confidence = "over 99.9%" if option.confidence > 0.999 else f"{option.confidence:.1%}"  # a few seeds never make it 100.0%
    return f"{'sure' if option.sure else 'not sure'} of {asked} ({confidence})"
