"""Golden cases of methods that compare the samples of a batch with each other."""

from __future__ import annotations

import torch
from read_golden import Case
from result import AFTER_WARMUP, Result, load_weights, map_terms, read_inputs, result, shapes_of, total

from kdbench.data.batch import Batch, Part
from kdbench.methods.cc import CC
from kdbench.methods.crd import CRD, Contrast
from kdbench.methods.pkt import PKT, neighbourhood_loss
from kdbench.methods.rkd import RKD, angle_loss, distance_loss
from kdbench.methods.sp import SP, similarity_loss
from kdbench.methods.uskd import USKD
from kdbench.models.outputs import Outputs
from kdbench.tasks.base import TaskInfo

_EMBEDDINGS = {"embed_s.linear.": "student_embeddings.0.", "embed_t.linear.": "teacher_embeddings.0."}
_CONTRAST = {
    "embed_s.linear.": "contrasts.0.embed_student.",
    "embed_t.linear.": "contrasts.0.embed_teacher.",
    "contrast.memory_v1": "contrasts.0.memory_student",
    "contrast.memory_v2": "contrasts.0.memory_teacher",
}


def sp(case: Case) -> Result:
    x = read_inputs(case)
    _, found = map_terms(SP, {"weight": case.hp["feat_weight"]}, x)
    names = sorted(name.removeprefix("feat_s") for name in x if name.startswith("feat_s"))
    stages = {f"stage{name}": similarity_loss(x[f"feat_s{name}"], x[f"feat_t{name}"]) for name in names}
    return result(case, x, {"total": found()["sp"], **stages})


def rkd(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    _, found = map_terms(RKD, {name: hp[name] for name in ("distance_weight", "angle_weight", "squared")}, x)
    parts = {"distance": distance_loss(x["feat_s"], x["feat_t"], hp["squared"]), "angle": angle_loss(x["feat_s"], x["feat_t"])}
    return result(case, x, {"total": total(found().values()), **parts})


def pkt(case: Case) -> Result:
    x = read_inputs(case)
    _, found = map_terms(PKT, {"weight": case.hp["feat_weight"]}, x)
    return result(case, x, {"total": found()["pkt"], "raw": neighbourhood_loss(x["feat_s"], x["feat_t"])})


def cc(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    method, found = map_terms(CC, {"weight": hp["weight"], "dimensions": hp["embed_dim"]}, x)
    weights = load_weights(method, case, _EMBEDDINGS)
    return result(case, x, {"total": found()["cc"]}, weights)


def crd(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    settings = {"weight": hp["feat_weight"], "temperature": hp["nce_t"], "momentum": hp["nce_m"]}
    method, _ = map_terms(CRD, {**settings, "negatives": hp["nce_k"], "dimensions": hp["feat_dim"]}, x)
    assert isinstance(method, CRD)
    everyone = torch.arange(hp["n_data"])
    method.use_samples(Part(everyone, everyone % 2, everyone))
    own = {name: value for name, value in case.weights.items() if name != "contrast.params"}
    weights = load_weights(method, Case(case.method, case.name, case.meta, {**case.arrays, "w": own}), _CONTRAST)
    (contrast,) = method.contrasts
    assert isinstance(contrast, Contrast)
    partition = torch.from_numpy(case.weights["contrast.params"][2:4])  # of the student's and of the teacher's side; below 0: not yet known
    contrast.log_partition.copy_(torch.where(partition > 0, partition, torch.nan).log())
    (tap,) = method.student_taps
    raw = method.contrasted(Outputs(x["feat_s"], {tap: x["feat_s"]}), Outputs(x["feat_t"], {tap: x["feat_t"]}), x["contrast_idx"])["crd"]
    z_student, z_teacher = contrast.log_partition.exp()
    middle = {"Z_v1": z_student, "Z_v2": z_teacher, "memory_v1_after": contrast.memory_student, "memory_v2_after": contrast.memory_teacher}
    return result(case, x, {"total": raw, "raw": raw / hp["feat_weight"], **middle}, weights)


def uskd(case: Case) -> Result:
    x, hp = read_inputs(case), case.hp
    student, samples = Outputs(x["logits_s"], {"middle": x["fea_mid"]}), torch.arange(len(x["logits_s"]))
    method = USKD(USKD.Params(alpha=1.0, beta=1.0, mu=hp["mu"], student_taps=("middle",)))
    method.build(shapes_of(student), None, TaskInfo("classification", hp["num_classes"], (3, 32, 32)))
    weights = load_weights(method, case, {"fc.": "weak_head."})

    def found() -> dict[str, torch.Tensor]:
        return method(student, None, Batch(samples, x["label"].detach(), samples), AFTER_WARMUP)

    parts = found()
    method.params = method.params.model_copy(update={"alpha": hp["alpha"], "beta": hp["beta"]})
    return result(case, x, {"total": total(found().values()), **parts}, weights)


RELATIONS = {"sp": sp, "rkd": rkd, "pkt": pkt, "cc": cc, "crd": crd, "uskd": uskd}
