"""Objects are whole, what is written once stays, a storage that refuses for a while is waited for, and credentials are never repeated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kdbench.credentials import without_secrets
from kdbench.errors import StorageFailed, UserError
from kdbench.storage.address import is_address
from kdbench.storage.object_store import ObjectStore
from tests.object_storage import SECRET, ObjectStorage


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, object_storage: ObjectStorage) -> Iterator[None]:
    """The driver itself does not retry, and the gate is open again afterwards."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield
    object_storage.gate.refuses = lambda method, path: False


def test_what_was_created_is_never_overwritten_and_the_storage_decides(bucket: str) -> None:
    ObjectStore(bucket).create("a/b", b"first")

    with pytest.raises(FileExistsError):
        ObjectStore(bucket).create("a/b", b"second")
    assert ObjectStore(bucket).read("a/b") == b"first"


def test_what_is_created_a_second_time_with_the_same_content_is_our_own(bucket: str) -> None:
    """The storage took it, and its answer was lost on the way."""
    store = ObjectStore(bucket)
    store.create("a", b"same")
    store.create("a", b"same")
    assert store.sizes("") == {"a": 4}


def test_objects_are_listed_replaced_and_removed(bucket: str) -> None:
    store = ObjectStore(bucket)
    for path in ("x/1", "x/y/2", "xx/3"):
        store.replace(path, b"old")
    store.replace("x/1", b"content")

    assert store.sizes("x") == {"x/1": 7, "x/y/2": 3}
    store.remove("x/1")
    store.remove("x/1")
    assert sorted(store.find("")) == ["x/y/2", "xx/3"]
    with pytest.raises(FileNotFoundError):
        store.read("x/1")


def test_files_go_up_and_come_down_whole(bucket: str, tmp_path) -> None:
    (tmp_path / "up").write_bytes(b"k" * 1_000_000)
    store = ObjectStore(bucket)
    store.upload(tmp_path / "up", "large")
    store.download("large", tmp_path / "new" / "down")

    assert (tmp_path / "new" / "down").read_bytes() == b"k" * 1_000_000
    with pytest.raises(FileNotFoundError):
        store.download("nothing", tmp_path / "new" / "nothing")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["down"]


@pytest.mark.usefixtures("quick")
def test_a_storage_that_refuses_for_a_while_is_waited_for(bucket: str, object_storage: ObjectStorage, caplog) -> None:
    refusals = iter([True] * 3)
    object_storage.gate.refuses = lambda method, path: method == "PUT" and next(refusals, False)
    store = ObjectStore(bucket)
    store.create("a", b"1")

    assert store.read("a") == b"1"
    assert [record.getMessage() for record in caplog.records if "does not take a request" in record.getMessage()]


@pytest.mark.usefixtures("quick")
def test_a_storage_that_refuses_for_too_long_ends_in_one_line_with_the_way_out(
    bucket: str, object_storage: ObjectStorage, monkeypatch
) -> None:
    monkeypatch.setenv("KDBENCH_STORAGE_PATIENCE", "0.6")
    object_storage.gate.refuses = lambda method, path: True

    for attempt in (lambda store: store.create("a", b"1"), lambda store: store.read("a"), lambda store: store.find("")):
        with pytest.raises(
            StorageFailed, match=rf"{bucket} refused for \d+ s \(.*run the same command again when the storage answers"
        ) as error:
            attempt(ObjectStore(bucket))
        assert "\n" not in str(error.value)


def test_a_bucket_that_is_not_there_is_a_mistake_and_not_waited_for(bucket: str) -> None:
    with pytest.raises(UserError, match="does not exist; make it first, or name another"):
        ObjectStore("s3://no-such-bucket-anywhere/x").replace("a", b"")


def test_missing_credentials_are_named_by_their_variables(bucket: str, monkeypatch, tmp_path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    with pytest.raises(UserError, match="no credentials; they are read from the environment: AWS_ACCESS_KEY_ID"):
        ObjectStore(bucket).replace("a", b"")


@pytest.mark.usefixtures("bucket")
def test_nothing_that_foreign_code_says_repeats_a_credential() -> None:
    said = f'Could not connect to "http://me:hunter22@host:1/x" with {SECRET} and AKIAKDBENCHTESTKEY00'

    assert without_secrets(said) == 'Could not connect to "http://host:1/x" with *** and ***'


@pytest.mark.parametrize(
    ("location", "expected"), [("s3://b/x", True), ("s3:/b/x", True), ("file:///x", False), ("/x", False), ("C:x", False), ("a:b", False)]
)
def test_addresses_are_told_from_folders(location: str, expected: bool) -> None:
    assert is_address(location) is expected


@pytest.mark.parametrize("given", ["soon", "-1", "nan", "inf"])
def test_a_patience_that_is_no_number_of_seconds_is_refused(given: str, bucket: str, monkeypatch) -> None:
    monkeypatch.setenv("KDBENCH_STORAGE_PATIENCE", given)
    with pytest.raises(UserError, match="KDBENCH_STORAGE_PATIENCE: expected a number of seconds"):
        ObjectStore(bucket).replace("a", b"")
