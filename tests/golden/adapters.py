"""Feed golden cases to kdbench's own methods: `ADAPTERS[case.method](case)` gives outputs and gradients under the case's own names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from read_golden import Case
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, Progress
from kdbench.methods.dkd import DKD, nontarget_class_loss, target_class_loss
from kdbench.methods.kd import KD
from kdbench.methods.nkd import NKD
from kdbench.methods.tf_nkd import TeacherFreeNKD
from kdbench.models.outputs import Outputs

AFTER_WARMUP = Progress(epoch=1.0, step=1, total_steps=1)


@dataclass(frozen=True)
class Result:
    """What kdbench computes for a case: outputs, gradients of the objective for inputs and for weights."""

    outputs: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    weight_grads: dict[str, np.ndarray] = field(default_factory=dict)


def kd(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    params = KD.Params(temperature=hp["temperature"], kd_weight=hp["kd_weight"], task_weight=hp["ce_weight"])
    loss_kd, raw = terms(KD(params), x)["kd"], terms(KD(params.model_copy(update={"kd_weight": 1.0})), x)["kd"]
    ce = cross_entropy(x)
    loss_ce = params.task_weight * ce
    return result(case, x, {"total": loss_ce + loss_kd, "loss_ce": loss_ce, "loss_kd": loss_kd, "kd_raw": raw, "ce_raw": ce})


def kd_clskd(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    params = KD.Params(temperature=hp["temp"], kd_weight=hp["alpha"], task_weight=1 - hp["alpha"], form="cross_entropy")
    return result(case, x, {"total": terms(KD(params), x)["kd"], "ori_weight": torch.tensor(params.task_weight, dtype=torch.float64)})


def nkd(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    parts = terms(NKD(NKD.Params(temperature=hp["temp"], gamma=hp["gamma"])), x)
    return result(case, x, {"total": parts["target"] + parts["nontarget"], **parts, "ce": cross_entropy(x)})


def dkd(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    weighted = terms(DKD(DKD.Params(temperature=hp["temperature"], alpha=hp["alpha"], beta=hp["beta"])), x)
    outputs = {
        "total": weighted["tckd"] + weighted["nckd"],
        "tckd": target_class_loss(x["logits_s"], x["logits_t"], x["label"], hp["temperature"]),
        "nckd": nontarget_class_loss(x["logits_s"], x["logits_t"], x["label"], hp["temperature"]),
        "ce": cross_entropy(x),
    }
    return result(case, x, outputs)


def tfnkd(case: Case) -> Result:
    x = read_inputs(case)
    parts = terms(TeacherFreeNKD(TeacherFreeNKD.Params(weight=case.hp["weight"])), x)
    return result(case, x, {"total": total(parts.values()), **parts, "ce": cross_entropy(x)})


ADAPTERS: dict[str, Callable[[Case], Result]] = {"kd": kd, "kd_clskd": kd_clskd, "nkd": nkd, "dkd": dkd, "tfnkd": tfnkd}


def read_inputs(case: Case) -> dict[str, Tensor]:
    """The case's inputs as tensors: floating ones are float64 leaves that take gradients, whole numbers stay int64."""
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in case.inputs.items()}
    return {name: x.double().requires_grad_() if x.is_floating_point() else x.long() for name, x in tensors.items()}


def terms(method: Method, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The method's terms for logits and label, as training gets them; where a case has no label, none may be looked at."""
    student = Outputs(x["logits_s"])
    teacher = Outputs(x["logits_t"]) if method.needs_teacher else None
    samples = torch.arange(len(student.logits))
    label = x["label"].detach() if "label" in x else torch.full_like(samples, -1)
    return method(student, teacher, Batch(inputs=samples, target=label, index=samples), AFTER_WARMUP)


def cross_entropy(x: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(x["logits_s"], x["label"].detach())


def total(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


def result(case: Case, x: dict[str, Tensor], outputs: dict[str, Tensor]) -> Result:
    """Outputs, and the gradients that the case asks for, as numpy arrays under the case's names."""
    cotangents = {name: torch.from_numpy(np.array(value)) for name, value in case.cotangents.items()}
    objective = total((outputs[name] * value).sum() for name, value in cotangents.items()) if cotangents else outputs["total"]
    names = sorted({*case.grads, *(name.removeprefix("grad_") for name in case.arrays["stable"] if name.startswith("grad_"))})
    grads = torch.autograd.grad(objective, [x[name] for name in names], allow_unused=True, materialize_grads=True)
    return Result(
        outputs={name: value.detach().numpy() for name, value in outputs.items()},
        grads={name: grad.numpy() for name, grad in zip(names, grads, strict=True)},
    )
