"""Golden cases of methods that compare logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from read_golden import Case
from result import Result, cross_entropy, load_weights, read_inputs, result, shapes_of, terms, total

from kdbench.methods.base import Progress
from kdbench.methods.ctkd import CTKD
from kdbench.methods.dist import DIST
from kdbench.methods.dkd import DKD, nontarget_class_loss, target_class_loss
from kdbench.methods.kd import KD
from kdbench.methods.nkd import NKD
from kdbench.methods.tf_nkd import TeacherFreeNKD
from kdbench.methods.wsld import WSLD
from kdbench.models.outputs import Outputs
from kdbench.tasks.base import TaskInfo

_RAZOR_NAMES = {"logit_s": "logits_s", "logit_t": "logits_t", "labels": "label"}


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


def dist(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    params = DIST.Params(weight=1.0, beta=hp["beta"], gamma=hp["gamma"], temperature=hp.get("tau", 1.0))
    ones = params.model_copy(update={"beta": 1.0, "gamma": 1.0})
    return result(case, x, {"total": total(terms(DIST(params), x).values()), **terms(DIST(ones), x)})


def wsld(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    return result(case, x, {"total": terms(WSLD(WSLD.Params(weight=hp["alpha"], temperature=hp["temp"])), x)["wsld"]})


def ctkd(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    epochs = 10 * hp["decay_loops"]
    at = Progress(hp["epoch"], step=hp["epoch"], total_steps=epochs)
    method = CTKD(
        CTKD.Params(
            kd_weight=hp["alpha"],
            task_weight=hp["gamma"],
            lowest=hp["t_start"],
            span=hp["t_end"],
            curriculum_share=hp["decay_loops"] / epochs,
        )
    )
    classes = x["logits_s"].shape[1]
    method.build(shapes_of(Outputs(x["logits_s"])), shapes_of(Outputs(x["logits_t"])), TaskInfo("classification", classes, (3, 32, 32)))
    weights = load_weights(method, case, {"global_T": "theta"})
    kd, ce = terms(method, x, at)["kd"], cross_entropy(x)
    outputs = {"total": hp["gamma"] * ce + kd, "ce": ce, "kl": kd / hp["alpha"], "temp": method.temperature(at)}
    return result(case, x, outputs, weights)


def razor_dist(case: Case) -> Result:
    hp = {"beta": case.hp["inter_loss_weight"], "gamma": case.hp["intra_loss_weight"], "tau": case.hp["tau"]}
    return _by_the_cases_names(dist(_as_ours(case, hp)))


def razor_wsld(case: Case) -> Result:
    return _by_the_cases_names(wsld(_as_ours(case, {"alpha": case.hp["loss_weight"], "temp": case.hp["tau"]})))


def razor_dkd(case: Case) -> Result:
    hp = {"temperature": case.hp["tau"], "alpha": case.hp["alpha"], "beta": case.hp["beta"]}
    return _by_the_cases_names(dkd(_as_ours(case, hp)))


def _as_ours(case: Case, hp: Mapping[str, float]) -> Case:
    """The case with its inputs, their gradients and its hyper-parameters named as in the other logit methods' cases."""
    renamed = {kind: {_RAZOR_NAMES.get(name, name): value for name, value in found.items()} for kind, found in case.arrays.items()}
    return replace(case, meta={**case.meta, "hp": dict(hp)}, arrays=renamed)


def _by_the_cases_names(found: Result) -> Result:
    theirs = {ours: name for name, ours in _RAZOR_NAMES.items()}
    grads: dict[str, np.ndarray] = {theirs.get(name, name): value for name, value in found.grads.items()}
    return replace(found, grads=grads)


LOGITS = {
    "kd": kd,
    "kd_clskd": kd_clskd,
    "nkd": nkd,
    "dkd": dkd,
    "tfnkd": tfnkd,
    "dist": dist,
    "wsld": wsld,
    "ctkd": ctkd,
    "razor_dist": razor_dist,
    "razor_wsld": razor_wsld,
    "razor_dkd": razor_dkd,
}
