"""What a finished training keeps: predictions that give the network's own metrics, at whatever scale its logits are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from kdbench.deploy.verification import verify
from kdbench.errors import UserError
from kdbench.experiment import Experiment, TeacherRef, to_yaml
from kdbench.models.build import ModelSpec
from kdbench.records.bits import unpacked
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.training.checkpoint import save_weights
from kdbench.training.evaluate import predict
from kdbench.training.keys import derived
from kdbench.training.loop import fit
from kdbench.training.outcome import measured_teacher, rederive
from kdbench.training.recorded import experiment_of
from kdbench.training.session import LocalSession
from tests.training import units
from tests.training.units import SmoothNet, layout, smooth_net, unit, with_cache

LOUD = "tests.training.test_outcome:loud_net"


class LoudNet(SmoothNet):
    """Its logits are `scale` times those of the network that it is otherwise; a power of two scales without rounding."""

    scale = 1.0

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale


def loud_net(num_classes: int, in_channels: int, scale: float = 1.0) -> nn.Module:
    model = LoudNet(num_classes, in_channels)
    model.scale = scale
    model(torch.zeros(1, in_channels, 28, 28))
    return model


def measured_at(scale: float, folder: Path) -> RunRecord:
    """The record of one fixed network whose logits are multiplied by `scale`."""
    torch.manual_seed(3)
    weights = folder / "weights.safetensors"
    sha = save_weights(smooth_net(10, 1).state_dict(), weights)
    of = unit(role="teacher", student={"name": LOUD, "scale": scale})
    asked = Experiment.model_validate(
        {
            "name": "loud",
            "task": units.TASK,
            "teacher": {"model": {"name": LOUD, "scale": scale}},
            "students": ["tiny_cnn"],
            "methods": ["kd"],
        }
    )
    record = measured_teacher(of, weights, LocalSession(), layout(folder), of.key)
    return keyed(record.model_copy(update={"teacher_sha": sha, "config": to_yaml(asked)}))


def keyed(record: RunRecord) -> RunRecord:
    """With the keys that a run would have given it."""
    keys = derived(record, experiment_of(record))
    return record.model_copy(update={"unit_key": keys.unit_keys[0], "protocol_hash": keys.protocol_hash})


def kept(record: RunRecord, folder: Path) -> Tensor:
    return load((folder / str(record.predictions_uri)).read_bytes())["prediction"]


@pytest.mark.parametrize(
    ("scale", "precision"),
    [
        (1.0, torch.float16),
        (2.0**20, torch.float32),  # above 65,504, the largest number of half precision
        (2.0**-20, torch.float32),  # so close to 0 that half precision has few numbers there, and classes tie
    ],
)
def test_the_scale_of_logits_does_not_change_the_accuracy(scale: float, precision: torch.dtype, tmp_path: Path) -> None:
    record = measured_at(scale, tmp_path)
    (tmp_path / "plain").mkdir()
    plain = measured_at(1.0, tmp_path / "plain")
    assert record.test_metric == plain.test_metric
    prediction = kept(record, tmp_path)
    assert prediction.dtype == precision
    assert prediction.isfinite().all()
    task = build_task(TaskSpec.model_validate(units.TASK))
    stored = (tmp_path / str(record.predictions_uri)).read_bytes()
    assert rederive(record, task, stored) == record.metrics
    assert record.samples_right is not None
    assert 100 * unpacked(record.samples_right).mean() == pytest.approx(record.test_metric)
    ResultStore(tmp_path).append(record)
    found = verify(tmp_path)
    assert (found.derived, found.problems) == (1, ())


def test_a_record_says_what_its_metric_can_show(tmp_path: Path) -> None:
    """A board cuts intervals at the bounds, and takes no error to be smaller than that of the rounding."""
    record = fit(unit(role="final"), LocalSession(), layout(tmp_path))
    samples = len(build_task(unit().task).splits().test)
    assert record.primary_scale == {"step": 100 / samples, "low": 0.0, "high": 100.0, "smallest_gap": 0.5}
    steps = record.test_metric / record.primary_scale["step"]
    assert steps == pytest.approx(round(steps))
    ResultStore(tmp_path).append(record)
    assert ResultStore(tmp_path).scan()[0].primary_scale == record.primary_scale


def test_predictions_that_half_precision_serves_are_kept_as_they_always_were(tmp_path: Path) -> None:
    """Bit by bit: older code packed float16 with the positions of the samples."""
    record = measured_at(1.0, tmp_path)
    task = build_task(TaskSpec.model_validate(units.TASK))
    test = task.splits().test
    network = task.build_model(ModelSpec(name=LOUD, weights=tmp_path / "weights.safetensors"))
    half = predict(network, test, LocalSession(), "fp32", task).half()
    assert torch.equal(kept(record, tmp_path), half)
    assert record.metrics == task.metrics(half.float(), test.target)
    older = save({"prediction": half.contiguous(), "index": test.index.contiguous()})
    assert record.predictions_sha256 == hashlib.sha256(older).hexdigest()
    assert rederive(record, task, older) == record.metrics


def test_a_student_of_a_teacher_with_large_logits_is_measured_against_all_of_them(tmp_path: Path) -> None:
    """The cache refuses such logits in fp16, and says what to do; in fp32 the agreement is that of the teacher's own predictions."""
    teacher = measured_at(2.0**20, tmp_path)
    weights = tmp_path / "weights.safetensors"
    ref = TeacherRef(
        model=ModelSpec.model_validate({"name": LOUD, "scale": 2.0**20}),
        weights=weights,
        sha=teacher.teacher_sha,
        metric=teacher.test_metric,
    )
    learns = unit("kd", ref, recipe={"epochs": 1, "lr": 0.001})
    with pytest.raises(UserError, match=r"the teacher's \S+ reaches .* set cache.precision to fp32"):
        with_cache(ref, learns, tmp_path / "refused")
    cached = with_cache(ref, learns, tmp_path / "cache", options={"precision": "fp32"})
    record = fit(learns.model_copy(update={"teacher": cached}), LocalSession(), layout(tmp_path))
    store = ResultStore(tmp_path)
    student = record.model_copy(update={"config": teacher.config, "student": "tiny_cnn", "params_count": None})
    for one in (teacher, keyed(student)):
        store.append(one)
    found = verify(tmp_path)
    assert (found.derived, found.compared, found.problems) == (2, 1, ())
