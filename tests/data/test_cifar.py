"""CIFAR-100 from its binary version, made small here: four images of a class for training, one for testing."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import kdbench.data.cifar as module
from kdbench.data.cifar import cifar100
from kdbench.data.facts import NotHere
from kdbench.data.sources import DataSpec, open_source
from kdbench.errors import UserError

NAMES = [f"class_{number}" for number in range(100)]


def records(each: int) -> bytes:
    """Of each class `each` images whose red is the class, whose green the row and whose blue the column."""
    image = np.zeros((100 * each, 3, 32, 32), np.uint8)
    labels = np.arange(100 * each) % 100
    image[:, 0] = labels[:, None, None]
    image[:, 1] = np.arange(32)[:, None]
    image[:, 2] = np.arange(32)
    coarse = np.full((len(labels), 1), 19)
    return np.concatenate([coarse, labels[:, None], image.reshape(len(labels), -1)], 1).astype(np.uint8).tobytes()


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    monkeypatch.setattr(module, "TRAIN_EACH", 4)
    monkeypatch.setattr(module, "TEST_EACH", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDBENCH_DATA", str(tmp_path / "sets"))
    return {"train.bin": records(4), "test.bin": records(1), "fine_label_names.txt": "\n".join([*NAMES, ""]).encode()}


def unpack(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pack(files: dict[str, bytes], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-100-binary/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_labels_are_the_fine_ones_and_pixels_come_out_channel_by_channel_row_by_row(files, tmp_path) -> None:
    unpack(files, tmp_path / "sets" / "cifar-100-binary")
    source = open_source(DataSpec(name="cifar100"))
    assert (len(source.train), len(source.test), source.image_shape) == (400, 100, (3, 32, 32))
    assert source.class_names == tuple(NAMES)
    assert torch.equal(source.train.inputs[:, 0, 5, 7].long(), source.train.target)
    assert source.train.inputs[0, 1, 5, 7] == 5
    assert source.train.inputs[0, 2, 5, 7] == 7
    assert torch.equal(source.test.index, torch.arange(400, 500))


def test_the_archive_gives_the_same_data_without_being_unpacked(files, tmp_path, monkeypatch) -> None:
    unpack(files, tmp_path / "unpacked")
    archive = pack(files, tmp_path / "packed" / module.ARCHIVE)
    monkeypatch.setenv("KDBENCH_DATA", str(tmp_path / "unpacked"))
    unpacked = cifar100()
    monkeypatch.setenv("KDBENCH_DATA", str(archive.parent))
    assert cifar100().sha256 == unpacked.sha256
    assert list(archive.parent.iterdir()) == [archive]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"train.bin": b"\0" * 100}, r"train\.bin holds 100 bytes, expected 1229600"),
        ({"test.bin": bytes(100 * 3074)}, r"test\.bin is damaged: not every class has 1 images"),
        ({"fine_label_names.txt": b"cat dog"}, "names 2 classes instead of 100"),
    ],
)
def test_damaged_files_are_reported_with_what_is_wrong_and_what_to_do(files, tmp_path, damage, reason) -> None:
    unpack(files | damage, tmp_path / "sets" / "cifar100")
    with pytest.raises(UserError, match=f"{reason}; delete it, or let KDBENCH_DATA"):
        cifar100()


def test_a_truncated_archive_is_reported(files, tmp_path) -> None:
    archive = pack(files, tmp_path / "sets" / module.ARCHIVE)
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cifar-100-binary\.tar\.gz can't be read: .*; delete it"):
        cifar100()


def test_a_pickle_is_not_read_but_named(files, tmp_path) -> None:
    (tmp_path / "sets" / "cifar-100-python").mkdir(parents=True)
    with pytest.raises(NotHere, match="cifar-100-python is the Python version, a pickle, which kdbench does not read"):
        cifar100()


def test_where_it_is_nowhere_the_places_and_the_way_are_named_and_the_facts_are_known(files, tmp_path, monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("KDBENCH_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        NotHere, match=r"KDBENCH_OFFLINE forbids .*put cifar-100-binary\.tar\.gz from https://www\.cs\.toronto\.edu"
    ) as caught:
        cifar100()
    facts = caught.value.facts
    assert (facts.classes, facts.side, facts.train, facts.test) == (100, 32, 50_000, 10_000)
    stand_in = open_source(DataSpec.model_validate(facts.stand_in()))
    assert (stand_in.num_classes, stand_in.image_shape, stand_in.mean) == (100, (3, 32, 32), module.MEAN)


def test_it_is_downloaded_whole_and_kept(files, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("KDBENCH_OFFLINE")
    whole = pack(files, tmp_path / "mirror" / module.ARCHIVE)
    broken = tmp_path / "broken" / module.ARCHIVE
    broken.parent.mkdir()
    broken.write_bytes(whole.read_bytes()[:-200])
    monkeypatch.setattr(module, "ADDRESSES", (broken.as_uri(),))
    with pytest.raises(NotHere, match="can't be downloaded"):
        cifar100()
    assert list((tmp_path / "home/.cache/kdbench/cifar-100").iterdir()) == []
    monkeypatch.setattr(module, "ADDRESSES", (broken.as_uri(), whole.as_uri()))
    downloaded = cifar100()
    monkeypatch.setattr(module, "ADDRESSES", ())
    assert cifar100().sha256 == downloaded.sha256
