"""Ray's start and end: once per command, quiet, on loopback unless an address says otherwise."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import signal
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdbench.account import home_is_writable
from kdbench.errors import RunFailed, UserError, printable
from kdbench.experiment import Runtime, worker_bounds
from kdbench.own_code import trust_environment

if TYPE_CHECKING:
    import torch

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
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # for a place, not for processes; then Train looks again how many workers fit
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a path in an experiment means the same in a trial as on the command line
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Half a page each; what they mean is said by ours.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing a task|The node with node id|Raylet is terminated",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",  # the queue counts deaths, of whatever cause, and Tune has to tell it of each
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # or Ctrl-C makes fit() return as if all were well
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_WARN_THRESHOLD_S": "60",  # what takes long is a storage or MLflow, and not that reports come too often
}
# Nothing travels through the object store: units are small, data and caches are files.
_OBJECT_STORE_BYTES = 256 * 2**20
_LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# What a trial holds that only waits for its workers: memory, which every node has, and about what its process takes. A share of a CPU,
# however small, would keep a worker that needs a whole one from its place.
_WAITING_TRIAL: dict[str, float] = {"memory": 512 * 2**20}


_SIOCGIFADDR = 0x8915  # Linux: the address of an interface, from netdevice(7)
_HEAD_SECONDS = 3.0  # between two looks at whether the head of a cluster is there
log = logging.getLogger(__name__)

# Ray 2.60 puts its longest socket below the temporary folder at a path like this one; sockaddr_un holds 108 bytes with the last one 0.
_SOCKET_PATH = "/ray/session_2026-11-29_01-14-45_123456_1234567/sockets/plasma_store"
_SOCKET_BYTES = 107


@dataclass(frozen=True)
class Slots:
    """How many trainings run at once, and what Tune reserves for each trial's own process.

    now: of these, how many there is room for at this moment.
    gpus: how many GPUs each worker gets, or which share of one.
    short: why not even one training can start before the cluster grows; empty where one can.
    """

    concurrent: int
    now: int
    trial_resources: dict[str, float]
    short: str = ""
    gpus: float = 0.0


def check_fits_here(runtime: Runtime) -> None:
    """Raises UserError where this machine, without a cluster, can't hold one training."""
    if runtime.address is not None:
        return
    scratch_folder()
    fewest, _ = worker_bounds(runtime.workers)
    cpus, needed = available_cpus(), fewest * runtime.cpus_per_worker
    if needed > cpus:
        raise UserError(
            f"runtime.workers: {fewest} workers of {runtime.cpus_per_worker} CPU need {needed} CPUs, "
            f"this machine has {cpus}; use at most {max(1, cpus // runtime.cpus_per_worker)}, or name a cluster with runtime.address"
        )
    asked, runtime = runtime.gpus_per_worker, decided(runtime, nodes_of(runtime))
    if workers_on(_here(), runtime) < fewest:
        auto = " (auto)" if asked == "auto" else ""
        raise UserError(
            f"runtime.gpus_per_worker: {fewest} workers need {fewest * share_of(runtime):g} GPUs{auto}, "
            f"this machine has {_here()['GPU']:g}; use gpus_per_worker: 0 to train on CPUs"
        )


def scratch_folder() -> Path | None:
    """Where a private Ray keeps its sockets and logs; None where the folder that Ray itself would take will do.

    The path of a Unix socket may have 107 bytes, and Ray takes ASCII alone. A TMPDIR of a Slurm job can be longer than that:
    then it is /tmp/ray. Raises UserError where that can't be written either, or where RAY_TMPDIR itself will not do.
    """
    named = os.environ.get("RAY_TMPDIR")
    wanted = named or os.environ.get("TMPDIR") or "/tmp"
    problem = _unfit(wanted)
    if problem is None:
        return None
    if named is None and os.access("/tmp", os.W_OK | os.X_OK):
        return Path("/tmp/ray")
    raise UserError(
        f"{'RAY_TMPDIR' if named else 'TMPDIR'} {problem} ({printable(wanted)}): "
        "set RAY_TMPDIR to a shorter folder that you can write, such as one below /tmp"
    )


def _unfit(folder: str) -> str | None:
    """Why Ray can't keep its sockets in a folder, which need not exist yet; None where it can."""
    too_long = len(os.fsencode(folder)) - (_SOCKET_BYTES - len(_SOCKET_PATH))
    if too_long > 0:
        return f"is {too_long} bytes too long for Ray's sockets"
    if not folder.isascii():
        return "holds characters that are not ASCII, which Ray does not take"
    if not os.path.isabs(folder):
        return "is a relative path, which Ray does not take"
    there = next(place for place in (Path(folder), *Path(folder).parents) if place.exists())
    return None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else "can't be written"


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
    ended = threading.Event()
    if mine and runtime.address is not None:
        head = ray.get_runtime_context().gcs_address
        threading.Thread(target=_watch_head, args=(head, ended), daemon=True).start()
    try:
        yield slots_of(runtime, nodes_of(runtime))
    finally:
        ended.set()
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
            "num_gpus": _here()["GPU"],  # those that torch can use
            "include_dashboard": not runtime.single,  # without it Ray Train logs an error a second
            "dashboard_host": "127.0.0.1",
            "_node_ip_address": "127.0.0.1",
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        if (folder := scratch_folder()) is not None:
            options["_temp_dir"] = str(folder)
        if not home_is_writable():  # Ray would write ~/.ray/auth_token
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    else:
        options["address"] = runtime.address
        if trusted := trust_environment():
            options["runtime_env"] = {"env_vars": trusted}
    try:
        with _own_sigterm():
            ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
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


def _watch_head(address: str, ended: threading.Event) -> None:
    """Say that the cluster's head is gone: without it Ray waits a minute, and then ends this process with a line of its own."""
    host, _, port = address.rpartition(":")
    gone = False
    while not ended.wait(_HEAD_SECONDS):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_HEAD_SECONDS).close()
            gone = False
        except OSError:
            if not gone:
                log.warning(
                    "the head of the Ray cluster at %s does not answer; if it stays away, this ends within a minute or two. "
                    "What is finished is kept, and the same command goes on, on any cluster that sees the results folder",
                    address,
                )
            gone = True


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


def nodes_of(runtime: Runtime) -> list[dict[str, float]]:
    """The resources of each machine that trainings may run on."""
    if runtime.address is None:
        return [_here()]
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def decided(runtime: Runtime, nodes: Sequence[Mapping[str, float]]) -> Runtime:
    """The runtime with a number of GPUs in place of `gpus_per_worker: auto`: 1 where one of the nodes (`CPU`, `GPU`) has a GPU, else 0."""
    if runtime.gpus_per_worker != "auto":
        return runtime
    return runtime.model_copy(update={"gpus_per_worker": 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0})


def device_here(runtime: Runtime) -> torch.device:
    """The device of all that the command's own process computes: measurements, a teacher's evaluation and trainings without Ray.

    This process has no reservation, so this machine's GPUs decide what `auto` means, also where trainings run on a cluster.
    """
    from kdbench.training.session import device_for

    return device_for(share_of(decided(runtime, [_here()])))


def share_of(runtime: Runtime) -> float:
    """How many GPUs one worker gets, or which share of one, of a runtime that is `decided`."""
    assert runtime.gpus_per_worker != "auto", "what auto means depends on the nodes: see `decided`"
    return runtime.gpus_per_worker


def unusable_gpus(gpus: float) -> str | None:
    """What is wrong in a process for which Ray reserved so many GPUs, None where torch can use them or none is reserved."""
    import torch

    if not gpus or torch.cuda.is_available():
        return None
    return (
        f"Ray reserved {gpus:g} GPU on {socket.gethostname()}, but torch {torch.__version__} can't use it; "
        "install a build of torch for CUDA, or set runtime.gpus_per_worker: 0"
    )


def workers_on(node: Mapping[str, float], runtime: Runtime) -> int:
    """How many workers fit on a node at once (`CPU`, `GPU`). One that takes a part of a GPU takes it of a single one."""
    cpus, share = int(node.get("CPU", 0) // runtime.cpus_per_worker), share_of(runtime)
    if not share:
        return cpus
    gpus = int(node.get("GPU", 0))
    return min(cpus, int(gpus // share) if share >= 1 else gpus * int(1 / share + 1e-9))


def resources_of(runtime: Runtime) -> dict[str, float]:
    """What one worker reserves, under Ray's names."""
    cpus: dict[str, float] = {"CPU": runtime.cpus_per_worker}
    return cpus | {"GPU": share_of(runtime)} if share_of(runtime) else cpus


def slots_of(runtime: Runtime, nodes: Sequence[Mapping[str, float]]) -> Slots:
    """How many trainings run at once on these nodes (`CPU`, `GPU` of each), unless the experiment says it, and what each trial holds.

    One worker: the trial's process is the worker, and reserves what it needs.

    Several: the trial only waits for them. Ray places a training's workers all together or not at all, on one node or on several, so that
    trainings never keep each other from starting.
    """
    runtime = decided(runtime, nodes)
    fewest, most = worker_bounds(runtime.workers)
    room = sum(workers_on(node, runtime) for node in nodes)
    fit = max(1, room // most)
    # A cluster may grow: there `concurrent` may ask for more than it holds now.
    concurrent = min(runtime.concurrent or fit, fit) if runtime.address is None else runtime.concurrent or fit
    each = " and ".join(f"{amount:g} {name}" for name, amount in resources_of(runtime).items())
    short = f"a training needs {fewest} x {each}, and there is room for {room} of them" if room < fewest else ""
    held = resources_of(runtime) if runtime.single else dict(_WAITING_TRIAL)
    return Slots(concurrent, min(concurrent, room // fewest), held, short, share_of(runtime))


def talk_on_rays_network() -> None:
    """Have gloo use the interface that has this node's address in Ray, unless the user has named one.

    It would resolve the host's own name, which on many machines gives 127.0.1.1 or an address that the others can't reach.
    """
    import ray

    interface = _interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _interface_of(address: str) -> str | None:
    """The name of the network interface with an IPv4 address, None where none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
