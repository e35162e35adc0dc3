"""The store keeps what it was given, whole or not at all, and never edits."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from kdbench.errors import RunFailed, UserError
from kdbench.records.compaction import compact
from kdbench.records.store import ResultStore, path_name


def every_file(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(params=["folder", "bucket"])
def location(request, tmp_path) -> str:
    return str(tmp_path / "results") if request.param == "folder" else request.getfixturevalue("bucket")


def test_what_is_appended_is_scanned_in_order_of_time(location, make_record) -> None:
    records = [make_record(seed=seed) for seed in range(3)]
    store = ResultStore(location)
    for record in reversed(records):
        store.append(record)

    assert store.scan() == records
    assert ResultStore(location).scan() == records


def test_a_record_lies_where_its_identity_says(location, make_record) -> None:
    record = make_record(teacher="hf_hub:timm/vit", student="res 8", label="../kd")

    path = ResultStore(location).append(record)

    assert path == f"v1/classification/fashion_mnist/hf_hub_timm_vit~res_8/_kd/{record.run_id}.parquet"
    assert ResultStore(location).read_bytes(path)[:4] == b"PAR1"


def test_a_teacher_has_a_place_too(location, make_record) -> None:
    path = ResultStore(location).append(make_record(role="teacher", teacher=None, method="none", student="resnet56"))

    assert "/none~resnet56/none/" in path


def test_an_empty_location_holds_nothing(location) -> None:
    assert ResultStore(location).scan() == []
    assert ResultStore(location).scan(unit_key="x") == []


def test_appending_the_same_run_twice_is_refused(location, make_record) -> None:
    store, record = ResultStore(location), make_record(test_metric=1.0)
    path = store.append(record)
    before = store.read_bytes(path)

    with pytest.raises(UserError, match="never overwritten"):
        ResultStore(location).append(record.model_copy(update={"test_metric": 2.0}))

    assert store.read_bytes(path) == before


def test_a_later_record_of_a_unit_supersedes_even_when_appended_first(location, make_record) -> None:
    store = ResultStore(location)
    old = make_record(unit_key="same", test_metric=1.0)
    new = make_record(unit_key="same", test_metric=2.0, created_at=old.created_at + timedelta(microseconds=1))
    store.append(new)
    store.append(old)

    assert store.scan() == [new]
    assert store.scan(unit_key="same")[-1] == new


def test_one_training_measured_on_two_test_parts_has_two_records_compacted_or_not(location, make_record) -> None:
    store = ResultStore(location)
    records = [make_record(unit_key="same", test_hash=test, test_metric=metric) for test, metric in (("a", 1.0), ("b", 2.0))]
    for record in records:
        store.append(record)
    assert store.scan() == records
    assert store.by_unit()("same") == records
    compact(store)
    assert ResultStore(location).scan() == records
    assert ResultStore(location).by_unit()("same") == records
    assert ResultStore(location).by_unit()("other") == []


def test_a_record_that_another_one_stands_for_under_another_key_is_not_shown_compacted_or_not(location, make_record) -> None:
    store = ResultStore(location)
    old = make_record(unit_key="earlier", seed=0)
    new = make_record(unit_key="now", seed=0, supersedes=old.run_id)
    store.append(old)
    store.append(new)
    assert store.scan() == [new]
    assert store.scan(unit_key="earlier") == []
    compact(store)
    assert ResultStore(location).scan() == [new]


def test_a_superseded_record_does_not_come_back_through_a_filter(location, make_record) -> None:
    store = ResultStore(location)
    store.append(make_record(unit_key="same", status="failed"))
    store.append(make_record(unit_key="same", status="ok"))

    assert store.scan(status="failed") == []
    assert store.keys(status="ok") == {"same"}


@pytest.mark.parametrize("compacted", [False, True])
def test_a_record_of_a_driver_that_was_taken_over_does_not_count_though_it_is_the_later(tmp_path, make_record, compacted) -> None:
    store = ResultStore(tmp_path)
    counts = make_record(unit_key="u", lease=8)
    others = [make_record(unit_key="u", lease=7), make_record(unit_key="v", lease=3), make_record(unit_key="w", lease=None)]
    for record in (counts, *others):
        store.append(record)
    if compacted:
        compact(store)

    assert ResultStore(tmp_path).scan() == [counts, *others[1:]]
    assert store.scan(unit_key="u")[-1] == counts


def test_a_record_without_a_lease_supersedes_an_earlier_one_that_has_one(tmp_path, make_record) -> None:
    """A correction, say, that was made in a folder."""
    store = ResultStore(tmp_path)
    store.append(make_record(unit_key="u", lease=8))
    later = make_record(unit_key="u")
    store.append(later)

    assert store.scan() == [later]


def test_filters_are_joined_by_and(location, make_record) -> None:
    store = ResultStore(location)
    for role in ("candidate", "final"):
        for label in ("kd", "nkd"):
            store.append(make_record(role=role, label=label, unit_key=f"{role}-{label}"))

    assert store.keys(role="final") == {"final-kd", "final-nkd"}
    assert store.keys(role="final", label="nkd", task="classification") == {"final-nkd"}
    assert store.keys(data="cifar10") == set()


def test_an_unknown_filter_names_the_nearest(location) -> None:
    with pytest.raises(UserError, match="'lable'; did you mean 'label'"):
        ResultStore(location).scan(lable="kd")


def test_records_of_another_process_are_seen_by_an_open_store(location, make_record) -> None:
    store = ResultStore(location)
    assert store.scan() == []
    ResultStore(location).append(make_record(unit_key="theirs"))

    assert store.keys() == {"theirs"}


def test_temporary_and_stray_files_are_ignored(tmp_path, make_record) -> None:
    store = ResultStore(tmp_path)
    folder = (tmp_path / store.append(make_record())).parent
    (folder / ".01ABC.parquet.1234.tmp").write_bytes(b"half")
    (folder / ".hidden.parquet").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "v1" / ".DS_Store").write_bytes(b"")

    assert len(ResultStore(tmp_path).scan()) == 1


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_record_is_left_out_and_named_with_what_to_do(tmp_path, make_record, keep, caplog) -> None:
    store = ResultStore(tmp_path)
    path = tmp_path / store.append(make_record())
    other = make_record(seed=1)
    store.append(other)
    path.write_bytes(path.read_bytes()[:keep])

    assert [record.run_id for record in ResultStore(tmp_path).scan()] == [other.run_id]
    (line,) = caplog.messages
    assert path.name in line
    assert "left out" in line


def test_a_newer_record_is_named(tmp_path, make_record) -> None:
    path = ResultStore(tmp_path).append(make_record(schema_version=7))

    with pytest.raises(UserError, match=f"{Path(path).name} has schema version 7.*update"):
        ResultStore(tmp_path).scan()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind_and_says_so(tmp_path, make_record, monkeypatch, call) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)

    with pytest.raises(RunFailed, match=r"the disk is full: .*parquet"):
        ResultStore(tmp_path).append(make_record())
    assert every_file(tmp_path) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path, make_record, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)

    with pytest.raises(KeyboardInterrupt):
        ResultStore(tmp_path).append(make_record())
    assert every_file(tmp_path) == []


def test_content_is_on_disk_before_it_has_its_name_and_the_folder_after(tmp_path, monkeypatch) -> None:
    steps = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        steps.append("folder" if stat.S_ISDIR(status.st_mode) else f"file of {status.st_size}")
        real_sync(descriptor)

    def replace(source: str, target: str) -> None:
        steps.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    ResultStore(tmp_path / "new").write_bytes("a/b/file", b"content")

    assert steps == ["file of 7", "rename", "folder", "folder", "folder", "folder"]  # b, a, new and the one that was there


def test_a_place_that_can_not_be_written_is_named_with_the_ways_out(tmp_path, make_record) -> None:
    (tmp_path / "taken").write_text("a file")
    store = ResultStore(tmp_path / "taken" / "results")

    for attempt in (store.check_writable, lambda: store.append(make_record()), lambda: store.write_bytes("a/b", b"")):
        with pytest.raises(UserError, match=r"taken/results can't be written.*--results DIR.*KDBENCH_RESULTS"):
            attempt()


def test_checking_leaves_no_trace(location) -> None:
    store = ResultStore(location)
    store.check_writable()

    assert store.scan() == []
    assert store.files.find("") == []


def test_bytes_come_back_with_their_hash_and_replace_older_ones(location) -> None:
    store = ResultStore(location)
    store.write_bytes("predictions/k.bytes", b"old")

    assert store.write_bytes("predictions/k.bytes", b"new") == hashlib.sha256(b"new").hexdigest()
    assert store.read_bytes("predictions/k.bytes") == b"new"


def test_missing_bytes_are_named(location) -> None:
    with pytest.raises(UserError, match=r"no 'predictions/k\.safetensors'"):
        ResultStore(location).read_bytes("predictions/k.safetensors")


@pytest.mark.parametrize("relative", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_bytes_stay_inside_the_folder(location, relative) -> None:
    for attempt in (lambda s: s.read_bytes(relative), lambda s: s.write_bytes(relative, b"")):
        with pytest.raises(UserError, match="not a path inside"):
            attempt(ResultStore(location))


def test_many_writers_at_once_lose_nothing(tmp_path, make_record) -> None:
    records = [make_record(seed=seed) for seed in range(40)]

    def write(part: list) -> None:
        for record in part:
            ResultStore(tmp_path).append(record)

    threads = [threading.Thread(target=write, args=(records[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert ResultStore(tmp_path).scan() == records


@pytest.mark.parametrize("location", ["nowhere://x", "s3x://bucket"])
def test_an_unknown_scheme_is_a_readable_error(location) -> None:
    with pytest.raises(UserError, match=location):
        ResultStore(location)


@pytest.mark.parametrize(
    ("name", "part"), [("a/b", "a_b"), ("..", "_"), ("", "_"), (".hidden", "hidden"), ("résumé~x", "r_sum_x"), ("x" * 300, "x" * 100)]
)
def test_names_become_one_safe_part_of_a_path(name, part) -> None:
    assert path_name(name) == part
