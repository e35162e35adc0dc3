"""The cache as a run fills it and as `kdbench cache` shows, builds, verifies and prunes it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.data.batch import Batch
from kdbench.experiment import Experiment
from kdbench.methods.base import Method, Paper, Progress
from kdbench.models.outputs import Outputs
from kdbench.records.store import ResultStore
from kdbench.storage.layout import Layout
from kdbench.storage.locks import Held, locked
from kdbench.training import teacher
from tests.console import Kdbench

TINY: dict[str, Any] = {
    "name": "tiny",
    "task": {"name": "classification", "data": {"name": "shapes", "train": 150, "test": 30, "target": "class"}, "val_size": 30},
    "teacher": {"model": {"name": "tiny_cnn", "width": 4}, "recipe": {"lr": 0.1}},
    "students": [{"name": "tiny_cnn", "width": 4, "label": "student"}],
    "methods": ["none", "kd"],
    "recipe": {"epochs": 1, "batch_size": 60, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "seeds": 1,
}


class Pooled(Method):
    """For tests: the teacher's pooled vector has to be zero, whatever the student does."""

    paper = Paper("none")
    teacher_taps = ("pooled",)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        return {"pooled": t.maps["pooled"].float().square().mean() + 0 * s.logits.float().sum()}


class Notes(Unwatched):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.images = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, phase: str, done: int, total: int) -> None:
        if phase == "cache":
            self.images = done


def ran(results: Path, **changes: Any) -> Notes:
    notes = Notes()
    assert run(Experiment.model_validate({**TINY, **changes}), results, notes).failures == ()
    return notes


@pytest.fixture
def file(kdbench: Kdbench) -> Path:
    path = Path("tiny.yaml")
    path.write_text(yaml.safe_dump(TINY))
    return path


# --- run -------------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_will_keep_and_trains_without_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(tmp_path, methods=["none"])
    loaded = 0
    load = teacher.load_teacher

    def counted(*arguments: Any) -> Any:
        nonlocal loaded
        loaded += 1
        return load(*arguments)

    for module in ("teacher", "cache.build", "assembly"):
        monkeypatch.setattr(f"kdbench.training.{module}.load_teacher", counted, raising=False)
    notes = ran(tmp_path, methods=["none", "kd", {"name": f"{__name__}:Pooled", "label": "pooled"}], seeds=2)
    assert loaded == 1  # by the build; no training asks for it
    (note,) = [note for note in notes.notes if note.startswith("teacher's outputs:")]
    folder = next((tmp_path / "cache").iterdir())
    assert f"logits, tap pooled of 120 images: 0.01 MB in {folder}, about 0 s" in note
    assert notes.images == 150


def test_of_an_experiment_without_a_method_that_learns_from_the_teacher_nothing_is_kept(tmp_path: Path) -> None:
    ran(tmp_path, methods=["none", "label_smoothing"])
    assert not (tmp_path / "cache").exists()


def test_a_finished_experiment_does_not_build_its_pruned_cache_again(tmp_path: Path) -> None:
    ran(tmp_path)
    (folder,) = (tmp_path / "cache").iterdir()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert ran(tmp_path).images == 0
    assert not folder.exists()
    assert ran(tmp_path, seeds=2).images == 150


def test_what_is_over_budget_is_said_with_its_size_and_key_and_the_run_goes_on_live(tmp_path: Path) -> None:
    notes = ran(tmp_path, cache={"budget_gb": 1e-6})
    (note,) = [note for note in notes.notes if "budget" in note]
    assert note == (
        "the teacher's predictions would make its cache 0.00 MB; cache.budget_gb is 1e-06, "
        "so the teacher runs at every step of the methods that need them"
    )
    assert not list((tmp_path / "cache").rglob("*.npy"))
    assert {record.label for record in ResultStore(tmp_path).scan(role="final")} == {"none", "kd"}


def test_what_changes_the_numbers_gives_a_board_of_its_own_and_the_budget_does_not(tmp_path: Path) -> None:
    def protocol(**cache: Any) -> str:
        ran(tmp_path, cache=cache, methods=["kd"])
        return max(ResultStore(tmp_path).scan(role="final"), key=lambda record: record.created_at).protocol_hash

    assert len({protocol(), protocol(budget_gb=4.0), protocol(precision="fp32"), protocol(top_k=1)}) == 3
    assert len(ResultStore(tmp_path).scan(role="final")) == 3


def test_a_second_run_waits_for_the_one_that_builds_and_then_finds_all(tmp_path: Path) -> None:
    ran(tmp_path, methods=["none"])
    ran(tmp_path / "other")
    (key,) = [path.name for path in (tmp_path / "other" / "cache").iterdir()]
    layout = Layout(tmp_path)
    waited: list[str] = []

    class Waiting(Notes):
        def note(self, text: str) -> None:
            super().note(text)
            if text.startswith("waiting for process"):
                waited.append(text)
                (tmp_path / "cache").mkdir()
                (tmp_path / "other" / "cache" / key).rename(layout.cache(key))
                builder.__exit__(None, None, None)

    builder = locked(layout.cache_lock(key, "build"))
    builder.__enter__()
    notes = Waiting()
    run(Experiment.model_validate(TINY), tmp_path, notes)
    assert waited == [f"waiting for process {os.getpid()}, which is writing the teacher's outputs to {layout.cache(key)}"]
    assert notes.images == 0


# --- kdbench cache ---------------------------------------------------------------------------------------------------


def test_build_needs_a_teacher_and_then_trains_nothing(kdbench: Kdbench, file: Path) -> None:
    refused = kdbench("cache", "build", file, "--results", "results")
    assert refused.code == 2
    assert refused.err == (
        f"kdbench: tiny: its teacher is not trained yet in {Path('results').resolve()}; "
        "train it with kdbench run, or name a file with teacher.weights\n"
    )
    ran(Path("results").resolve(), methods=["none"])
    before = len(ResultStore("results").scan())
    assert kdbench("cache", "build", file, "--results", "results").code == 0
    assert len(ResultStore("results").scan()) == before
    assert ran(Path("results").resolve()).images == 0


@pytest.mark.parametrize(
    ("setting", "said"), [("teacher=null", "the experiment has no `teacher:`"), ("recipe.views=null", "nothing can be cached")]
)
def test_build_says_why_nothing_can_be_built(kdbench: Kdbench, file: Path, setting: str, said: str) -> None:
    settings = ["--set", setting] + (["--set", "recipe.augment.flip=true"] if "views" in setting else ["--set", "methods=[none]"])
    ended = kdbench("cache", "build", file, "--results", "results", *settings)
    assert ended.code == 2
    assert said in ended.err


def test_ls_lists_what_there_is(kdbench: Kdbench, file: Path) -> None:
    assert "the cache is empty" in kdbench("cache", "ls", "--results", "results").out
    ran(Path("results").resolve(), cache={"top_k": 1})
    header, row, total = kdbench("cache", "ls", "--results", "results").out.splitlines()
    (key,) = [path.name for path in Path("results/cache").iterdir()]
    assert header.split()[:4] == ["key", "teacher", "data", "views"]
    assert row.split()[:8] == [key, "tiny_cnn", "shapes", "1", "120", "fp16,", "top", "1"]
    assert row.endswith("logits, test")
    assert total.startswith("1 in all")


def test_verify_names_the_shard_and_the_next_run_writes_it_again(kdbench: Kdbench, file: Path) -> None:
    results = Path("results").resolve()
    ran(results)
    (folder,) = (results / "cache").iterdir()
    logits = folder / "logits.npy"
    whole = logits.read_bytes()
    assert kdbench("cache", "verify", "--results", "results").out == f"{folder.name}  ok\n"
    logits.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ended = kdbench("cache", "verify", folder.name[:6], "--results", "results")
    assert ended.code == 1
    assert ended.out == f"{folder.name}  logits: shard 0 (view 0, images 0 to 119) has other bytes\n"
    assert kdbench("cache", "verify", "--results", "results").code == 0
    assert ran(results, seeds=2).images == 120
    assert logits.read_bytes() == whole
    missing = kdbench("cache", "verify", "0x", "--results", "results")
    assert missing.code == 2
    assert "there is none" in missing.err


@pytest.mark.parametrize(
    ("arguments", "prepare", "goes"),
    [
        ([], None, False),
        ([], lambda folder: (folder / "entry.json").unlink(), True),
        ([], lambda folder: [path.unlink() for path in (folder.parents[1] / "v1").rglob("*.parquet")], True),
        (["--older-than", "3"], None, False),
        (["--older-than", "3"], lambda folder: os.utime(folder / "entry.json", (time.time() - 4 * 86400,) * 2), True),
        (["--keep-gb", "1"], None, False),
        (["--keep-gb", "0"], None, True),
    ],
    ids=["in use by a record", "unreadable", "unknown teacher", "young", "old", "small", "large"],
)
def test_prune_deletes_what_it_says_and_nothing_else(
    kdbench: Kdbench, arguments: list[str], prepare: Callable[[Path], Any] | None, goes: bool
) -> None:
    results = Path("results").resolve()
    ran(results)
    (folder,) = (results / "cache").iterdir()
    if prepare is not None:
        prepare(folder)
    dry = kdbench("cache", "prune", *arguments, "--dry-run", "--results", "results")
    assert folder.exists()
    assert (folder.name in dry.out) == goes
    done = kdbench("cache", "prune", *arguments, "--results", "results")
    assert done.code == 0
    assert folder.exists() != goes
    assert done.out == dry.out.replace("would be freed", "freed")


def test_prune_leaves_an_entry_that_a_run_is_using(kdbench: Kdbench) -> None:
    results = Path("results").resolve()
    pruned: list[str] = []

    class Pruning(Notes):
        def progress(self, phase: str, done: int, total: int) -> None:
            if phase == "final" and done == 1:
                pruned.append(kdbench("cache", "prune", "--keep-gb", 0, "--results", "results").out)

    run(Experiment.model_validate(TINY), results, Pruning())
    (folder,) = (results / "cache").iterdir()
    assert f"{folder.name}  0.0" in pruned[0]
    assert ": in use, kept\n0.00 MB freed" in pruned[0]
    assert kdbench("cache", "prune", "--keep-gb", 0, "--results", "results").code == 0
    assert not folder.exists()


def test_a_lock_can_be_shared_or_held_alone(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "a.lock"
    with locked(lock, shared=True), locked(lock, shared=True), pytest.raises(Held), locked(lock):
        pass
    with locked(lock), pytest.raises(Held, match=str(os.getpid())), locked(lock, shared=True):
        pass
