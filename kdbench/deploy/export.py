"""The trained network of a record as a file of its own, for use outside kdbench, checked against the original on real images."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from kdbench import __version__
from kdbench.data.columns import Columns, alone, like, mapped, named, tensors
from kdbench.data.loader import in_order
from kdbench.errors import RunFailed, UserError, cut, nearest, printable, shown
from kdbench.models.bounds import at_most
from kdbench.models.build import ModelSpec
from kdbench.models.inputs import InputSpec
from kdbench.models.outputs import in_words, predicted
from kdbench.models.trace import sample_shapes
from kdbench.models.weights import matched, portable
from kdbench.own_code import names_from_records
from kdbench.records.record import RunRecord
from kdbench.records.store import is_inside, path_name
from kdbench.storage.working_copy import fetch
from kdbench.tasks.base import Role, Task, role_of
from kdbench.tasks.build import build_task
from kdbench.tasks.networks import rebuilt
from kdbench.training.checkpoint import write_atomically
from kdbench.training.recorded import experiment_of, model_spec

FORMATS = ("safetensors", "onnx", "pt2")
CHECKED_IMAGES = 64
TOLERANCE = 1e-4  # of the largest prediction: float32 sums in another order differ by some 1e-6 of it
_TRACED_IMAGES = 2  # one would be taken for a constant
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it was checked: `difference` is the largest of all predictions of `images` images, at most `tolerance`.

    inputs: what the network in the file expects, in words. output_shape: its prediction for one image.
    """

    path: Path
    format: str
    model: str
    size_bytes: int
    images: int
    difference: float
    tolerance: float
    inputs: str
    output_shape: tuple[int, ...] | dict[str, tuple[int, ...]]


def find_run(records: Sequence[RunRecord], run: str) -> RunRecord:
    """The record whose id is `run`, or the only one whose id begins so. Raises UserError where there is none, or several."""
    found = [record for record in records if record.run_id == run] or [r for r in records if r.run_id.upper().startswith(run.upper())]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"run {run!r}: {len(found)} runs begin so, such as {found[0].run_id} and {found[1].run_id}; give more of the id")
    hint = "`kdbench leaderboard --format json` lists the `run_ids` of every row"
    raise UserError(
        f"run {run!r}: there is none in this results folder; {hint}"
        + (", or name another folder with --results DIR" if not records else "")
    )


def export(record: RunRecord, store_root: Path, format: str, output: Path | None = None) -> ExportReport:
    """Write the network of `record` to `output`, by default `<student>-<label>-<run id>.<format>` in the working directory.

    safetensors: the parameters and buffers under plain keys; the metadata say what the model is and how images are normalised.
    onnx: float images [batch, C, H, W] in [0, 1] go in, of any number; resizing and normalisation are part of the graph.
    pt2: the same as torch.export's program; several inputs and outputs are dictionaries by name. The metadata are in `metadata.json`.
    The file gets its name only once it gave what the original gives. Raises UserError where the record has no weights, the format is
    unknown or its packages are missing; RunFailed where the file's predictions differ by more than TOLERANCE.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: unknown format{nearest(format, FORMATS)}")
    if format == "onnx":
        require_onnx("--format onnx")
    path = output or Path("-".join(map(path_name, (record.student, record.label, record.run_id))) + f".{format}")
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder, expected a file name")
    if (shown := printable(str(path))) != str(path):  # the libraries that write the formats take UTF-8 alone
        raise UserError(f"--output {shown}: expected a name in UTF-8 without control characters")
    network, images, metadata = deployed(record, store_root)
    return _write_checked(network, images, path, format, metadata)


def require_onnx(what: str) -> None:
    """Raise UserError where a package is missing that writes or runs ONNX. what: who asks for it."""
    missing = [package for package in _ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install 'kdbench[onnx]'")


# --- from the record back to the network -----------------------------------------------------------------------------


def deployed(record: RunRecord, store_root: Path) -> tuple[Deployed, Columns, dict[str, str]]:
    """The network of a record, ready to predict; test samples, images in [0, 1], to check it with; what its user must know, as text.

    Raises UserError where the record has no weights, or doesn't say how to build the network.
    """
    experiment = experiment_of(record)
    spec = model_spec(record, experiment)
    with names_from_records():
        task = build_task(experiment.task_of(record.role))
        weights = _weights(record, store_root)
        with at_most(weights.stat().st_size):  # a parameter has a byte or more
            model = rebuilt(task, spec, weights, role_of(record.role))
    inputs = next(in_order(task.splits().test, CHECKED_IMAGES)).inputs
    return Deployed(model).eval(), task.inputs_for(role_of(record.role), inputs), _metadata(record, spec, task, model)


def _weights(record: RunRecord, store_root: Path) -> Path:
    """The weights file of a record. Raises UserError, with the reason, where there is none."""
    if record.artifacts_uri is None:
        reason = {"failed": f"it failed: {record.failure}", "stopped": "it was stopped early"}.get(record.status)
        reason = reason or f"it is a {record.role}, and only the weights of final runs and of teachers trained here are kept"
        raise UserError(f"run {record.run_id} has no weights to export: {reason}")
    if not is_inside(record.artifacts_uri):
        raise UserError(
            f"run {record.run_id}: its weights {shown(record.artifacts_uri)} are not in the results folder, so they are not read"
        )
    path = fetch(store_root / record.artifacts_uri)
    if not os.path.isfile(path):  # False, too, for a path that no file can have
        place = cut(printable(str(path)), 500)
        raise UserError(f"run {record.run_id}: its weights {place} are gone; restore them from a copy of the results folder")
    return path


# --- writing and checking --------------------------------------------------------------------------------------------


class Deployed(nn.Module):
    """The model with its own resizing and normalisation in front: what is deployed so can't be fed wrongly normalised images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Columns) -> Columns:
        """What the model's head gives [B, ...] for images [B, C, H, W] in [0, 1], or for several inputs by name."""
        return predicted(self.model, images)


def input_names(inputs: Columns) -> tuple[str, ...]:
    """What the inputs of an exported graph are called."""
    return tuple(_by_name(inputs))


def _by_name(inputs: Columns) -> dict[str, Tensor]:
    """Inputs by the names that an exported graph has for them; a single one is `images` or, of words, `inputs`."""
    first = tensors(inputs)[0]
    return named(inputs, "images" if first.is_floating_point() and first.ndim == 4 else "inputs")


def output_names(prediction: Columns, inputs: Columns) -> tuple[str, ...]:
    """What the outputs of an exported graph are called; `NAME_output` where an input has the same name."""
    taken = input_names(inputs)
    return tuple(f"{name}_output" if name in taken else name for name in named(prediction, "prediction"))


def difference_allowed(found: Columns, expected: Columns, what: object) -> tuple[float, float]:
    """The largest difference of two sets of predictions, and what is allowed; of several tensors those of the worst.

    Raises RunFailed where it is more: `what` is not written.
    """
    pairs = []
    theirs = named(found, "prediction")
    for name, tensor in named(expected, "prediction").items():
        difference, tolerance = float((theirs[name] - tensor).abs().max()), TOLERANCE * float(tensor.abs().max())
        called = "predictions" if alone(expected) else f"predictions {name}"
        if not difference <= tolerance:  # nan too
            raise RunFailed(
                f"{what} was not written: on {len(tensor)} test samples its {called} differ from the original's by up to "
                f"{difference:.2g}, allowed are {tolerance:.2g}"
            )
        pairs.append((difference, tolerance))
    return max(pairs, key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)


def _write_checked(network: Deployed, inputs: Columns, path: Path, format: str, metadata: dict[str, str]) -> ExportReport:
    # Before the graph is traced: it takes the constants of the normalisation from this pass, real numbers instead of traced ones.
    with torch.no_grad():
        expected = network(inputs)
    checked: list[tuple[float, float]] = []

    def write(temporary: Path) -> None:
        found = _WRITERS[format](network, inputs, temporary, metadata)
        checked.append(difference_allowed(found, expected, path))

    write_atomically(path, write)
    return ExportReport(
        path=path,
        format=format,
        model=metadata["model"],
        size_bytes=path.stat().st_size,
        images=len(tensors(inputs)[0]),
        difference=checked[0][0],
        tolerance=checked[0][1],
        inputs=inputs_in_words(inputs, format),
        output_shape=sample_shapes(expected),
    )


def inputs_in_words(inputs: Columns, format: str) -> str:
    """What goes into the network of an exported file."""
    scale = "normalised as the file's metadata say" if format == "safetensors" else "in [0, 1], which the graph normalises"
    words = []
    for name, tensor in _by_name(inputs).items():
        numbers, shape = str(tensor.dtype).removeprefix("torch."), in_words(tuple(tensor.shape[1:]))
        image = tensor.is_floating_point() and tensor.ndim == 4
        words.append(f"{numbers} {name} {shape}, any number of them" + (f", {scale}" if image else ""))
    return "; ".join(words)


def _write_safetensors(network: Deployed, inputs: Columns, path: Path, metadata: dict[str, str]) -> Columns:
    """Write the tensors; returns the predictions of a network that was filled from the file alone."""
    path.write_bytes(save_safetensors(portable(network.model.state_dict()), metadata))
    again = copy.deepcopy(network)
    classes = int(metadata["num_classes"])
    again.model.load_state_dict(matched(load_file(path), again.model, path, name=metadata["model"], num_classes=classes))
    with torch.no_grad():
        prediction: Columns = again(inputs)
        return prediction


def write_onnx(network: Deployed, inputs: Columns, path: Path, metadata: dict[str, str]) -> Columns:
    """Write the graph, its weights inside the one file; returns onnxruntime's predictions from the file."""
    import onnx
    import onnxruntime

    with torch.no_grad():
        expected = network(mapped(inputs, lambda tensor: tensor[:_TRACED_IMAGES]))
    outputs = output_names(expected, inputs)
    names, batch = input_names(inputs), torch.export.Dim("batch")
    with silent(), _explained(metadata["model"]):
        program = torch.onnx.export(
            network,
            kwargs={"images": mapped(inputs, lambda tensor: tensor[:_TRACED_IMAGES])},  # a dictionary alone would be keywords
            dynamo=True,
            input_names=list(names),
            output_names=list(outputs),
            dynamic_shapes={"images": {0: batch} if alone(inputs) else {name: {0: batch} for name in names}},
            verbose=False,
        )
    assert program is not None, "there is a program wherever dynamo=True"
    graph = program.model_proto
    onnx.helper.set_model_props(graph, metadata)
    onnx.save(graph, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {name: tensor.numpy() for name, tensor in _by_name(inputs).items()}
    arrays = session.run(list(outputs), given)
    return like({name: torch.from_numpy(array) for name, array in zip(named(expected, ""), arrays, strict=True)}, expected)


def write_pt2(network: Deployed, inputs: Columns, path: Path, metadata: dict[str, str]) -> Columns:
    """Write torch.export's program; returns the predictions of the program in the file."""
    batch = torch.export.Dim("batch")
    few = mapped(inputs, lambda tensor: tensor[:_TRACED_IMAGES])
    shapes: Any = {0: batch} if alone(inputs) else {name: {0: batch} for name in input_names(inputs)}
    try:
        with silent(), torch.no_grad():
            program = torch.export.export(network, (few,), dynamic_shapes=(shapes,))
            torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})
            prediction: Columns = torch.export.load(path).module()(inputs)
    except Exception as error:  # whatever tracing a user's own network ends in
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunFailed(
            f"model {metadata['model']!r} can't be written as pt2 ({reason}); --format safetensors works with every model"
        ) from error
    return prediction


_WRITERS: dict[str, Callable[[Deployed, Columns, Path, dict[str, str]], Columns]] = {
    "safetensors": _write_safetensors,
    "onnx": write_onnx,
    "pt2": write_pt2,
}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Those that trace a network print and log each of their steps; what goes wrong they raise as well."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _explained(model: str) -> Iterator[None]:
    """The exporter's own message is pages long; what it stumbled over stands in the first line of its cause."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise RunFailed(f"model {model!r} can't be written as ONNX ({reason}); --format safetensors works with every model") from error


def _inputs_of(task: Task, role: Role) -> dict[str, Any]:
    """The shape of one sample's inputs as a network of this role sees them: of an image alone, or of each by name."""
    example = task.example(role)
    if isinstance(example, tuple):
        return {"image_shape": list(example)}
    return {"input_shapes": {name: list(tensor.shape[1:]) for name, tensor in named(example, "inputs").items()}}


def _metadata(record: RunRecord, spec: ModelSpec, task: Task, model: nn.Module) -> dict[str, str]:
    """What a reader of the file must know, as text: lists are JSON, as safetensors and ONNX hold nothing but text."""
    inputs = getattr(model, "input_spec", None)
    facts: dict[str, Any] = {
        "kdbench_version": __version__,
        "run_id": record.run_id,
        "model": spec.name,
        "model_options": spec.options,
        "task": task.name,
        "data": record.data,
        "num_classes": task.info.num_classes,
        "class_names": list(task.info.class_names),
        **_inputs_of(task, role_of(record.role)),
        "method": record.label,
        "seed": record.seed,
        f"test_{record.primary}": record.test_metric,
    }
    words = task.source.vocabulary if task.source is not None else None
    if words is not None:
        facts["vocabulary"] = list(words.words)  # the first has number 5: see `kdbench.data.vocabulary`
    if isinstance(inputs, dict):
        inputs = next(iter(inputs.values()), None)
    if isinstance(inputs, InputSpec):
        facts |= {"mean": list(inputs.mean), "std": list(inputs.std), "input_size": inputs.size}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items() if value is not None}
