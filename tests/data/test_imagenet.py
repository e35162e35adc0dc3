"""ImageNet from one's own copy: found by its layout, never half of it, never downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kdbench.data.imagenet as module
from kdbench.data.facts import NotHere
from kdbench.data.imagenet import imagenet
from kdbench.errors import UserError


def photographs(root: Path, classes: int) -> None:
    for part in ("train", "val"):
        for number in range(classes):
            folder = root / part / f"n{number:04}"
            folder.mkdir(parents=True)
            Image.fromarray(np.full((40, 50, 3), 10 * number, np.uint8)).save(folder / "one.png")


def test_it_is_found_below_the_named_folder_and_has_to_be_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path / "imagenet", classes=3)
    monkeypatch.setenv("KDBENCH_DATA", str(tmp_path))
    with pytest.raises(UserError, match="holds 3 classes, expected 1000; use image_folder"):
        imagenet(size=32)
    monkeypatch.setattr(module, "CLASSES", 3)
    source = imagenet(size=32)
    assert (source.name, source.image_shape, len(source.train), len(source.test)) == ("imagenet", (3, 32, 32), 3, 3)


def test_where_it_is_not_its_home_and_its_facts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotHere, match=r"no train and val below data; get ILSVRC 2012 from https://image-net\.org") as caught:
        imagenet()
    facts = caught.value.facts
    assert (facts.classes, facts.side, facts.train, facts.test) == (1000, 224, 1_281_167, 50_000)
