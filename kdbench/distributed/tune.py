"""Ray Tune empties a queue of units: reused actors, one training each, or a worker group each where a training needs several.

Tune only executes. What to run next, when to stop it and what came of it is the queue's affair (and behind it an Optuna study's),
through Tune's public Searcher and scheduler interfaces; a resumed run is a new Tuner on the same queue.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import tune
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from kdbench.distributed.cluster import Slots, share_of, unusable_gpus
from kdbench.distributed.storage import files_in, ray_storage, scratch
from kdbench.distributed.train import train_with_workers
from kdbench.errors import RunFailed
from kdbench.experiment import Runtime, Unit
from kdbench.storage.layout import Layout
from kdbench.training.session import LocalSession, device_for
from kdbench.training.work import (
    DEATH,
    DEATHS,
    ENDING,
    EPOCH,
    RESUMED,
    Ending,
    Work,
    attempt,
    given_up,
    pack_ending,
    pack_epoch,
    pack_resumed,
    settle,
    stopped_record,
    unpack_ending,
    unpack_epoch,
)

log = logging.getLogger(__name__)

# An actor imports torch in a few seconds; one that takes longer than this is not waited for.
_START_SECONDS = 30.0
_LOOKS_A_SECOND = 80  # at who is up, by all actors together: a thousand of them would keep an object store busy with their questions


def run_with_tune(work: Work, layout: Layout, runtime: Runtime, slots: Slots, experiment: str) -> None:
    """Empty the queue on Ray, which is running. Raises what the queue raised, or RunFailed where Tune itself could not go on."""
    runtime = runtime.model_copy(update={"gpus_per_worker": slots.gpus})
    desk = _Desk(work, layout, slots.concurrent)
    first = desk.draw(slots.now)
    # Else Tune starts its actors one after the other, and it calls off one that still starts whenever another comes free: with trials
    # shorter than the start of a process there would be a single actor for ever.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots.concurrent)
    # When it ends, Tune looks for result files of its own and complains of each that it was told not to write. It also lists the trials
    # whose processes died, which the desk has said already.
    for talkative in ("ray.tune.analysis.experiment_analysis", "ray.tune.tune"):
        logging.getLogger(talkative).setLevel(logging.CRITICAL)
    with scratch(layout, runtime, experiment) as storage:
        trainable = tune.with_resources(
            partial(_train_unit, runtime=runtime.model_dump_json(), results=layout.location, storage=storage, first=first),
            slots.trial_resources,
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=QueueSearcher(desk),
                scheduler=QueueScheduler(desk),
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="units",
                **ray_storage(storage),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),  # the desk counts, and hands the unit to another trial
                callbacks=[_Begun(desk)],
            ),
        )
        try:
            tuner.fit()
        except tune.TuneError as error:
            raise desk.error or RunFailed(f"Ray Tune stopped: {' '.join(str(error).split())[:300]}") from error
    if desk.error is not None:
        raise desk.error
    if not work.done:
        raise RunFailed("Ray Tune ended before all was done; run the same command again to go on")


class _Desk:
    """Between Tune's trial ids and the queue's units. An error of the queue's own (a full disk, say) is kept, and ends the run.

    A unit whose process died is handed to the next trial. Tune's own recovery is of no use here: where a process that it wanted to use
    again is dead, it counts one death several times, or waits for that process for ever (Ray 2.60).
    """

    def __init__(self, work: Work, layout: Layout, concurrent: int) -> None:
        self.work = work
        self.layout = layout
        self.concurrent = concurrent
        self.running: dict[str, Unit] = {}
        self.error: Exception | None = None
        self._drawn: deque[Unit] = deque()
        self._begun: set[str] = set()  # trials whose process took its unit up
        self._endings: dict[str, Ending] = {}  # of trials that said how they ended, but did not end yet
        self._deaths: Counter[tuple[str, int | None]] = Counter()  # by unit: of processes that trained it, since its furthest epoch
        self._furthest: dict[tuple[str, int | None], float] = {}
        self._never_begun = 0  # processes one after the other that died before they took a unit up
        self._unbegun_deaths: Counter[tuple[str, int | None]] = Counter()  # those that count, by unit, since a process last took it up

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune pickles its searcher and scheduler for a restore that we never do; what is behind the desk stays in this process."""
        return (object, ())

    def draw(self, count: int) -> int:
        """Take the queue's first units out of it, `count` at most; returns how many can start at once."""
        while len(self._drawn) < count and (unit := self.work.next()) is not None:
            self._drawn.append(unit)
        return len(self._drawn)

    def next(self, trial_id: str) -> Unit | None:
        try:
            unit = self._drawn.popleft() if self._drawn else self.work.next()
        except Exception as error:
            self.error = error
            return None
        if unit is not None:
            self.running[trial_id] = unit
        return unit

    def report(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """True where the trial should stop."""
        if self.error is not None:
            return True
        unit = self.running.get(trial_id)
        if unit is None:
            return False
        try:
            if DEATH in result:
                self.died(unit)
            elif RESUMED in result:
                self.work.resumed(unit, result[RESUMED])
            elif ENDING in result:
                self._endings[trial_id] = unpack_ending(result)
            if EPOCH not in result:
                return False
            row = unpack_epoch(result)
            self._lived(unit, row["epoch"])
            return self.work.report(unit, row)
        except Exception as error:
            self.error = error
            return True

    def died(self, unit: Unit) -> None:
        """Say that a process died, which costs time, and that nothing of what is finished is lost by it."""
        log.warning("%s: its process died; another one goes on with it", unit.title)

    def begin(self, trial_id: str) -> None:
        """A process is up and takes the trial's unit."""
        self._begun.add(trial_id)
        self._never_begun = 0
        if trial_id in self.running:
            del self._unbegun_deaths[_who(self.running[trial_id])]

    def finish(self, trial_id: str, crashed: bool) -> None:
        unit, ending, begun = self.running.pop(trial_id, None), self._endings.pop(trial_id, None), trial_id in self._begun
        self._begun.discard(trial_id)
        if unit is None or self.error is not None:
            return
        if ending is None:
            ending = self._after_death(unit, begun) if crashed else Ending(stopped_record(unit))
        if ending is None:
            self._drawn.appendleft(unit)
            return
        try:
            settle(self.work, unit, ending, self.layout)
        except Exception as error:
            self.error = error

    def _lived(self, unit: Unit, epoch: float) -> None:
        """Only deaths without an epoch in between count: a long training may lose many nodes."""
        who = _who(unit)
        if epoch > self._furthest.get(who, 0.0):
            self._furthest[who] = epoch
            del self._deaths[who]

    def _after_death(self, unit: Unit, begun: bool) -> Ending | None:
        """How a unit ends whose process died; None where another process takes it up."""
        if not begun:
            return self._after_death_unbegun(unit)
        who = _who(unit)
        self._deaths[who] += 1
        if self._deaths[who] < DEATHS:
            self.died(unit)
            return None
        del self._deaths[who]
        return given_up(unit.title, "its process")

    def _after_death_unbegun(self, unit: Unit) -> Ending | None:
        """The same, of a process that had not taken the unit up: it waited for its next unit, or it was starting.

        The death of a process that waited is no fault of the unit, and there are `concurrent` of those at most. More deaths one after the
        other are of processes that were starting. These count by themselves, apart from the deaths of processes that trained the unit.
        """
        who = _who(unit)
        self._never_begun += 1
        self._unbegun_deaths[who] += self._never_begun > self.concurrent
        if self._unbegun_deaths[who] < DEATHS:
            log.warning("%s: its process died before it began; another one takes it up", unit.title)
            return None
        del self._unbegun_deaths[who]
        return given_up(unit.title, "its process", "before the training began")


def _who(unit: Unit) -> tuple[str, int | None]:
    """Trials of one study may meet at the same point; their numbers keep them apart."""
    return unit.key, unit.number


class QueueSearcher(Searcher):
    """Hands Tune the queue's units as trial configs, as many at once as there are slots."""

    def __init__(self, desk: _Desk) -> None:
        super().__init__()
        self._desk = desk

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        desk = self._desk
        if desk.error is not None or desk.work.done:
            return str(Searcher.FINISHED)
        if len(desk.running) >= desk.concurrent:
            return None
        unit = desk.next(trial_id)
        if unit is None:
            return str(Searcher.FINISHED) if desk.error is not None or desk.work.done else None
        return {"unit": unit.model_dump_json()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._desk.finish(trial_id, crashed=error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the queue keeps its own state, and Tune's is never restored."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a resumed run is a new Tuner on the same queue")


class QueueScheduler(FIFOScheduler):
    """Stops a trial where the queue says so."""

    def __init__(self, desk: _Desk) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray leaves it without annotations
        self._desk = desk

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        return TrialScheduler.STOP if self._desk.report(trial.trial_id, result) else TrialScheduler.CONTINUE


class _Begun(tune.Callback):
    """Hears that a trial's process, a new one or that of an earlier trial, is up."""

    def __init__(self, desk: _Desk) -> None:
        self._desk = desk

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._desk.begin(trial.trial_id)


def _train_unit(config: dict[str, Any], runtime: str, results: str, storage: str, first: int) -> None:
    """What a Tune trial runs, in its actor. first: how many trials start with the first one."""
    unit, layout, how = Unit.model_validate_json(config["unit"]), Layout.at(results), Runtime.model_validate_json(runtime)
    if not how.single:
        train_with_workers(unit, how, layout, storage)
        return
    _wait_for_the_others(storage, first)
    gpus, threads = share_of(how), how.cpus_per_worker
    checkpoint, unusable = layout.checkpoint(unit.experiment, unit.key), unusable_gpus(gpus)
    session = LocalSession(checkpoint, _epoch_to_tune, _place_to_tune, device_for(gpus), threads)
    tune.report(pack_ending(Ending(crash=f"{unit.title}: {unusable}") if unusable else attempt(unit, session, layout)))


def _wait_for_the_others(storage: str, count: int) -> None:
    """Hold a new actor's first training until `count` actors are up, or a while has passed: see `run_with_tune` for what happens else."""
    files, me = files_in(storage), f"actors/{socket.gethostname()}-{os.getpid()}"
    if files.exists(me):
        return
    files.replace(me, b"")
    deadline = time.monotonic() + _START_SECONDS
    while len(files.find("actors")) < count and time.monotonic() < deadline:
        time.sleep(max(0.05, count / _LOOKS_A_SECOND))


def _epoch_to_tune(metrics: Mapping[str, float]) -> None:
    tune.report(pack_epoch(metrics))


def _place_to_tune(place: str) -> None:
    tune.report(pack_resumed(place))
