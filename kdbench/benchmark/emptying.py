"""Who empties a queue of trainings: this process, or Ray."""

from __future__ import annotations

from kdbench.benchmark.ledger import Ledger
from kdbench.distributed.cluster import device_here, nodes_of, slots_of
from kdbench.experiment import Experiment, Runtime
from kdbench.training.work import Work, run_here


def empty(work: Work, experiment: Experiment, ledger: Ledger, searching: bool | None = None) -> None:
    """In this process, or on Ray, for all that is to do."""
    runtime = experiment.runtime
    if not needs_ray(runtime, experiment.search is not None if searching is None else searching):
        run_here(work, ledger.layout, device_here(runtime))
        return
    from kdbench.distributed.cluster import started

    slots = ledger.held.enter_context(started(runtime))
    if slots.short:
        ledger.watch.note(f"{slots.short}: waiting for nodes to join the cluster at {runtime.address}")
    from kdbench.distributed.tune import run_with_tune

    run_with_tune(work, ledger.layout, runtime, slots, experiment.name)


def needs_ray(runtime: Runtime, searching: bool) -> bool:
    """One worker, no cluster, no search and one training at a time: no Ray. On several GPUs several trainings run at once."""
    if not runtime.single or runtime.address is not None or searching:
        return True
    slots = slots_of(runtime, nodes_of(runtime))
    return (slots.concurrent if slots.gpus else runtime.concurrent or 1) > 1
