"""Test images that training images nearly equal: the hash, its distance, what is compared, and what is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.boards.leaderboard import boards
from kdbench.data.batch import Part
from kdbench.data.near_duplicates import counted_once, difference_hashes, near_duplicates, nearly_equal
from kdbench.data.sources import DataSpec, open_source
from kdbench.experiment import Experiment
from kdbench.records.store import ResultStore


def noise(count: int, seed: int, size: int = 32) -> torch.Tensor:
    coarse = torch.rand(count, 3, 8, 9, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")).to(torch.uint8)


def part(images: torch.Tensor, rows: torch.Tensor | None = None) -> Part:
    count = len(images) if rows is None else len(rows)
    return Part(images, torch.zeros(count, dtype=torch.int64), torch.arange(count), rows=rows)


def test_a_bit_says_whether_a_pixel_is_brighter_than_its_right_neighbour() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 1, 8, 9), dtype=np.uint8))
    for image, found in zip(pixels[:, 0].tolist(), difference_hashes(pixels).tolist(), strict=True):
        bits = [row[column] > row[column + 1] for row in image for column in range(8)]
        assert found == sum(1 << (63 - place) for place, bit in enumerate(bits) if bit)


def test_distances_of_up_to_four_bits_are_near() -> None:
    among = np.array([0, 2**64 - 1], dtype=np.uint64)
    of = np.array([0, 0b1111, 0b11111, 2**64 - 1 - 0b1011, 0xAAAAAAAAAAAAAAAA, 0b1111], dtype=np.uint64)
    assert nearly_equal(of, among).tolist() == [True, True, False, True, False, True]


def test_copies_that_were_compressed_brightened_or_enlarged_are_found_and_others_are_not() -> None:
    train = noise(200, 1)
    copies = [train[3], (train[5].float() * 0.9).to(torch.uint8), torch.nn.functional.interpolate(train[7][None], size=(32, 32))[0]]
    assert near_duplicates(part(train), part(torch.stack([*copies, *noise(50, 2)]))) == 3


def test_a_part_counts_its_own_rows_alone() -> None:
    images = noise(20, 3)
    assert near_duplicates(part(images, torch.arange(10)), part(images, torch.arange(5, 20))) == 5


def test_images_in_files_are_compared_as_they_are_seen(tmp_path: Path) -> None:
    images = noise(12, 4, size=64)
    for name, rows in (("train", range(8)), ("val", range(6, 12))):
        for row in rows:
            folder = tmp_path / name / f"class{row % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[row].permute(1, 2, 0).numpy()).save(folder / f"{row}.jpg", quality=90)
    source = open_source(DataSpec.model_validate({"name": "image_folder", "path": str(tmp_path), "size": 32, "in_memory": False}))
    assert source.train.encoded is not None
    assert near_duplicates(source.train, source.test) == 2


@pytest.mark.parametrize("inputs", [torch.rand(4, 10), torch.zeros(4, 3, 4, 4, dtype=torch.uint8), torch.zeros(4, 12, dtype=torch.int64)])
def test_samples_that_are_no_images_are_not_compared(inputs: torch.Tensor) -> None:
    assert near_duplicates(part(inputs), part(inputs)) is None


def test_more_than_can_be_compared_in_minutes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdbench.data.near_duplicates.MOST_PAIRS", 99)
    assert near_duplicates(part(noise(10, 1)), part(noise(10, 1))) is None


def test_a_data_set_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = part(noise(10, 1))
    assert counted_once(images, images, "ab" * 32) == 10
    monkeypatch.setattr("kdbench.data.near_duplicates.near_duplicates", lambda train, test: 3)
    assert counted_once(images, images, "ab" * 32) == 10
    assert counted_once(images, images, "cd" * 32) == 3
    [kept, other] = sorted((tmp_path / "kdbench" / "near-duplicates").iterdir())
    for damaged in ("", "true", "11", "-1", "{", '"x"'):
        kept.write_text(damaged)
        assert counted_once(images, images, "ab" * 32) == 3
    assert other.name == f"{'cd' * 16}.json"


def test_where_nothing_can_be_kept_it_is_counted_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    images = part(noise(4, 1))
    assert counted_once(images, images, "ab" * 32) == 4


def test_a_run_puts_the_number_on_record_and_the_board_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = noise(60, 4, size=16)
    for name, rows in (("train", range(40)), ("test", range(37, 60))):
        for row in rows:
            folder = tmp_path / "pictures" / name / f"class{row % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[row].permute(1, 2, 0).numpy()).save(folder / f"{row}.png")
    asked = {
        "name": "near",
        "task": {
            "name": "classification",
            "data": {"name": "image_folder", "path": str(tmp_path / "pictures"), "size": 16},
            "val_size": 10,
        },
        "students": [{"name": "tiny_cnn", "width": 4}],
        "methods": ["none"],
        "recipe": {"epochs": 1, "batch_size": 10, "precision": "fp32", "memory_format": "contiguous", "compile": False},
        "seeds": 1,
    }
    run(Experiment.model_validate(asked), tmp_path / "results", Unwatched())
    [record] = ResultStore(tmp_path / "results").scan(role="final")
    assert record.near_duplicates == 3
    [board] = boards([record])
    said = f"3 test images of {record.data} ({record.data_hash[:8]}) have a near-duplicate among the training images"
    assert any(note.startswith(said) for note in board.notes)
    assert not any("near-duplicate" in note for note in boards([record.model_copy(update={"near_duplicates": 0})])[0].notes)
