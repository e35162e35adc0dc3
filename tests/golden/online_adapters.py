"""Golden cases of networks that learn together, without a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from read_golden import Case
from result import Result, load_weights, read_inputs, result, shapes_of
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import Progress
from kdbench.methods.ffsd import FFSD, redirected
from kdbench.models.outputs import Outputs
from kdbench.tasks.base import TaskInfo

PLAIN = {"diversity_weight": 1.0, "fusion_weight": 1.0}


def ffsd(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    count = hp["model_num"]
    students = tuple(network(x, str(k)) for k in range(count))
    leader = network(x, "leader")
    leader.peers = students
    method = FFSD(
        FFSD.Params.model_validate(
            {
                "students": count,
                "temperature": hp["temperature"],
                "diversity_weight": hp["lambda_diversity"],
                "fusion_weight": hp["lambda_fusion"],
                "upsampler_weight": hp["lambda_self_distillation"],
                "warmup_share": 1.0,
                "student_taps": tuple(leader.maps),
            }
        )
    )
    method.build(shapes_of(leader), None, TaskInfo("classification", leader.logits.shape[1], (3, 32, 32)))
    weights = load_weights(method, case, renamed(count, len(leader.maps) - 1))
    samples = torch.arange(len(x["label"]))
    batch, warming = Batch(samples, x["label"].detach(), samples), Progress(hp["epoch"], hp["epoch"], 5)
    plain = copy.deepcopy(method)  # whose upsamplers have the same running statistics
    plain.params = plain.params.model_copy(update=PLAIN)
    raw = {name: value / method.strength(warming) for name, value in plain(leader, None, batch, warming).items()}
    last = [student.maps[method.student_taps[-1]] for student in students]
    feature = copy.deepcopy(method).fusion(torch.cat(last, dim=1))
    terms = method(leader, None, batch, warming)
    terms["leader_labels"] = F.cross_entropy(leader.logits, batch.target)
    outputs = {**sums(terms, count), **details(terms, raw, count), "fusion_feature": feature}
    for k in range(1, count):
        outputs[f"diversity_target{k}"] = redirected(last[k - 1])
    used = {"diversity": method.params.diversity_weight, "fusion": method.params.fusion_weight, "sd": method.params.upsampler_weight}
    outputs |= {f"lambda_{name}_used": torch.tensor(w * method.strength(warming), dtype=torch.float64) for name, w in used.items()}
    return result(case, x, outputs, weights)


def network(x: dict[str, Tensor], name: str) -> Outputs:
    count = sum(key.startswith(f"feat_{name}_") for key in x)
    return Outputs(x[f"logits_{name}"], {f"stage{j}": x[f"feat_{name}_{j}"] for j in range(1, count + 1)})


def renamed(count: int, steps: int) -> dict[str, str]:
    """The authors' names of weights -> ours; steps: of each upsampler."""
    names = {"fusion_module.fc2.": "fusion_head."}
    for theirs, ours in (("fusion_module", "fusion"), ("trans_fusion_module", "trans_fusion")):
        for position, layer in ((0, "conv1"), (1, "bn1"), (3, "conv1_1"), (4, "bn1_1")):
            names[f"{theirs}.{layer}."] = f"{ours}.{position}."
    upsamplers = {f"sd_models.{k}": f"upsamplers.{k}" for k in range(count - 1)} | {"sd_leader_model": "leader_upsampler"}
    for theirs, ours in upsamplers.items():
        for step in range(steps):
            names[f"{theirs}.layer{step}.convtranpose."] = f"{ours}.convolutions.{step}."
            names[f"{theirs}.layer{step}.norm."] = f"{ours}.norms.{step}."
    return names


def sums(terms: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The loss of each network, and of all of them."""
    begins = {f"student{k}": f"student{k}_" for k in range(count)} | {"fusion": "fusion_", "sdleader": "leader_upsampler_"}
    begins |= {f"sd{k}": f"upsampler{k}_" for k in range(1, count)}
    found = {theirs: torch.stack([terms[name] for name in terms if name.startswith(begin)]).sum() for theirs, begin in begins.items()}
    found["total"] = torch.stack(list(terms.values())).sum()
    own = [name for name in terms if name.startswith("leader_") and "upsampler" not in name]
    return found | {"leader": torch.stack([terms[name] for name in own]).sum()}


def details(terms: dict[str, Tensor], raw: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    found = {
        "leader_fusion_raw": raw["leader_attention"],
        "leader_transfusion_raw": raw["leader_students"],
        "leader_sd_raw": raw["leader_shallow"],
        "sdleader_feature": terms["leader_upsampler_features"],
        "sdleader_attention": terms["leader_upsampler_attention"],
    }
    for k in range(count):
        found |= {f"student{k}_ce": terms[f"student{k}_labels"], f"student{k}_dml": terms[f"student{k}_mutual"]}
    for k in range(1, count):
        found |= {f"student{k}_diversity_raw": raw[f"student{k}_diversity"], f"student{k}_sd_raw": raw[f"student{k}_shallow"]}
        found |= {f"sd{k}_feature": terms[f"upsampler{k}_features"], f"sd{k}_attention": terms[f"upsampler{k}_attention"]}
    return found


ONLINE: dict[str, Callable[[Case], Result]] = {"ffsd": ffsd}
