import gzip
import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from kdbench.data import fashion_mnist as module
from kdbench.data.fashion_mnist import EMBEDDED, EMBEDDED_BYTES, fashion_mnist
from kdbench.data.sources import DataSpec, open_source
from kdbench.errors import UserError

TRAIN, TEST = 6, 4


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """A folder with the four files of a tiny Fashion-MNIST, which the module then takes for the real one; nothing else is to be found."""
    random = np.random.default_rng(0)
    contents = {
        "train images": bytes(16) + random.integers(0, 256, TRAIN * 784, np.uint8).tobytes(),
        "train labels": bytes(8) + bytes(range(TRAIN)),
        "test images": bytes(16) + random.integers(0, 256, TEST * 784, np.uint8).tobytes(),
        "test labels": bytes(8) + bytes(range(TEST)),
    }
    facts = {key: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for key, content in contents.items()}
    monkeypatch.setattr(module, "_FILES", {key: replace(file, **facts[key]) for key, file in module._FILES.items()})
    monkeypatch.setattr(module, "DEBIAN", tmp_path / "debian")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "whole"
    folder.mkdir()
    for key, file in module._FILES.items():
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(contents[key]))
    return folder


def test_the_embedded_subset_holds_equally_many_of_each_class():
    source = fashion_mnist()
    assert source.train.inputs.shape == (12_000, 1, 28, 28)
    assert source.test.inputs.shape == (2_000, 1, 28, 28)
    assert torch.bincount(source.train.target).tolist() == [1_200] * 10
    assert torch.bincount(source.test.target).tolist() == [200] * 10
    assert source.train.index.max() < 60_000 <= source.test.index.min()
    assert source.test.index.max() < 70_000


def test_the_embedded_subset_looks_like_the_whole():
    images = fashion_mnist().train.inputs.double() / 255
    assert images.mean().item() == pytest.approx(module.MEAN, abs=0.003)
    assert images.std().item() == pytest.approx(module.STD, abs=0.003)


def test_the_embedded_file_is_small_and_says_where_it_is_from():
    assert EMBEDDED.stat().st_size == EMBEDDED_BYTES <= 7_000_000
    table = pq.read_table(EMBEDDED)
    assert table.column_names == ["split", "source_index", "label", "image"]
    assert Counter(table["split"].to_pylist()) == {"train": 12_000, "test": 2_000}
    assert b"Copyright (c) 2017 Zalando SE" in table.schema.metadata[b"license"]
    assert "Permission is hereby granted" in EMBEDDED.with_name("FASHION_MNIST.md").read_text()


def test_opening_it_twice_gives_the_same_object_and_a_fresh_copy_the_same_hash():
    opened = open_source(DataSpec(name="fashion_mnist"))
    assert open_source(DataSpec.model_validate("fashion_mnist")) is opened
    assert fashion_mnist().sha256 == opened.sha256


@pytest.mark.parametrize("damage", [lambda content: content[:-1000], lambda content: content[:5000] + b"\0" + content[5001:]])
def test_a_damaged_embedded_file_is_reported(monkeypatch, tmp_path, damage):
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(damage(EMBEDDED.read_bytes()))
    monkeypatch.setattr(module, "EMBEDDED", copy)
    with pytest.raises(UserError, match=r"copy\.parquet is damaged: \d+ bytes .* expected 5377005 .* install kdbench again"):
        fashion_mnist()


def test_a_missing_embedded_file_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "EMBEDDED", tmp_path / "gone.parquet")
    with pytest.raises(UserError, match=r"gone\.parquet"):
        fashion_mnist()


@pytest.mark.parametrize("inside", ["", "fashion-mnist", "FashionMNIST", "FashionMNIST/raw"])
def test_the_full_set_is_found_where_kdbench_data_points(small, monkeypatch, tmp_path, inside):
    home = tmp_path / "data sets" / inside
    home.parent.mkdir(parents=True, exist_ok=True)
    small.rename(home)
    monkeypatch.setenv("KDBENCH_DATA", str(tmp_path / "data sets"))
    source = fashion_mnist("full")
    assert source.train.target.tolist() == list(range(TRAIN))
    assert source.train.index.tolist() == list(range(TRAIN))
    assert source.test.index.tolist() == [60_000 + i for i in range(TEST)]


@pytest.mark.parametrize("home", ["debian", "data/FashionMNIST/raw", "home/.cache/kdbench/fashion-mnist"])
def test_the_full_set_is_found_in_the_usual_places(small, tmp_path, home):
    (tmp_path / home).parent.mkdir(parents=True, exist_ok=True)
    small.rename(tmp_path / home)
    assert len(fashion_mnist("full").train) == TRAIN


def test_uncompressed_files_give_the_same_data(small, monkeypatch):
    monkeypatch.setenv("KDBENCH_DATA", str(small))
    packed = fashion_mnist("full").sha256
    for path in list(small.glob("*.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert fashion_mnist("full").sha256 == packed


def test_pixels_come_out_row_by_row(small, monkeypatch):
    monkeypatch.setenv("KDBENCH_DATA", str(small))
    raw = gzip.decompress((small / "train-images-idx3-ubyte.gz").read_bytes())
    image = fashion_mnist("full").train.inputs[2, 0]
    assert image[3].tolist() == list(raw[16 + 2 * 784 + 3 * 28 : 16 + 2 * 784 + 4 * 28])


def test_a_truncated_archive_is_reported_with_its_name_and_what_to_do(small, monkeypatch):
    monkeypatch.setenv("KDBENCH_DATA", str(small))
    path = small / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged \(\d+ bytes: .*delete it, or let KDBENCH_DATA"):
        fashion_mnist("full")


def test_a_file_with_other_content_is_reported_with_both_hashes(small, monkeypatch):
    monkeypatch.setenv("KDBENCH_DATA", str(small))
    (small / "t10k-labels-idx1-ubyte").write_bytes(bytes(12))
    expected = module._FILES["test labels"].sha256[:12]
    with pytest.raises(UserError, match=rf"t10k-labels-idx1-ubyte is damaged: its content is 12 bytes .* expected 12 with {expected}"):
        fashion_mnist("full")


def test_where_it_is_nowhere_the_places_and_the_ways_out_are_named(small, monkeypatch, tmp_path):
    monkeypatch.setenv("KDBENCH_DATA", str(tmp_path / "empty"))
    with pytest.raises(UserError) as caught:
        fashion_mnist("full")
    for part in (str(tmp_path / "empty"), str(tmp_path / "debian"), "KDBENCH_OFFLINE", "apt-get install dataset-fashion-mnist", "embedded"):
        assert part in str(caught.value)


def test_it_is_downloaded_from_the_first_mirror_that_has_it_whole_and_kept(small, monkeypatch, tmp_path):
    monkeypatch.delenv("KDBENCH_OFFLINE")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in small.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:-5])
    monkeypatch.setattr(module, "MIRRORS", [f"{folder.as_uri()}/" for folder in (tmp_path / "gone", broken, small)])
    downloaded = fashion_mnist("full")
    cache = tmp_path / "home/.cache/kdbench/fashion-mnist"
    assert sorted(path.name for path in cache.iterdir()) == sorted(path.name for path in small.iterdir())
    monkeypatch.setattr(module, "MIRRORS", ())
    assert fashion_mnist("full").sha256 == downloaded.sha256


def test_without_a_network_no_half_file_is_left(small, monkeypatch, tmp_path):
    monkeypatch.delenv("KDBENCH_OFFLINE")
    monkeypatch.setattr(module, "MIRRORS", [(tmp_path / "gone").as_uri() + "/"])
    with pytest.raises(UserError, match="can't be downloaded"):
        fashion_mnist("full")
    assert list((tmp_path / "home/.cache/kdbench/fashion-mnist").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(small, monkeypatch, tmp_path):
    monkeypatch.delenv("KDBENCH_OFFLINE")
    (tmp_path / "home").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"can't be stored in .*\.cache/kdbench/fashion-mnist"):
        fashion_mnist("full")
