"""Makes `results/` beside this file, with the code of commit eaaa7df: what the rules of keys before this one have left on users' disks.

    git worktree add /tmp/before eaaa7df && cd tests/benchmark/earlier && /tmp/before/.venv/bin/python make.py

The pictures stay as they are where they are there already, as their names and sizes are a part of what was kept.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.experiment import Experiment

HERE = Path(__file__).parent
SHAPES = {"name": "shapes", "train": 60, "test": 10, "target": "class"}
RECIPE = {"epochs": 1, "batch_size": 20, "lr": 0.05, "precision": "fp32", "memory_format": "contiguous", "compile": False}


def experiment(name: str, **changes: Any) -> Experiment:
    """An experiment that is trained in a moment."""
    return Experiment.model_validate(
        {
            "name": name,
            "task": {"name": "classification", "data": SHAPES, "val_size": 20},
            "teacher": {"model": {"name": "tiny_cnn", "width": 4}},
            "students": [{"name": "tiny_cnn", "width": 2}],
            "methods": ["none", "kd"],
            "recipe": RECIPE,
            "seeds": 1,
            **changes,
        }
    )


def given(weights: Path, stem_stride: int) -> Experiment:
    """A teacher from a file. Two of them that differ in `stem_stride` alone are one teacher by the earlier rule."""
    model = {"name": "tiny_cnn", "width": 4, "stem_stride": stem_stride}
    return experiment("given", teacher={"model": model, "weights": str(weights)})


def searched() -> Experiment:
    """A search on the user's task of `earlier_task.py`."""
    search = {"trials": 2, "sampler": "random", "scheduler": "none", "top_k": 1}
    task = {"name": "earlier_task:Versioned", "data": SHAPES, "val_size": 20}
    return experiment("searched", task=task, methods=["kd"], search=search)


def pictures() -> Experiment:
    """Images in files, which the earlier rule knew by names and sizes."""
    return experiment(
        "pictures",
        task={"name": "classification", "data": {"name": "image_folder", "path": "pictures", "size": 16}, "val_size": 4},
        methods=["none"],
        recipe={**RECIPE, "batch_size": 4},
    )


def draw(folder: Path) -> None:
    """Red and blue squares as PNG files of some 100 bytes."""
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for channel, name in ((0, "red"), (2, "blue")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.zeros((16, 16, 3), dtype=np.uint8)
                pixels[..., channel] = random.integers(100, 255)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")


def main() -> None:
    results = HERE / "results"
    shutil.rmtree(results, ignore_errors=True)
    if not (HERE / "pictures").exists():
        draw(HERE / "pictures")
    run(experiment("plain"), results, Unwatched())
    (weights,) = sorted((results / "teachers").rglob("model.safetensors"))
    for stem_stride in (1, 2):
        run(given(weights.relative_to(HERE), stem_stride), results, Unwatched())
    run(searched(), results, Unwatched())
    run(pictures(), results, Unwatched())
    for folder in ("locks", "logs", "checkpoints", "choices", "data"):
        shutil.rmtree(results / folder, ignore_errors=True)


if __name__ == "__main__":
    main()
