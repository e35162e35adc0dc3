"""Several workers on one training: Ray Train starts them, DDP joins their gradients, and each runs the one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdbench.distributed.storage import ray_storage
from kdbench.experiment import Runtime, Unit
from kdbench.results.layout import Layout
from kdbench.training.checkpoint import load_checkpoint, save_checkpoint
from kdbench.training.session import State
from kdbench.training.work import ENDING, attempt, pack_ending, pack_epoch, unpack_ending


class RaySession:
    """One worker of a Ray Train group. Rank 0 keeps the checkpoint, as a file that the next attempt finds by the unit's key."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.threads = threads
        self.checkpoint = checkpoint

    def prepare(self, module: nn.Module) -> nn.Module:
        import ray.train.torch

        return ray.train.torch.prepare_model(module)

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def report(self, metrics: Mapping[str, float], state: Callable[[], State] | None) -> None:
        import ray.train

        if state is not None and self.rank == 0:
            save_checkpoint(state(), self.checkpoint)
        ray.train.report(pack_epoch(metrics))

    def resume(self) -> State | None:
        return load_checkpoint(self.checkpoint)

    def gather(self, rows: Tensor) -> Tensor:
        return gathered(rows)


def gathered(rows: Tensor) -> Tensor:
    """All workers' rows (equal numbers of them) in rank order, without gradients."""
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class WorkerFailed(Exception):
    """One worker could not go on. Its message is the packed Ending, which is how it reaches the process that started the workers."""


def train_worker(config: dict[str, Any]) -> None:
    """What every worker of a TorchTrainer runs; the last report carries how it ended.

    A worker that can't go on raises, which ends the others too: they would wait for its gradients.
    """
    import ray.train

    unit, layout = Unit.model_validate_json(config["unit"]), Layout.at(config["results"])
    checkpoint = layout.checkpoint(unit.experiment, unit.key)
    ending = pack_ending(attempt(unit, RaySession(checkpoint, config["threads"]), layout))
    if unpack_ending(ending).record is None:
        raise WorkerFailed(ending[ENDING])
    ray.train.report(ending)


def train_with_workers(unit: Unit, runtime: Runtime, layout: Layout, storage: str) -> None:
    """Run inside a Tune trial: a worker group for this unit, its reports passed on to Tune, which repeats it where a worker died."""
    import ray.train
    from ray import tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    resources: dict[str, float] = {"CPU": runtime.cpus_per_worker}
    if runtime.gpus_per_worker:
        resources["GPU"] = runtime.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"unit": unit.model_dump_json(), "results": layout.location, "threads": runtime.cpus_per_worker},
        scaling_config=ray.train.ScalingConfig(
            num_workers=runtime.workers, use_gpu=runtime.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            **ray_storage(storage),
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        told = [str(failure) for failure in error.worker_failures.values() if isinstance(failure, WorkerFailed)]
        if not told:  # they died without a word: Tune tries again
            raise
        tune.report({ENDING: told[0]})
