"""A student in MLflow's model registry: as a graph with its tensors, so that loading it unpickles and runs no code.

The graph is torch.export's; of a network with several inputs or outputs it is ONNX, as MLflow's flavour for torch takes one array and
gives one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdbench.data.columns import Columns, alone, like, named, tensors
from kdbench.deploy.export import (
    Deployed,
    deployed,
    difference_allowed,
    input_names,
    inputs_in_words,
    output_names,
    require_onnx,
    silent,
    write_onnx,
)
from kdbench.errors import KDBenchError, RunFailed, UserError, in_one_line
from kdbench.models.trace import sample_shapes
from kdbench.records.record import RunRecord
from kdbench.tracking import RUN_TAG, MlflowTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

ARTIFACT = "model"
_TRACED_IMAGES = 2  # one would be taken for a constant


@dataclass(frozen=True)
class Registered:
    """A version of a registered model. new: False where the run was registered before.

    uri: what `mlflow.pyfunc.load_model` takes, and, for a network of one input and one output, `mlflow.pytorch.load_model`.

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

    It takes float32 images [N, C, H, W] in [0, 1], or the arrays of several inputs by name, and gives what its head gives; resizing and
    normalisation are part of it. It is registered only once what was loaded gave what the original gives. Raises UserError where the
    record has no weights, the registry refuses the name or packages for ONNX are missing, RunFailed where it can't be written as a graph
    or MLflow can't be reached.
    """
    network, inputs, facts = deployed(record, store_root)
    with torch.no_grad():
        expected = network(inputs)
    one = alone(inputs) and alone(expected)
    if not one:
        require_onnx(f"--register {name}: a network of several inputs or outputs")
    try:
        client = tracker.client()
        run_id = record.mlflow_run_id or tracker.log_run(None, f"{record.label} · seed {record.seed}", f"registered/{record.unit_key}")
        if run_id is None:
            raise RunFailed(f"MLflow at {tracker.name} can't be written, so nothing was registered")
        with tempfile.TemporaryDirectory() as scratch, silent():
            folder = Path(scratch) / ARTIFACT
            served = _traced if one else _as_onnx
            difference, tolerance = difference_allowed(served(network, inputs, expected, folder, facts), expected, f"model {name}")
            number, new = _version(client, name, run_id, folder, facts)
    except KDBenchError:
        raise
    except Exception as error:  # MLflow passes on whatever its database driver, its object store or torch.export raises
        raise _explained(error, name) from error
    return Registered(
        uri=f"models:/{name}/{number}",
        tracking_uri=tracker.name,
        new=new,
        images=len(tensors(inputs)[0]),
        difference=difference,
        tolerance=tolerance,
        inputs=inputs_in_words(inputs, "pt2" if one else "onnx"),
        output_shape=sample_shapes(expected),
    )


def _traced(network: Deployed, inputs: Columns, expected: Columns, folder: Path, facts: dict[str, str]) -> Columns:
    """Write a network of one input and one output; returns the predictions of what was written, read as a user of the registry reads it."""
    import mlflow.pytorch

    (images,) = tensors(inputs)
    mlflow.pytorch.save_model(
        network,
        str(folder),
        serialization_format="pt2",  # the other one is a pickle
        signature=_signature(named(inputs, ""), named(expected, "")),
        input_example=images[:_TRACED_IMAGES].numpy(),
        pip_requirements=_requirements("torch"),
        metadata=_described(facts),
    )
    with torch.no_grad():
        prediction: Columns = mlflow.pytorch.load_model(str(folder))(images)
    return prediction


def _as_onnx(network: Deployed, inputs: Columns, expected: Columns, folder: Path, facts: dict[str, str]) -> Columns:
    """As `_traced`, of a network of several inputs or outputs, the graph's own names for which are `export`'s."""
    import mlflow.onnx
    import mlflow.pyfunc
    import onnx

    graph = folder.with_suffix(".onnx")
    write_onnx(network, inputs, graph, facts)
    given, outputs = dict(zip(input_names(inputs), tensors(inputs), strict=True)), output_names(expected, inputs)
    mlflow.onnx.save_model(
        onnx.load(str(graph)),
        str(folder),
        signature=_signature(given, dict(zip(outputs, tensors(expected), strict=True))),
        pip_requirements=_requirements("onnx", "onnxruntime"),
        metadata=_described(facts),
    )
    arrays = mlflow.pyfunc.load_model(str(folder)).predict({name: tensor.numpy() for name, tensor in given.items()})
    found = (torch.from_numpy(arrays[name]) for name in outputs)
    return like(dict(zip(named(expected, "prediction"), found, strict=True)), expected)


def _signature(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> ModelSignature:
    """Tensors by name, or one without."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    def schema(columns: Mapping[str, Tensor]) -> Schema:
        specs = [TensorSpec(tensor[:0].numpy().dtype, (-1, *tensor.shape[1:]), name or None) for name, tensor in columns.items()]
        return Schema(list[ColSpec | TensorSpec](specs))

    return ModelSignature(inputs=schema(inputs), outputs=schema(outputs))


def _requirements(*packages: str) -> list[str]:
    return [f"{package}=={version(package).partition('+')[0]}" for package in (*packages, "mlflow", "numpy")]


def _described(facts: dict[str, str]) -> dict[str, str]:
    return {f"kdbench.{name}": value for name, value in facts.items()}


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
