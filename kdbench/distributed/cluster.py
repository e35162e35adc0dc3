"""Ray's start and end: once per command, quiet, on loopback unless an address says otherwise."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kdbench.errors import RunFailed, UserError
from kdbench.experiment import Runtime

# Set before Ray is imported; what the user has set stays.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_AUTH_MODE": "token",
    # What Ray gives to Prometheus it gives to anybody, on all interfaces: not collected, and two servers on ports that there are not.
    "RAY_enable_metrics_collection": "0",
    "DASHBOARD_METRIC_PORT": "-1",
    "AUTOSCALER_METRIC_PORT": "-1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # report() blocks on this poll: 2 s by default
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a path in an experiment means the same in a trial as on the command line
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing a task",  # half a page; what it means is said by ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # or Ctrl-C makes fit() return as if all were well
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# Nothing travels through the object store: units are small, data and caches are files.
_OBJECT_STORE_BYTES = 256 * 2**20
_LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass(frozen=True)
class Slots:
    """How many trainings run at once, and what Tune reserves for each trial's own process."""

    concurrent: int
    trial_resources: dict[str, float]


def needed_cpus(runtime: Runtime) -> int:
    return runtime.workers * runtime.cpus_per_worker


def check_fits_here(runtime: Runtime) -> None:
    """Raises UserError where this machine, without a cluster, can't hold one training."""
    if runtime.address is not None:
        return
    cpus = available_cpus()
    if needed_cpus(runtime) > cpus:
        raise UserError(
            f"runtime.workers: {runtime.workers} workers of {runtime.cpus_per_worker} CPU need {needed_cpus(runtime)} CPUs, "
            f"this machine has {cpus}; use at most {max(1, cpus // runtime.cpus_per_worker)}, or name a cluster with runtime.address"
        )
    if runtime.gpus_per_worker > 0:
        import torch

        if runtime.workers * runtime.gpus_per_worker > torch.cuda.device_count():
            raise UserError(
                f"runtime.gpus_per_worker: {runtime.workers} workers need {runtime.workers * runtime.gpus_per_worker:g} GPUs, "
                f"this machine has {torch.cuda.device_count()}; use gpus_per_worker: 0 to train on CPUs"
            )


def available_cpus() -> int:
    """CPUs that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet() -> None:
    """Set Ray's environment, before anything imports Ray. What the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def started(runtime: Runtime) -> Iterator[Slots]:
    """Ray, running: a private one on this machine, or the cluster at `runtime.address`. What was running before is left running."""
    quiet()
    with _on_loopback(runtime.address is None):
        import ray

        mine = not ray.is_initialized()
        if mine:
            _init(runtime)
    try:
        yield slots_of(runtime, _here() if runtime.address is None else ray.cluster_resources())
    finally:
        if mine:
            ray.shutdown()


def _init(runtime: Runtime) -> None:
    """Raises RunFailed where Ray does not start, or there is none at the address."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if runtime.address is None:
        options |= {
            "address": "local",  # else Ray joins a head that happens to run on this machine
            "num_cpus": available_cpus(),
            "resources": {"trial_slot": slots_of(runtime, _here()).concurrent},
            "include_dashboard": runtime.workers > 1,  # without it Ray Train logs an error a second
            "dashboard_host": "127.0.0.1",
            "_node_ip_address": "127.0.0.1",
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    else:
        options["address"] = runtime.address
    try:
        with _own_sigterm():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunFailed(f"Ray could not be started or reached: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _on_loopback(private: bool) -> Iterator[None]:
    """Have all of a private Ray listen on loopback alone, as Ray does by itself where a firewall would ask its user.

    The switch is read when Ray is imported, and by the processes that it starts. It is put back: with it no node could join a cluster.
    """
    before = os.environ.get(_LOOPBACK_SWITCH)
    if private:
        os.environ[_LOOPBACK_SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_LOOPBACK_SWITCH, None)
        else:
            os.environ[_LOOPBACK_SWITCH] = before


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep Ray from taking SIGTERM over for good: its handler exits at once, with nothing said or closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as terminated:
        raise KeyboardInterrupt from terminated
    finally:
        signal.signal(signal.SIGTERM, before)


def _here() -> dict[str, float]:
    """CPUs and GPUs of this machine, under Ray's names."""
    import torch

    return {"CPU": available_cpus(), "GPU": torch.cuda.device_count()}


def slots_of(runtime: Runtime, has: Mapping[str, float]) -> Slots:
    """How many trainings run at once on what there is (`CPU`, `GPU`), unless the experiment says it, and what each holds.

    One worker: the trial's process is the worker, and reserves its CPUs.

    Several: the trial only waits for them, and holds a slot instead of a CPU, or trials would keep each other's workers from starting.
    """
    fit = int(has.get("CPU", 1) // needed_cpus(runtime))
    if runtime.gpus_per_worker:
        fit = min(fit, int(has.get("GPU", 0) / (runtime.workers * runtime.gpus_per_worker)))
    fit = max(1, fit)
    # A cluster may grow: there `concurrent` may ask for more than it holds now.
    concurrent = min(runtime.concurrent or fit, fit) if runtime.address is None else runtime.concurrent or fit
    if runtime.workers > 1:
        return Slots(concurrent, {"trial_slot": 1} if runtime.address is None else {"CPU": 0.01})
    resources: dict[str, float] = {"CPU": runtime.cpus_per_worker}
    if runtime.gpus_per_worker:
        resources["GPU"] = runtime.gpus_per_worker
    return Slots(concurrent, resources)
