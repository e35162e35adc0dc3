"""Channel-wise distillation for dense prediction, CWD (Shu et al., ICCV 2021, arXiv 2011.13256)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Method, Paper, Progress
from kdbench.methods.features import FeatureMethod, Names, paired_levels, paired_spatial_stages
from kdbench.methods.kd import softened_divergence
from kdbench.methods.presets import Presets
from kdbench.models.adapters import to_smaller, to_width
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 mean KL(softmax(teacher / T) || softmax(student / T)), softmax over the positions of a channel, mean over both.

    student, teacher: [B, D, H, W]. Returns a scalar in nats, float32 or wider, 0 for maps of a single position.
    """
    return softened_divergence(student.flatten(2).flatten(0, 1), teacher.flatten(2).flatten(0, 1), temperature)


def dense_logits(student: Shapes, teacher: Shapes) -> bool:
    """Whether both networks predict a map of logits [C, H, W], of one shape."""
    return len(student.logits) == 3 and student.logits == teacher.logits


class CWD(FeatureMethod):
    """Put each channel's weight where the teacher's channel has it: in the logits of a segmentation, in features otherwise.

    Without named taps the logits are compared where they are maps; where they are not, every level of a pyramid, or the last stage that is
    wider than one position.
    The paper compares equal shapes. Where widths differ, a pointwise convolution that is trained along leads from the student's to the
    teacher's; where sizes differ, the larger map is averaged down.
    """

    paper = Paper(
        "Channel-wise Knowledge Distillation for Dense Prediction",
        arxiv="2011.13256",
        venue="ICCV 2021",
        formula="L = w_task L_task + weight T^2 / (C B) sum_channels KL(softmax_space(f_t / T) || softmax_space(f_s / T))",
        checked_against="open-mmlab/mmrazor@90c7af1",
    )
    reads = MAPS_ALONE
    presets: ClassVar[Presets] = {"boxes": {"weight": 10.0, "temperature": 1.0}}

    class Params(FeatureMethod.Params):
        """Defaults are for logits, at the paper's temperature; mmrazor has weight 5 at 1 for them.

        On detectors the defaults are those that mmrazor has for the maps of a pyramid.
        """

        weight: Annotated[float, Range(0.1, 50.0, log=True), Field(ge=0)] = 3.0
        temperature: Annotated[float, Range(0.5, 10.0, log=True), Field(gt=0)] = 4.0

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        if (found := paired_levels(student, teacher)) is not None:
            return found
        ours, theirs = paired_spatial_stages(student, teacher)
        return ours[-1:], theirs[-1:]

    def choose_taps(self, student: Shapes, teacher: Shapes | None) -> Method.Params:
        named = self.params.student_taps or self.params.teacher_taps
        if teacher is not None and dense_logits(student, teacher) and not named:
            return self.params
        return super().choose_taps(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        maps = self.map_pairs(student, teacher, over_space=True)
        self.aligns = nn.ModuleList(to_width(ours[0], theirs[0]) for ours, theirs in maps)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        losses = [channel_divergence(ours, theirs, self.params.temperature) for ours, theirs in self._compared(s, t)]
        return {"cwd": self.params.weight * torch.stack(losses).sum()}

    def _compared(self, s: Outputs, t: Outputs | None) -> list[tuple[Tensor, Tensor]]:
        """Student's and teacher's maps, of one shape."""
        assert t is not None
        if not self.student_taps:
            return [(s.logits, t.logits)]
        return [to_smaller(align(ours), theirs) for align, (ours, theirs) in zip(self.aligns, self.read_maps(s, t), strict=True)]
