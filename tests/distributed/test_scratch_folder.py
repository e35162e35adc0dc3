"""A TMPDIR that is too long for a Unix socket, as Slurm makes them, stops no search; what can not be helped is said before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdbench.distributed import cluster
from kdbench.errors import UserError
from kdbench.experiment import Runtime

ROOM = 107 - len("/ray/session_2026-11-29_01-14-45_123456_1234567/sockets/plasma_store")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)


def folder(length: int) -> str:
    return "/tmp/" + "x" * (length - 5)


def test_ray_takes_its_own_folder_where_a_socket_fits_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.scratch_folder() is None
    monkeypatch.setenv("TMPDIR", folder(ROOM))
    assert cluster.scratch_folder() is None


def test_a_tmpdir_that_is_too_long_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", folder(ROOM + 1))
    assert cluster.scratch_folder() == Path("/tmp/ray")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/scratch")
    assert cluster.scratch_folder() is None


@pytest.mark.parametrize(
    ("unfit", "said"),
    [
        ("/tmp/naïve", "holds characters that are not ASCII"),
        ("scratch", "is a relative path"),
        ("/etc/passwd", "can't be written"),
        ("/etc/passwd/below", "can't be written"),
    ],
)
def test_a_tmpdir_that_ray_can_not_use_is_replaced_and_a_ray_tmpdir_is_refused(
    monkeypatch: pytest.MonkeyPatch, unfit: str, said: str
) -> None:
    monkeypatch.setenv("TMPDIR", unfit)
    assert cluster.scratch_folder() == Path("/tmp/ray")
    monkeypatch.setenv("RAY_TMPDIR", unfit)
    with pytest.raises(UserError, match=rf"^RAY_TMPDIR {said}.* \({unfit}\): set RAY_TMPDIR to a shorter folder that you can write"):
        cluster.scratch_folder()


def test_bytes_count_and_not_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    named = "/tmp/" + "ü" * (ROOM // 2)
    monkeypatch.setenv("RAY_TMPDIR", named)
    with pytest.raises(UserError, match=f"^RAY_TMPDIR is {len(named.encode()) - ROOM} bytes too long"):
        cluster.scratch_folder()


def test_what_the_user_named_or_what_can_not_be_replaced_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", folder(ROOM + 5))
    with pytest.raises(UserError, match=r"^RAY_TMPDIR is 5 bytes too long for Ray's sockets .*: set RAY_TMPDIR to a shorter folder"):
        cluster.check_fits_here(Runtime())
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", folder(ROOM + 2))
    monkeypatch.setattr(cluster.os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"^TMPDIR is 2 bytes too long"):
        cluster.check_fits_here(Runtime())
    cluster.check_fits_here(Runtime(address="auto"))  # a cluster's nodes have temporary folders of their own
