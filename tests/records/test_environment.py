"""What a record says of the code that made it: the checkout's commit, or the one that a job was sent from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kdbench.records.environment import COMMIT_VARIABLE, commit_of, describe_environment

describe = describe_environment.__wrapped__  # it looks once a process


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "method.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    return tmp_path


def test_a_checkout_is_named_by_its_commit_and_whether_it_holds_changes(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    monkeypatch.chdir(checkout)
    monkeypatch.setenv(COMMIT_VARIABLE, "of-another-place")
    assert (describe()["git_commit"], describe()["git_dirty"]) == (commit, False)
    (checkout / "method.py").write_text("2\n")
    assert (describe()["git_commit"], describe()["git_dirty"]) == (commit, True)
    assert commit_of(checkout) == f"{commit}-dirty"


@pytest.mark.parametrize(
    ("sent", "found"),
    [("abc123", ("abc123", False)), ("abc123-dirty", ("abc123", True)), (None, (None, None))],
    ids=["clean", "dirty", "none"],
)
def test_a_job_is_named_by_the_commit_that_it_was_sent_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: str | None, found: tuple[str | None, bool | None]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    if sent:
        monkeypatch.setenv(COMMIT_VARIABLE, sent)
    assert (describe()["git_commit"], describe()["git_dirty"]) == found
