"""Golden cases of methods that read every stage, run the rest of the teacher, or change the student while it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from read_golden import Case
from result import AFTER_WARMUP, Result, cross_entropy, load_weights, map_terms, read_inputs, result, shapes_of
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.adain import AdaIN
from kdbench.methods.base import Method, Progress
from kdbench.methods.features import FeatureMethod
from kdbench.methods.kdsvd import KDSVD
from kdbench.methods.norm import NORM
from kdbench.methods.ofd import OFD
from kdbench.methods.reviewkd import ReviewKD
from kdbench.methods.srrl import SRRL
from kdbench.models.outputs import Outputs
from kdbench.models.taps import Taps, probe
from kdbench.tasks.base import TaskInfo

Terms = Callable[[], dict[str, Tensor]]


def reviewkd(case: Case) -> Result:
    x = read_inputs(case)
    levels = sum(name.startswith("feat_s") for name in x)
    for side in "st":
        x[f"feat_{side}{levels}"] = x[f"pooled_{side}"]
    at = Progress(epoch=case.hp["epoch"], step=case.hp["epoch"], total_steps=case.hp["warmup"])
    method, found = map_terms(ReviewKD, {"weight": case.hp["weight"], "warmup_share": 1.0}, x, at)
    deepest_first = {f"abfs.{position}.": f"fusions.{levels - position}." for position in range(levels + 1)}
    weights = load_weights(method, case, deepest_first)
    return result(case, x, {"total": found()["review"], "ce": cross_entropy(x)}, weights)


class NormsInARow(nn.Module):
    """A teacher whose features are the case's own: its batch norms are there to be read, and pass on what they get."""

    class Unchanged(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return x

    def __init__(self, x: dict[str, Tensor], levels: int) -> None:
        super().__init__()
        self.maps = [x[f"feat_t{level}"].detach() for level in range(levels)]
        self.levels = nn.ModuleList(nn.Sequential(self.Unchanged(m.shape[1]), nn.ReLU()).double() for m in self.maps)
        for position, level in enumerate(self.levels):
            level[0].load_state_dict(level[0].state_dict() | {"weight": x[f"bn_weight_t{position}"], "bias": x[f"bn_bias_t{position}"]})
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Of the maps, as many samples as there are images."""
        for values, level in zip(self.maps, self.levels, strict=True):
            level(values[:1].expand(len(images), -1, -1, -1) if len(images) != len(values) else values)
        return torch.zeros(len(images), 2)


def ofd(case: Case) -> Result:
    x = read_inputs(case)
    levels = sum(name.startswith("feat_s") for name in x)
    teacher = NormsInARow(x, levels)
    images = torch.zeros(len(x["feat_s0"]), *x["feat_t0"].shape[1:])
    taps = tuple(f"before:levels.{level}.1" for level in range(levels))
    student = Outputs(torch.zeros(len(images), 2), {f"map{level}": x[f"feat_s{level}"] for level in range(levels)})
    method, found = network_terms(OFD, {"weight": case.hp["feat_weight"]}, student, teacher, taps, images, x)
    weights = load_weights(method, case, {"connectors.connectors.": "connectors."})
    return result(case, x, {"total": found()["partial"], "ce": cross_entropy(x)}, weights)


class Averaged(nn.Module):
    """A classifier behind global average pooling."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.fc = linear(weight, bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))


def srrl(case: Case) -> Result:
    x = read_inputs(case)
    teacher = Averaged(x["fc_weight"], x["fc_bias"]).requires_grad_(False)
    student = Outputs(torch.zeros(len(x["feat_s"]), 2), {"map": x["feat_s"]})
    params = {"alpha": case.hp["alpha"], "beta": case.hp["beta"]}
    method, found = network_terms(SRRL, params, student, teacher, ("pooled",), x["feat_t"].detach(), x)
    weights = load_weights(method, case, {"Connectors.": "connector."})
    return result(case, x, {"total": torch.stack(list(found().values())).sum()}, weights)


class Judge(nn.Module):
    """A place to tap, then convolution, ReLU, average pooling and a linear layer."""

    stage_modules = ("place", "tail")

    def __init__(self, x: dict[str, Tensor]) -> None:
        super().__init__()
        wanted, channels, *kernel = x["tail_conv_weight"].shape
        conv = nn.Conv2d(channels, wanted, kernel, padding=1).double()
        conv.load_state_dict({"weight": x["tail_conv_weight"], "bias": x["tail_conv_bias"]})
        self.place, self.tail = nn.Identity(), nn.Sequential(conv, nn.ReLU())
        self.fc = linear(x["tail_fc_weight"], x["tail_fc_bias"])

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(self.tail(self.place(features)).mean((2, 3)))


def adain(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    teacher = Judge(x).requires_grad_(False)
    student = Outputs(torch.zeros(len(x["feat_s"]), 2), {"map": x["feat_s"]})
    params = {
        "weight": hp["w_adain"],
        "style_weight": hp["w_stat"],
        "judgement": {"feat_mse": "feature_mse"}.get(hp["evaluator"], hp["evaluator"]),
        "temperature": hp["T"],
        "adapter": hp["adapter"],
        "epsilon": hp["eps"],
    }
    method, found = network_terms(AdaIN, params, student, teacher, ("place",), x["feat_t"].detach(), x)
    weights = load_weights(method, case, {"adapter.": "adapters.0."})
    weighted = found()
    method.params = method.params.model_copy(update={"weight": 1.0, "style_weight": 1.0})
    plain = found()
    return result(case, x, {"total": weighted["judged"] + weighted["style"], "adain": plain["judged"], "stat": plain["style"]}, weights)


def kdsvd(case: Case) -> Result:
    x = read_inputs(case)
    _, found = map_terms(KDSVD, {"weight": case.hp["weight"], "vectors": case.hp["k"]}, x)
    return result(case, x, {"total": found()["kdsvd"]})


class AveragedStage(Averaged):
    """The same behind a stage that gives back what it gets."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight, bias)
        self.stage = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.stage(features))


def norm(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    params = {"gamma": hp["gamma"], "alpha": hp["alpha"], "beta": hp["beta"], "segments": hp["N"], "temperature": hp["kd_T"]}
    params |= {"logit_scale": hp["ceta"], "schedule": "imagenet" if hp["dataset"] == "imagenet" else "cifar"}
    epochs = {"cifar": 240, "imagenet": 100}[params["schedule"]]
    at = Progress(epoch=hp["epoch"], step=hp["epoch"], total_steps=epochs)
    if "feat_s" not in x:
        expanded = {name.replace("f_expanded_s", "feat_s"): value for name, value in x.items()}
        method, found = map_terms(NORM, params, expanded, at)
        return norm_result(case, x, method, found, {})
    weights = {name.removeprefix("net."): torch.from_numpy(value) for name, value in case.weights.items()}
    plain = AveragedStage(weights["fc.weight"], weights["fc.bias"])
    method = NORM(NORM.Params.model_validate({**params, "student_taps": ("stage",), "teacher_taps": ("map",)}))
    teacher = Outputs(x["logits_t"].detach(), {"map": x["feat_t"].detach()})
    shape = tuple(x["feat_s"].shape[1:])
    method.build(probe(plain, shape, ("stage",)), shapes_of(teacher), TaskInfo("classification", hp["num_classes"], shape))
    student = method.adapt_student(plain)
    places_of = {"net.fc.": "network.fc.", "net.layer31.": "expand.", "net.layer32.": "contract."} if hp["N"] > 1 else {"net.fc.": "fc."}
    used = {name: value for name, value in case.weights.items() if name.startswith(tuple(places_of))}  # net.alpha has no use
    trained = load_weights(student, replace(case, arrays={**case.arrays, "w": used}), places_of)
    samples = torch.arange(len(x["feat_s"]))
    batch = Batch(inputs=samples, target=x["label"].detach(), index=samples)
    outputs = Taps(student, method.student_taps)(x["feat_s"])
    return norm_result(case, x, method, lambda: method(outputs, teacher, batch, at), trained)


def norm_result(case: Case, x: dict[str, Tensor], method: Method, found: Terms, weights: Mapping[str, Tensor]) -> Result:
    """The case gives the terms without their weights, beside the weighted total."""
    weighted = found()
    method.params = method.params.model_copy(update={"gamma": 1.0, "alpha": 1.0, "beta": 1.0, "schedule": "constant"})
    return result(case, x, {"total": torch.stack(list(weighted.values())).sum(), **found()}, weights)


def network_terms(
    kind: type[FeatureMethod],
    params: Mapping[str, object],
    student: Outputs,
    network: nn.Module,
    taps: tuple[str, ...],
    images: Tensor,
    x: dict[str, Tensor],
) -> tuple[FeatureMethod, Terms]:
    """A method built for the student's maps and the frozen teacher's taps, and what computes its terms once the weights are in it."""
    channels, height, width = images.shape[1:]
    teacher = Taps(network.eval(), taps)(images)
    if "logits_t" in x:
        teacher.prediction = x["logits_t"].detach()
    method = kind(kind.Params.model_validate({**params, "student_taps": tuple(student.maps), "teacher_taps": taps}))
    method.build(shapes_of(student), shapes_of(teacher), TaskInfo("classification", student.logits.shape[1], (channels, height, width)))
    method.use_teacher(network, (channels, height, width))
    samples = torch.arange(len(images))
    batch = Batch(inputs=samples, target=x["label"].detach() if "label" in x else samples, index=samples)
    return method, lambda: method(student, teacher, batch, AFTER_WARMUP)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


NETWORK = {"adain": adain, "kdsvd": kdsvd, "norm": norm, "ofd": ofd, "reviewkd": reviewkd, "srrl": srrl}
