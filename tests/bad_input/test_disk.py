"""A results folder that can't be written, a disk that fills up, an interrupt: nothing is half-written, and the same command goes on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from kdbench.errors import DiskFull, UserError
from kdbench.experiment import Unit
from kdbench.storage.layout import Layout
from kdbench.training.checkpoint import save_checkpoint
from kdbench.training.session import LocalSession
from kdbench.training.work import Ending, attempt, pack_ending, unpack_ending
from tests.bad_input.tiny_experiment import TINIER, TINY, WHOLE, assert_mistake, assert_one_line, results, run, write
from tests.console import Kdbench


@pytest.mark.parametrize("folder", ["taken", "taken/below", "/proc/kdbench"])
def test_a_results_folder_that_can_not_be_written_is_refused(kdbench: Kdbench, folder: str) -> None:
    Path("taken").write_text("")
    ended = kdbench("run", write({}), "--results", folder, "--no-mlflow")
    assert_mistake(ended, "can't be written", "choose another with --results DIR or the variable KDBENCH_RESULTS")


def test_a_results_folder_whose_name_is_too_long_is_refused(kdbench: Kdbench) -> None:
    assert_mistake(kdbench("run", write({}), "--results", "x" * 300, "--no-mlflow"), "results folder", "File name too long")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s4://bucket/results", ["no storage is called 's4'; did you mean 's3'?"]),
        ("s3://", ["expected s3://bucket/folder, got no bucket"]),
        ("s3://me:hunter22@bucket/results", ["holds credentials or options", "set credentials in the environment"]),
        ("s3://bucket/results?secret=hunter22", ["holds credentials or options"]),
    ],
)
def test_an_address_that_can_not_be_used_is_refused_and_credentials_are_not_repeated(
    kdbench: Kdbench, address: str, words: list[str]
) -> None:
    for ended in (kdbench("run", write({}), "--results", address), kdbench("run", write({"results": address}))):
        assert_mistake(ended, *words)
        assert "hunter22" not in ended.err + ended.out
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]


def test_credentials_in_a_file_are_refused_even_where_another_place_is_given(kdbench: Kdbench) -> None:
    ended = kdbench("run", write({"results": "s3://me:hunter22@bucket/results"}), "--results", "here")
    assert_mistake(ended, "tiny.yaml: results: ", "holds credentials")
    assert "hunter22" not in ended.err + ended.out


def test_a_storage_without_its_driver_is_told_what_to_install(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    loaded = sys.modules[fsspec.get_filesystem_class.__module__]._registry  # `fsspec.registry` is the public view of it
    monkeypatch.delitem(loaded, "s3", raising=False)  # where another test has loaded it
    monkeypatch.setenv("KDBENCH_WORKING_COPIES", "copies")
    assert_mistake(kdbench("leaderboard", "--results", "s3://bucket/results"), "pip install 'kdbench[s3]'")


def test_a_file_is_no_results_folder_to_read_from(kdbench: Kdbench) -> None:
    assert_one_line(kdbench("leaderboard", "--results", write({})), 2, "tiny.yaml is a file, expected a results folder")


@pytest.fixture
def small_disk(kdbench: Kdbench) -> Iterator[Callable[[str], None]]:
    """Makes ./results a file system of its own of the given size, or gives it that size."""
    folder = Path("results").absolute()
    folder.mkdir()

    def resize(size: str) -> None:
        mounted = ",remount" if os.path.ismount(folder) else ""
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}{mounted}", "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("kilobytes", [4, 40, 100, 160])
@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
def test_a_disk_that_fills_up_ends_the_run_and_with_more_space_it_goes_on(
    kdbench: Kdbench, small_disk: Callable[[str], None], kilobytes: int
) -> None:
    small_disk(f"{kilobytes}k")
    changes = {"runtime.checkpoint_seconds": 0}
    assert_one_line(run(kdbench, changes), 1, "the disk is full: ", "free some space and run the same command again, finished work is kept")
    finished = results()
    assert set(finished) < set(WHOLE)
    small_disk("50m")
    assert run(kdbench, changes).code == 0
    assert results() == WHOLE


class _Fault:
    """Stands in for os.fsync, through which everything goes that is kept: the n-th call fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.left, self.error, self.sync = 0, error, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error
        self.sync(descriptor)

    def at(self, call: int) -> None:
        self.left = call

    @property
    def came(self) -> bool:
        return self.left <= 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full: "),
        (KeyboardInterrupt(), 130, "Stopped. What is finished is kept; to go on: kdbench run tiny.yaml"),
    ],
)
def test_whichever_write_fails_nothing_is_half_written_and_the_same_command_goes_on(
    kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    fault = _Fault(monkeypatch, error)
    seen = 0
    for call in range(1, 100):
        shutil.rmtree("results", ignore_errors=True)
        fault.at(call)
        ended = run(kdbench, TINIER)
        if not fault.came:
            break
        seen += 1
        assert ended.code == code, ended
        assert said in ended.err
        assert "Traceback" not in ended.err
        assert len(ended.err.strip().splitlines()) == 1
        results()
        assert run(kdbench, TINIER).code == 0
        assert results() == WHOLE
    assert seen >= 10
    assert ended.code == 0


@pytest.mark.parametrize("moment", ["progress", "epoch", "finished", "note"])
def test_an_interrupt_at_any_step_leaves_whole_results_only(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"kdbench.cli.display.Display.{moment}", interrupted)
        ended = run(kdbench)
    assert ended.code == 130
    assert "Stopped. What is finished is kept; to go on: kdbench run tiny.yaml" in ended.err
    assert set(results()) < set(WHOLE)
    assert run(kdbench).code == 0
    assert results() == WHOLE


def test_an_interrupt_while_the_teachers_outputs_are_kept_leaves_what_the_next_run_goes_on_with(
    kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kdbench.training.cache.streams.StreamFiles.mark", interrupted)
        assert run(kdbench).code == 130
    assert results() == ["teacher teacher ok"]
    assert run(kdbench).code == 0
    assert results() == WHOLE


def test_a_checkpoint_that_does_not_fit_says_that_the_disk_is_full(small_disk: Callable[[str], None]) -> None:
    small_disk("64k")
    with pytest.raises(DiskFull, match=r"the disk is full: results/a\.pt"):
        save_checkpoint({"a": torch.zeros(100_000)}, Path("results/a.pt"))
    assert list(Path("results").iterdir()) == []


def test_a_full_disk_in_a_process_of_ray_ends_the_run_in_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise DiskFull("the disk is full: x was not written")

    monkeypatch.setattr("kdbench.training.work.fit", full)
    unit = Unit.model_validate(
        {"role": "final", "experiment": "e", "protocol_hash": "p", "task": TINY["task"], "seed": 0}
        | {"student": "tiny_cnn", "method": "none", "recipe": {}}
    )
    ending = unpack_ending(pack_ending(attempt(unit, LocalSession(), Layout(tmp_path))))
    assert ending == Ending(crash="the disk is full: x was not written", storage_failed=True)


def test_a_full_disk_is_no_user_error() -> None:
    assert not issubclass(DiskFull, UserError)
    assert DiskFull.exit_code == 1
