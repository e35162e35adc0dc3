"""Self-supervised knowledge distillation using singular value decomposition (Lee, Kim & Song, ECCV 2018, arXiv 1807.06819)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, paired_stages, stages
from kdbench.models.adapters import map_shape
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_SPARE = 3  # of the student, so many vectors more than of the teacher, for each of these to find its like
_KERNEL_WIDTH = 8.0


def singular_vectors(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest singular values [B, count] of features [B, N, D], and their right singular vectors [B, D, count].

    The vectors' gradient is that of perturbation theory, sum_j v_j (v_j' dG v_i) / (l_i - l_j) with G = F'F, in which pairs of equal
    singular values, whose vectors are not determined, are left out: it is finite for any features. The values have none.
    """
    (features,) = loss_precision(features)
    with torch.no_grad():
        _, values, transposed = torch.linalg.svd(features, full_matrices=False)
        every, squares = transposed.mT, values.square()
        chosen, square = every[..., :count], squares[..., None, :count]
        precision = torch.finfo(features.dtype).eps * max(features.shape[1:]) * squares[..., :1, None]
        inside = _inverse(square - squares[..., None], precision)
        outside = _inverse(square, precision)
    if not features.requires_grad:
        return values[..., :count], chosen
    change = features.mT @ (features @ chosen)
    change = change - change.detach()  # 0, but its gradient is that of G v
    along = every.mT @ change
    return values[..., :count], chosen + every @ (along * inside) + (change - every @ along) * outside


def _inverse(differences: Tensor, precision: Tensor) -> Tensor:
    return torch.where(differences.abs() > precision, 1 / differences, 0.0)


def aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """For each of the teacher's vectors [B, D, k] the student's [B, D, n] with the largest |cosine|, turned to its side; [B, D, k]."""
    cosine = student.detach().mT @ teacher
    nearest = cosine.abs().argmax(dim=1, keepdim=True)
    side = cosine.gather(1, nearest).sign()
    return student.gather(2, nearest.expand(-1, student.shape[1], -1)) * side


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """RBF kernel exp(-(a - b)^2 / 8) of every entry of [B, D1, k] with every one of [B, D2, k], vector by vector: [B, D1, D2, k]."""
    return torch.exp(-(first.unsqueeze(2) - second.unsqueeze(1)).square() / _KERNEL_WIDTH)


class KDSVD(FeatureMethod):
    """Match how the principal directions of consecutive stages relate, which a singular value decomposition finds in each image.

    A direction is a vector over channels, so both networks need the same number of them; the size of the map is free. The loss is a sum
    over the channels of two stages, so its scale grows with their widths. The teacher's directions have the sign that the decomposition
    happens to give them. The map is read as RepDistiller does, [H W, D]; mdistiller's [D H, W] is another loss.
    """

    paper = Paper(
        "Self-supervised Knowledge Distillation Using Singular Value Decomposition",
        arxiv="1807.06819",
        venue="ECCV 2018",
        formula="L = w_task L_task + weight / B sum_l |K(v_s^l, v_s^(l-1)) - K(v_t^l, v_t^(l-1))|^2;  K(a, b) = exp(-(a - b)^2 / 8)",
        checked_against="HobbitLong/RepDistiller@b84f547",
    )
    reads = MAPS_ALONE

    class Params(FeatureMethod.Params):
        """vectors: of the teacher at each place; the student's are chosen among three more."""

        weight: Annotated[float, Range(0.1, 100.0, log=True), Field(ge=0)] = 1.0
        vectors: Annotated[int, Range(1, 4), Field(ge=1, le=1024)] = 1

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """The stages that both have, without those of different widths or with too few positions; where fewer than two are left, stages
        that are as wide wherever they stand; and all stages, for `build` to say what is wrong with them, where that leaves too few too.
        """
        ours, theirs = paired_stages(student, teacher)
        paired = list(zip(ours, theirs, strict=True))
        in_place = [(s, t) for s, t in paired if self._comparable(student.taps[s], teacher.taps[t])]
        found = (pairs for pairs in (in_place, self._anywhere(student, teacher)) if len(pairs) > 1)
        chosen = next(found, paired)
        return tuple(s for s, _ in chosen), tuple(t for _, t in chosen)

    def _anywhere(self, student: Shapes, teacher: Shapes) -> list[tuple[str, str]]:
        """From the last stage back, each of the student's with the teacher's deepest that is left and can be compared; in forward order."""
        pairs, left = [], stages(teacher)
        for ours in reversed(stages(student)):
            fitting = [place for place, theirs in enumerate(left) if self._comparable(student.taps[ours], teacher.taps[theirs])]
            if fitting:
                pairs.append((ours, left[fitting[-1]]))
                left = left[: fitting[-1]]
        return pairs[::-1]

    def _comparable(self, student: TapShape, teacher: TapShape) -> bool:
        return self._obstacle(map_shape(student), map_shape(teacher)) is None

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        pairs = self.pairs(student, teacher)
        for position, (ours, theirs) in enumerate(self.map_pairs(student, teacher)):
            if (obstacle := self._obstacle(ours, theirs)) is not None:
                raise self.unfit(position, *pairs[position], obstacle)
        if len(pairs) < 2:
            raise UserError(f"method {self.name} relates consecutive places; name at least two student_taps and teacher_taps")

    def _obstacle(self, student: tuple[int, int, int], teacher: tuple[int, int, int]) -> str | None:
        """Why maps of these [D, H, W] can't be compared; None if they can."""
        if student[0] != teacher[0]:
            return "both need the same number of channels; name taps of one width, or choose a student as wide as the teacher"
        needed = self.params.vectors + _SPARE
        for channels, height, width in (student, teacher):
            if min(channels, height * width) < needed:
                return f"it takes {needed} singular vectors, so both need as many channels and positions; tap an earlier stage"
        return None

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        directions = []
        for ours, theirs in self.read_maps(s, t):
            values, goal = singular_vectors(theirs.flatten(2).mT, self.params.vectors)
            _, found = singular_vectors(ours.flatten(2).mT, self.params.vectors + _SPARE)
            scale = F.normalize(values, dim=1).unsqueeze(1)
            directions.append((aligned(found, goal) * scale, goal * scale))
        distances = [
            (correlation(student, before_s) - correlation(teacher, before_t)).square().sum()
            for (before_s, before_t), (student, teacher) in pairwise(directions)
        ]
        return {"kdsvd": self.params.weight * torch.stack(distances).sum() / len(batch)}
