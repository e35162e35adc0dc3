"""Each task of the catalogue as small as it still says something: its data, networks, and a method that looks inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

SCENES = {"name": "shapes", "size": 32, "train": 60, "test": 12}
CUT = {"val_size": 12, "transfer_size": 36}
RECIPE = {
    "epochs": 2,
    "batch_size": 12,
    "lr": 0.01,
    "precision": "fp32",
    "memory_format": "contiguous",
    "augment": {"crop": 2},
    "views": 2,
}


class Tiny(NamedTuple):
    """What an experiment says of a task.

    teacher, student: models as users have them. smooth: a student without batch statistics, which is the same trained by one worker or by
    two. looks_inside: a method that reads maps of both networks.
    """

    task: dict[str, Any]
    teacher: dict[str, Any]
    student: dict[str, Any]
    smooth: dict[str, Any]
    looks_inside: dict[str, Any]


def _fitnet(tap: str) -> dict[str, Any]:
    return {"name": "fitnet", "student_taps": [tap], "teacher_taps": [tap]}


# Its batch statistics are frozen.
MASKS: dict[str, Any] = {"name": "mask_rcnn", "backbone": "resnet18", "preset": "coco_v1", "width": 8, "levels": 2, "anchor": 16}
MASKS |= {"hidden": 8, "proposals": 20, "learned": 20, "drawn": 6}
EACH_TASK = {
    "classification": Tiny(
        {"name": "classification", "data": {**SCENES, "size": 28, "target": "class"}, **CUT},
        {"name": "tiny_cnn", "width": 6},
        {"name": "tiny_cnn", "width": 4},
        {"name": "tests.training.units:smooth_net"},
        _fitnet("stage:-1"),
    ),
    "segmentation": Tiny(
        {"name": "segmentation", "data": SCENES, **CUT},
        {"name": "tiny_fcn", "width": 6},
        {"name": "tiny_fcn", "width": 4},
        {"name": "tests.training.units:dense_net"},
        _fitnet("stage:-1"),
    ),
    "detection": Tiny(
        {"name": "detection", "data": {**SCENES, "target": "boxes"}, **CUT},
        {"name": "tiny_fcos", "width": 6},
        {"name": "tiny_fcos", "width": 4},
        {"name": "tests.training.units:PlainDetector"},
        _fitnet("level:0"),
    ),
    "instance_masks": Tiny(
        {"name": "instance_masks", "data": {**SCENES, "target": "masks"}, **CUT},
        {**MASKS, "width": 12},
        MASKS,
        MASKS,
        _fitnet("level:0"),
    ),
    "multi_label": Tiny(
        {"name": "multi_label", "data": {**SCENES, "target": "present"}, **CUT},
        {"name": "tiny_cnn", "width": 6},
        {"name": "tiny_cnn", "width": 4},
        {"name": "tests.training.units:yes_or_no_net"},
        _fitnet("stage:-1"),
    ),
    "image_text": Tiny(
        {"name": "image_text", "data": {**SCENES, "target": "caption"}, **CUT},
        {"name": "tiny_towers", "width": 12},
        {"name": "tiny_towers", "width": 8, "depth": 1},
        {"name": "tests.training.units:PairNet"},
        _fitnet("image.blocks.0"),
    ),
}


def experiment_file(task: str, folder: Path) -> Path:
    """A file with an experiment on a task: a teacher, a search of two random trials a method, two final seeds."""
    tiny = EACH_TASK[task]
    asked = {
        "name": "tiny",
        "task": tiny.task,
        "teacher": {"model": tiny.teacher, "recipe": {"epochs": 8}},
        "students": [tiny.student],
        "methods": ["none", "kd", tiny.looks_inside],
        "recipe": RECIPE,
        "search": {
            "trials": 2,
            "sampler": "random",
            "scheduler": "none",
            "top_k": 2,
            "also": {"recipe.lr": {"low": 0.005, "high": 0.05, "log": True}},
        },
        "seeds": 2,
        "control_seeds": 2,
        "runtime": {"checkpoint_seconds": 0.05},
    }
    file = folder / f"{task}.yaml"
    file.write_text(yaml.safe_dump(asked, sort_keys=False))
    return file
