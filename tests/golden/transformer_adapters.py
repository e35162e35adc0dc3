"""Golden cases of methods that compare transformers with each other, or with other kinds of networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from read_golden import Case
from result import AFTER_WARMUP, Result, cross_entropy, load_weights, read_inputs, result, shapes_of, total
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.ofa import OneForAll, ofa_loss
from kdbench.methods.scalekd import DualView, ScaleKD, frequency_loss, spatial_loss
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
    given = {
        "alpha": hp["alpha_vitkd"],
        "beta": hp["beta_vitkd"],
        "removed": hp["lambda_vitkd"],
        "student_taps": taps,
        "teacher_taps": taps,
    }
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


def scalekd(case: Case) -> Result:
    return _scalekd_whole(case) if case.hp["kind"] == "full_distiller" else _scalekd_stage(case)


_PROJECTOR_NAMES = {
    "pos_embed": "position",
    "proj_pos.0.": "query_projection.",
    "proj_student.": "features.",
    "pos_attention.": "attention.",
    "ffn.layers.0.0.": "ffn.0.",
    "ffn.layers.1.": "ffn.2.",
    "norm.": "norm.",
    "query.weight": "query",
}


def _projector_names(begin: str, ours: str) -> dict[str, str]:
    """The case's names of a stage's two projectors -> ours."""
    views = (("projector_0.", "spatial."), ("projector_1.", "frequency."))
    return {begin + view + name: ours + own + place for view, own in views for name, place in _PROJECTOR_NAMES.items()}


def _scalekd_stage(case: Case) -> Result:
    """One stage: its projectors and both losses."""
    x, hp = read_inputs(case), case.hp
    shape_s, shape_t = (tuple(x[f"feat_{side}"].shape[1:]) for side in "st")
    views = DualView(
        shape_s, shape_t, hp["num_heads"], hp["softmax_scale"], hp["self_query"], "layer" if hp["kind"] == "convnext" else "batch"
    )
    weights = load_weights(views, case, _projector_names("", ""))
    given = (x[name].transpose(1, 2).unflatten(2, shape_t[1:]) if name in x else None for name in ("query_s", "query_f"))
    spatial, frequency = views(x["feat_s"], tuple(given))
    losses = hp["alpha"][0] * spatial_loss(spatial, x["feat_t"]), hp["alpha"][1] * frequency_loss(frequency, x["feat_t"])
    return result(case, x, {"spat_loss": losses[0], "freq_loss": losses[1], "total": total(losses)}, weights)


class StandInTeacher(nn.Module):
    """The cases' teacher behind its third stage: two by two positions joined, two linear layers, a norm; its front is of no account."""

    def __init__(self, third: tuple[int, int, int], last: int, classes: int) -> None:
        super().__init__()
        self.size = third[1:]
        self.third = nn.Conv2d(3, third[0], kernel_size=1)
        self.red, self.mlp, self.norm = nn.Linear(4 * third[0], last), nn.Linear(last, last), nn.LayerNorm(last)
        self.last, self.fc = nn.Identity(), nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.third(F.adaptive_avg_pool2d(images, self.size)).permute(0, 2, 3, 1)
        x = self.red(torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=3))
        x = self.last(self.norm(x + torch.tanh(self.mlp(x))).permute(0, 3, 1, 2))
        return self.fc(x.mean((2, 3)))


def _scalekd_whole(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    kd_weight = hp["kd_alpha"] if hp["kd"] else 0.0
    params = ScaleKD.Params(
        task_weight=1 - kd_weight,
        kd_weight=kd_weight,
        temperature=hp["kd_temp"],
        spatial_weight=(hp["alpha_s3"][0], hp["alpha_s4"][0]),
        frequency_weight=(hp["alpha_s3"][1], hp["alpha_s4"][1]),
        sharpness=tuple(hp["softmax_scale"]),
        heads=(hp["heads_s3"], hp["heads_s4"]),
        student_taps=("third", "last"),
        teacher_taps=("third", "last"),
    )
    method = ScaleKD(params)
    head = nn.Linear(x["feat_s4"].shape[1], hp["num_classes"])
    network = StandInTeacher(tuple(x["feat_t3"].shape[1:]), x["feat_t4"].shape[1], hp["num_classes"])
    student, teacher = (Outputs(torch.zeros(1, hp["num_classes"]), {"third": x[f"feat_{s}3"], "last": x[f"feat_{s}4"]}) for s in "st")
    image_shape = (3, 8, 8)
    method.build(shapes_of(student), shapes_of(teacher), TaskInfo("classification", hp["num_classes"], image_shape))
    named = {"method": method, "head": head, "teacher": network}
    names = {"student.head.fc.": "head.", "teacher.head.fc.": "teacher.fc.", "teacher.backbone.": "teacher."}
    for stage, ours in (("3", "perceived"), ("4", "last")):
        names |= _projector_names(f"distill_losses.loss_fmd_s{stage}.", f"method.{ours}.")
    # Queries that the authors' last stage may have learned, although it is always given some: ours has none there.
    names |= {f"distill_losses.loss_fmd_s4.projector_{view}.query.weight": f"replaced.{view}" for view in (0, 1)}
    named["replaced"] = nn.ParameterList(torch.zeros(x["feat_t4"][0, 0].numel(), x["feat_t4"].shape[1]) for _ in range(2))
    weights = load_weights(nn.ModuleDict(named), case, names)
    method.use_teacher(network.eval().requires_grad_(False), image_shape)
    x["logits_s"] = head(x["feat_s4"].mean((2, 3)))
    student.prediction, teacher.prediction = x["logits_s"], network.fc(x["feat_t4"].mean((2, 3))).detach()
    samples = torch.arange(len(x["labels"]))
    terms = method(student, teacher, Batch(inputs=samples, target=x["labels"], index=samples), AFTER_WARMUP)
    outputs = {
        "ori_loss": params.task_weight * F.cross_entropy(x["logits_s"], x["labels"]),
        "loss_s3": terms["spatial"],
        "loss_s3_alt": terms["frequency"],
        "loss_s4": terms["last_spatial"],
        "loss_s4_alt": terms["last_frequency"],
        "loss_kd": terms["kd"],
    }
    return result(case, x, {**outputs, "total": total(outputs.values())}, weights)


TRANSFORMERS = {"ofa": ofa, "scalekd": scalekd, "vitkd": vitkd}
