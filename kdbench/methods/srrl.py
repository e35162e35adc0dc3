"""Softmax regression representation learning, SRRL (Yang et al., ICLR 2021, OpenReview ZzwDy_wiWv)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names
from kdbench.models.adapters import as_map, as_vector, map_shape
from kdbench.models.outputs import Outputs, Shapes
from kdbench.models.tail import Tail
from kdbench.models.trace import Example
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo


class SRRL(FeatureMethod):
    """Give the student's last features to the teacher's classifier: it must say what it says to the teacher's own.

    The connector ends in a ReLU, so it fits teachers whose classifier reads what is not negative, as that of a ResNet does.
    """

    paper = Paper(
        "Knowledge Distillation via Softmax Regression Representation Learning",
        venue="ICLR 2021",
        formula="L = w_task CE + alpha mean (gap(f) - g_t)^2 + beta mean (W_t gap(f) + b_t - z_t)^2;  f = ReLU(BN(conv1x1(f_s)))",
        checked_against="yzd-v/cls_KD@1e5d48f",
    )
    needs_teacher_network = True

    class Params(FeatureMethod.Params):
        """Both weights are of means, so they hold at any size; the authors use 1 and 1, cls_KD 1 and 5 on CIFAR-100."""

        alpha: Annotated[float, Range(0.1, 10.0, log=True), Field(ge=0)] = 1.0
        beta: Annotated[float, Range(0.1, 10.0, log=True), Field(ge=0)] = 1.0

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """The student's last stage, and what the teacher's classifier reads."""
        return ("stage:-1",), ("pooled",)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        pairs = self.pairs(student, teacher)
        if len(pairs) != 1:
            raise UserError(f"method {self.name} has one classifier to ask; name one of student_taps and one of teacher_taps")
        ours, theirs = pairs[0]
        if theirs.kind != "vector":
            raise self.unfit(0, ours, theirs, "the teacher's tap must be what its classifier reads, a vector such as 'pooled'")
        try:
            channels = map_shape(ours)[0]
        except UserError as error:
            raise self.unfit(0, ours, theirs, str(error)) from error
        self._shape = ours
        convolution = nn.Conv2d(channels, theirs.channels, kernel_size=1, bias=False)
        self.connector = nn.Sequential(convolution, nn.BatchNorm2d(theirs.channels), nn.ReLU())

    def use_teacher(self, network: nn.Module, example: Example) -> None:
        self._classifier = Tail(network, self.teacher_taps[0], example)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        (student,), (teacher,) = self.student_taps, self.teacher_taps
        (feature,) = loss_precision(as_map(s.maps[student], self._shape))
        pooled = as_vector(self.connector(feature))
        goal, logits = (x.to(pooled.dtype) for x in (t.maps[teacher], t.logits))
        return {
            "feature": self.params.alpha * F.mse_loss(pooled, goal),
            "regression": self.params.beta * F.mse_loss(self._classifier(pooled), logits),
        }
