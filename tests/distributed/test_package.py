"""What of the working directory goes to a cluster with a job, and that it is small."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from kdbench.distributed import package
from kdbench.distributed.package import pack
from kdbench.errors import UserError


def write(folder: Path, *names: str, content: str = "x") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    write(folder, "study.yaml", "my_method.py", "rooms/results/store.py", "rooms/data/loader.py", "rooms/data/digits.parquet")
    return folder


def packed(folder: Path, *keep_out: Path) -> set[str]:
    return set(pack(folder, folder.parent / "job.zip", keep_out).files)


def test_code_goes_and_environments_results_data_and_history_stay(project: Path) -> None:
    mine = packed(project)
    write(project, ".git/HEAD", ".venv/bin/python", "venv/bin/python", "node_modules/a/b.js", "rooms/__pycache__/x.pyc", "rooms/old.pyc")
    write(project, "results/v1/a.parquet", "mlflow.db", "mlruns/0/meta.yaml", "kdbench.egg-info/PKG-INFO", ".mypy_cache/3.11/a.json")
    write(project, "data/train/1.png", "datasets/x.bin", "build/lib/a.py")
    assert packed(project) == mine
    assert mine == {"study.yaml", "my_method.py", "rooms/results/store.py", "rooms/data/loader.py", "rooms/data/digits.parquet"}


def test_keys_and_passwords_beside_the_code_stay(project: Path) -> None:
    mine = packed(project)
    write(project, ".env", "rooms/.env", ".aws/credentials", "host.pem", ".ray/auth_token", ".netrc")
    assert packed(project) == mine


def test_a_folder_called_data_goes_where_it_holds_code(project: Path) -> None:
    write(project, "data/__init__.py", "data/pets.py")
    assert {"data/__init__.py", "data/pets.py"} <= packed(project)


def test_ignore_files_count_in_their_own_folder_and_below(project: Path) -> None:
    write(project, ".gitignore", content="*.ckpt\n!keep.ckpt\n/only_here.txt\n")
    write(project, "rooms/.rayignore", content="big/\n")
    write(project, "a.ckpt", "keep.ckpt", "only_here.txt", "rooms/only_here.txt", "rooms/big/file", "big/file")
    files = packed(project)
    assert {"keep.ckpt", "rooms/only_here.txt", "big/file"} <= files
    assert not files & {"a.ckpt", "only_here.txt", "rooms/big/file"}


def test_the_results_folder_stays_whatever_it_is_called(project: Path) -> None:
    write(project, "runs/v1/a.parquet")
    assert "runs/v1/a.parquet" in packed(project)
    assert "runs/v1/a.parquet" not in packed(project, project / "runs")


def test_the_same_content_is_the_same_archive_whenever_it_was_written(project: Path) -> None:
    pack(project, project.parent / "a.zip")
    for path in project.rglob("*.py"):
        os.utime(path, (1e9, 1e9))
    pack(project, project.parent / "b.zip")
    assert (project.parent / "a.zip").read_bytes() == (project.parent / "b.zip").read_bytes()
    write(project, "my_method.py", content="y")
    pack(project, project.parent / "b.zip")
    assert (project.parent / "a.zip").read_bytes() != (project.parent / "b.zip").read_bytes()


def test_the_archive_holds_the_files_as_they_are(project: Path) -> None:
    (project / "tool.sh").write_text("#!/bin/sh\n")
    (project / "tool.sh").chmod(0o755)
    (project / "loop").symlink_to(project, target_is_directory=True)
    made = pack(project, project.parent / "job.zip")
    with zipfile.ZipFile(made.archive) as archive:
        assert tuple(archive.namelist()) == made.files
        assert archive.read("tool.sh") == b"#!/bin/sh\n"
        assert archive.getinfo("tool.sh").external_attr >> 16 == 0o755
    assert made.left_out == ("loop",)


def test_one_that_is_too_large_is_an_error_that_names_the_largest_folders(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "LIMIT_BYTES", 2 * 2**20)
    for name, size in (("scans/2024/a.bin", 3), ("scans/2024/b.bin", 1), ("weights.bin", 2)):
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size * 2**20))  # which no archive makes smaller
    with pytest.raises(UserError) as failed:
        pack(project, project.parent / "job.zip")
    message = str(failed.value)
    assert "it takes 6 MiB, Ray takes 2 MiB" in message
    assert "scans/2024 4 MiB, weights.bin 2 MiB" in message
    assert ".rayignore" in message
    assert len(message.splitlines()) == 1
