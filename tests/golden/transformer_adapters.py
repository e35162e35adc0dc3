"""Golden cases of methods that compare transformers with each other, or with other kinds of networks."""

from __future__ import annotations

from typing import Any

import torch
from read_golden import Case
from result import AFTER_WARMUP, Result, cross_entropy, load_weights, read_inputs, result, shapes_of, total
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.ofa import OneForAll, ofa_loss
from kdbench.methods.vitkd import ViTKD
from kdbench.models.outputs import Outputs
from kdbench.tasks.base import TaskInfo


def vitkd(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp

    class WithItsNoise(ViTKD):
        def noise(self, tokens: Tensor) -> Tensor:
            return x["noise"]

    blocks = range(x["low_s"].shape[1])
    taps = (*(f"block:{block}" for block in blocks), "norm")
    ours, theirs = ({**{f"block:{b}": x[f"low_{side}"][:, b] for b in blocks}, "norm": x[f"high_{side}"]} for side in "st")
    given = {"alpha": hp["alpha_vitkd"], "beta": hp["beta_vitkd"], "removed": hp["lambda_vitkd"], "student_taps": taps, "teacher_taps": taps}
    method = WithItsNoise(ViTKD.Params.model_validate(given))
    logits = torch.zeros(len(x["high_s"]), 2)
    student, teacher = Outputs(logits, ours), Outputs(logits, theirs)
    method.build(shapes_of(student), shapes_of(teacher), TaskInfo("classification", 2, (3, 32, 32)))
    weights = load_weights(method, case, {"align2.": "low_align.", "align.": "high_align."})
    samples = torch.arange(len(logits))
    terms = method(student, teacher, Batch(inputs=samples, target=samples, index=samples), AFTER_WARMUP)
    outputs = {"total": total(terms.values()), "lr": terms["mimicking"], "gen": terms["generation"]}
    return result(case, x, outputs, weights)


def ofa(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    if "stages" not in hp:
        return result(case, x, {"total": ofa_loss(x["logits_s"], x["logits_t"], x["label"], hp["eps"], hp["temperature"])})
    method = OneForAll(_ofa_params(hp))
    maps = {f"stage:{stage}": x[f"feat_s{stage}"] for stage in hp["stages"]}
    student, teacher = Outputs(x["logits_s"], maps), Outputs(x["logits_t"])
    method.build(shapes_of(student), shapes_of(teacher), TaskInfo("classification", hp["num_classes"], (3, 32, 32)))
    weights = load_weights(method, case, _ofa_names(case))
    samples = torch.arange(len(x["label"]))
    terms = method(student, teacher, Batch(inputs=samples, target=x["label"], index=samples), AFTER_WARMUP)
    loss_gt = method.params.task_weight * cross_entropy(x)
    outputs = {"loss_gt": loss_gt, "loss_kd": terms["kd"], "loss_ofa": terms["ofa"], "total": total([loss_gt, *terms.values()])}
    return result(case, x, outputs, weights)


def _ofa_params(hp: dict[str, Any]) -> OneForAll.Params:
    """What `choose_taps` would find in the case's student, of which a case holds the chosen stages alone, and its settings."""
    shapes = {int(stage): shape for stage, shape in hp["stage_shapes"].items()}
    last = shapes[max(shapes)]
    width = max(last[0], hp["teacher_dim"]) if len(last) == 3 else last[-1]
    return OneForAll.Params(
        temperature=hp["ofa_temperature"],
        eps=hp["ofa_eps"][0] if len(hp["ofa_eps"]) == 1 else tuple(hp["ofa_eps"]),
        ofa_weight=hp["ofa_loss_weight"],
        kd_weight=hp["kd_loss_weight"],
        task_weight=hp["gt_loss_weight"],
        student_taps=tuple(f"stage:{stage}" for stage in hp["stages"]),
        stages_behind=tuple(max(shapes) - stage for stage in hp["stages"]),
        widths=(width,) * len(hp["stages"]),
    )


def _ofa_names(case: Case) -> dict[str, str]:
    """The case's names of weights -> ours: its projectors are sequences, whose last member is the classifier."""
    names = {}
    for position, stage in enumerate(case.hp["stages"]):
        begin, ours = f"projector.{stage}.", f"projectors.{position}."
        members = {int(name.removeprefix(begin).split(".")[0]) for name in case.weights if name.startswith(begin)}
        names |= {f"{begin}{max(members)}.": f"{ours}classifier.", f"{begin}0.fn.": f"{ours}merging.", f"{begin}1.": f"{ours}blocks."}
        if case.hp["student_kind"] == "cnn":
            names |= {f"{begin}{member}.": f"{ours}reduce.{member}." for member in members - {max(members)}}
            if f"{begin}0.weight" in case.weights:
                names[f"{begin}0."] = f"{ours}reduce."
    return names


TRANSFORMERS = {"ofa": ofa, "vitkd": vitkd}
