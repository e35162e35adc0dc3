"""The keys that kdbench gave until November 2026 (commit eaaa7df), so that what was trained under them is found and not trained again.

The earlier rule named a teacher by its file alone, a study without its task, weights and data by their paths, and images in files by names
and sizes. So a key alone does not say what a training was of. What is kept beside it does: the record, with the experiment that it was made
by. What is found under an earlier key counts only where all of that says the same as is asked for now.

This module can go once nobody has results of then, or at the next change of keys, with everything that imports it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from kdbench import yaml12
from kdbench.data.batch import Part
from kdbench.data.content import newest_change
from kdbench.data.image_folder import Files
from kdbench.data.parquet import Rows
from kdbench.experiment import Experiment, Recipe, Search, TeacherRef, Unit, content_hash
from kdbench.methods.base import Method
from kdbench.methods.build import MethodSpec, method_class, method_code
from kdbench.models.build import ModelSpec
from kdbench.records.record import RunRecord
from kdbench.search.space import Parameter, describe
from kdbench.tasks.base import Splits
from kdbench.tasks.build import TaskSpec

LONG_AGO = 0.0


class EarlierData:
    """A task's data as the earlier rule knew them."""

    def __init__(self, splits: Splits) -> None:
        self.splits = splits

    @cached_property
    def data_hash(self) -> str:
        """The source's hash, images in files by their names and sizes, or by the ends of Parquet files."""
        source = self.splits.source
        if source is None:
            return self.splits.data_hash
        facts = [source.num_classes, source.class_names, source.mean, source.std, source.ignore_index]
        return hashlib.sha256(json.dumps([_part_hash(source.train), _part_hash(source.test), *facts]).encode()).hexdigest()

    @cached_property
    def split_hash(self) -> str:
        digest = hashlib.sha256(self.data_hash.encode())
        for part in (self.splits.train, self.splits.transfer, self.splits.val, self.splits.test):
            digest.update(len(part).to_bytes(8, "little") + part.index.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def changed(self) -> float:
        """When a file of the data was last written, in seconds since 1970; long ago where the hash is of content, of images in memory."""
        source = self.splits.source
        stores = [part.encoded_images.store for part in (source.train, source.test) if part.encoded is not None] if source else []
        return max((newest_change(_files(store)) for store in stores), default=LONG_AGO)


def _part_hash(part: Part) -> str:
    if part.encoded is None or not isinstance(part.target, Tensor):  # pictures in files had one label each then
        return part.sha256()
    inputs = part.encoded_images
    images = hashlib.sha256(f"{_listing(inputs.store)} {inputs.size} {inputs.resize}".encode())
    if inputs.store.turned:  # which then were shown as they are stored
        images.update(b"turned upright")
    images.update(inputs.rows.numpy().tobytes())
    digest = hashlib.sha256(str((tuple(inputs.shape), inputs.dtype)).encode() + images.hexdigest().encode())
    for tensor in (part.labels, part.index):
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _files(store: Any) -> list[Path]:
    if isinstance(store, Files):
        return [store.folder / name for name in store.names]
    return list(store.paths) if isinstance(store, Rows) else []


def _listing(store: Any) -> str:
    if isinstance(store, Files):
        names = (f"{name} {path.stat().st_size}" for name, path in zip(store.names, _files(store), strict=True))
        return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    if isinstance(store, Rows):
        return hashlib.sha256(b"".join(map(_footer, store.paths))).hexdigest()
    return str(store.sha256())


def _footer(path: Path) -> bytes:
    """The end of a Parquet file: the metadata, their length in 4 bytes, and the magic number."""
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return file.read()


# --- keys ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EarlierRule:
    """The earlier rule itself, for an experiment on data with these hashes (`EarlierData`). version: of the task."""

    experiment: Experiment
    version: int
    data_hash: str
    split_hash: str

    def student_key(self, unit: Unit, recipe: Recipe) -> str:
        """recipe: the pair's, without what a search varies."""
        return self._key(unit, self.student_protocol(unit.teacher, recipe))

    def student_protocol(self, teacher: TeacherRef | None, recipe: Recipe) -> str:
        """What the trainings of a board shared."""
        experiment = self.experiment
        protocol = {
            "task": experiment.task.model_dump(mode="json"),
            "task_version": self.version,
            "data": self.data_hash,
            "split": self.split_hash,
            "recipe": recipe.model_dump(mode="json"),
            "data_seed": experiment.data_seed,
            "search": experiment.search.model_dump(mode="json") if experiment.search else None,
            "teacher": teacher.sha if teacher else None,
            "cache": experiment.cache.numbers if teacher is not None and teacher.cache is not None else None,
        }
        return content_hash(protocol)

    def teacher_key(self, unit: Unit, given: str | None = None) -> str:
        """given: SHA-256 of the file, where its weights came in one."""
        key = self._key(unit, self.teacher_protocol(unit.recipe))
        return content_hash([key, given]) if given else key

    def teacher_protocol(self, recipe: Recipe) -> str:
        """As `student_protocol`, of a teacher's own training."""
        return content_hash([self.experiment.task.model_dump(mode="json"), self.split_hash, recipe.model_dump(mode="json")])

    def _key(self, unit: Unit, protocol_hash: str) -> str:
        same = {"role", "task", "student", "method", "method_version", "recipe", "seed", "data_seed", "workers"}
        content = unit.model_dump(mode="json", include=same)
        content |= {"protocol_hash": protocol_hash, "split_hash": self.split_hash}
        return content_hash(content | {"teacher": unit.teacher.sha if unit.teacher else None})


@dataclass(frozen=True)
class Asked:
    """What an experiment asks for now, as far as the earlier keys held it. version: of the task."""

    experiment: Experiment
    version: int
    data: EarlierData

    @property
    def task(self) -> dict[str, Any]:
        return self.experiment.task.model_dump(mode="json")

    @property
    def rule(self) -> EarlierRule:
        """The earlier keys of what is asked for."""
        return EarlierRule(self.experiment, self.version, self.data.data_hash, self.data.split_hash)

    def study_id(
        self, student: ModelSpec, teacher: TeacherRef | None, recipe: Recipe, spec: MethodSpec, axes: tuple[Parameter, ...], search: Search
    ) -> str:
        experiment = self.experiment
        return content_hash(
            {
                "experiment": experiment.name,
                "pair": [student.model_dump(mode="json"), teacher.sha if teacher else None, self.data.split_hash],
                "method": [spec.label, spec.name, spec.pinned, method_class(spec).version],
                "recipe": recipe.model_dump(mode="json"),
                "data_seed": experiment.data_seed,
                "cache": experiment.cache.numbers,
                "workers": experiment.runtime.model_dump(mode="json")["workers"],
                "space": describe(axes),
                "search": search.model_dump(mode="json", exclude={"trials", "top_k", "confirm_seeds", "also"}),
            }
        )

    def cache_facts(self, facts: Mapping[str, Any], teacher: TeacherRef) -> dict[str, Any] | None:
        """What a cache entry of then says of itself, `facts` being what one of now does; None where it could be of other images."""
        if self.data.changed > LONG_AGO:
            return None
        return {**facts, "teacher": teacher.sha, "split": self.data.split_hash, "data": self.data.data_hash}

    # --- what is kept beside a key -------------------------------------------------------------------------------

    def differs(
        self, record: RunRecord, student: ModelSpec, teacher: TeacherRef | None, teachers: Sequence[RunRecord], noise: bool
    ) -> str | None:
        """Why a record found by an earlier key can't be taken for what is asked for; None where it can.

        Args:
            record: with the earlier key, or from a study with an earlier id.
            student: of the training; of a teacher's own training the teacher.
            teacher: as the training would have it now.
            teachers: the records of all teachers of the results folder.
            noise: whether the training draws anything for each sample, as `draws_noise` says.
        """
        if noise and max(record.worker_counts or [record.world_size]) > 1:
            return "its workers drew the same dropout masks or the same noise of the method for different samples"
        return next(self._differences(record, student, teacher, teachers), None)

    def _differences(
        self, record: RunRecord, student: ModelSpec, teacher: TeacherRef | None, teachers: Sequence[RunRecord]
    ) -> Iterator[str]:
        if record.task_version != self.version:
            yield f"it was made with version {record.task_version} of its task, which has version {self.version} now"
        if (record.data_hash, record.split_hash) != (self.data.data_hash, self.data.split_hash):
            yield "it was made with other data"
        begun = record.created_at.timestamp() - (record.train_seconds or 0.0)
        if self.data.changed > begun:
            yield "the images were written or copied after it was trained, so nobody can tell whether they are the same"
        if student.weights == "teacher":
            yield "kdbench of then had no `weights: teacher`"
        elif student.weights is not None and _written(student.weights) > begun:
            yield f"{student.weights} was written after it was trained, so nobody can tell whether it is the same"
        kept = _config(record)
        if kept is None:
            yield "its record does not hold a readable experiment, so nobody can tell what it was made with"
            return
        if _dumped(TaskSpec, kept.get("task")) != self.task:
            yield "it was made with other options of its task"
        if teacher is None:
            return
        model = _model(kept)
        if model != _as_model(teacher.model):
            yield f"it learned from a teacher with other model options ({_shown(model)}, now {_shown(_as_model(teacher.model))})"
        elif (numbers := self._teacher_numbers(record, kept, teachers)) != (teacher.precision, teacher.memory_format):
            now = f"now {teacher.precision} and {teacher.memory_format}"
            yield f"its teacher ran in {' and '.join(numbers)}, {now}" if numbers else f"nobody can tell its teacher's precision, {now}"

    def _teacher_numbers(self, record: RunRecord, kept: Mapping[str, Any], teachers: Sequence[RunRecord]) -> tuple[str, str] | None:
        """Precision and memory format of the teacher that a student learned from; None where nothing says them.

        What was asked for may have been overridden by what `auto` had measured: the teacher's own record says what it was.
        """
        own = [r for r in teachers if r.teacher_sha == record.teacher_sha and _model(_config(r) or {}) == _model(kept)]
        numbers = {(r.recipe.get("precision"), r.recipe.get("memory_format")) for r in own}
        if len(numbers) == 1:
            precision, memory_format = numbers.pop()
            return str(precision), str(memory_format)
        asked = {**(kept.get("recipe") or {}), **((kept.get("teacher") or {}).get("recipe") or {})}
        told = (str(asked.get("precision", "auto")), str(asked.get("memory_format", "auto")))
        return None if numbers or "auto" in told else told


def has_dropout(network: nn.Module) -> bool:
    return any(isinstance(module, _DropoutNd) or "drop" in type(module).__name__.lower() for module in network.modules())


def draws_noise(dropout: bool, spec: MethodSpec) -> bool:
    """Whether a training draws anything for each sample: dropout in the network, or noise of a method that doesn't compare samples."""
    return dropout or any(_uses_generator(kind) and not kind.batch_coupled for kind in method_code(spec))


def _uses_generator(kind: type[Method]) -> bool:
    own = [part for part in kind.__mro__ if part not in Method.__mro__]
    functions = [
        code for part in own for name, value in vars(part).items() if name != "__init__" and (code := getattr(value, "__code__", None))
    ]
    return any("generator" in code.co_names for code in functions)


def _config(record: RunRecord) -> Mapping[str, Any] | None:
    try:
        kept = yaml12.load_as_1_1(record.config or "")
    except yaml12.InvalidYAML:
        return None
    return kept if isinstance(kept, dict) else None


def _model(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The teacher's model as an experiment describes it, but for its label."""
    model = (config.get("teacher") or {}).get("model")
    try:
        return _as_model(ModelSpec.model_validate(model))
    except ValidationError:
        return None


def _as_model(spec: ModelSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude={"label", "weights"})


def _shown(model: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key}: {value}" for key, value in (model or {}).items() if key != "pretrained") or "unknown"


def _dumped(kind: type[TaskSpec], value: Any) -> dict[str, Any] | None:
    try:
        return kind.model_validate(value).model_dump(mode="json")
    except ValidationError:
        return None


def _written(path: Path) -> float:
    try:
        return path.expanduser().stat().st_mtime
    except (OSError, RuntimeError):  # RuntimeError: `~` of a user whom this machine does not know
        return LONG_AGO
