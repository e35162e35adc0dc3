"""What every adapter needs: a case's inputs as tensors, a method's terms for them, outputs and gradients as numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from read_golden import Case
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, Progress
from kdbench.methods.features import FeatureMethod
from kdbench.models.adapters import shape_of
from kdbench.models.outputs import Outputs, Shapes
from kdbench.tasks.base import TaskInfo

AFTER_WARMUP = Progress(epoch=1.0, step=1, total_steps=1)


@dataclass(frozen=True)
class Result:
    """What kdbench computes for a case: outputs, gradients of the objective for inputs and for weights."""

    outputs: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    weight_grads: dict[str, np.ndarray] = field(default_factory=dict)


def read_inputs(case: Case) -> dict[str, Tensor]:
    """The case's inputs as tensors: floating ones are float64 leaves that take gradients, whole numbers stay int64."""
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in case.inputs.items()}
    return {name: x.double().requires_grad_() if x.is_floating_point() else x.long() for name, x in tensors.items()}


def terms(method: Method, x: dict[str, Tensor], at: Progress = AFTER_WARMUP) -> dict[str, Tensor]:
    """The method's terms for logits and label, as training gets them; where a case has no label, none may be looked at."""
    student = Outputs(x["logits_s"])
    teacher = Outputs(x["logits_t"]) if method.needs_teacher else None
    samples = torch.arange(len(student.logits))
    label = x["label"].detach() if "label" in x else torch.full_like(samples, -1)
    return method(student, teacher, Batch(inputs=samples, target=label, index=samples), at)


def cross_entropy(x: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(x["logits_s"], x["label"].detach())


def total(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


def load_weights(module: nn.Module, case: Case, renamed: Mapping[str, str]) -> dict[str, Tensor]:
    """Put the case's weights into the module, in float64; returns its parameters and buffers by the case's names.

    renamed: the case's name -> the module's, of each weight or of its beginning (`conv_reg.` -> `regressors.0.`); the longest fits first.
    Raises KeyError where a weight of the case has no place in the module.
    """
    module.double()
    state = module.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    for name, value in case.weights.items():
        begin = max((old for old in renamed if name.startswith(old)), key=len, default="")
        place = renamed.get(begin, "") + name[len(begin) :]
        with torch.no_grad():
            state[place].copy_(torch.from_numpy(np.array(value)))
        found[name] = state[place]
    return found


def result(case: Case, x: dict[str, Tensor], outputs: dict[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> Result:
    """Outputs, and the gradients that the case asks for, under the case's names; weights: as `load_weights` returns them."""
    cotangents = {name: torch.from_numpy(np.array(value)) for name, value in case.cotangents.items()}
    objective = total((outputs[name] * value).sum() for name, value in cotangents.items()) if cotangents else outputs["total"]
    names = sorted({*case.grads, *(name.removeprefix("grad_") for name in case.arrays["stable"] if name.startswith("grad_"))})
    trained = sorted(case.weight_grads)
    sources = [*(x[name] for name in names), *((weights or {})[name] for name in trained)]
    grads = [grad.numpy() for grad in torch.autograd.grad(objective, sources, allow_unused=True, materialize_grads=True)]
    return Result(
        outputs={name: value.detach().numpy() for name, value in outputs.items()},
        grads=dict(zip(names, grads[: len(names)], strict=True)),
        weight_grads=dict(zip(trained, grads[len(names) :], strict=True)),
    )


def map_terms(
    kind: type[FeatureMethod], params: Mapping[str, object], x: dict[str, Tensor], at: Progress = AFTER_WARMUP
) -> tuple[Method, Callable[[], dict[str, Tensor]]]:
    """A feature method built for the case's maps, and what computes its terms, once the case's weights are in it.

    Maps are the inputs `feat_s`, `feat_t` or `feat_s0`, `feat_t0`, `feat_s1`, ...; logits and label go along where the case has them.
    """
    names = sorted((name.removeprefix("feat_s") for name in x if name.startswith("feat_s")), key=lambda name: (len(name), name))
    ours, theirs = ({f"map{name}": x[f"feat_{side}{name}"] for name in names} for side in "st")
    taps = tuple(f"map{name}" for name in names)
    method = kind(kind.Params.model_validate({**params, "student_taps": taps, "teacher_taps": taps}))
    student, teacher = (Outputs(x.get(f"logits_{side}", torch.zeros(1, 2)), maps) for side, maps in (("s", ours), ("t", theirs)))
    method.build(shapes_of(student), shapes_of(teacher), TaskInfo("classification", student.logits.shape[1], (3, 32, 32)))
    samples = torch.arange(len(next(iter(ours.values()))))
    batch = Batch(inputs=samples, target=x["label"].detach() if "label" in x else samples, index=samples)
    return method, lambda: method(student, teacher, batch, at)


def shapes_of(outputs: Outputs) -> Shapes:
    """What a probe would have found: of one sample, by the number of dimensions."""
    return Shapes(tuple(outputs.logits.shape[1:]), {name: shape_of(value) for name, value in outputs.maps.items()})
