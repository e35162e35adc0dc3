"""From a record back to what was trained: its experiment, and how that describes its network."""

from __future__ import annotations

from kdbench.errors import UserError
from kdbench.experiment import Experiment, parse_yaml, validated
from kdbench.models.build import ModelSpec
from kdbench.records.record import RunRecord


def experiment_of(record: RunRecord) -> Experiment:
    """The experiment that a record holds. Raises UserError where it holds none, or one that this kdbench can't read."""
    if record.config is None:
        raise UserError(f"run {record.run_id}: its record doesn't hold the experiment, so its model can't be built again")
    where = f"the experiment of run {record.run_id}"
    experiment: Experiment = validated(Experiment, parse_yaml(record.config, where), where)
    return experiment


def model_spec(record: RunRecord, experiment: Experiment) -> ModelSpec:
    """How the experiment describes the network that the record names."""
    teacher = [experiment.teacher.model] if experiment.teacher else []
    specs = teacher if record.role == "teacher" else [spec for spec in experiment.students if spec.label == record.student]
    if len(specs) != 1:
        raise UserError(f"run {record.run_id}: its experiment describes {len(specs)} models called {record.student!r}, expected one")
    return specs[0]
