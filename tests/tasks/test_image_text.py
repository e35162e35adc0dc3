"""Image-text retrieval through the frame: two inputs and two outputs. Its loss, which compares samples: `test_two_workers.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.data.columns import several
from kdbench.data.sources import DataSpec
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.tasks.image_text import ImageText
from kdbench.training.assembly import assemble
from kdbench.training.cache.outputs import open_cache
from kdbench.training.loop import fit
from kdbench.training.outcome import rederive
from kdbench.training.session import LocalSession
from kdbench.training.teacher import LiveTeacher, load_teacher
from tests.training.units import layout, saved_teacher, unit, with_cache

CPU = torch.device("cpu")
DATA = {"name": "shapes", "target": "caption", "size": 32, "train": 60, "test": 12}
TASK: dict[str, Any] = {"name": "image_text", "data": DATA, "val_size": 12, "transfer_size": 40}
STUDENT = {"name": "tiny_towers", "width": 8, "depth": 1}
RECIPE = {"epochs": 1, "batch_size": 10, "lr": 0.05, "precision": "fp64", "augment": {"crop": 2}, "views": 1}
FITNET = {"name": "fitnet", "student_taps": ["image.blocks.0"], "teacher_taps": ["image.blocks.0"]}


def towers(method: Any, folder: Path, **changes: Any) -> Any:
    teacher = saved_teacher(folder, "fp64", {"name": "tiny_towers", "width": 12, "depth": 1, "embedding": 16}, TASK)
    return unit(method, teacher, task=TASK, student=STUDENT, recipe=RECIPE | changes.pop("recipe", {}), **changes)


@pytest.mark.parametrize("method", ["none", "kd", FITNET])
def test_a_training_keeps_both_embeddings_and_its_metrics_are_theirs(tmp_path: Path, method: Any) -> None:
    each = towers(method, tmp_path, recipe={"precision": "fp32"})
    record = fit(each, LocalSession(), layout(tmp_path))
    assert record.predictions_uri is not None
    assert rederive(record, build_task(each.task), (tmp_path / record.predictions_uri).read_bytes()) == record.metrics
    assert record.primary == "recall_at_1"
    assert record.flops is not None
    assert record.flops > 0


def test_a_cached_teacher_says_what_a_live_one_says(tmp_path: Path) -> None:
    each = towers("kd", tmp_path)
    ref = with_cache(each.teacher, each, tmp_path / "cache", ("text.blocks.0", "text.blocks.0.attn.weights"), {"precision": "fp32"})
    batch = next(iter(assemble(each, LocalSession()).loader.batches(0)))
    task = build_task(each.task)
    taps = ("text.blocks.0", "text.blocks.0.attn.weights")
    live = LiveTeacher(load_teacher(ref, task, CPU), task, taps, "fp64")(batch)
    assert ref.cache is not None
    cache = open_cache(ref.cache, taps)
    assert cache is not None
    cached = cache(batch)
    for name, tensor in several(live.prediction).items():
        torch.testing.assert_close(several(cached.prediction)[name].double(), tensor, rtol=1e-5, atol=1e-5)
    for tap in taps:
        torch.testing.assert_close(cached.maps[tap].double(), live.maps[tap], rtol=1e-5, atol=1e-5)


def test_a_task_that_compares_samples_refuses_micro_batches(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task image_text: its loss compares the samples of a batch.*accumulate: 1"):
        assemble(towers("none", tmp_path, recipe={"accumulate": 2}), LocalSession())


def test_captions_refuse_a_mirror_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"column 'tokens': recipe\.augment\.flip would make wrong what this column says"):
        assemble(towers("none", tmp_path, recipe={"augment": {"flip": True}}), LocalSession())


def test_data_without_texts_are_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"needs the inputs `image` and `tokens` .*use target: caption"):
        ImageText(ImageText.Options(data=DataSpec.model_validate({"name": "shapes", "train": 5, "test": 2, "size": 16})))


def test_a_network_for_images_alone_is_refused() -> None:
    task = build_task(TaskSpec.model_validate(TASK))
    with pytest.raises(UserError, match=r"model 'tiny_cnn' doesn't work on image uint8 \[3, 32, 32\], tokens int64 \[13\]"):
        task.build_model(ModelSpec(name="tiny_cnn"))
