"""The step of a run that fills the teacher's cache: it says what that takes, writes what is missing, and keeps it from being pruned."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from kdbench.benchmark.kept import keep, read_kept
from kdbench.benchmark.watch import Watch
from kdbench.distributed.cache import worth_ray, write_with_ray
from kdbench.distributed.cluster import started
from kdbench.experiment import Recipe, Runtime, TeacherRef, content_hash
from kdbench.storage.layout import Layout
from kdbench.storage.locks import Held, locked
from kdbench.training.cache.build import Builder, Plan, build_here, cached_already, mend
from kdbench.training.cache.copies import bring, send
from kdbench.training.cache.outputs import LOGITS, TEST, CacheSpec, tap_stream
from kdbench.training.cache.streams import ENTRY, Stream
from kdbench.training.cache.top_k import BOUND, TEMPERATURES
from kdbench.training.earlier_keys import Asked

# Writes a plan's pieces somewhere else than in this process, yielding how many images after each; None where this process should.
Elsewhere = Callable[[Builder, Plan, float], Iterator[int] | None]


def cache_spec(asked: Asked, teacher: TeacherRef, recipe: Recipe, layout: Layout) -> CacheSpec:
    """The entry that students with this recipe read: where there is none under its key, the one that the earlier rule of keys left."""
    experiment = asked.experiment
    spec = CacheSpec(teacher=teacher, task=experiment.task, recipe=recipe, data_seed=experiment.data_seed, options=experiment.cache)
    earlier = asked.cache_facts(spec.facts, teacher)
    if earlier is None or _there(layout.cache(spec.key)) or not _there(layout.cache(content_hash(earlier))):
        return spec
    return spec.model_copy(update={"earlier": earlier})


def _there(folder: Path) -> bool:
    bring(folder, {LOGITS, TEST})
    return (folder / ENTRY).exists()


def on_ray(stack: ExitStack, runtime: Runtime, started_anyway: bool, builder: Builder, plan: Plan, seconds: float) -> Iterator[int] | None:
    """An `Elsewhere`: Ray, where that is worth while. It then runs until the stack is closed, for the trainings to use it too."""
    if not worth_ray(runtime, plan, seconds, started_anyway):
        return None
    stack.enter_context(started(runtime))
    return write_with_ray(builder, plan, runtime)


def fill_cache(
    spec: CacheSpec, tap_sets: Sequence[tuple[str, ...]], layout: Layout, watch: Watch, device: torch.device, elsewhere: Elsewhere
) -> ExitStack:
    """Have the cache hold all that fits its budget of what methods with these taps ask for. Keep the result open while it is used.

    Raises DiskFull where there is no room on the disk; what was written by then is gone on with. A store of results at an address
    holds it too once this returns.
    """
    key = spec.key
    folder = layout.cache(key)
    with ExitStack() as in_use:
        in_use.enter_context(locked(layout.cache_lock(key, "use"), shared=True, wait=True))
        with _only_builder(layout.cache_lock(key, "build"), folder, watch):
            bring(folder, {LOGITS, TEST, *(tap_stream(tap) for taps in tap_sets for tap in taps)})
            for name in mend(folder):
                watch.note(f"the teacher cache {folder} is damaged ({name}); it is made again")
            if not cached_already(folder, tap_sets):
                start = time.monotonic()
                _build(Builder(spec, folder, device), tap_sets, watch, elsewhere)
                _note_seconds(layout, key, time.monotonic() - start)
            send(folder)
        if (folder / ENTRY).exists():
            os.utime(folder / ENTRY)  # when it was last used
        return in_use.pop_all()


def cache_seconds(layout: Layout, key: str) -> float:
    """How long an entry took to make, together; 0 where nobody measured it."""
    seconds = read_kept(_seconds_of(layout, key)).get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def _note_seconds(layout: Layout, key: str, seconds: float) -> None:
    """An entry may be made in several runs, and grow when further methods ask for more."""
    keep(_seconds_of(layout, key), {"seconds": cache_seconds(layout, key) + seconds})


def _seconds_of(layout: Layout, key: str) -> Path:
    return layout.choice(f"cache-{key}-seconds")


def _only_builder(lock: Path, folder: Path, watch: Watch) -> ExitStack:
    stack = ExitStack()
    try:
        stack.enter_context(locked(lock))
    except Held as held:
        watch.note(f"waiting for {held.holder}, which is writing the teacher's outputs to {folder}")
        stack.enter_context(locked(lock, wait=True))
    return stack


def _build(builder: Builder, tap_sets: Sequence[tuple[str, ...]], watch: Watch, elsewhere: Elsewhere) -> None:
    plan = builder.plan(tap_sets)
    budget = builder.spec.options.budget_gb
    for taps, nbytes in plan.too_big.items():
        what = " and ".join(taps) if taps else "predictions"
        watch.note(
            f"the teacher's {what} would make its cache {_size(nbytes)}; cache.budget_gb is {budget:g}, "
            f"so the teacher runs at every step of the methods that need {'that' if taps else 'them'}"
        )
    if plan.measured:
        watch.note(_top_k_note(plan))
    if plan.pieces:
        _write(builder, plan, watch, elsewhere)
    elif plan.streams:
        builder.begin(plan)
    builder.finish(plan)


def _write(builder: Builder, plan: Plan, watch: Watch, elsewhere: Elsewhere) -> None:
    seconds = builder.seconds(plan)
    watch.note(_estimate(builder, plan, seconds))
    builder.begin(plan)
    done, total = 0, plan.images
    watch.progress("cache", done, total)
    for images in elsewhere(builder, plan, seconds) or build_here(builder, plan):
        done += images
        watch.progress("cache", done, total)


def _estimate(builder: Builder, plan: Plan, seconds: float) -> str:
    splits, views = builder.spec.splits, builder.spec.views
    names = [stream.name for stream in plan.streams if stream.name != TEST]
    of = f"{views} views of {len(splits.transfer):,} images" if views > 1 else f"{len(splits.transfer):,} images"
    whole = sum(stream.rows for stream in plan.streams if stream.name in (LOGITS, TEST))
    left = "" if plan.images == whole else f", {plan.images:,} images to go"
    return f"teacher's outputs: {', '.join(names)} of {of}: {_size(plan.nbytes)} in {builder.folder}{left}, about {_time(seconds)}"


def _top_k_note(plan: Plan) -> str:
    logits: Stream = next(stream for stream in plan.streams if stream.name == LOGITS)
    assert plan.measured
    tried = ", ".join(f"{k}: {value:.1e}" for k, value in plan.measured.items())
    kept = f"the {logits.top_k} largest" if logits.top_k else "all"
    temperatures = " and ".join(f"{t:g}" for t in TEMPERATURES)
    return (
        f"cache.top_k auto: {kept} of {logits.shape[0]} logits are kept; relative change of kd's loss or gradient at temperature "
        f"{temperatures} by number kept, allowed {BOUND:g}: {tried}"
    )


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.2f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
