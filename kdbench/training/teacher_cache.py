"""Teacher outputs computed once for a whole sweep: memory-mapped, one copy for all trials and workers of a node.

An entry is a folder named by what decides its content (teacher's weights, data, views, precision), written under a temporary name
and renamed when whole, so that a stale or half-written entry can't be read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.data.loader import in_order, view_batches
from kdbench.errors import RunFailed, in_one_line, not_written
from kdbench.experiment import Recipe, TeacherRef, content_hash
from kdbench.models.inputs import model_inputs
from kdbench.models.outputs import Outputs
from kdbench.tasks.base import Splits
from kdbench.training.precision import autocast, images_for

FORMAT_VERSION = 1


def cache_key(teacher: TeacherRef, splits: Splits, recipe: Recipe, data_seed: int) -> str:
    """What decides a cached teacher's outputs; two entries with one key are the same."""
    return content_hash(
        {
            "format": FORMAT_VERSION,
            "teacher": teacher.sha,
            "precision": teacher.precision,
            "split": splits.hash,
            "data": splits.data_hash,
            "augment": recipe.augment.model_dump(),
            "views": view_count(recipe),
            "data_seed": data_seed,
        }
    )


def view_count(recipe: Recipe) -> int | None:
    """How many different copies of an image training sees; None where every epoch has a fresh one and nothing can be cached."""
    return 1 if recipe.augment.none else recipe.views


@dataclass(frozen=True)
class TeacherCache:
    """Reads an entry: predictions for (index, view) of the transfer part, and for the clean test part."""

    views: np.ndarray  # float16 [K * N, ...], view after view, memory-mapped
    test: np.ndarray  # float16 [M, ...], memory-mapped
    rows: int  # N, the samples of the transfer part
    row_of: Tensor  # position in the source data set -> row of a view, -1 where there is none

    @property
    def prediction_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.views.shape[1:]

    def get(self, index: Tensor, view: int) -> Tensor:
        """Teacher predictions [B, ...] float32 for the samples at `index` [B] seen through `view`."""
        rows = view * self.rows + self.row_of[index.cpu()]
        return torch.from_numpy(self.views[rows.numpy()].astype(np.float32))

    def __call__(self, batch: Batch) -> Outputs:
        return Outputs(self.get(batch.index, batch.view).to(batch.inputs.device, non_blocking=True))


def open_cache(folder: Path) -> TeacherCache:
    """Map a finished entry. Raises RunFailed, naming the folder, where it is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        views, test, index = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("views", "test", "index"))
        whole = [list(views.shape), list(test.shape)] == [manifest["views"], manifest["test"]]
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise RunFailed(f"the teacher cache {folder} can't be read ({in_one_line(error)})") from error
    if not whole:
        raise RunFailed(f"the teacher cache {folder} is damaged: its files are not of the size that they were written with")
    row_of = torch.full((int(index.max()) + 1,), -1, dtype=torch.int64)
    row_of[torch.from_numpy(np.array(index))] = torch.arange(len(index))
    return TeacherCache(views, test, len(index), row_of)


def build_cache(
    folder: Path, teacher: torch.nn.Module, ref: TeacherRef, splits: Splits, recipe: Recipe, data_seed: int, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Write the entry, yielding (images done, images in all) as it goes. A folder that is there already is left alone."""
    count = view_count(recipe)
    assert count is not None, "a fresh view each epoch can't be cached"
    total = count * len(splits.transfer) + len(splits.test)
    if folder.exists():
        yield total, total
        return
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir(parents=True)
        yield from _write_entry(scratch, teacher, ref, splits, recipe, data_seed, device, count, total)
        scratch.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another process finished the same entry first
            raise not_written(error, folder) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_entry(
    scratch: Path,
    teacher: torch.nn.Module,
    ref: TeacherRef,
    splits: Splits,
    recipe: Recipe,
    data_seed: int,
    device: torch.device,
    views: int,
    total: int,
) -> Iterator[tuple[int, int]]:
    done = 0
    shapes: dict[str, list[int]] = {}
    passes = {
        "views": [view_batches(splits.transfer, view, recipe.augment, data_seed, 256, device) for view in range(views)],
        "test": [in_order(splits.test, 256, device)],
    }
    sizes = {"views": views * len(splits.transfer), "test": len(splits.test)}
    for name, rounds in passes.items():
        # Written, not mapped: a disk that fills up is then an error of the write, and not a signal that kills the process.
        with (scratch / f"{name}.npy").open("wb") as file:
            for batch in chain.from_iterable(rounds):
                prediction = _predict(teacher, batch, ref.precision, device)
                if name not in shapes:
                    shapes[name] = [sizes[name], *prediction.shape[1:]]
                    header = {"descr": prediction.dtype.str, "fortran_order": False, "shape": tuple(shapes[name])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(prediction.tobytes())
                done += len(batch)
                yield done, total
            file.flush()
            os.fsync(file.fileno())
    np.save(scratch / "index.npy", splits.transfer.index.numpy())
    (scratch / "manifest.json").write_text(json.dumps({"format": FORMAT_VERSION, "teacher": ref.sha, **shapes}))


@torch.no_grad()
def _predict(teacher: torch.nn.Module, batch: Batch, precision: str, device: torch.device) -> np.ndarray:
    with autocast(precision, device):
        return teacher(model_inputs(teacher, images_for(batch.inputs, precision))).half().cpu().numpy()
