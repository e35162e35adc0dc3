"""A cache of results at an address is built once, sent whole, and downloaded once by each machine that trains with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from kdbench.distributed import cache as distributed_cache
from kdbench.experiment import CacheOptions
from kdbench.storage.working_copy import upload
from kdbench.training.cache.build import Builder
from kdbench.training.cache.copies import bring, send
from kdbench.training.cache.entries import entries, remove, verify
from kdbench.training.cache.outputs import LOGITS, TEST, CacheSpec, open_cache
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from tests.object_storage import ObjectStorage
from tests.training.units import saved_teacher, unit, with_cache


@pytest.fixture
def built(machine):
    """Layout and cached teacher of the machine that built the entry and sent it."""
    layout = machine("here")
    live = saved_teacher(layout.teacher("t").parent)
    live.weights.rename(layout.teacher("t"))
    live = live.model_copy(update={"weights": layout.teacher("t")})
    upload(live.weights)
    cached = with_cache(live, unit("kd", live), layout.cache("k"))
    send(layout.cache("k"))
    return layout, cached


def requests(storage: ObjectStorage, bucket: str, what: str) -> list[str]:
    return [path for method, path in storage.gate.passed if method == what and f"{bucket.removeprefix('s3:/')}/cache" in path]


def test_another_machine_trains_from_the_store_alone_to_the_same_bits(machine, built) -> None:
    here, cached = built
    record = fit(unit("kd", cached), LocalSession(), here)
    student = here.student(record.unit_key).read_bytes()
    shutil.rmtree(here.root.parent)
    there = machine("there")

    again = fit(unit("kd", cached), LocalSession(), there)  # the unit names the places of the machine that is gone
    assert there.student(again.unit_key).read_bytes() == student
    assert again.test_metric == record.test_metric
    assert again.agreement == record.agreement
    assert not there.teacher("t").exists(), "the cache was enough"


def test_a_teacher_that_is_not_cached_is_fetched(machine, built) -> None:
    here, cached = built
    shutil.rmtree(here.root.parent)
    there = machine("there")
    live = cached.model_copy(update={"cache": None})

    fit(unit("kd", live), LocalSession(), there)
    assert there.teacher("t").exists()


def test_an_entry_is_downloaded_once_a_machine(machine, built, bucket: str, object_storage: ObjectStorage) -> None:
    there = machine("there").cache("k")
    assert bring(there, [LOGITS, TEST]) == []
    object_storage.gate.passed.clear()
    bring(there, [LOGITS, TEST])

    assert requests(object_storage, bucket, "GET") == []
    assert open_cache(there) is not None


def test_what_was_sent_is_not_sent_again(built, bucket: str, object_storage: ObjectStorage) -> None:
    here, _ = built
    object_storage.gate.passed.clear()
    send(here.cache("k"))

    assert [path.rpartition("/")[2] for path in requests(object_storage, bucket, "PUT")] == ["entry.json"]


def test_bytes_that_are_not_what_was_written_are_taken_out_of_the_store(machine, built, bucket: str, object_storage: ObjectStorage) -> None:
    data = bytearray(object_storage.objects(bucket)["cache/k/logits.npy"])
    data[-1] ^= 1
    object_storage.put(bucket, "cache/k/logits.npy", bytes(data))
    there = machine("there").cache("k")

    assert bring(there, [LOGITS, TEST]) == [LOGITS]
    assert open_cache(there) is None
    assert "cache/k/logits.json" not in object_storage.objects(bucket)


def test_an_upload_that_was_cut_off_is_not_read(machine, built, bucket: str, object_storage: ObjectStorage) -> None:
    object_storage.client.delete_object(Bucket=bucket.split("/")[2], Key="results/cache/k/logits.json")
    there = machine("there").cache("k")
    bring(there, [LOGITS, TEST])

    assert open_cache(there) is None


def test_the_entries_of_a_store_are_listed_checked_and_deleted_from_any_machine(machine, built, bucket: str, object_storage) -> None:
    there = machine("there")
    [listed] = entries(there)

    assert (listed.key, listed.streams, listed.entry.teacher) == ("k", (LOGITS, TEST), "tiny_cnn")
    assert listed.nbytes == sum(len(data) for path, data in object_storage.objects(bucket).items() if path.startswith("cache/k/"))
    assert [problem for problem in verify(there, listed) if "of another entry" not in problem] == []
    assert remove(there, listed)
    assert entries(machine("here")) == []


def test_a_machine_that_shares_no_disk_with_the_driver_hands_its_rows_back(machine, bucket: str, tmp_path: Path) -> None:
    """What `write_with_ray` and its writers do, without Ray between them."""
    here = machine("here")
    live = saved_teacher(tmp_path)
    spec = CacheSpec(teacher=live, task=unit().task, recipe=unit().recipe, data_seed=0, options=CacheOptions())
    driver = Builder(spec, here.cache("k"), torch.device("cpu"))
    plan = driver.plan([("stage:-1",)])
    driver.begin(plan)
    writer = distributed_cache._Writer(
        spec.model_dump_json(), "/nowhere", bucket, threads=1, gpus=0, streams={stream.name: stream for stream in plan.streams}
    )
    for piece in plan.pieces:
        driver.put(piece, writer.write(piece))
    driver.finish(plan)

    straight = with_cache(live, unit("kd", live), tmp_path / "straight", ("stage:-1",)).cache
    files = sorted(path.name for path in straight.glob("*.npy"))
    assert len(files) == 4
    assert [(here.cache("k") / name).read_bytes() for name in files] == [(straight / name).read_bytes() for name in files]
