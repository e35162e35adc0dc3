"""What the keys of before have left is found where it says the same as is asked for, and is trained again where it does not.

`earlier/results` was written by commit eaaa7df; `earlier/make.py` says how.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

from kdbench.benchmark.ledger import Ledger
from kdbench.benchmark.pair import PairWork
from kdbench.benchmark.run import _pairs, check, run
from kdbench.benchmark.watch import Unwatched
from kdbench.boards.leaderboard import boards
from kdbench.data import sources
from kdbench.data.image_folder import Files
from kdbench.deploy.verification import verify
from kdbench.experiment import Experiment
from kdbench.methods.build import MethodSpec
from kdbench.records.record import CHECKSUM, row_checksum
from kdbench.records.store import ResultStore
from kdbench.tasks import build
from kdbench.tracking import NoTracker
from kdbench.training.earlier_keys import _config, draws_noise, has_dropout
from tests.test_yaml12 import bomb

EARLIER = Path(__file__).parent / "earlier"
LONG_AGO = 1e9  # seconds since 1970


class Notes(Unwatched):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def saying(self, part: str) -> list[str]:
        return [note for note in self.notes if part in note]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module that made the results, in a copy of its folder as the working directory."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    monkeypatch.syspath_prepend(str(EARLIER))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for picture in Path("pictures").rglob("*.png"):
        os.utime(picture, (LONG_AGO, LONG_AGO))
    forget_data()
    yield importlib.import_module("make")
    forget_data()


def forget_data() -> None:
    """As in a new process: data are known by a path of this working directory."""
    build._built.cache_clear()
    sources._opened.cache_clear()


def again(experiment: Experiment) -> tuple[int, int, Notes]:
    """How many trainings a run of now does, how many it finds, and what it says."""
    watch = Notes()
    summary = run(experiment, Path("results"), watch)
    return summary.trained, summary.found, watch


def test_what_was_finished_before_is_found_and_stands_on_one_board_with_what_comes_after(make: Any) -> None:
    before = {record.run_id for record in ResultStore("results").scan(experiment="plain")}
    trained, found, watch = again(make.experiment("plain"))
    assert (trained, found) == (0, 3)
    assert watch.saying("again") == []
    records = ResultStore("results").scan(experiment="plain")
    assert {record.supersedes for record in records} == before
    assert again(make.experiment("plain"))[:2] == (0, 3)

    more = make.experiment("plain", methods=["none", "kd", "dkd"])
    assert again(more)[:2] == (1, 3)
    (board,) = [board for board in boards(ResultStore("results").scan()) if "dkd" in {row.label for row in board.rows}]
    assert {row.label for row in board.rows} == {"none", "kd", "dkd"}
    assert verify(Path("results")).problems == ()


def test_verify_makes_the_keys_of_before_again_and_accuses_nobody_for_having_no_seals(make: Any) -> None:
    found = verify(Path("results"))
    assert (found.records, found.keyed, found.unkeyed, found.sealed) == (9, 9, 0, 0)
    assert found.problems == ()
    assert "has no seals yet" in found.notes[0]

    again(make.experiment("plain"))  # adopts three records, and seals all
    found = verify(Path("results"))
    assert (found.records, found.keyed, found.sealed) == (12, 12, 12)
    assert (found.problems, found.notes) == ((), ())


def test_a_record_of_before_that_was_edited_is_named(make: Any) -> None:
    (path,) = Path("results/v1").rglob("none/01M8JCYWRJ94H26H0YEZ8AH1JJ.parquet")
    table = pq.read_table(path)
    (row,) = table.to_pylist()
    row |= {"label": "ours", "method": "kd"}
    row[CHECKSUM] = row_checksum(row)
    pq.write_table(pa.Table.from_pylist([row], schema=table.schema), path)

    (problem,) = verify(Path("results")).problems
    assert problem.startswith(f"run {path.stem} (ours, seed 0): its unit_key is ")


def test_the_teachers_outputs_of_before_are_used_as_they_are(make: Any) -> None:
    entries = sorted(path.name for path in Path("results/cache").iterdir())
    written = {path: path.read_bytes() for path in Path("results/cache").rglob("*.npy")}
    assert again(make.experiment("plain", methods=["none", "kd", "dkd"]))[0] == 1
    assert sorted(path.name for path in Path("results/cache").iterdir()) == entries
    assert {path: path.read_bytes() for path in Path("results/cache").rglob("*.npy")} == written


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_students_of_a_teacher_with_other_model_options_are_not_taken_for_its_own(make: Any, stem_stride: int) -> None:
    (weights,) = {path for path in Path("results/teachers").rglob("model.safetensors") if path.parent.name in _keys_of_teachers("plain")}
    trained, found, watch = again(make.given(weights, stem_stride))
    assert (trained, found) == (2, 0)  # the measured teacher is found too, and counts as neither
    (note,) = watch.saying("under an earlier key")
    assert "other model options" in note
    assert f"stem_stride: {stem_stride}" in note


def _keys_of_teachers(experiment: str) -> set[str]:
    return {record.unit_key for record in ResultStore("results").scan(role="teacher", experiment=experiment)}


def test_a_search_of_before_goes_on(make: Any) -> None:
    assert again(make.searched())[:2] == (0, 2)
    assert len(list(Path("results/studies").iterdir())) == 1


def test_a_search_of_a_lower_version_of_the_task_begins_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("earlier_task").Versioned, "version", 2)
    watch = Notes()
    ledger = Ledger(make.searched(), Path("results"), watch, NoTracker())
    (pair,) = _pairs(make.searched(), ledger, check(make.searched(), ledger), may_train=True)
    assert ledger.trained == 1  # the teacher: nothing says that version 2 would have trained the same one
    work = PairWork(pair, ledger, search_only=False)
    (contender,) = work.contenders
    assert contender.study is not None
    assert contender.study.missing == 2
    # A teacher that was trained again has mostly other weights, so that its search would not be looked for: ask for that search by name.
    (earlier,) = {record.study_id for record in ResultStore("results").scan(experiment="searched") if record.study_id is not None}
    assert not work._recall.continues(earlier, pair.student, pair.teacher, "kd", noise=False)
    assert watch.saying("version 1 of its task, which has version 2 now")


def test_a_search_of_which_no_record_tells_begins_again(make: Any) -> None:
    for path in Path("results/v1").rglob("kd/*.parquet"):
        path.unlink()
    watch = Notes()
    ledger = Ledger(make.searched(), Path("results"), watch, NoTracker())
    (pair,) = _pairs(make.searched(), ledger, check(make.searched(), ledger), may_train=True)
    (contender,) = PairWork(pair, ledger, search_only=False).contenders
    assert contender.study is not None
    assert contender.study.missing == 2
    assert len(watch.saying("it begins again")) == 1


def test_images_in_files_that_nobody_wrote_to_since_are_taken_for_those_of_before(make: Any) -> None:
    assert again(make.pictures())[:2] == (0, 2)
    assert verify(Path("results")).problems == ()


def test_images_in_files_that_were_written_since_are_learned_from_again_and_a_line_says_why(make: Any) -> None:
    os.utime("pictures/train/red/0.png", (time.time(), time.time() + 400 * 86400))
    trained, found, watch = again(make.pictures())
    assert (trained, found) == (2, 0)
    assert watch.saying("the images were written or copied after it was trained")


def test_images_that_are_turned_now_are_learned_from_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A tag would change the size of a file, by which the earlier keys knew it, so the count is given.
    monkeypatch.setattr(Files, "turned", 1)
    assert again(make.pictures())[:2] == (2, 0)


def test_what_several_workers_trained_with_noise_is_not_taken(make: Any) -> None:
    asked = make.experiment("plain")
    ledger = Ledger(asked, Path("results"), Notes(), NoTracker())
    (pair,) = _pairs(asked, ledger, check(asked, ledger), may_train=True)
    recall = PairWork(pair, ledger, search_only=False)._recall
    (record,) = ResultStore("results").scan(experiment="plain", label="none")
    several = record.model_copy(update={"worker_counts": [1, 2]})
    told = {noise: recall.asked.differs(several, asked.students[0], None, [], noise) for noise in (True, False)}
    assert "drew the same" in (told[True] or "")
    assert "drew the same" not in (told[False] or "")


@pytest.mark.parametrize(
    ("network", "method", "expected"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "kd", False),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), "kd", True),
        (nn.Linear(2, 2), "mgd", True),
        (nn.Linear(2, 2), "vitkd", True),
        (nn.Linear(2, 2), "vitkd+nkd", True),
        (nn.Linear(2, 2), "crd", False),  # its noise is drawn once over the joined batch
    ],
    ids=str,
)
def test_noise_for_each_sample_is_seen_in_networks_and_methods(network: nn.Module, method: str, expected: bool) -> None:
    assert draws_noise(has_dropout(network), MethodSpec.model_validate(method)) is expected


def test_records_of_before_are_verified_by_the_rule_of_before(make: Any) -> None:
    checked = verify(Path("results"))
    assert checked.problems == ()
    assert checked.derived + len(checked.left_out) == 9
    assert all("earlier_task" in left_out for left_out in checked.left_out)


def test_the_experiment_of_a_record_is_read_within_bounds() -> None:
    [record, *_] = ResultStore(EARLIER / "results").scan()

    def read(config: str | None) -> Any:
        return _config(record.model_copy(update={"config": config}))

    assert read("lr: 1e-3") == {"lr": "1e-3"}  # as it was read when it was written
    assert [read(config) for config in (bomb(10), "[" * 300, "lr: 2026-13-01", "text", None)] == [None] * 5
