"""Golden cases of methods that compare maps place by place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from read_golden import Case
from result import Result, load_weights, map_terms, read_inputs, result, terms, total
from torch import Tensor

from kdbench.methods.ab import boundary_loss, stage_weights
from kdbench.methods.at import AT, attention_loss
from kdbench.methods.cwd import CWD
from kdbench.methods.fsp import FSP
from kdbench.methods.ft import factor_loss
from kdbench.methods.mgd import MGD, generation_loss, mask_from
from kdbench.methods.nst import NST, neuron_selectivity_loss
from kdbench.methods.pkd import PKD
from kdbench.methods.vid import VID


def pairs(x: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The case's maps `feat_s0`, `feat_t0`, `feat_s1`, ..."""
    return [(x[f"feat_s{k}"], x[f"feat_t{k}"]) for k in range(len(x)) if f"feat_s{k}" in x]


def by_stage(x: dict[str, Tensor], loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    return {f"stage{k}": loss(*pair) for k, pair in enumerate(pairs(x))}


def at(case: Case) -> Result:
    x, power = read_inputs(case), case.hp["p"]
    _, found = map_terms(AT, {"weight": case.hp["feat_weight"], "power": power}, x)
    return result(case, x, {"total": found()["attention"], **by_stage(x, lambda s, t: attention_loss(s, t, power))})


def nst(case: Case) -> Result:
    x = read_inputs(case)
    _, found = map_terms(NST, {"weight": case.hp["weight"]}, x)
    return result(case, x, {"total": found()["selectivity"], **by_stage(x, neuron_selectivity_loss)})


def pkd(case: Case) -> Result:
    x = read_inputs(case)
    side = "student" if case.hp.get("resize_stu", True) else "teacher"
    _, found = map_terms(PKD, {"weight": case.hp["loss_weight"], "resize": side}, x)
    return result(case, x, {"total": found()["correlation"]})


def cwd(case: Case) -> Result:
    """Maps come in as a dense prediction does."""
    x = read_inputs(case)
    method = CWD(CWD.Params(weight=case.hp["loss_weight"], temperature=case.hp["tau"]))
    return result(case, x, {"total": terms(method, {"logits_s": x["feat_s"], "logits_t": x["feat_t"]})["cwd"]})


def fsp(case: Case) -> Result:
    x = read_inputs(case)
    _, found = map_terms(FSP, {"weight": case.hp["weight"]}, x)
    return result(case, x, {"total": found()["flow"]})


def ab(case: Case) -> Result:
    """The features of a case are those behind the connectors, so the method itself begins later."""
    x = read_inputs(case)
    weights = stage_weights(case.hp["feat_num"])
    losses = by_stage(x, lambda s, t: boundary_loss(s, t, case.hp["margin"]))
    stages = {name: weight * loss for weight, (name, loss) in zip(weights, losses.items(), strict=True)}
    return result(case, x, {"total": total(stages.values()), **stages})


def ft(case: Case) -> Result:
    """The features of a case are factors already."""
    x, hp = read_inputs(case), case.hp
    return result(case, x, {"total": hp["weight"] * factor_loss(x["feat_s0"], x["feat_t0"], hp["p1"], hp["p2"])})


def vid(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    hidden = len(case.weights["regressor.0.weight"])
    params = {"init_variance": hp["init_pred_var"], "least_variance": hp["eps"], "hidden_channels": hidden}
    method, found = map_terms(VID, params, x)
    weights = load_weights(method, case, {"": "guesses.0."})
    return result(case, x, {"total": found()["vid"]}, weights)


def mgd(case: Case) -> Result:
    """Classification, detection and segmentation; the case's noise stands in for the method's own."""
    x, hp = read_inputs(case), case.hp
    variant = hp.get("variant", "cls")
    with_logits = {"logits_s": x["logit_s"], "logits_t": x["logit_t"]} if "logit_s" in x else {}
    params: dict[str, Any] = {"alpha": hp["alpha_mgd"], "masked": hp["lambda_mgd"], "mask": "channel" if variant == "cls" else "pixel"}
    if with_logits:
        params |= {"logit_weight": hp["logit_weight"], "logit_temperature": hp["logit_tau"]}
    method, found = map_terms(MGD, params, {**x, **with_logits})
    assert isinstance(method, MGD)
    weights = load_weights(method, case, {"": "generators.0.", "distill_losses.loss_mgd_fea.": "generators.0."})
    noise = (x["noise"] if "noise" in x else x["rand"]).detach()
    method._noise = lambda features: noise  # type: ignore[method-assign]
    parts = found()
    mask = mask_from(noise, method.params.masked, method.params.mask)
    outputs = {
        "total": total(parts.values()),
        "loss_mgd_fea": parts["mgd"],
        "loss_logit": parts.get("logits", torch.zeros(())),
        "unweighted": generation_loss(method.generators[0](x["feat_s"], mask), x["feat_t"]),
    }
    return result(case, x, outputs, weights)


MAPS = {"ab": ab, "at": at, "cwd": cwd, "fsp": fsp, "ft": ft, "mgd": mgd, "nst": nst, "pkd": pkd, "vid": vid}
