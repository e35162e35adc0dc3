"""A task of a user's whose targets no view can move is refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.errors import UserError
from kdbench.experiment import Experiment
from kdbench.records.store import ResultStore
from kdbench.tasks.base import Splits
from kdbench.tasks.segmentation import Segmentation


class Depth(Segmentation):
    """A number for each pixel."""

    def splits(self) -> Splits:
        cut = super().splits()
        return replace(cut, **{name: replace(part, target=part.target / 2) for name in PARTS for part in [getattr(cut, name)]})


class Layers(Segmentation):
    """Several labels for each pixel."""

    def splits(self) -> Splits:
        cut = super().splits()
        parts: dict[str, Any] = {
            name: replace(part, target=part.target[:, None].repeat(1, 2, 1, 1)) for name in PARTS for part in [getattr(cut, name)]
        }
        return replace(cut, **parts)


PARTS = ("train", "transfer", "val", "test")


@pytest.mark.parametrize(
    ("task", "message"), [("Depth", r"float32 \[17, 32, 32\] needs a kind"), ("Layers", r"uint8 \[17, 2, 32, 32\] needs a kind")]
)
def test_targets_that_views_can_not_move_end_the_run_at_its_beginning(tmp_path: Path, task: str, message: str) -> None:
    asked = Experiment.model_validate(
        {
            "name": "targets",
            "task": {"name": f"tests.benchmark.test_targets:{task}", "data": {"name": "shapes", "train": 20, "test": 5}},
            "teacher": {"model": "tiny_fcn"},
            "students": ["tiny_fcn"],
            "methods": ["none"],
            "recipe": {"epochs": 1, "batch_size": 10, "augment": {"flip": True}},
        }
    )
    with pytest.raises(UserError, match=message) as caught:
        run(asked, tmp_path / "results", Unwatched())
    assert "\n" not in str(caught.value)
    assert ResultStore(tmp_path / "results").scan() == []
