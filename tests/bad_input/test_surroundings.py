"""Where kdbench runs: odd characters in paths, a user without a name or a home, credentials in the environment, names that are no text."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdbench.records.store import ResultStore
from kdbench.tracking import tracking_uri
from tests.bad_input.tiny_experiment import TINIER, assert_one_line, run, write
from tests.console import Kdbench

REPOSITORY = Path(__file__).parents[2]
PASSWORD, TOKEN = "hunter2-is-long-enough", "t0ken-that-nobody-may-see"
ALONE = {**TINIER, "teacher": None, "methods": ["none"]}


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["100%20 done?x=%2Fy#z", 'it\'s "naïve" & co'])
def test_results_and_their_mlflow_database_lie_where_the_path_says(
    kdbench: Kdbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / name
    assert kdbench("run", write(ALONE), "--results", folder).code == 0
    assert (folder / "mlflow.db").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {name, "tiny.yaml"}  # nothing lies where a part of the name would lead

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(folder))
    (experiment,) = [found for found in client.search_experiments() if found.name == "tiny"]
    runs = client.search_runs([experiment.experiment_id])
    assert [any(name.startswith("val_") for name in found.data.metrics) for found in runs].count(True) == 1, runs
    assert kdbench("verify", "--results", folder).code == 0
    assert "none" in kdbench("leaderboard", "--results", folder).out


@pytest.mark.parametrize("name", ["a%2Fb", "q?x=1&y;z#w", "100% naïve", 'it\'s "odd" \\ $HOME'])
def test_every_command_takes_an_odd_results_path(kdbench: Kdbench, tmp_path: Path, name: str) -> None:
    assert kdbench("run", write(ALONE), "--results", name, "--no-mlflow").code == 0
    assert kdbench("results", "export", "board.zip", "--results", name).code == 0
    assert kdbench("results", "import", "board.zip", "--results", f"{name} again").code == 0
    for folder in (name, f"{name} again"):
        assert kdbench("verify", "--results", folder).code == 0
        assert "none" in kdbench("leaderboard", "--results", folder).out
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "board.zip", name, f"{name} again"}


@pytest.mark.parametrize("name", ["two\nlines", "bell\x07", os.fsdecode(b"\xff")])
def test_a_results_path_that_no_line_of_text_can_hold_is_refused_before_anything_is_made(kdbench: Kdbench, name: str) -> None:
    ended = run(kdbench, ALONE, "--results", name)
    assert_one_line(ended, 2, "results: the path", "Rename the folder")
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]


def test_an_experiment_whose_name_is_no_text_is_read_and_shown_escaped(kdbench: Kdbench) -> None:
    name = os.fsdecode(b"\xe9clair.yaml")
    Path(write(ALONE)).rename(name)
    assert kdbench("run", name, "--results", "results", "--no-mlflow").code == 0
    Path(name).write_text("name: [")
    assert_one_line(kdbench("run", name, "--results", "results", "--no-mlflow"), 2, "\\xe9clair.yaml", "not valid YAML")


def test_images_whose_names_are_no_text_are_read(kdbench: Kdbench) -> None:
    changes = pictures("pictures", "blue")
    for _ in range(2):
        ended = run(kdbench, changes)
        assert ended.code == 0, ended
    assert len(ResultStore("results").scan(role="final")) == 1  # the second command found what the first one trained
    assert kdbench("verify", "--results", "results").code == 0


def test_a_class_whose_name_is_no_text_is_refused(kdbench: Kdbench) -> None:
    """Its name is that of a label, which records, boards and exported files hold."""
    changes = pictures("others", os.fsdecode(b"bl\xfce"))
    assert_one_line(run(kdbench, changes), 2, "others/train/bl\\xfce holds control characters or bytes", "Rename the folder")


def pictures(folder: str, name: str) -> dict[str, Any]:
    """What learns from a folder of red pictures and of blue ones in a class of that name. The files' names are not UTF-8."""
    random = np.random.default_rng(0)
    for part, (channel, label) in product(("train", "val"), ((0, "red"), (2, name))):
        Path(folder, part, label).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(Path(folder, part, label, os.fsdecode(b"\xff%d.png" % number)))
    task = {"name": "classification", "data": {"name": "image_folder", "path": folder, "size": 16}, "val_size": 4}
    return {**ALONE, "task": task, "recipe.batch_size": 4}


# --- the user --------------------------------------------------------------------------------------------------------


def test_a_user_without_a_name_or_a_home_runs_everything(tmp_path: Path) -> None:
    """As in a container that was started with `docker run --user 12345`."""
    if os.getuid() != 0 or not _readable_for_others(Path(sys.executable).resolve()):
        pytest.skip("needs root, to become somebody else, and a Python that others may run")
    folder = Path("/var/tmp") / f"kdbench-test-{os.getpid()}"
    folder.mkdir()
    try:
        os.chdir(folder)
        write(TINIER)
        os.chown(folder, 12345, 12345)
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        for arguments in (["list", "methods"], ["run", "tiny.yaml"], ["leaderboard"], ["verify"], ["doctor"]):
            command = [sys.executable, "-m", "kdbench.cli", *arguments]
            ended = subprocess.run(
                command, user=12345, group=12345, extra_groups=[], env=environment, cwd=folder, capture_output=True, text=True, timeout=250
            )
            assert "Traceback" not in ended.stderr, ended.stderr
            assert ended.returncode == 0 or arguments == ["doctor"], (arguments, ended.stdout, ended.stderr)
        assert len(ResultStore(folder / "results").scan(role="final")) == 2
    finally:
        os.chdir(tmp_path)
        shutil.rmtree(folder)


def _readable_for_others(path: Path) -> bool:
    """Whether anybody may go to it and read it, as far as the bits of its folders say."""
    return all(above.stat().st_mode & 0o001 for above in path.parents) and all(above.stat().st_mode & 0o001 for above in REPOSITORY.parents)


# --- credentials -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("run", "tiny.yaml"), ("doctor",), ("leaderboard",), ("verify",), ("run", "tiny.yaml", "--set", "methods=[kd]")]
)
def test_credentials_of_the_tracking_server_are_printed_and_kept_nowhere(
    kdbench: Kdbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:{PASSWORD}@127.0.0.1:9/?key={TOKEN}")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    write(ALONE)
    ended = kdbench(*arguments, "--results", "results")
    kept = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    said = [ended.out, ended.err, caplog.text, *kept]
    assert [text for text in said if PASSWORD in text or TOKEN in text] == []
    if arguments == ("run", "tiny.yaml"):
        assert ended.code == 0
        assert "127.0.0.1:9" in ended.out + ended.err + caplog.text  # which server it is about is said


ADDRESSES = (f"s3://someone:{PASSWORD}@bucket/x", f"gs://bucket/x?key={TOKEN}", f"simplecache::s3://someone:{PASSWORD}@bucket/x")


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("arguments", [("run", "tiny.yaml"), ("leaderboard",), ("verify",), ("results", "export", "x.zip"), ("doctor",)])
def test_credentials_in_an_address_of_results_are_refused_and_not_repeated(
    kdbench: Kdbench, tmp_path: Path, address: str, arguments: tuple[str, ...]
) -> None:
    write(ALONE)
    ended = kdbench(*arguments, "--results", address)
    assert_one_line(ended, 2, "results: the ", "expected" if "::" in address else "set credentials in the environment")
    assert PASSWORD not in ended.out + ended.err
    assert TOKEN not in ended.out + ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    "address", [f"ray://someone:{PASSWORD}@head:10001", f"someone:{PASSWORD}@head:6379", f"http://head/?token={TOKEN}"]
)
def test_credentials_in_the_address_of_a_cluster_are_refused_and_not_repeated(kdbench: Kdbench, tmp_path: Path, address: str) -> None:
    for ended in (
        run(kdbench, {**ALONE, "runtime.address": address}),
        run(kdbench, ALONE, "--set", f"runtime.address={address}"),
        run(kdbench, {**ALONE, "runtime.address": address}, "--dry-run"),
    ):
        assert_one_line(ended, 2, "runtime.address: expected the address of a Ray cluster alone", "set RAY_AUTH_TOKEN in the environment")
        assert PASSWORD not in ended.out + ended.err
        assert TOKEN not in ended.out + ended.err
    if "@" in address:
        ended = kdbench("submit", write(ALONE), "--address", address)
        assert_one_line(ended, 2, "--address: expected the address of the cluster's dashboard alone")
        assert PASSWORD not in ended.out + ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
