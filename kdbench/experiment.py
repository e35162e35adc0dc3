"""An experiment: one short YAML file, read into frozen, strict models, with the content hashes that name its parts.

Reading a config never executes anything: YAML's safe subset in, typed data out.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from kdbench import yaml12
from kdbench.bounded import read_file
from kdbench.catalogue import known, nearest
from kdbench.data.options import LEFT_OUT_UNSET, LONGEST_NAME, Seed, StrictOptions
from kdbench.data.views import Augment
from kdbench.errors import UserError, cut, explain, printable, shown
from kdbench.methods.build import MethodSpec, check_method_name, method_class
from kdbench.models.build import ModelSpec
from kdbench.records.plan import AT_COST, AT_DEFAULT, CONTROL, LEVELS, UNDISTILLED, Plan, control_of, doubled
from kdbench.search.space import Choice, Dimension, Range
from kdbench.storage.address import is_address, problem_with
from kdbench.tasks import TASKS
from kdbench.tasks.build import TaskSpec

MOST_EPOCHS = 1_000_000
MOST_SEEDS = 1000
TRIAL_SEED = 1_000_000  # of the trials of a method's first search; each further search has the next
MOST_WORKERS = 10_000
MOST_GPUS = 1024  # of one worker


class _Part(StrictOptions):
    model_config = ConfigDict(validate_default=True, allow_inf_nan=False)


def _ascending(value: tuple[float, ...]) -> tuple[float, ...]:
    if not value or any(later <= earlier for earlier, later in pairwise(value)):
        raise ValueError(f"expected epochs in ascending order, such as [150, 180, 210], got {shown(list(value))}")
    return value


Milestones = Annotated[tuple[Annotated[float, Field(gt=0, le=MOST_EPOCHS)], ...], AfterValidator(_ascending)]


class Recipe(_Part):
    """How a model is trained. `batch_size` is the samples of one optimizer step, over all workers and micro-batches."""

    epochs: int = Field(default=5, ge=1, le=MOST_EPOCHS)
    batch_size: int = Field(default=128, ge=1, le=2**20)
    optimizer: str = "sgd"  # sgd, adamw, or any name that timm.optim knows
    lr: float = Field(default=0.1, gt=0, le=1e4)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0, le=1e4)
    no_decay_on_norms: Annotated[bool, LEFT_OUT_UNSET] = False  # nor on biases, nor on what a model's no_weight_decay() names
    schedule: str = "cosine"  # cosine, linear, constant, or any name that timm.scheduler knows
    milestones: Annotated[Milestones | None, LEFT_OUT_UNSET] = None  # epochs after which multistep decays
    decay_rate: Annotated[float | None, LEFT_OUT_UNSET] = Field(
        default=None, gt=0, lt=1
    )  # what step and multistep multiply the learning rate with
    warmup_epochs: float = Field(default=0.0, ge=0, le=MOST_EPOCHS)
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"  # auto: measured once on the model and device, then kept
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: measured where a training is long enough for it to pay
    clip_grad: float | None = Field(default=None, gt=0, le=1e9)  # maximum norm of the gradient
    accumulate: int = Field(default=1, ge=1, le=2**20)  # micro-batches that one optimizer step is cut into
    ema: float | None = Field(
        default=None, gt=0, lt=1
    )  # decay of an exponential moving average of the weights, which is then what is evaluated
    augment: Augment = Augment()
    views: int | None = Field(
        default=4, ge=1, le=MOST_EPOCHS
    )  # augmented copies of each image that training cycles through; null: a fresh one each epoch, no cache
    weights: Literal["last", "best"] = "last"  # which epoch's weights are kept, `best` by the validation metric


def _dimension(value: Any) -> Any:
    if isinstance(value, Range | Choice):
        return value
    if isinstance(value, list):
        value = {"options": value}
    if not isinstance(value, dict):
        raise ValueError("expected {low: 0.1, high: 1.0, log: true} or a list of options")
    kind, keys = (Choice, {"options"}) if "options" in value else (Range, {"low", "high", "log", "step"})
    if unknown := sorted(set(value) - keys):
        raise ValueError(f"unknown key {shown(unknown[0])}{nearest(unknown[0], keys)}")
    if missing := sorted(({"options"} if kind is Choice else {"low", "high"}) - set(value)):
        raise ValueError(f"the key {shown(missing[0])} is missing")
    if kind is Choice:
        return Choice(options=tuple(value["options"]))
    try:
        if any(isinstance(value.get(key), bool) for key in ("low", "high", "step")) or isinstance(value.get("log"), str):
            raise TypeError
        numbers = {key: float(value[key]) for key in ("low", "high", "step") if value.get(key) is not None}
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"low, high and step must be numbers, and log true or false; got {shown(value)}") from None
    if missing := sorted({"low", "high"} - set(numbers)):
        raise ValueError(f"{missing[0]} must be a number, got null")
    return Range(numbers["low"], numbers["high"], bool(value.get("log", False)), numbers.get("step"))


class Budget(_Part):
    """What the trials of one search may take, as if none were stopped early. One of the two."""

    device_hours: float | None = Field(default=None, gt=0, le=1e9)
    epochs: float | None = Field(default=None, gt=0, le=1e12)

    @model_validator(mode="after")
    def _one_of_them(self) -> Budget:
        if (self.device_hours is None) == (self.epochs is None):
            raise ValueError("expected one of device_hours and epochs, such as {device_hours: 0.5}")
        return self

    @property
    def said(self) -> str:
        """`0.5 device-hours`."""
        return f"{self.epochs:g} epochs" if self.epochs is not None else f"{self.device_hours:g} device-hours"

    def trials(self, seconds: float, epochs: float, whole: int, workers: int) -> int:
        """How many trials it pays for, by what one has cost; at least 1.

        seconds, epochs: of that trial. whole: the epochs of a trial that is not stopped. workers: that it had.
        """
        cost = whole if self.epochs is not None else seconds * workers / 3600 * whole / epochs
        return max(1, int((self.epochs or self.device_hours or 0.0) / max(cost, 1e-9) + 1e-9))


class Search(_Part):
    """How every method's parameters are searched: the same budget for each, the published default first, judged on validation only."""

    trials: int = Field(ge=1, le=100_000)  # of a search with a budget, the most
    budget: Annotated[Budget | None, LEFT_OUT_UNSET] = None
    sampler: Literal["tpe", "random", "cmaes", "gp", "qmc", "nsgaii", "nsgaiii"] = "tpe"
    scheduler: Literal["asha", "none"] = "asha"
    grace_epochs: int = Field(default=1, ge=1, le=MOST_EPOCHS)  # no trial is stopped before this, nor before its method's warm-up is over
    reduction: int = Field(default=3, ge=2, le=1000)  # asha: one in this many goes on at each rung
    also: dict[str, Annotated[Dimension, BeforeValidator(_dimension)]] = Field(default_factory=dict)  # recipe keys in every method's space
    objectives: tuple[str, ...] = ()  # beside the task's own metric: lower-is-better costs such as train_seconds
    studies: Annotated[int, LEFT_OUT_UNSET] = Field(default=1, ge=1, le=100)  # searches of each method, each with its own finals
    defaults: Annotated[bool, LEFT_OUT_UNSET] = False  # whether finals are trained at each method's published default too
    top_k: int = Field(default=2, ge=1, le=100)  # this many are trained again on fresh seeds; the best validation mean is tuned for good
    confirm_seeds: int = Field(default=1, ge=1, le=100)
    seed: Seed = 0

    @field_validator("also")
    @classmethod
    def _only_recipe_keys(cls, value: dict[str, Dimension]) -> dict[str, Dimension]:
        names = [f"recipe.{name}" for name in Recipe.model_fields]
        for key in value:
            if key not in names:
                raise ValueError(f"unknown key {shown(key)}{nearest(key, names)}")
        return value

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in OBJECTIVES:
                raise ValueError(f"unknown objective {shown(name)}{nearest(name, OBJECTIVES)}")
        return value

    @model_validator(mode="after")
    def _as_many_objectives_as_can_be(self) -> Search:
        if self.objectives and self.scheduler == "asha":
            raise ValueError(
                "several objectives and scheduler asha do not go together: one of them can't stop a trial early; use scheduler: none"
            )
        if self.objectives and self.sampler == "cmaes":
            raise ValueError("sampler cmaes knows one objective only; for several use tpe, gp or nsgaii")
        return self


def check_label(label: str, where: str) -> None:
    """Raises ValueError for a label that can't be shown, or that is too long to be part of a file's name.

    where: the label's key.
    """
    if not 1 <= len(label) <= LONGEST_NAME:
        raise ValueError(f"{where}: expected 1 to {LONGEST_NAME} characters, got {len(label)}; give it a `label` of that length")
    if odd := next((character for character in label if unicodedata.category(character) in ("Cc", "Cs")), None):
        raise ValueError(f"{where}: holds {odd!a}, which is no printable character; got {label!a:.80}")


OBJECTIVES = ("train_seconds", "nll", "ece")


class TeacherSpec(_Part):
    """The teacher: trained here with `recipe` (keys that differ from the experiment's), or read from `weights`, a file or timm's own.

    task: what it is trained for and measured on; None for the experiment's own task.
    """

    model: ModelSpec
    recipe: dict[str, Any] = Field(default_factory=dict)
    weights: Literal["pretrained"] | Path | None = None
    seed: Seed = 0
    task: Annotated[TaskSpec | None, LEFT_OUT_UNSET] = None

    @model_validator(mode="after")
    def _pretrained(self) -> TeacherSpec:
        if self.weights == "pretrained" and not self.model.pretrained:
            raise ValueError("weights: pretrained needs a pretrained model, such as model: {name: resnet50, pretrained: true}")
        if self.model.weights == "teacher":
            raise ValueError("model.weights: teacher is for students; name a file, or train the teacher from random weights")
        return self


def _top_k(value: Any) -> Any:
    if value is None or value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1_000_000):
        return value
    raise ValueError(f"expected a whole number from 1 to 1000000, auto or null, got {shown(value)}")


class CacheOptions(_Part):
    """What is kept of the teacher's outputs."""

    budget_gb: float = Field(default=8.0, ge=0, le=1e6)  # of an entry, in 10^9 bytes; what does not fit is computed anew at every step
    precision: Literal["fp16", "fp32"] = "fp16"
    top_k: Annotated[int | Literal["auto"] | None, BeforeValidator(_top_k)] = None  # of many classes; auto: as many as are needed

    @property
    def numbers(self) -> dict[str, Any]:
        """What changes the outputs that a student sees."""
        return self.model_dump(mode="json", exclude={"budget_gb"})


class WorkerRange(_Part):
    """As many workers as there is room for, and another number after a loss or when nodes join. The global batch stays what it is."""

    min: int = Field(default=1, ge=1, le=MOST_WORKERS)
    max: int = Field(ge=1, le=MOST_WORKERS)

    @model_validator(mode="after")
    def _ordered(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max {self.max}; expected min to be the smaller")
        return self


def _number_or(part: type[_Part], called: str, most: int, example: str) -> Callable[[Any], Any]:
    """A check for a key that is a whole number, or a `part` with keys of its own. called: what errors in these say of them."""

    def check(value: Any) -> Any:
        if isinstance(value, dict):
            try:
                return part.model_validate(value)
            except ValidationError as error:
                raise ValueError(explain(error, called, part).splitlines()[0]) from None
        if isinstance(value, part) or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most):
            return value
        raise ValueError(f"expected a whole number from 1 to {most}, or {example}, got {shown(value)}")

    return check


Workers = Annotated[
    int | WorkerRange, BeforeValidator(_number_or(WorkerRange, "of a range", MOST_WORKERS, "a range such as {min: 1, max: 8}"))
]


def worker_bounds(workers: int | WorkerRange) -> tuple[int, int]:
    """The fewest and the most processes that one training has."""
    return (workers.min, workers.max) if isinstance(workers, WorkerRange) else (workers, workers)


def _gpus(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_GPUS
    if value == "auto" or (number and (value <= 1 or value % 1 == 0)):
        return value
    raise ValueError(f"expected auto, a share of one GPU, such as 0.5, or a whole number of them up to {MOST_GPUS}, got {shown(value)}")


class Runtime(_Part):
    """What one training uses, and where Ray is."""

    workers: Workers = 1
    cpus_per_worker: int = Field(default=1, ge=1, le=4096)
    gpus_per_worker: Annotated[float | Literal["auto"], BeforeValidator(_gpus)] = "auto"  # auto: see `distributed.cluster.decided`
    placement: Literal["pack", "spread"] = "pack"  # a training's workers: on as few nodes as they fit, or on as many as there are
    concurrent: int | None = Field(default=None, ge=1, le=MOST_WORKERS)  # trainings at once; by default as many as fit
    address: str | None = None  # a running Ray cluster; `auto` finds one
    checkpoint_seconds: float = Field(default=15.0, ge=0, le=1e9)  # the most that a killed training loses

    @field_validator("address")
    @classmethod
    def _without_credentials(cls, address: str | None) -> str | None:
        """An experiment is kept with every record of it."""
        if address is not None and re.search(r"[@?]", address):
            raise ValueError(
                "expected the address of a Ray cluster alone, got user:password@ or something behind ? in it; "
                "set RAY_AUTH_TOKEN in the environment"
            )
        return address

    @property
    def single(self) -> bool:
        """Whether a training is one process."""
        return self.workers == 1


class UntilDecided(_Part):
    """Seeds are added while a method is not told apart from kd: after each look, twice as many as before, up to `max`."""

    start: int = Field(default=3, ge=2, le=MOST_SEEDS)
    max: int = Field(ge=2, le=MOST_SEEDS)
    until: Literal["decided"]
    matters: float | None = Field(default=None, gt=0, le=1e9)  # a lead over kd, in the metric's unit, below which a method is no better

    @model_validator(mode="after")
    def _few_looks(self) -> UntilDecided:
        if self.max < self.start:
            raise ValueError(f"max is {self.max} and start {self.start}; expected max to be the larger")
        if (looks := len(doubled(self.start, self.max))) > max(LEVELS):
            raise ValueError(f"from {self.start} to {self.max} seeds there are {looks} looks, expected at most {max(LEVELS)}; raise start")
        return self


Seeds = Annotated[
    int | UntilDecided,
    BeforeValidator(_number_or(UntilDecided, "of seeds until decided", MOST_SEEDS, "{start: 3, max: 12, until: decided}")),
]


class Experiment(_Part):
    """The whole of one YAML file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST_NAME)
    task: TaskSpec
    teacher: TeacherSpec | None = None
    students: tuple[ModelSpec, ...] = Field(min_length=1)
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    recipe: Recipe = Recipe()
    search: Search | None = None
    seeds: Seeds = 3  # of `search.studies` searches, each has so many
    # Of `none` and `kd`; by default twice as many as the others, as all are compared with these.
    control_seeds: Annotated[int | None, LEFT_OUT_UNSET] = Field(default=None, ge=1, le=MOST_SEEDS)
    # Whether `none` is trained once more, for as long as teacher, cache, search and finals of the best method took.
    cost_control: Annotated[bool, LEFT_OUT_UNSET] = False
    data_seed: Seed = 0
    cache: CacheOptions = CacheOptions()
    runtime: Runtime = Runtime()
    # A folder, or an address such as s3://bucket/folder; `storage:` is another name of the key.
    results: str | None = Field(default=None, validation_alias=AliasChoices("results", "storage"))

    @model_validator(mode="before")
    @classmethod
    def _one_place(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and {"results", "storage"} <= value.keys():
            raise ValueError("`results` and `storage` are two names of one key; give one of them")
        return value

    @field_validator("results")
    @classmethod
    def _without_credentials(cls, place: str | None) -> str | None:
        """An experiment is kept with every record of it."""
        if place is not None and is_address(place) and (problem := problem_with(place)):
            raise ValueError(problem)
        return place

    @model_validator(mode="after")
    def _names(self) -> Experiment:
        for key, task in (("task", self.task), ("teacher.task", self.task_of("teacher"))):
            if not known("task", task.name, TASKS):
                raise ValueError(f"{key}: unknown task {shown(task.name)}{nearest(task.name, TASKS)}")
        for method in self.methods:
            try:
                check_method_name(method.name)
            except UserError as error:
                raise ValueError(f"methods: {error}") from error
        for key, specs in (("methods", self.methods), ("students", self.students)):
            for place, spec in enumerate(specs):
                check_label(spec.label, f"{key}.{place}.label")
                if key == "methods" and spec.label.endswith((AT_DEFAULT, AT_COST)):
                    raise ValueError(
                        f"{key}.{place}.label: {shown(spec.label)} ends as kdbench's own rows below a board do; leave the @ out"
                    )
        if self.teacher is not None:
            check_label(self.teacher.model.label, "teacher.model.label")
        elif inheriting := [spec.label for spec in self.students if spec.weights == "teacher"]:
            raise ValueError(f"students: {shown(inheriting[0])} has weights: teacher, and the file has no `teacher:`; add one")
        for key, labels in (("methods", [m.label for m in self.methods]), ("students", [s.label for s in self.students])):
            if twice := sorted({label for label in labels if labels.count(label) > 1}):
                raise ValueError(f"{key}: {shown(twice[0])} stands twice; give one of them another `label`")
        return self

    @model_validator(mode="after")
    def _one_way_to_more_seeds(self) -> Experiment:
        studies = self.search.studies if self.search is not None else 1
        ways = {
            "seeds.until: decided": isinstance(self.seeds, UntilDecided),
            "search.studies above 1": studies > 1,
            "control_seeds": self.control_seeds is not None and self.control_seeds != self.seeds,
        }
        if len(asked := [way for way, there in ways.items() if there]) > 1:
            raise ValueError(f"{asked[0]} and {asked[1]} do not go together: what they would find out is not known; leave one of them out")
        if isinstance(self.seeds, UntilDecided):
            if control_of([(spec.label, spec.name) for spec in self.methods], CONTROL) is None:
                raise ValueError("seeds.until: decided compares methods with kd, which is not among them; add kd to the methods")
        elif self.control_seeds is not None and self.control_seeds < self.seeds:
            raise ValueError(f"control_seeds is {self.control_seeds} and seeds {self.seeds}; expected at least as many")
        return self

    @model_validator(mode="after")
    def _somebody_to_train_longer(self) -> Experiment:
        if self.cost_control and control_of([(spec.label, spec.name) for spec in self.methods], UNDISTILLED) is None:
            raise ValueError("cost_control trains none for longer, which is not among the methods; add none to them")
        return self

    @property
    def plan(self) -> Plan:
        """How many finals the board of each pair is meant to have."""
        searches = self.search.studies if self.search is not None else 1
        if isinstance(self.seeds, UntilDecided):
            until = self.seeds
            return Plan(seeds=until.start, control_seeds=until.start, looks=doubled(until.start, until.max), matters=until.matters)
        more = self.seeds if searches > 1 else self.control_seeds or (min(2 * self.seeds, MOST_SEEDS) if self.seeds > 1 else 1)
        return Plan(seeds=self.seeds, control_seeds=more, searches=searches)

    def task_of(self, role: str) -> TaskSpec:
        """What a network of this role, `teacher` or any other, is trained for and measured on."""
        own = self.teacher.task if self.teacher is not None and role == "teacher" else None
        return self.task if own is None else own

    def teacher_recipe(self) -> Recipe:
        """The experiment's recipe with the teacher's own keys."""
        overrides = self.teacher.recipe if self.teacher else {}
        return validated(Recipe, {**self.recipe.model_dump(), **overrides}, "teacher.recipe")


Checked = TypeVar("Checked", bound=BaseModel)


def validated(model: type[Checked], value: Any, where: str) -> Checked:
    """`value` as a `model`. Raises UserError, one line a problem, each beginning with `where`."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise UserError(explain(error, where, model)) from error


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and apply `--set key=value` overrides.

    Raises UserError, one line a problem, for a file that is missing, empty or not YAML, and for every wrong key, type or name.
    """
    where = printable(str(path))
    try:
        text = read_file(path, yaml12.LONGEST).decode()
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path}: can't be read: it is a link to nothing") from None
        here = [str(p) for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        raise UserError(f"{where}: there is no such file" + (nearest(str(path), here) if here else "")) from None
    except OSError as error:
        raise UserError(f"{where}: can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: can't be read as text: {error}") from error
    value = parse_yaml(text, where)
    for override in overrides:
        _override(value, override)
    return validated(Experiment, value, where)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping that `text` holds. Raises UserError with line and column where it does not parse."""
    try:
        value = yaml12.load(text)
    except yaml12.InvalidYAML as error:
        raise UserError(f"{where}: {error}") from error
    if value is None:
        raise UserError(f"{where}: the file is empty; experiments/quickstart.yaml shows what an experiment looks like")
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected keys and values such as `name: my-experiment`, got a {type(value).__name__}")
    return value


def _override(experiment: dict[str, Any], assignment: str) -> None:
    """Apply one `--set a.b=c`.

    A list element is addressed by its name (`methods.kd.temperature`); `method.x` means every method that has an x.
    """
    key, equals, text = assignment.partition("=")
    assignment = cut(assignment)
    if not equals or not key:
        raise UserError(f"--set {assignment}: expected key=value, such as --set recipe.epochs=3")
    try:
        value = yaml12.load(text)
    except yaml12.InvalidYAML as error:
        raise UserError(f"--set {assignment}: the value, {error}") from error
    path = key.split(".")
    if len(path) > yaml12.DEEPEST:
        raise UserError(f"--set {assignment}: the key has {len(path)} parts, expected at most {yaml12.DEEPEST}")
    if path[0] == "method":
        _override_methods(experiment, path[1:], value, assignment)
        return
    place: Any = experiment
    for depth, name in enumerate(path[:-1]):
        place = _step_into(place, name, assignment, ".".join(path[: depth + 1]))
    if isinstance(place, list):
        _replace_element(place, path[-1], value, assignment)
    else:
        place[path[-1]] = value


def _step_into(place: Any, name: str, assignment: str, so_far: str) -> Any:
    if isinstance(place, list):
        return _element(place, name, assignment)
    inner = place.setdefault(name, {})
    if isinstance(inner, str):  # `data: fashion_mnist` is short for `data: {name: fashion_mnist}`
        inner = place[name] = {"name": inner}
    if inner is None:
        inner = place[name] = {}
    if not isinstance(inner, dict | list):
        raise UserError(f"--set {assignment}: {so_far} is a {type(inner).__name__}, it has no keys")
    return inner


def _element_name(element: Any) -> str:
    return str(element.get("label") or element.get("name")) if isinstance(element, dict) else str(element)


def _element(elements: list[Any], name: str, assignment: str) -> dict[str, Any]:
    for position, element in enumerate(elements):
        if _element_name(element) == name or str(position) == name:
            if not isinstance(element, dict):
                element = elements[position] = {"name": element}
            return element
    raise UserError(f"--set {assignment}: there is no {name!r}{nearest(name, [_element_name(e) for e in elements])}")


def _replace_element(elements: list[Any], name: str, value: Any, assignment: str) -> None:
    element = _element(elements, name, assignment)
    elements[elements.index(element)] = value


def _override_methods(experiment: dict[str, Any], path: list[str], value: Any, assignment: str) -> None:
    methods = experiment.get("methods")
    if len(path) != 1 or not isinstance(methods, list):
        raise UserError(f"--set {assignment}: expected method.PARAMETER=value, such as --set method.temperature=2")
    fields: set[str] = set()
    for method in list(methods):
        spec = validated(MethodSpec, method, f"--set {assignment}: methods")
        names = set(method_class(spec).Params.model_fields)
        fields |= names
        if path[0] in names:
            _element(methods, spec.label, assignment)[path[0]] = value
    if path[0] not in fields:
        raise UserError(f"--set {assignment}: none of the methods has a parameter {path[0]!r}{nearest(path[0], fields)}")


class TeacherRef(_Part):
    """A teacher that is ready: its weights, how good it is, and where its cached outputs lie.

    sha: SHA-256 of the weights' file. state: of the tensors as the network holds them once they are loaded (`models.weights.state_sha256`),
    which is the same for every kind of file; None where nobody loaded them. task: what the network was trained for, where that is another
    task than the students', with `task_facts`, a content hash of what decides its outputs there; its metric is None then.
    """

    model: ModelSpec
    weights: Path
    sha: str
    state: Annotated[str | None, LEFT_OUT_UNSET] = None
    metric: float | None = None
    precision: str = "fp32"
    memory_format: str = "contiguous"
    cache: Path | None = None
    task: Annotated[TaskSpec | None, LEFT_OUT_UNSET] = None
    task_facts: Annotated[str | None, LEFT_OUT_UNSET] = None

    @property
    def identity(self) -> str:
        """Content hash of all that decides the teacher's outputs: tensors, model and its options, precision and memory format, other task.

        Its label, its file and how it was trained are left out.
        """
        model = self.model.model_dump(mode="json", exclude={"label", "weights"})
        facts = [self.state or self.sha, model, self.precision, self.memory_format]
        return content_hash(facts if self.task_facts is None else [*facts, self.task_facts])


class Unit(_Part):
    """One training, fully described: the same unit gives the same weights wherever it runs. `key` names it.

    protocol_hash: what the trainings of a board share, the test part left out. data_hash: content of train, transfer and val; task_version:
    of the task's code; student_init: content of the student's `weights` (`models.weights.state_sha256`), or of the tensors
    that it takes from its teacher. A process that finds other content
    or another version refuses to train; None asks for no such check.
    """

    role: Literal["teacher", "trial", "candidate", "final"]
    experiment: str
    protocol_hash: str
    data_hash: Annotated[str | None, LEFT_OUT_UNSET] = None
    task: TaskSpec
    task_version: Annotated[int | None, LEFT_OUT_UNSET] = None
    student: ModelSpec
    student_init: Annotated[str | None, LEFT_OUT_UNSET] = None
    teacher: TeacherRef | None = None
    method: MethodSpec
    method_version: int = 1
    recipe: Recipe
    seed: int
    data_seed: int = 0
    workers: Workers = 1
    checkpoint_seconds: float = 15.0
    number: int | None = None  # of a trial in its study

    @property
    def key(self) -> str:
        """Content hash of all that decides the weights, and of nothing else: where files lie and how the experiment is called is left out.

        The task is in `protocol_hash`, with its options and version. The test part decides what is measured, and no weight. Labels of
        method and student are part of the key: a tuned method may end at the parameters that another label pins, and a board has a row
        for each.
        """
        places = {"experiment": True, "task": True, "teacher": True, "checkpoint_seconds": True, "number": True}
        content = self.model_dump(mode="json", exclude={**places, "student": {"weights"}})
        content["teacher"] = self.teacher.identity if self.teacher else None
        return content_hash(content)

    @property
    def title(self) -> str:
        """What people read: `kd trial 3`, `kd seed 1`, `teacher resnet8x4`."""
        if self.role == "teacher":
            return f"teacher {self.student.label}"
        if self.role == "trial":
            search = self.seed - TRIAL_SEED
            return f"{self.method.label} trial {self.number}" + (f" of search {search + 1}" if search > 0 else "")
        return f"{self.method.label} {'check ' if self.role == 'candidate' else ''}seed {self.seed}"

    @property
    def evaluates_test(self) -> bool:
        """Choices are made on validation; only what is final sees the test set."""
        return self.role in ("teacher", "final")


def board_hash(protocol_hash: str, test_hash: str) -> str:
    """What a board shares: the protocol of its trainings, and the test part that they are measured on."""
    return content_hash([protocol_hash, test_hash])


def content_hash(value: Mapping[str, Any] | Sequence[Any], length: int = 16) -> str:
    """The first `length` hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def to_yaml(experiment: Experiment) -> str:
    """The experiment as YAML, as it is kept with every record. Reading it gives an equal experiment."""
    return yaml12.dump(_without_default_nulls(experiment, json.loads(experiment.model_dump_json())))


def _without_default_nulls(value: Any, dumped: Any) -> Any:
    """The dump of a value without the nulls that reading it gives by itself: others, such as `views: null`, say something."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        kept = {name: item for name, item in dumped.items() if item is not None or name not in fields or fields[name].default is not None}
        return {name: _without_default_nulls(getattr(value, name), item) for name, item in kept.items()}
    if isinstance(value, Range | Choice):
        return {name: item for name, item in dumped.items() if item is not None}
    if isinstance(value, Mapping):
        return {name: _without_default_nulls(value[name], item) for name, item in dumped.items()}
    if isinstance(value, tuple | list):
        return [_without_default_nulls(*pair) for pair in zip(value, dumped, strict=True)]
    return dumped
