"""Several labels an image: a yes or no for each class, binary cross-entropy, mean average precision in percent."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.data.columns import Columns, alone, described, single, wide
from kdbench.data.options import LEFT_OUT_UNSET
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Outputs
from kdbench.tasks.agreement import agreement, agreement_tolerance
from kdbench.tasks.base import Splits, Task, TaskInfo
from kdbench.tasks.networks import network_for, seen_by_roles
from kdbench.tasks.splits import SplitOptions, cut


class MultiLabel(Task):
    """Which of the classes an image shows, any number of them.

    A target is 0 or 1 for each class, uint8 or float32 [B, C]. A network gives one logit a class, [B, C], whose sigmoid is the score; any
    network for classification does.
    """

    name = "multi_label"
    gives = frozenset({"scores", "imitation"})
    primary = "map"
    bounds = (0.0, 100.0)

    class Options(SplitOptions):
        """top: also measure the answer that names so many classes of each image, those with the highest scores, as for COCO's top 3."""

        data: DataSpec = DataSpec(name="shapes", target="present")
        top: Annotated[Annotated[int, Field(ge=1, le=1000)] | None, LEFT_OUT_UNSET] = None

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.source: Source = open_source(options.data)
        source = self.source
        for part in source.parts:
            if part.target is not None and not _answers(part.target, source.num_classes):
                way_out = "; use target: present" if source.name in ("shapes", "stamps") else ""
                raise UserError(
                    f"task 'multi_label' needs a 0 or 1 for each of {source.num_classes} classes, uint8 or float32 [N, "
                    f"{source.num_classes}]; data {source.name!r} gives {described(part.target)}{way_out}"
                )
        if options.top is not None and options.top > source.num_classes:
            raise UserError(f"top: {options.top} is more than the {source.num_classes} classes of data {source.name!r}; lower it")
        self.data_name = source.name
        self.info = TaskInfo(self.name, source.num_classes, source.example, source.class_names, _imitation)
        self._splits = cut(source, options)

    def splits(self) -> Splits:
        return self._splits

    def build_model(self, spec: ModelSpec) -> nn.Module:
        return network_for(spec, self.source, (self.source.num_classes,), seen_by_roles(self))

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Binary cross-entropy of logits [B, C] with the answers [B, C], mean over both, in nats."""
        logits = wide(outputs.logits)
        return {"binary_cross_entropy": F.binary_cross_entropy_with_logits(logits, batch.labels.to(logits.dtype))}

    def metrics(self, prediction: Columns, target: Columns) -> dict[str, float]:
        """prediction: logits [N, C]; target: 0 or 1, [N, C]. All in percent.

        map: average precision, mean over the classes that a sample shows. micro_f1, macro_f1: of the classes whose score is above 0.5, over
        all answers together, and the mean over the classes that a sample shows. With the option `top` both also for the best k classes of
        each sample, as micro_f1_top3 and macro_f1_top3.
        """
        logits, present = single(prediction, "logits").double(), single(target, "target") > 0
        found = {"map": mean_average_precision(logits, present), **_f1(logits > 0, present, "")}
        if self.options.top is not None:
            best = torch.zeros_like(present).scatter_(1, logits.topk(self.options.top, dim=1).indices, True)
            found |= _f1(best, present, f"_top{self.options.top}")
        return found

    def chance(self, target: Columns) -> float:
        """The average precision of equal scores for all samples: the share of samples with a class, mean over the classes that occur."""
        present = single(target, "target") > 0
        shares = present.double().mean(0)
        return 100 * shares[shares > 0].mean().item() if bool(present.any()) else 0.0

    def agreement(self, prediction: Columns, teacher: Columns) -> dict[str, float]:
        """agreement: the share of the answers, one a sample and class, that are equal. teacher_kl: their mean KL(teacher || student)."""
        return agreement(*(_no_and_yes(single(columns, "logits")) for columns in (prediction, teacher)))

    def agreement_tolerance(self, found: dict[str, float], teacher: Columns) -> dict[str, float]:
        return agreement_tolerance(found, _no_and_yes(single(teacher, "logits")))


def mean_average_precision(scores: Tensor, present: Tensor) -> float:
    """Average precision in percent, mean over the classes that at least one sample shows; 0 where none does.

    A class's average precision is the mean, over the samples that show it, of the precision among all samples whose score is at least as
    high. Equal scores count together, so the order of samples says nothing.

    Args:
        scores: [N, C], higher for surer.
        present: bool [N, C].
    """
    found = [_average_precision(scores[:, k], present[:, k]) for k in present.any(0).nonzero().flatten().tolist()]
    return 100 * sum(found) / len(found) if found else 0.0


def _average_precision(scores: Tensor, present: Tensor) -> float:
    """Of one class: scores [N], present bool [N] with at least one true."""
    ranked, order = scores.sort(descending=True)
    hits = present[order].double().cumsum(0)
    last = torch.ones_like(present)  # of the samples with one score
    last[:-1] = ranked[:-1] != ranked[1:]
    reached, samples = hits[last], last.nonzero().flatten() + 1
    gained = reached.diff(prepend=reached.new_zeros(1))
    return (gained * reached / samples).sum().item() / hits[-1].item()


def _f1(answers: Tensor, present: Tensor, suffix: str) -> dict[str, float]:
    """F1 = 2 hits / (named + present) in percent; 0 where nothing is named and nothing is there. answers, present: bool [N, C]."""
    hits, named, there = (counted.sum(0).double() for counted in (answers & present, answers, present))
    occurring = there > 0
    by_class = 2 * hits[occurring] / (named + there)[occurring]
    return {
        f"micro_f1{suffix}": 200 * hits.sum().item() / max(1.0, (named + there).sum().item()),
        f"macro_f1{suffix}": 100 * by_class.mean().item() if bool(occurring.any()) else 0.0,
    }


def _imitation(student: Outputs, teacher: Outputs, batch: Batch, temperature: float) -> Tensor:
    """T^2 times the binary cross-entropy of sigmoid(student / T) with sigmoid(teacher / T), mean over samples and classes."""
    logits, wanted = wide(student.logits) / temperature, wide(teacher.logits.detach()) / temperature
    return temperature**2 * F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype).sigmoid())


def _answers(target: Columns, classes: int) -> bool:
    """Whether a target is 0 or 1 for each class of each sample."""
    answers = single(target, "target") if alone(target) else None
    if answers is None or answers.dtype not in (torch.uint8, torch.float32) or answers.shape[1:] != (classes,):
        return False
    return bool(((answers == 0) | (answers == 1)).all())


def _no_and_yes(logits: Tensor) -> Tensor:
    """Each answer as a choice between two classes: logits [N, 2, C] whose softmax over the second dimension is 1 - p and p."""
    return torch.stack([torch.zeros_like(logits), logits], dim=1)
