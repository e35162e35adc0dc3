"""The random numbers of a training: those of torch, NumPy and Python, and a generator for the method.

Rank 0 draws from streams that begin with the unit's seed and go on through the whole training; a checkpoint keeps where they are. A higher
rank begins its own anew at each step: they follow from (seed, step, rank), so nothing of them has to be kept, and any number of workers can
go on with a training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kdbench.data.hashing import hash64
from kdbench.models.trace import generators_kept

# Method generators get a stream of their own, so that a method's randomness never shifts the student's initial weights.
_METHOD_STREAM = 0x5EED
_STAGE_STREAM = 0x57A6E


def begin_streams(seed: int) -> torch.Generator:
    """Begin the streams that every rank builds its networks with, the same on all; returns the method's generator, on the CPU."""
    _seed_process(seed)
    return torch.Generator().manual_seed(seed ^ _METHOD_STREAM)


def begin_step(seed: int, step: int, rank: int, method: torch.Generator | None) -> None:
    """Give a higher rank the streams of one optimizer step; rank 0 goes on with its own.

    method: the method's generator; None where all ranks must draw the same from it, as they compute its loss from the joined batch.
    """
    if rank == 0:
        return
    drawn = int(hash64(seed, step, rank))
    _seed_process(drawn)
    if method is not None:
        method.manual_seed(drawn ^ _METHOD_STREAM)


@contextmanager
def stage_streams(seed: int, stage: int, method: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """The streams that a stage begins with, the same on all ranks and again after a kill; afterwards all are what they were."""
    before = method.get_state() if method is not None else None
    with generators_kept(device):
        drawn = int(hash64(seed, stage, _STAGE_STREAM))
        _seed_process(drawn)
        if method is not None:
            method.manual_seed(drawn ^ _METHOD_STREAM)
        try:
            yield
        finally:
            if method is not None and before is not None:
                method.set_state(before)


def _seed_process(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - a network or a method of a user's may draw from it


def streams(device: torch.device, method: torch.Generator) -> dict[str, Any]:
    """Where this process's streams are, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "random": torch.get_rng_state(),
        "random_device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "random_method": method.get_state(),
        "random_python": random.getstate(),
        "random_numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
    }


def restore_streams(state: dict[str, Any], device: torch.device, method: torch.Generator) -> None:
    """Go on where `streams` said; in a checkpoint of an older version those of NumPy and Python are missing, and stay as they are."""
    torch.set_rng_state(state["random"])
    if state["random_device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["random_device"], device)
    method.set_state(state["random_method"])
    if "random_python" in state:
        random.setstate(state["random_python"])
    if "random_numpy" in state:
        name, keys, *rest = state["random_numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
