"""Several workers on one training: Ray Train starts them, DDP joins their gradients, and each runs the one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdbench.distributed.cluster import quiet, resources_of, share_of, talk_on_rays_network
from kdbench.distributed.storage import ray_storage
from kdbench.experiment import Runtime, Unit, WorkerRange
from kdbench.storage.layout import Layout
from kdbench.training.checkpoint import load_checkpoint, save_checkpoint
from kdbench.training.session import State
from kdbench.training.work import (
    DEATHS,
    ENDING,
    EPOCH,
    attempt,
    given_up,
    pack_death,
    pack_ending,
    pack_epoch,
    pack_resumed,
    unpack_ending,
    unpack_epoch,
)

# How often a training whose workers may be more or fewer looks whether the cluster has room for more.
RESIZE_SECONDS = 60.0


class RaySession:
    """One worker of a Ray Train group. Rank 0 keeps the checkpoint, as a file that the next attempt finds by the unit's key."""

    def __init__(self, checkpoint: Path, threads: int, gpus: float) -> None:
        """gpus: how many are reserved for this worker. Without one, Ray Train would name the first GPU that torch sees."""
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device() if gpus else torch.device("cpu")
        self.threads = threads
        self.checkpoint = checkpoint

    def prepare(self, module: nn.Module) -> nn.Module:
        import ray.train.torch

        return ray.train.torch.prepare_model(module, move_to_device=self.device)

    def without_exchange(self, module: nn.Module) -> AbstractContextManager[None]:
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def report(self, metrics: Mapping[str, float], state: Callable[[], State] | None) -> None:
        import ray.train

        if state is not None and self.rank == 0:
            save_checkpoint(state(), self.checkpoint)
        if metrics:
            ray.train.report(pack_epoch(metrics))

    def resume(self) -> State | None:
        return load_checkpoint(self.checkpoint)

    def resumed(self, place: str) -> None:
        import ray.train

        ray.train.report(pack_resumed(place))

    def gather(self, rows: Tensor) -> Tensor:
        return gathered(rows)

    def lost_peer(self, error: Exception) -> bool:
        return lost_peer(error)


def gathered(rows: Tensor) -> Tensor:
    """All workers' rows (equal numbers of them) in rank order, without gradients."""
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def lost_peer(error: Exception) -> bool:
    """Whether an exchange failed as another worker is gone. gloo says so in a plain RuntimeError."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class WorkerFailed(Exception):
    """One worker could not go on. Its message is the packed Ending, which is how it reaches the process that started the workers."""


def train_worker(config: dict[str, Any]) -> None:
    """What every worker of a TorchTrainer runs; the last report carries how it ended.

    A worker that can't go on raises, which ends the others too: they would wait for its gradients.
    """
    import ray.train

    unit, layout = Unit.model_validate_json(config["unit"]), Layout.at(config["results"])
    checkpoint = layout.checkpoint(unit.experiment, unit.key)
    ending = pack_ending(attempt(unit, RaySession(checkpoint, config["threads"], config["gpus"]), layout))
    if unpack_ending(ending).record is None:
        raise WorkerFailed(ending[ENDING])
    ray.train.report(ending)


def train_with_workers(unit: Unit, runtime: Runtime, layout: Layout, storage: str) -> None:
    """Run inside a Tune trial: a worker group for this unit, its reports passed on to Tune.

    Train begins a group again where a worker died, with as many workers as there is room for where their number is a range.
    """
    quiet()  # on another node than the driver's nobody has
    import ray.train
    from ray import tune
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    workers = unit.workers
    reports = Queue(1, actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "unit": unit.model_dump_json(),
            "results": layout.location,
            "threads": runtime.cpus_per_worker,
            "gpus": share_of(runtime),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.min, workers.max) if isinstance(workers, WorkerRange) else workers,  # type: ignore[arg-type]
            use_gpu=share_of(runtime) > 0,
            resources_per_worker=resources_of(runtime),
            placement_strategy=runtime.placement.upper(),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,  # type: ignore[call-arg]
        ),
        torch_config=_network(),
        run_config=ray.train.RunConfig(
            **ray_storage(storage),
            failure_config=ray.train.FailureConfig(max_failures=-1),  # the callback counts
            callbacks=[_to_tune(unit.title, reports)],
            logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),  # type: ignore[call-arg]
        ),
    )
    fitted: Future[None] = Future()
    Thread(target=_fit, args=(trainer, reports, fitted), daemon=True).start()
    try:
        while (metrics := reports.get()) is not None:
            tune.report(metrics)
    finally:
        wait([fitted])  # for ever where Tune stopped the trial: it then ends this process, and Train with it
    reports.shutdown()
    try:
        fitted.result()
    except ray.train.ControllerError as error:
        if not isinstance(error.controller_failure, WorkerFailed):
            raise
        tune.report({ENDING: str(error.controller_failure)})


def _fit(trainer: Any, reports: Any, fitted: Future[None]) -> None:
    """Train, in a thread of its own. None in the queue says that no further report comes."""
    try:
        trainer.fit()
    except BaseException as error:
        fitted.set_exception(error)
    else:
        fitted.set_result(None)
    reports.put(None)


def _network() -> Any:
    """How Ray Train joins the workers, on the network that Ray itself uses."""
    from ray.train.torch import TorchConfig

    backend: Any = TorchConfig().backend_cls

    class OnRaysNetwork(backend):  # type: ignore[misc]  # Ray has no public name for its base
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(talk_on_rays_network)
            super().on_start(worker_group, backend_config)

    class Network(TorchConfig):
        backend_cls = OnRaysNetwork

    return Network()


def _to_tune(title: str, reports: Any) -> Any:
    """A callback of Ray Train that queues reports for the trial, and says what is to be done when workers end with an exception.

    Ray's own way, TuneReportCallback, has a second thread of the trial report to Tune: where both report at once, as they may do at the
    end of every training, neither returns (Ray 2.60).
    """
    import ray.train

    class ToTune(ray.train.UserCallback):
        """Runs in Train's controller. What it raises ends the training; else Train begins the group again."""

        def __init__(self) -> None:
            self.deaths, self.epochs = 0, 0.0

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if EPOCH in metrics[0] and (epoch := unpack_epoch(metrics[0])["epoch"]) > self.epochs:
                self.deaths, self.epochs = 0, epoch
            reports.put(metrics[0])

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            told = [failure for failure in worker_exceptions.values() if isinstance(failure, WorkerFailed)]
            if told:
                raise told[0]
            self.deaths += 1
            if self.deaths == DEATHS:
                raise WorkerFailed(pack_ending(given_up(title, "workers"))[ENDING])
            reports.put(pack_death())

    return ToTune()
