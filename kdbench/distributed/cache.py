"""A teacher's cache filled by Ray: writers on all nodes, each with the teacher loaded once, take piece after piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kdbench.distributed.cluster import available_cpus
from kdbench.errors import KDBenchError, RunFailed
from kdbench.experiment import Runtime
from kdbench.results.address import is_address
from kdbench.results.layout import Layout
from kdbench.training.cache_build import Builder, Piece, Plan
from kdbench.training.cache_streams import Stream
from kdbench.training.session import LocalSession
from kdbench.training.teacher import teacher_here
from kdbench.training.teacher_cache import CacheSpec

# Starting Ray's processes takes about ten seconds, so that a build must be long before several of them end sooner than one.
LONG_SECONDS = 60.0
_RETRIES = 2  # of a writer whose process died; what it had finished stays


def worth_ray(runtime: Runtime, plan: Plan, seconds: float, started_anyway: bool) -> bool:
    """Whether Ray should write it: always on a cluster; on one machine where it is long, several writers fit and Ray is used after it."""
    if len(plan.pieces) < 2:
        return False
    return runtime.address is not None or (started_anyway and seconds > LONG_SECONDS and _fit_here(runtime) > 1)


def write_with_ray(builder: Builder, plan: Plan, runtime: Runtime) -> Iterator[int]:
    """Write all pieces on Ray, which is running, yielding how many images after each piece.

    Raises what a writer raised (DiskFull, say), or RunFailed where writers keep dying.
    """
    import ray

    count = min(len(plan.pieces), _fit_here(runtime) if runtime.address is None else _fit_on_cluster(runtime))
    kind: Any = ray.remote(_Writer).options(
        num_cpus=runtime.cpus_per_worker, num_gpus=runtime.gpus_per_worker, max_restarts=_RETRIES, max_task_retries=_RETRIES
    )
    layout = Layout(builder.folder.parents[1])
    # The folder is only this machine's where results are at an address: rows then come back here, and the store gets the entry from here.
    apart = runtime.address is not None and is_address(layout.location)
    streams = {stream.name: stream for stream in plan.streams} if apart else None
    given = (builder.spec.model_dump_json(), str(builder.folder), layout.location, runtime.cpus_per_worker, streams)
    # They end when nothing refers to them any more. Killed, they would leave Ray with tasks to complain of.
    writers: list[Any] = [kind.remote(*given) for _ in range(count)]
    # A writer gets pieces once it runs: one that other jobs on the cluster leave no room for holds up nobody.
    busy: dict[Any, tuple[Any, Piece | None]] = {writer.ready.remote(): (writer, None) for writer in writers}
    todo, left = deque(plan.pieces), len(plan.pieces)
    try:
        while left:
            (ready,), _ = ray.wait(list(busy), num_returns=1)
            (writer, piece), rows = busy.pop(ready), ray.get(ready)
            if isinstance(rows, KDBenchError):
                raise rows
            if todo:
                following = todo.popleft()
                busy[writer.write.remote(following)] = writer, following
            if piece is not None:
                if rows:
                    builder.put(piece, rows)
                left -= 1
                yield piece.images
    except ray.exceptions.RayActorError as error:
        raise RunFailed(
            f"a process that wrote the teacher's outputs died {_RETRIES + 1} times; is there enough memory? The same command goes on"
        ) from error


class _Writer:
    """A Ray actor: one process that holds the teacher. A mistake is returned, as Ray would wrap what is raised in a traceback."""

    def __init__(self, spec: str, folder: str, results: str, threads: int, streams: Mapping[str, Stream] | None) -> None:
        """streams: those of the plan, where the rows have to be handed back; None where this process can write to the folder."""
        torch.set_num_threads(threads)
        of = CacheSpec.model_validate_json(spec)
        of = of.model_copy(update={"teacher": teacher_here(of.teacher, Layout.at(results))})
        self._builder, self._streams = Builder(of, Path(folder), LocalSession().device), streams

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


def _fit_here(runtime: Runtime) -> int:
    return _fit({"CPU": available_cpus(), "GPU": torch.cuda.device_count()}, runtime)


def _fit_on_cluster(runtime: Runtime) -> int:
    import ray

    return max(1, sum(_fit(node["Resources"], runtime) for node in ray.nodes() if node["Alive"]))


def _fit(resources: dict[str, float], runtime: Runtime) -> int:
    """How many writers fit on a node; each reserves what one worker of a training does."""
    cpus = resources.get("CPU", 0) // runtime.cpus_per_worker
    gpus = resources.get("GPU", 0) // runtime.gpus_per_worker if runtime.gpus_per_worker else cpus
    return int(min(cpus, gpus))
