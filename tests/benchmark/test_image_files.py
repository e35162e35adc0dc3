"""A whole run on image files: from a folder to a board, with every augmentation, and what is wrong said before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdbench.benchmark.dry_run import dry_run
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.cli.pages import dry_run_page
from kdbench.errors import UserError
from kdbench.experiment import Experiment
from kdbench.records.store import ResultStore
from tests.console import Kdbench

EVERYTHING = {"resized_crop": 0.3, "crop": 2, "flip": True, "operations": 1, "color": 0.3, "erase": 0.3, "mixup": 0.2, "cutmix": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Reddish and bluish noise: 20 training and 4 test images of each."""
    random = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 4)):
        for channel, name in ((0, "red"), (2, "blue")):
            (tmp_path / "colours" / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 120, (24, 30, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(tmp_path / "colours" / part / name / f"{k}.jpg")
    return tmp_path / "colours"


def experiment(folder: Path, **changes: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "colours",
            "task": {"name": "classification", "data": {"name": "image_folder", "path": str(folder), "size": 16}, "val_size": 8},
            "teacher": {"model": "tiny_cnn"},
            "students": [{"name": "tiny_cnn", "width": 4}],
            "methods": ["none", "kd"],
            "recipe": {
                "epochs": 3,
                "batch_size": 8,
                "precision": "fp32",
                "memory_format": "contiguous",
                "compile": False,
                "augment": EVERYTHING,
                "views": 2,
            },
            "seeds": 1,
            **changes,
        }
    )


def test_teacher_cache_and_students_learn_from_files(folder: Path, tmp_path: Path) -> None:
    summary = run(experiment(folder), tmp_path / "results", Unwatched())
    assert summary.failures == ()
    records = {record.label: record for record in ResultStore(tmp_path / "results").scan() if record.role == "final"}
    assert set(records) == {"none", "kd"}
    assert records["kd"].agreement is not None  # with the cached outputs for the test images
    again = run(experiment(folder), tmp_path / "results", Unwatched())
    assert (again.trained, again.found) == (0, summary.trained)


def test_mixtures_of_masks_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    masks = {
        "task": {"name": "segmentation", "data": {"name": "shapes", "train": 20, "test": 5}},
        "teacher": {"model": "tiny_fcn"},
        "students": ["tiny_fcn"],
        "recipe": {"augment": {"mixup": 0.2}},
    }
    with pytest.raises(UserError, match=r"recipe\.augment\.mixup .* needs one label per image"):
        run(experiment(tmp_path, **masks), tmp_path / "results", Unwatched())
    assert ResultStore(tmp_path / "results").scan() == []


class Heard(Unwatched):
    """Keeps the notes and counts the epochs."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.epochs = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def epoch(self, *_: object) -> None:
        self.epochs += 1


@pytest.mark.parametrize("broken", ["train/red/3.jpg", "val/blue/2.jpg"])
def test_a_broken_image_ends_the_run_before_anything_is_trained(folder: Path, tmp_path: Path, broken: str) -> None:
    (folder / broken).write_bytes(b"no image")
    heard = Heard()
    with pytest.raises(UserError, match=rf"colours/{broken} can't be decoded") as caught:
        run(experiment(folder), tmp_path / "results", heard)
    assert heard.epochs == 0
    assert ResultStore(tmp_path / "results").scan() == []
    with pytest.raises(UserError, match=rf"colours/{broken} can't be decoded"):
        dry_run(experiment(folder))
    assert "\n" not in str(caught.value)


def test_a_run_without_a_teacher_looks_at_the_images_first_too(folder: Path, tmp_path: Path) -> None:
    (folder / "val/blue/2.jpg").write_bytes(b"no image")
    heard = Heard()
    with pytest.raises(UserError, match=r"val/blue/2\.jpg can't be decoded"):
        run(experiment(folder, teacher=None, methods=["none"]), tmp_path / "results", heard)
    assert heard.epochs == 0


def test_a_run_and_a_dry_run_say_what_was_read_and_what_was_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "train/red/notes.txt").write_text("x")
    (folder / "train/red/3.jpg").rename(folder / "train/red/3.heic")
    said = f"{folder}: read 39 images (39 .jpg) to train on and 8 images (8 .jpg) to test on; left out: 1 .heic, 1 .txt"
    heard = Heard()
    run(experiment(folder, teacher=None, methods=["none"]), tmp_path / "results", heard)
    assert heard.notes.count(said) == 1
    assert said in dry_run_page(dry_run(experiment(folder))).splitlines()


UNSEEN = (
    "transparent pixels are shown as if they were opaque, in 32 of 32 training images, 8 of 8 validation images; "
    "only the first of several frames is shown, in 1 of 8 test images"
)


@pytest.fixture
def icons(folder: Path) -> Path:
    """Training images whose colours are only where they can't be seen, a test image of two frames, and folders that are not read."""
    for path in sorted(folder.glob("train/*/*.jpg")):
        transparent = Image.open(path).convert("RGBA")
        transparent.putalpha(0)
        transparent.save(path.with_suffix(".png"))
        path.unlink()
    frames = [Image.open(folder / f"val/red/{k}.jpg").convert("P") for k in range(2)]
    frames[0].save(folder / "val/red/0.gif", save_all=True, append_images=frames[1:])
    (folder / "val/red/0.jpg").unlink()
    (folder / "more").mkdir()
    (folder / "train/.old").mkdir()
    return folder


def test_a_run_says_once_what_of_images_is_not_shown(icons: Path, tmp_path: Path) -> None:
    heard = Heard()
    run(experiment(icons, methods=["none"]), tmp_path / "results", heard)
    assert [note for note in heard.notes if " shown" in note] == [UNSEEN]
    again = Heard()
    run(experiment(icons, methods=["none"]), tmp_path / "results", again)  # nothing is left to do
    assert [note for note in again.notes if " shown" in note] == []
    more = Heard()
    run(experiment(icons, methods=["none"], seeds=2), tmp_path / "results", more)
    assert [note for note in more.notes if " shown" in note] == [UNSEEN]


def test_a_dry_run_prints_what_of_images_is_not_shown_and_not_read(icons: Path, tmp_path: Path, kdbench: Kdbench) -> None:
    (tmp_path / "colours.yaml").write_text(experiment(icons).model_dump_json(exclude_unset=True))
    ended = kdbench("run", tmp_path / "colours.yaml", "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert UNSEEN in lines
    read = f"{icons}: read 40 images (40 .png) to train on and 8 images (1 .gif, 7 .jpg) to test on"
    assert f"{read}; left out: 1 folders beside train and val (more), 1 hidden" in lines
