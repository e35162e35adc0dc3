"""Golden cases of methods that look at the boxes of a detector's targets."""

from __future__ import annotations

import torch
from read_golden import Case
from result import AFTER_WARMUP, Result, load_weights, read_inputs, result, shapes_of, total
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.fgd import (
    FGD,
    Level,
    attention_distance,
    background,
    channel_attention,
    focal_distance,
    foreground,
    spatial_attention,
)
from kdbench.models.outputs import Outputs
from kdbench.tasks.base import TaskInfo

CONTEXT = {"conv_mask_": "weigh.", "channel_add_conv_": "add."}


def fgd(case: Case) -> Result:
    """One level. Where all pictures have one size, the method itself gives the total; it is never given pictures of several sizes."""
    x, hp = read_inputs(case), case.hp
    temperature = hp["temp"]
    weights = {"alpha": hp["alpha_fgd"], "beta": hp["beta_fgd"], "gamma": hp["gamma_fgd"], "relation": hp["lambda_fgd"]}
    method = FGD(FGD.Params.model_validate({**weights, "temperature": temperature, "student_taps": ["x"], "teacher_taps": ["x"]}))
    prediction = {"logits": torch.zeros(1, 1, 1), "boxes": torch.zeros(1, 1, 4)}
    student, teacher = (Outputs(prediction, {"x": x[f"feat_{side}"]}) for side in "st")
    method.build(shapes_of(student), shapes_of(teacher), TaskInfo("detection", 1, (3, 64, 64)))
    level = method.levels[0]
    assert isinstance(level, Level)
    renamed = {f"{theirs}{side[0]}.": f"levels.0.{side}.{ours}" for theirs, ours in CONTEXT.items() for side in ("student", "teacher")}
    learned = load_weights(method, case, {"align.": "levels.0.align.", **renamed})

    ours, theirs = level.align(x["feat_s"]), x["feat_t"].detach()
    boxes, sizes = x["gt_boxes"].detach(), x["img_shape"][:, :2]
    counts = torch.arange(boxes.shape[1]) < x["num_gt"][:, None]
    mask = foreground(boxes, counts, sizes, (theirs.shape[2], theirs.shape[3]))
    behind = background(mask)
    attention = spatial_attention(theirs, temperature), channel_attention(theirs, temperature)
    losses: dict[str, Tensor] = {
        "fg_loss": focal_distance(ours, theirs, mask, *attention),
        "bg_loss": focal_distance(ours, theirs, behind, *attention),
        "attn_loss": attention_distance(ours, theirs, temperature),
        "rela_loss": level.relation(ours, theirs),
    }
    whole = total(weight * loss for weight, loss in zip(weights.values(), losses.values(), strict=True))
    if len(sizes.unique(dim=0)) == 1:
        pictures = torch.zeros(len(boxes), 3, *sizes[0].tolist())
        target = {"boxes": boxes, "labels": counts.long() - 1}
        terms = method(student, Outputs(prediction, {"x": theirs}), Batch(pictures, target, torch.arange(len(boxes))), AFTER_WARMUP)
        whole = total(terms.values())
    masks = {"mask_fg": mask, "mask_bg": behind, "spatial_attn_t": attention[0], "channel_attn_t": attention[1]}
    masks |= {"spatial_attn_s": spatial_attention(ours, temperature), "channel_attn_s": channel_attention(ours, temperature)}
    return result(case, x, {"total": whole, **losses, **masks}, learned)


DETECTORS = {"fgd": fgd}
