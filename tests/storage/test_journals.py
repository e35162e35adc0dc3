"""A journal in the store grows by what is added, and is whole for whoever opens it next."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdbench.errors import RunFailed
from kdbench.storage.journals import fetch_journal, read_journal, upload_journal
from tests.object_storage import ObjectStorage


@pytest.fixture
def on(machine):
    """The journal on the machine of a name, opened there."""

    def opened(name: str) -> Path:
        path = fetch_journal(machine(name).study("q"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    return opened


def add(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")
    upload_journal(path)


def test_only_what_is_added_goes_up(on, bucket: str, object_storage: ObjectStorage) -> None:
    here = on("here")
    for line in ("one", "two", "three"):
        add(here, line)
    upload_journal(here)

    assert object_storage.objects(bucket) == {
        "studies/q.journal": b"one\n",
        "studies/q.journal.parts/000000000004": b"two\n",
        "studies/q.journal.parts/000000000008": b"three\n",
    }


def test_who_only_looks_sees_all_of_it_and_leaves_the_working_copy_as_it_is(on, machine) -> None:
    here = on("here")
    for line in ("one", "two"):
        add(here, line)
    elsewhere = machine("elsewhere").study("q")
    assert read_journal(elsewhere) == b"one\ntwo\n"
    assert not elsewhere.exists()
    assert read_journal(elsewhere.with_name("p.journal")) == b""


def test_another_machine_finds_all_of_it_and_puts_it_together(on, bucket: str, object_storage: ObjectStorage) -> None:
    here = on("here")
    for line in ("one", "two", "three"):
        add(here, line)
    there = on("there")
    assert there.read_text() == "one\ntwo\nthree\n"
    before = object_storage.objects(bucket)
    add(there, "four")

    assert object_storage.objects(bucket) == before | {"studies/q.journal.parts/000000000014": b"four\n"}
    assert on("here").read_text() == "one\ntwo\nthree\nfour\n", "the copy of before was stale"


def test_a_line_that_was_not_ended_stays_here_until_it_is(on, bucket: str, object_storage: ObjectStorage) -> None:
    here = on("here")
    with here.open("a") as file:
        file.write("one\ntw")
    upload_journal(here)
    assert object_storage.objects(bucket) == {"studies/q.journal": b"one\n"}
    add(here, "o")
    assert on("there").read_text() == "one\ntwo\n"


def test_a_line_in_the_store_that_was_never_ended_is_gone_on_from(on, bucket: str, object_storage: ObjectStorage) -> None:
    object_storage.put(bucket, "studies/q.journal", b"one\ntw")
    here = on("here")
    assert here.read_text() == "one\n"
    add(here, "two")
    add(here, "three")
    assert on("there").read_text() == "one\ntwo\nthree\n"


def test_a_part_that_is_in_the_beginning_already_is_not_taken_twice(on, bucket: str, object_storage: ObjectStorage) -> None:
    here = on("here")
    add(here, "one")
    add(here, "two")
    object_storage.put(bucket, "studies/q.journal", b"one\ntwo\nthree\n")

    assert on("there").read_text() == "one\ntwo\nthree\n"


def test_what_could_not_be_uploaded_is_not_thrown_away(on) -> None:
    here = on("here")
    add(here, "one")
    with here.open("a") as file:
        file.write("two\n")  # the storage refused it

    assert on("here").read_text() == "one\ntwo\n"
    upload_journal(here)
    assert on("there").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("begun", [True, False])
def test_a_driver_that_was_taken_over_can_not_write_over_the_other(on, bucket: str, object_storage: ObjectStorage, begun: bool) -> None:
    """Nor delete what the other one wrote, and be it that this one has not written to the search yet."""
    here = on("here")
    if begun:
        add(here, "one")
    there = on("there")
    add(there, "two")
    add(there, "six")
    before = object_storage.objects(bucket)
    with pytest.raises(RunFailed, match="another driver writes to this search"):
        add(here, "own")

    assert object_storage.objects(bucket) == before
    assert on("elsewhere").read_text() == ("one\n" if begun else "") + "two\nsix\n"
