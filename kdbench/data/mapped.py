"""A data set's pixels as files that every process of a machine maps: one copy in memory, however many trainings look at it.

The process that starts a run opens and checks the data and writes them down; the processes that train map what it wrote.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdbench.data import sources
from kdbench.data.batch import Part
from kdbench.data.sources import Source
from kdbench.errors import not_written

_FACTS = "source.json"
_PARTS = ("train", "test")
_TENSORS = ("inputs", "target", "index")


def write_mapped(source: Source, root: Path) -> Path | None:
    """Write what `adopt` maps below `root`, once for each content; returns the folder.

    None for images in files, which nobody holds in memory, and for a source that no name leads to. Raises DiskFull where there is no room.
    """
    if source.made_by is None or not all(isinstance(part.inputs, Tensor) for part in (source.train, source.test)):
        return None
    folder = root / source.sha256
    if (folder / _FACTS).exists():
        return folder
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir(parents=True)
        for name in _PARTS:
            part: Part = getattr(source, name)
            for tensor in _TENSORS:
                np.save(scratch / f"{name}-{tensor}.npy", getattr(part, tensor).numpy())
        (scratch / _FACTS).write_text(json.dumps(_facts(source)))
        scratch.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another process wrote the same data first
            raise not_written(error, folder) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def adopt(folder: Path) -> None:
    """Let `open_source` give the mapped data wherever it would make them anew. Nothing happens where the folder is gone."""
    try:
        facts: dict[str, Any] = json.loads((folder / _FACTS).read_text())
        if tuple(facts["made_by"]) in sources.MAPPED:  # by an earlier training of this process
            return
        facts |= {name: _mapped(folder, name) for name in _PARTS}
    except FileNotFoundError:
        return
    sha = facts.pop("sha256")
    known: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    source = Source(**known)
    source.__dict__["sha256"] = sha  # known from who wrote it; hashing would read all of the data in every process
    assert source.made_by is not None
    sources.MAPPED[source.made_by] = source


def _facts(source: Source) -> dict[str, Any]:
    keys = ("name", "num_classes", "class_names", "mean", "std", "ignore_index", "made_by", "sha256")
    return {key: getattr(source, key) for key in keys}


def _mapped(folder: Path, name: str) -> Part:
    # Copy-on-write, as torch warns of memory that it must not write to; nobody does write to it.
    inputs, target, index = (torch.from_numpy(np.load(folder / f"{name}-{tensor}.npy", mmap_mode="c")) for tensor in _TENSORS)
    return Part(inputs, target, index)
