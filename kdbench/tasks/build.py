"""Any task by name: kdbench's own, or a user's class by dotted path; made once a process."""

from __future__ import annotations

import inspect
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdbench.catalogue import resolve
from kdbench.data import DATA
from kdbench.data.options import NamedSpec
from kdbench.data.sources import DataSpec, source_maker
from kdbench.errors import UserError, explain
from kdbench.storage.folder import file_sha256, local_path
from kdbench.tasks import TASKS
from kdbench.tasks.base import Role, Task


class TaskSpec(NamedSpec):
    """Which task: `segmentation`, or `{name: classification, data: fashion_mnist}`; keys beside `name` are the task's `Options`."""


def build_task(spec: TaskSpec) -> Task:
    """The task that `spec` names; the same object when the process asks again.

    Raises UserError for an unknown task or option (naming the nearest), a wrong value, and data that doesn't fit the task.
    """
    return _built(spec.name, spec.options_json)


def task_class(spec: TaskSpec) -> type[Task]:
    """The class behind the name. Raises UserError for an unknown name, or for a dotted path to something that is no task."""
    found = resolve("task", spec.name, TASKS)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"task {spec.name!r} must be a subclass of kdbench.tasks.base.Task")
    return found


def check_task(spec: TaskSpec) -> type[Task]:
    """The task's class, after a look at its options and at the name of its data, which need not be on this machine.

    Raises UserError as `build_task` does, but for what only the data can tell.
    """
    data = getattr(_options(spec), "data", None)
    if isinstance(data, DataSpec):
        source_maker(data.name)
    return task_class(spec)


def task_facts(spec: TaskSpec, role: Role = "student") -> dict[str, Any]:
    """What of a task decides a training, beside the content of its data (`Splits.learned_hash`): its name, version and options.

    Where data lie is left out, and so are all options of kdbench's own data sets, which decide nothing but content. Of a user's own data
    set the options count that are no `Path`, as it may hold what no hash sees. A `Path` among the task's own options counts as the content
    of that file. Options that decide a teacher's training alone are no facts of a student's. Raises UserError as `build_task` does.
    """
    options = _options(spec)
    facts = options.facts_of(role)
    for name in facts:
        value = getattr(options, name, None)
        if isinstance(value, DataSpec):
            facts[name] = _data_facts(value)
        elif isinstance(value, Path):
            local_path(value, f"task {spec.name!r}: {name}")
            facts[name] = file_sha256(value) if value.is_file() else str(value.resolve())
    return {"name": spec.name, "version": task_class(spec).version, "options": facts}


def depends_on_files(spec: TaskSpec) -> bool:
    """Whether an option of the task itself is a file, so that its facts follow from what lies there now."""
    options = _options(spec)
    return any(isinstance(getattr(options, name), Path) for name in type(options).model_fields)


def task_code(spec: TaskSpec) -> list[Any]:
    """The task's class, and the functions that make its data."""
    options = _options(spec)
    specs = [value for name in type(options).model_fields if isinstance(value := getattr(options, name), DataSpec)]
    return [task_class(spec), *(source_maker(data.name) for data in specs)]


def _data_facts(spec: DataSpec) -> dict[str, Any] | None:
    if spec.name in DATA:
        return None
    options: dict[str, Any] = json.loads(spec.options_json)
    parameters = inspect.signature(source_maker(spec.name)).parameters
    places = {name for name, parameter in parameters.items() if "Path" in str(parameter.annotation)}
    return {"name": spec.name, **{name: value for name, value in options.items() if name not in places}}


def _options(spec: TaskSpec) -> Task.Options:
    kind = task_class(spec)
    try:
        return kind.Options.model_validate(json.loads(spec.options_json))
    except ValidationError as error:
        raise UserError(explain(error, f"task {spec.name!r}", kind.Options)) from error


@lru_cache(maxsize=4)
def _built(name: str, options: str) -> Task:
    spec = TaskSpec.model_validate({"name": name, **json.loads(options)})
    return task_class(spec)(_options(spec))
