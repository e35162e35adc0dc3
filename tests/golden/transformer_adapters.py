"""Golden cases of methods that compare transformers with each other, or with other kinds of networks."""

from __future__ import annotations

import torch
from read_golden import Case
from result import AFTER_WARMUP, Result, load_weights, read_inputs, result, shapes_of, total
from torch import Tensor

from kdbench.data.batch import Batch
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


TRANSFORMERS = {"vitkd": vitkd}
