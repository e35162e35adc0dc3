"""A teacher's cache filled by Ray: writers on all nodes, each with the teacher loaded once, take piece after piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kdbench.distributed.cluster import decided, nodes_of, resources_of, workers_on
from kdbench.errors import KDBenchError, RunFailed
from kdbench.experiment import Runtime
from kdbench.storage.address import is_address
from kdbench.storage.layout import Layout
from kdbench.training.cache.build import Builder, Piece, Plan
from kdbench.training.cache.outputs import CacheSpec
from kdbench.training.cache.streams import Stream
from kdbench.training.session import device_for
from kdbench.training.teacher import teacher_here

# Starting Ray's processes takes about ten seconds, so that a build must be long before several of them end sooner than one.
LONG_SECONDS = 60.0
_RETRIES = 2  # deaths for each writer without a shard in between, after which the build is given up; what they had finished stays


def worth_ray(runtime: Runtime, plan: Plan, seconds: float, started_anyway: bool) -> bool:
    """Whether Ray should write it: always on a cluster; on one machine where it is long, several writers fit and Ray is used after it."""
    if len(plan.pieces) < 2:
        return False
    return runtime.address is not None or (started_anyway and seconds > LONG_SECONDS and _fit(runtime) > 1)


def write_with_ray(builder: Builder, plan: Plan, runtime: Runtime) -> Iterator[int]:
    """Write all pieces on Ray, which is running, yielding how many images after each piece.

    Raises what a writer raised (DiskFull, say), or RunFailed where writers keep dying.
    """
    import ray

    count, reserved = min(len(plan.pieces), _fit(runtime)), resources_of(decided(runtime, nodes_of(runtime)))
    kind: Any = ray.remote(_Writer).options(num_cpus=reserved["CPU"], num_gpus=reserved.get("GPU", 0))
    layout = Layout(builder.folder.parents[1])
    # The folder is only this machine's where results are at an address: rows then come back here, and the store gets the entry from here.
    apart = runtime.address is not None and is_address(layout.location)
    streams = {stream.name: stream for stream in plan.streams} if apart else None
    given = (builder.spec.model_dump_json(), str(builder.folder), layout.location, runtime.cpus_per_worker, reserved.get("GPU", 0), streams)
    # Who does what. A writer gets pieces once it runs, so that one that other jobs leave no room for holds up nobody, and ends when nothing
    # refers to it any more, which leaves its place to one that takes over from a lost node. Killed, it would leave Ray with complaints.
    busy: dict[Any, tuple[Any, Piece | None]] = {
        writer.ready.remote(): (writer, None) for writer in (kind.remote(*given) for _ in range(count))
    }
    todo, left, deaths = deque(plan.pieces), len(plan.pieces), 0
    while left:
        (ready,), _ = ray.wait(list(busy), num_returns=1)
        writer, piece = busy.pop(ready)
        try:
            rows = ray.get(ready)
        except ray.exceptions.RayActorError as error:
            # Not Ray's own retries: these are used up within a second, before Ray knows that a node is gone.
            deaths += 1
            if deaths > _RETRIES * count:
                raise RunFailed(
                    f"{deaths} processes that wrote the teacher's outputs died; is there enough memory? The same command goes on"
                ) from error
            if piece is not None:
                todo.append(piece)
            writer = kind.remote(*given)
            busy[writer.ready.remote()] = writer, None
            continue
        if isinstance(rows, KDBenchError):
            raise rows
        if todo:
            following = todo.popleft()
            busy[writer.write.remote(following)] = writer, following
        del writer, ready
        if piece is not None:
            if rows:
                builder.put(piece, rows)
            left, deaths = left - 1, 0
            yield piece.images


class _Writer:
    """A Ray actor: one process that holds the teacher. A mistake is returned, as Ray would wrap what is raised in a traceback."""

    def __init__(self, spec: str, folder: str, results: str, threads: int, gpus: float, streams: Mapping[str, Stream] | None) -> None:
        """gpus: reserved for this process. streams: the plan's, where the rows have to be handed back; None where this process writes."""
        torch.set_num_threads(threads)
        of = CacheSpec.model_validate_json(spec)
        of = of.model_copy(update={"teacher": teacher_here(of.teacher, Layout.at(results))})
        self._builder, self._streams = Builder(of, Path(folder), device_for(gpus)), streams

    def ready(self) -> None:
        pass

    def write(self, piece: Piece) -> dict[str, bytes] | KDBenchError | None:
        """The rows, or None where they are written."""
        try:
            if self._streams is not None:
                return self._builder.predicted(piece, self._streams)
            for _ in self._builder.write(piece):
                pass
            return None
        except KDBenchError as error:
            return error


def _fit(runtime: Runtime) -> int:
    """How many writers there is room for; each reserves what one worker of a training does."""
    nodes = nodes_of(runtime)
    return max(1, sum(workers_on(node, decided(runtime, nodes)) for node in nodes))
