"""Golden cases of methods that compare logits."""

from __future__ import annotations

import torch
from read_golden import Case
from result import Result, cross_entropy, read_inputs, result, terms, total

from kdbench.methods.dkd import DKD, nontarget_class_loss, target_class_loss
from kdbench.methods.kd import KD
from kdbench.methods.nkd import NKD
from kdbench.methods.tf_nkd import TeacherFreeNKD


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


LOGITS = {"kd": kd, "kd_clskd": kd_clskd, "nkd": nkd, "dkd": dkd, "tfnkd": tfnkd}
