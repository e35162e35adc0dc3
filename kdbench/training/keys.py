"""What trainings and boards are called: content hashes of what decides them, made before a training, and again from its record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdbench.errors import CodeRefused, KDBenchError, UserError
from kdbench.experiment import Experiment, Recipe, TeacherRef, Unit, board_hash, content_hash, validated
from kdbench.methods.build import PLUS, MethodSpec
from kdbench.models.build import ModelSpec
from kdbench.records.record import RunRecord
from kdbench.tasks.base import Role, role_of
from kdbench.tasks.build import TaskSpec, depends_on_files, task_facts
from kdbench.training.cache.outputs import view_count
from kdbench.training.earlier_keys import EarlierRule
from kdbench.training.recorded import model_spec

_VARIED = "recipe."  # how the names of parameters begin that a search varies in the recipe


def student_protocol(
    experiment: Experiment, facts: Mapping[str, Any], data: str, learned_hash: str | None, recipe: Recipe, teacher: str | None, cached: bool
) -> str:
    """What the trainings of a board share, the test part left out.

    Args:
        experiment: that they belong to.
        facts: of its task, as `tasks.build.task_facts` gives them.
        data: name of the data set.
        learned_hash: content of its train, transfer and val part.
        recipe: the pair's, without what a search varies.
        teacher: `TeacherRef.identity`; None where there is no teacher.
        cached: whether students learn from the teacher's cached outputs.
    """
    return content_hash(
        {
            "task": facts,
            "data": [data, learned_hash],
            "recipe": recipe.model_dump(mode="json"),
            "data_seed": experiment.data_seed,
            # Finals at the defaults stand beside the others and change none of them.
            "search": experiment.search.model_dump(mode="json", exclude={"defaults"}) if experiment.search else None,
            "teacher": teacher,
            "cache": experiment.cache.numbers if cached else None,
        }
    )


def teacher_protocol(facts: Mapping[str, Any], data: str, learned_hash: str | None, recipe: Recipe) -> str:
    """As `student_protocol`, of a teacher's own training."""
    return content_hash([facts, data, learned_hash, recipe.model_dump(mode="json")])


def given_teacher_key(facts: Mapping[str, Any], identity: str | None, label: str) -> str:
    """The key of a teacher whose weights came in a file."""
    return content_hash(["given", facts, identity, label])


class NotDerivable(KDBenchError):
    """A record does not hold all that its key was made of, or holds it in a form that this kdbench can't read."""


@dataclass(frozen=True)
class Derived:
    """What a record's own fields and its experiment give.

    unit_keys: the key of its training; several where the record can be read in several ways. protocol_hash: of its board; None where the
    record does not say on which test part that is.
    """

    unit_keys: tuple[str, ...]
    protocol_hash: str | None


def derived(record: RunRecord, experiment: Experiment) -> Derived:
    """Make the keys of a record again, from nothing but the record and the experiment in its `config`.

    A record from before the key change has no `learned_hash`; its keys are made by the rule of then.

    Raises UserError where the experiment has no such network, NotDerivable where the record holds too little.
    """
    spec = model_spec(record, experiment)
    recipe = _recipe(record.recipe)
    pair_recipe = recipe if record.role == "teacher" else _pair_recipe(record, experiment)
    teacher = _teacher(record, experiment, cached=view_count(pair_recipe) is not None)
    if record.learned_hash is None:
        return _by_earlier_rule(record, experiment, spec, recipe, pair_recipe, teacher)
    facts = _task_facts(experiment.task_of(record.role), record.task_version, role_of(record.role))
    identity = record.teacher_id
    if record.role == "teacher":
        protocol = teacher_protocol(facts, record.data, record.learned_hash, recipe)
    else:
        cached = teacher is not None and teacher.cache is not None
        protocol = student_protocol(experiment, facts, record.data, record.learned_hash, pair_recipe, identity, cached)
    board = board_hash(protocol, record.test_hash) if record.test_hash is not None else None
    if record.role == "teacher" and _is_given(experiment):
        return Derived((given_teacher_key(facts, identity, spec.label),), board)
    return Derived(tuple(unit.key for unit in _units(record, experiment, spec, recipe, teacher, protocol)), board)


def _by_earlier_rule(
    record: RunRecord, experiment: Experiment, spec: ModelSpec, recipe: Recipe, pair_recipe: Recipe, teacher: TeacherRef | None
) -> Derived:
    rule = EarlierRule(experiment, record.task_version, record.data_hash, record.split_hash)
    units = list(_units(record, experiment, spec, recipe, teacher, ""))
    if record.role != "teacher":
        return Derived(tuple(rule.student_key(unit, pair_recipe) for unit in units), rule.student_protocol(teacher, pair_recipe))
    given = record.teacher_sha if _is_given(experiment) else None
    return Derived(tuple(rule.teacher_key(unit, given) for unit in units), rule.teacher_protocol(recipe))


def _is_given(experiment: Experiment) -> bool:
    return experiment.teacher is not None and experiment.teacher.weights is not None


def _task_facts(spec: TaskSpec, version: int, role: Role) -> dict[str, Any]:
    """With the version of the task's code that the record has, which may be another one than this kdbench's."""
    try:
        if depends_on_files(spec):
            raise NotDerivable("the task has files among its options, and their content of then is not on record")
        return {**task_facts(spec, role), "version": version}
    except (UserError, CodeRefused) as error:
        raise NotDerivable(str(error)) from error


def _recipe(stored: Mapping[str, Any]) -> Recipe:
    try:
        recipe: Recipe = validated(Recipe, dict(stored), "recipe")
    except UserError as error:
        raise NotDerivable(str(error)) from error
    return recipe


def _pair_recipe(record: RunRecord, experiment: Experiment) -> Recipe:
    """The recipe without what a search varied: with the experiment's own value there."""
    stored = dict(record.recipe)
    if record.beside == "cost":  # one that is trained for longer than its board says
        stored["epochs"] = experiment.recipe.epochs
    for key in experiment.search.also if experiment.search else ():
        name = key.removeprefix(_VARIED)
        stored[name] = getattr(experiment.recipe, name)
        if stored[name] == "auto":
            raise NotDerivable(f"what recipe.{name}: auto stood for is not on record where a search varies it")
    return _recipe(stored)


class _RecordedTeacher(TeacherRef):
    """A teacher as a student's record names it: by its identity, without the numbers that this is a hash of."""

    known_identity: str | None

    @property
    def identity(self) -> str:
        return self.known_identity or ""


def _teacher(record: RunRecord, experiment: Experiment, cached: bool) -> TeacherRef | None:
    if record.role == "teacher" or record.teacher_sha is None or experiment.teacher is None:
        return None
    return _RecordedTeacher(
        model=experiment.teacher.model,
        weights=Path("model.safetensors"),  # in no key
        sha=record.teacher_sha,
        known_identity=record.teacher_id,
        cache=Path("cache") if cached else None,
    )


def _units(
    record: RunRecord, experiment: Experiment, spec: ModelSpec, recipe: Recipe, teacher: TeacherRef | None, protocol: str
) -> Iterator[Unit]:
    """The training that a record is of; more than one where its parameters can be read in several ways."""
    params = {name: value for name, value in record.params.items() if not name.startswith(_VARIED)}
    for own in _readings(record.method, params):
        fields = {
            "role": record.role,
            "experiment": record.experiment,
            "protocol_hash": protocol,
            "data_hash": record.learned_hash,
            "task": experiment.task_of(record.role),
            "task_version": record.task_version,
            "student": spec,
            "student_init": record.student_init,
            "teacher": teacher,
            "method": validated(MethodSpec, {**own, "name": record.method, "label": record.label}, "method"),
            "method_version": record.method_version,
            "recipe": recipe,
            "seed": record.seed,
            "data_seed": record.data_seed,
            "workers": experiment.runtime.workers,
        }
        yield validated(Unit, fields, "its training")


def _readings(method: str, params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Parameters as the method had them, before `search_space.dotted`: `a.b` is `b` of `a`, unless the method itself has dots in names.

    Of several methods at once `a` is one of them, whose name may have dots too.
    """
    parts = method.split(PLUS) if PLUS in method else []
    nested: dict[str, Any] = {}
    for name, value in params.items():
        part = next((part for part in parts if name.startswith(f"{part}.")), None)
        above, own = ([part] if part else []), name.removeprefix(f"{part}.") if part else name
        *inner, last = own.split(".")
        place = nested
        for key in (*above, *inner):
            below = place.setdefault(key, {})
            place = below if isinstance(below, dict) else {}
        place[last] = value
    yield nested
    if nested != params:
        yield dict(params)
