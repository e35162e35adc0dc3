"""A student in MLflow's model registry: as a graph with its tensors (torch.export), so that loading it unpickles and runs no code."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kdbench.data.columns import Columns, named
from kdbench.deploy.export import Deployed, deployed, difference_allowed, inputs_in_words, silent
from kdbench.errors import KDBenchError, RunFailed, UserError, in_one_line
from kdbench.models.trace import sample_shapes
from kdbench.records.record import RunRecord
from kdbench.tracking import RUN_TAG, MlflowTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACT = "model"
_TRACED_IMAGES = 2  # one would be taken for a constant


@dataclass(frozen=True)
class Registered:
    """A version of a registered model. uri: what `mlflow.pytorch.load_model` takes. new: False where the run was registered before.

    difference: the largest of all predictions of `images` test images, at most `tolerance`.
    """

    uri: str
    tracking_uri: str
    new: bool
    images: int
    difference: float
    tolerance: float
    inputs: str
    output_shape: tuple[int, ...] | dict[str, tuple[int, ...]]


def register(record: RunRecord, store_root: Path, name: str, tracker: MlflowTracker) -> Registered:
    """Put the network of `record` into the registry as a version of the model `name`, once: the same run gives the same version.

    It takes float32 images [N, C, H, W] in [0, 1] and gives what its head gives; resizing and normalisation are part of it. It is
    registered only once what was loaded gave what the original gives. Raises UserError where the record has no weights, the network has
    several inputs or the registry refuses the name, RunFailed where it can't be written as a graph or MLflow can't be reached.
    """
    network, inputs, facts = deployed(record, store_root)
    if isinstance(inputs, dict):
        raise UserError(f"--register {name}: MLflow traces networks of one input, this one has {', '.join(inputs)}; use --format onnx")
    with torch.no_grad():
        expected = network(inputs)
    try:
        client = tracker.client()
        run_id = record.mlflow_run_id or tracker.log_run(None, f"{record.label} · seed {record.seed}", f"registered/{record.unit_key}")
        if run_id is None:
            raise RunFailed(f"MLflow at {tracker.name} can't be written, so nothing was registered")
        with tempfile.TemporaryDirectory() as scratch, silent():
            folder = Path(scratch) / ARTIFACT
            _save(network, inputs, expected, folder, facts)
            difference, tolerance = difference_allowed(_loaded(folder, inputs), expected, f"model {name}")
            version, new = _version(client, name, run_id, folder, facts)
    except KDBenchError:
        raise
    except Exception as error:  # MLflow passes on whatever its database driver, its object store or torch.export raises
        raise _explained(error, name) from error
    return Registered(
        uri=f"models:/{name}/{version}",
        tracking_uri=tracker.name,
        new=new,
        images=len(inputs),
        difference=difference,
        tolerance=tolerance,
        inputs=inputs_in_words(inputs, "pt2"),
        output_shape=sample_shapes(expected),
    )


def _save(network: Deployed, inputs: Tensor, expected: Columns, folder: Path, facts: dict[str, str]) -> None:
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    def schema(columns: Columns) -> Schema:
        """Tensors by name, or one without."""
        specs = [TensorSpec(tensor[:0].numpy().dtype, (-1, *tensor.shape[1:]), name or None) for name, tensor in named(columns, "").items()]
        return Schema(list[ColSpec | TensorSpec](specs))

    signature = ModelSignature(inputs=schema(inputs), outputs=schema(expected))
    needed = [f"torch=={torch.__version__.partition('+')[0]}", f"mlflow=={mlflow.__version__}", f"numpy=={np.__version__}"]
    mlflow.pytorch.save_model(
        network,
        str(folder),
        serialization_format="pt2",  # the other one is a pickle
        signature=signature,
        input_example=inputs[:_TRACED_IMAGES].numpy(),
        pip_requirements=needed,
        metadata={f"kdbench.{name}": value for name, value in facts.items()},
    )


def _loaded(folder: Path, inputs: Tensor) -> Columns:
    """The predictions of what was written, read as a user of the registry reads it."""
    import mlflow.pytorch

    with torch.no_grad():
        prediction: Columns = mlflow.pytorch.load_model(str(folder))(inputs)
    return prediction


def _version(client: MlflowClient, name: str, run_id: str, folder: Path, facts: dict[str, str]) -> tuple[str, bool]:
    """The version of the model that comes from this run, made where there is none."""
    from mlflow.exceptions import MlflowException

    for known in client.search_model_versions(f"run_id = '{run_id}'"):
        if known.name == name:
            return str(known.version), False
    client.log_artifacts(run_id, str(folder), ARTIFACT)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(run_id).info.artifact_uri}/{ARTIFACT}"
    described = f"{facts['model']} by {facts['method']}, seed {facts['seed']}, on {facts['data']}; kdbench run {facts['run_id']}"
    made = client.create_model_version(name, source, run_id, tags={RUN_TAG: facts["run_id"]}, description=described)
    return str(made.version), True


def _explained(error: Exception, name: str) -> KDBenchError:
    code = getattr(error, "error_code", None)
    if code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
        return UserError(f"--register {name}: MLflow refuses it ({in_one_line(error)})")
    return RunFailed(f"model {name} was not registered ({in_one_line(error)})")
