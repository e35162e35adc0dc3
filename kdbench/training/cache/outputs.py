"""Teacher outputs computed once for a whole sweep: memory-mapped, one copy for all trials and workers of a node.

An entry is a folder named by the hash of all that decides its content (teacher, data, views, precision), so that a stale one can't be
read. It holds a stream for the logits, one for the test part and one for each tap (`cache_streams`); `cache_build` writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from kdbench.bounded import open_regular, read_file
from kdbench.data.batch import Batch
from kdbench.data.columns import Columns, single
from kdbench.data.options import LEFT_OUT_UNSET, StrictOptions
from kdbench.errors import RunFailed, in_one_line
from kdbench.experiment import CacheOptions, Recipe, TeacherRef, content_hash
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.tasks.base import Splits
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.training.cache.streams import ENTRY, LARGEST_MANIFEST, Stream, StreamFiles, damaged

FORMAT_VERSION = 2

LOGITS, TEST = "logits", "test"  # names of streams


def tap_stream(tap: str) -> str:
    """A tap's stream. A module may well be called `logits`."""
    return f"tap {tap}"


def streams_of(taps: Sequence[str]) -> tuple[str, ...]:
    """What a method that looks at these taps reads."""
    return LOGITS, *map(tap_stream, taps)


def view_count(recipe: Recipe) -> int | None:
    """How many different copies of an image training sees; None where every epoch has a fresh one and nothing can be cached."""
    if recipe.augment.none:
        return 1
    return min(recipe.views, recipe.epochs) if recipe.views is not None else None


class CacheSpec(StrictOptions):
    """What an entry holds the outputs of, as plain data that travels to any process."""

    teacher: TeacherRef
    task: TaskSpec
    recipe: Recipe  # of the students: its augmentation and its views
    data_seed: int
    options: CacheOptions = CacheOptions()
    earlier: Annotated[dict[str, Any] | None, LEFT_OUT_UNSET] = (
        None  # `facts` of an entry of the earlier rule of keys, which is used as it is
    )

    @property
    def views(self) -> int:
        count = view_count(self.recipe)
        assert count is not None, "a fresh view each epoch can't be cached"
        return count

    @property
    def splits(self) -> Splits:
        return build_task(self.task).splits()

    @property
    def key(self) -> str:
        """Names the entry; two entries with one key hold the same."""
        return content_hash(self.facts)

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides an entry's content."""
        if self.earlier is not None:
            return self.earlier
        teacher, splits = self.teacher, self.splits
        return {
            "format": FORMAT_VERSION,
            # The tensors alone are not enough: options such as a stride change the outputs, and no tensor's shape.
            "model": teacher.model.model_dump(mode="json", exclude={"label", "weights"}),
            "teacher": teacher.state or teacher.sha,
            "precision": teacher.precision,
            "memory_format": teacher.memory_format,
            "split": splits.hash,
            "data": splits.data_hash,
            "augment": self.recipe.augment.model_dump(mode="json"),
            "views": self.views,
            "data_seed": self.data_seed,
            "kept": self.options.numbers,
            **({} if teacher.task_facts is None else {"task": teacher.task_facts}),
        }


class EntryFacts(StrictOptions):
    """entry.json: what an entry is of, for whoever opens or lists it. images: of the transfer part. index: checksum of index.npy."""

    facts: dict[str, Any]
    teacher: str
    data: str
    images: int
    index: str

    def shows(self, recipe: Recipe, data_seed: int) -> bool:
        """Whether it holds the views that a training with this recipe sees. A search may vary what a view is."""
        facts, views = self.facts, view_count(recipe)
        same = (facts["augment"], facts["data_seed"]) == (recipe.augment.model_dump(mode="json"), data_seed)
        return same and views is not None and views <= facts["views"]


def read_entry(folder: Path) -> EntryFacts | None:
    """None where there is no entry. Raises RunFailed where it can't be read."""
    try:
        return EntryFacts.model_validate_json(read_file(folder / ENTRY, LARGEST_MANIFEST))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise damaged(folder, in_one_line(error)) from error


@dataclass(frozen=True)
class Mapped:
    """A stream's rows, memory-mapped."""

    stream: Stream
    rows: np.ndarray

    def get(self, rows: np.ndarray, device: torch.device) -> Columns:
        """float32 [B, *shape] for row numbers [B]; several by name where the stream has parts."""
        return self.stream.unpacked(self.rows[rows], device)


@dataclass(frozen=True)
class TeacherCache:
    """Called with a batch it gives what the teacher gave for these samples through this view, in float32."""

    logits: Mapped
    taps: Mapping[str, Mapped]
    row_of: Tensor  # position in the source data set -> row of a view, -1 where there is none
    reading: Any = None  # of the teacher's prediction, see `Outputs.reading`

    @property
    def shapes(self) -> Shapes:
        """As a probe of the teacher would find them."""
        taps = {name: TapShape(tap.stream.kind, tap.stream.shape) for name, tap in self.taps.items() if tap.stream.kind != "prediction"}
        return Shapes(self.logits.stream.parts or self.logits.stream.shape, taps, self.reading)

    def __call__(self, batch: Batch) -> Outputs:
        rows = self._rows(batch.index, batch.view)
        device = batch.index.device
        maps = {name: single(tap.get(rows, device), "") for name, tap in self.taps.items()}
        return Outputs(self.logits.get(rows, device), maps, reading=self.reading)

    def _rows(self, index: Tensor, view: int) -> np.ndarray:
        rows = self.row_of[index.cpu()]
        if view >= self.logits.stream.views or bool((rows < 0).any()):
            raise RunFailed(
                f"the teacher cache has no view {view} of some of these samples; kdbench cache prune makes the next run build it"
            )
        return (rows + view * self.logits.stream.images).numpy()


def open_cache(folder: Path, taps: Sequence[str] = ()) -> TeacherCache | None:
    """Map what is cached of the logits and of these taps; None where one of them is not there.

    Cheap: sizes and manifests are checked, not checksums. Raises RunFailed, naming the folder, where it is damaged.
    """
    entry = read_entry(folder)
    mapped = {name: _mapped(folder, name) for name in streams_of(taps)}
    there = {name: stream for name, stream in mapped.items() if stream is not None}
    if entry is None or len(there) < len(mapped):
        return None
    return TeacherCache(there[LOGITS], {tap: there[tap_stream(tap)] for tap in taps}, row_of(folder, entry))


def cached_test(folder: Path) -> Columns | None:
    """What the task keeps of the teacher's predictions for the clean test part, float32 [M, ...] in its order; None where it is not."""
    test = _mapped(folder, TEST) if read_entry(folder) is not None else None
    return test.get(np.arange(test.stream.rows), torch.device("cpu")) if test is not None else None


def _mapped(folder: Path, name: str) -> Mapped | None:
    files = StreamFiles(folder, name)
    rows, manifest = files.open(), files.read()
    return Mapped(manifest.stream, rows) if rows is not None and manifest is not None else None


def row_of(folder: Path, entry: EntryFacts) -> Tensor:
    """Position in the source data set -> row of a view, from index.npy. Raises RunFailed where that is not what was written."""
    try:
        with open_regular(folder / "index.npy") as file:
            index = np.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(folder, in_one_line(error)) from error
    if index_hash(index) != entry.index:
        raise damaged(folder, "index.npy is not what was written")
    rows = torch.full((int(index.max()) + 1,), -1, dtype=torch.int64)
    rows[torch.from_numpy(index)] = torch.arange(len(index))
    return rows


def index_hash(index: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(index).data).hexdigest()


def entry_text(spec: CacheSpec, index: np.ndarray) -> str:
    """entry.json of a new entry."""
    teacher, data = spec.teacher.model.label, build_task(spec.task).data_name
    entry = EntryFacts(facts=spec.facts, teacher=teacher, data=data, images=len(index), index=index_hash(index))
    return json.dumps(entry.model_dump(mode="json"), indent=1)
