"""A working copy is a folder like any other, of which another machine finds in the store what it needs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from kdbench.errors import StorageFailed
from kdbench.records.store import ResultStore
from kdbench.storage.working_copy import fetch, fetch_later, forget, forget_folder, origin, upload
from tests.object_storage import ObjectStorage


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    upload(path)
    return path


def test_a_folder_that_is_no_working_copy_is_left_alone(tmp_path: Path) -> None:
    file = put(tmp_path / "teachers" / "t", b"1")

    assert origin(tmp_path) is None
    assert fetch(file) == fetch_later(file) == file
    forget(file)
    assert not file.exists()


def test_what_one_machine_kept_another_finds(machine, bucket: str) -> None:
    here = machine("here")
    for path in (here.teacher("t"), here.student("s"), here.checkpoint("e", "u"), here.choice("c"), here.log("l")):
        put(path, path.name.encode())
    there = machine("there")
    paths = (there.teacher("t"), there.student("s"), there.checkpoint("e", "u"), there.choice("c"), there.log("l"))

    assert there.root != here.root
    assert there.location == here.location == bucket
    assert [fetch(path).read_bytes() for path in paths] == [path.name.encode() for path in paths]
    assert ResultStore(there.root).location == bucket


def test_what_can_be_made_again_is_not_uploaded(machine, bucket: str, object_storage: ObjectStorage) -> None:
    here = machine("here")
    for path in (here.lock("e"), here.root / "mlflow.db", here.root / "boards" / "x.png", here.cache("k") / "a.npy"):
        put(path, b"1")

    assert object_storage.objects(bucket) == {}


def test_paths_of_one_machine_are_found_on_another(machine) -> None:
    here, there = machine("here"), machine("there")

    assert there.here(here.cache("k")) == there.cache("k")
    assert there.here(Path("/data/teacher.pt")) == Path("/data/teacher.pt")


def test_a_stale_file_is_replaced_where_its_content_is_known(machine) -> None:
    put(machine("here").teacher("t"), b"new")
    stale = machine("there").teacher("t")
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")

    assert fetch(stale).read_bytes() == b"old"
    assert fetch(stale, sha256=hashlib.sha256(b"new").hexdigest()).read_bytes() == b"new"


def test_of_two_checkpoints_the_later_is_gone_on_from(machine) -> None:
    here = put(machine("here").checkpoint("e", "u"), b"farther")
    there = machine("there").checkpoint("e", "u")
    there.parent.mkdir(parents=True)
    there.write_bytes(b"long ago")
    os.utime(there, (1, 1))

    assert fetch_later(there).read_bytes() == b"farther"
    here.write_bytes(b"not sent yet")
    os.utime(here, (4e9, 4e9))
    assert fetch_later(here).read_bytes() == b"not sent yet"


def test_what_is_forgotten_is_gone_everywhere(machine, bucket: str, object_storage: ObjectStorage) -> None:
    here = machine("here")
    for key in ("a", "b", "c"):
        put(here.checkpoint("e", key), b"1")
    forget(here.checkpoint("e", "a"))
    assert sorted(object_storage.objects(bucket)) == ["checkpoints/e/b.pt", "checkpoints/e/c.pt"]
    forget_folder(here.checkpoints("e"))

    assert object_storage.objects(bucket) == {}
    assert not here.checkpoints("e").exists()


def test_training_goes_on_without_the_checkpoint_that_a_storage_refuses_but_not_without_weights(
    machine, object_storage: ObjectStorage, monkeypatch, caplog
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("KDBENCH_STORAGE_PATIENCE", "0.1")
    here = machine("here")
    object_storage.gate.refuses = lambda method, path: True
    try:
        put(here.checkpoint("e", "u"), b"1")
        assert "was kept on this machine only, training goes on" in caplog.text
        with pytest.raises(StorageFailed):
            put(here.student("s"), b"1")
    finally:
        object_storage.gate.refuses = lambda method, path: False


def test_a_checkpoint_is_not_uploaded_more_often_than_its_upload_allows(machine, bucket: str, object_storage: ObjectStorage) -> None:
    path = machine("here").checkpoint("e", "u")
    put(path, b"first")
    for count in range(20):
        put(path, b"later %d" % count)

    sent = [request for request in object_storage.gate.passed if request[0] == "PUT" and bucket.removeprefix("s3:/") in request[1]]
    assert 1 <= len(sent) < 10
