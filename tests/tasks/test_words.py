"""The task classification on words, and on an image with words: the same path as images alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.data.batch import Part
from kdbench.data.columns import Columns, several
from kdbench.data.loader import in_order
from kdbench.data.shape_targets import CAPTION_TOKENS
from kdbench.data.shapes import shapes
from kdbench.data.sources import Source
from kdbench.deploy.export import Deployed, export, write_onnx
from kdbench.deploy.verification import verify
from kdbench.errors import UserError
from kdbench.experiment import Experiment
from kdbench.models.build import ModelSpec
from kdbench.models.towers import TextTower
from kdbench.own_code import TRUST_VARIABLE
from kdbench.records.store import ResultStore
from kdbench.tasks.base import Role
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.tasks.classification import Classification
from kdbench.training.assembly import assemble
from kdbench.training.loop import fit
from kdbench.training.outcome import rederive
from kdbench.training.session import LocalSession
from tests.training.units import layout, saved_teacher, unit, with_cache


def captions(image: bool = False) -> Source:
    """Captions of scenes, of which the class is the kind that is named first; with their pictures where asked."""
    drawn = shapes(train=60, test=12, size=16, target="caption")
    first = drawn.vocabulary.encode("circle square triangle cross ring", 5) if drawn.vocabulary is not None else []

    def part(of: Part) -> Part:
        inputs = several(cast(Any, of.inputs))
        there = torch.stack([inputs["tokens"] == word for word in first])  # [kinds, N, L]
        places = there.long().argmax(2).masked_fill(~there.any(2), CAPTION_TOKENS)
        return Part(inputs if image else inputs["tokens"], places.argmin(0), of.index)

    mean, std = (drawn.mean, drawn.std) if image else ((), ())
    return Source("captions", part(drawn.train), part(drawn.test), 5, drawn.class_names, mean, std, vocabulary=drawn.vocabulary)


class ImageAndWords(nn.Module):
    """Class logits of a picture and its caption."""

    def __init__(self, num_classes: int, in_channels: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 4, stride=4)
        self.text = TextTower(8, 1, 2, outputs=8, vocabulary=vocabulary, length=length)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        seen = self.conv(inputs["image"]).relu().mean((2, 3))
        logits: Tensor = self.fc(torch.cat([seen, self.text(inputs["tokens"])], 1))
        return logits


CASES = {
    "words": ({"name": "tests.tasks.test_words:captions"}, {"name": "tiny_text", "width": 8, "depth": 1}),
    "image and words": (
        {"name": "tests.tasks.test_words:captions", "image": True},
        {"name": "tests.tasks.test_words:ImageAndWords"},
    ),
}


@pytest.mark.parametrize("method", ["none", "kd", "dkd"])
@pytest.mark.parametrize("case", CASES)
def test_a_classifier_of_words_learns_from_a_cached_teacher_and_is_measured(tmp_path: Path, case: str, method: str) -> None:
    data, model = CASES[case]
    task = {"name": "classification", "data": data, "val_size": 12}
    teacher = saved_teacher(tmp_path, "fp32", model, task)
    asked = unit(method, teacher, task=task, student=model, recipe={"epochs": 2, "batch_size": 12, "lr": 0.1})
    cached = asked.model_copy(update={"teacher": with_cache(teacher, asked, tmp_path / "cache")})
    live, kept = (fit(each, LocalSession(), layout(tmp_path / name)) for name, each in (("live", asked), ("kept", cached)))
    assert live.metrics.keys() == {"accuracy", "nll", "ece"}
    assert kept.metrics["nll"] == pytest.approx(live.metrics["nll"], rel=1e-2)
    assert live.predictions_uri is not None
    assert rederive(live, build_task(asked.task), (tmp_path / "live" / live.predictions_uri).read_bytes()) == live.metrics


def test_steps_for_images_are_refused_for_words(tmp_path: Path) -> None:
    data, model = CASES["words"]
    asked = unit(
        task={"name": "classification", "data": data, "val_size": 12}, student=model, recipe={"augment": {"mixup": 0.2}, "batch_size": 8}
    )
    with pytest.raises(UserError, match=r"recipe\.augment\.mixup mixes two images"):
        assemble(asked, LocalSession())


def test_a_network_of_timms_for_images_is_refused_for_words() -> None:
    task = build_task(TaskSpec.model_validate({"name": "classification", "data": CASES["words"][0], "val_size": 12}))
    with pytest.raises(UserError, match="is a network of timm's for images, and these data have none"):
        task.build_model(ModelSpec(name="resnet18"))


def test_a_graph_takes_words(tmp_path: Path) -> None:
    task = build_task(TaskSpec.model_validate({"name": "classification", "data": CASES["words"][0], "val_size": 12}))
    network = Deployed(task.build_model(ModelSpec.model_validate(CASES["words"][1]))).eval()
    words = next(in_order(task.splits().test, 12)).inputs
    found = write_onnx(network, words, tmp_path / "words.onnx", {"model": "tiny_text"})
    with torch.no_grad():
        torch.testing.assert_close(found, network(words), rtol=1e-5, atol=1e-6)
    session = onnxruntime.InferenceSession(str(tmp_path / "words.onnx"), providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["inputs"]


class Privileged(Classification):
    """A teacher sees a picture and its caption, a student the caption alone."""

    def inputs_for(self, role: Role, inputs: Columns) -> Columns:
        return inputs if role == "teacher" else {"tokens": several(inputs)["tokens"]}


class CaptionAlone(nn.Module):
    """Class logits of a caption; it refuses to see anything else."""

    def __init__(self, num_classes: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.text = TextTower(8, 1, 2, outputs=num_classes, vocabulary=vocabulary, length=length)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        assert inputs.keys() == {"tokens"}, "a student sees what is the teacher's"
        logits: Tensor = self.text(inputs["tokens"])
        return logits


def test_what_is_the_teachers_alone_reaches_no_student_on_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, measured, verified and exported; the file's metadata name the inputs that its graph has, and the words of its tokens."""
    here = "tests.tasks.test_words"
    data, network = CASES["image and words"]
    asked = {
        "name": "privileged",
        "task": {"name": f"{here}:Privileged", "data": data, "val_size": 12},
        "teacher": {"model": network, "recipe": {"epochs": 1}},
        "students": [{"name": f"{here}:CaptionAlone", "label": "words"}],
        "methods": ["none", "kd"],
        "recipe": {"epochs": 1, "batch_size": 12, "precision": "fp32", "memory_format": "contiguous", "compile": False},
        "seeds": 1,
    }
    results = tmp_path / "results"
    assert run(Experiment.model_validate(asked), results, Unwatched()).failures == ()
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    assert verify(results).problems == ()
    record = next(record for record in ResultStore(results).scan(role="final") if record.label == "kd")
    export(record, results, "onnx", tmp_path / "words.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "words.onnx"), providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    vocabulary = captions().vocabulary
    assert vocabulary is not None
    assert json.loads(facts["input_shapes"]) == {"tokens": [CAPTION_TOKENS]}
    assert [given.name for given in session.get_inputs()] == ["tokens"]
    assert json.loads(facts["vocabulary"]) == list(vocabulary.words)
    export(record, results, "pt2", tmp_path / "words.pt2")
    inputs = several(next(in_order(captions(image=True).test, 3)).inputs)["tokens"]
    graph = session.run(None, {"tokens": inputs.numpy()})[0]
    torch.testing.assert_close(torch.export.load(tmp_path / "words.pt2").module()({"tokens": inputs}), torch.from_numpy(graph))
