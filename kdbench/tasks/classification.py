"""Image classification: one label per image, cross-entropy, accuracy in percent."""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.data.columns import Columns, described, single
from kdbench.data.samples import UNLABELLED
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Outputs
from kdbench.tasks.agreement import agreement, agreement_tolerance
from kdbench.tasks.base import Splits, Task, TaskInfo
from kdbench.tasks.networks import checked_network, network_for, seen_by_roles
from kdbench.tasks.splits import SplitOptions, cut

CALIBRATION_BINS = 15  # as in Guo et al., arXiv 1706.04599


class Classification(Task):
    """Which of the classes an image shows."""

    name = "classification"
    gives = frozenset({"class logits"})
    primary = "accuracy"
    bounds = (0.0, 100.0)

    class Options(SplitOptions):
        data: DataSpec = DataSpec(name="fashion_mnist")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.source: Source = open_source(options.data)
        train = self.source.train
        if not train.one_label or train.labels.dtype != torch.int64:
            given = "one per pixel" if isinstance(train.target, Tensor) and train.target.ndim == 3 else described(train.target)
            raise UserError(f"task 'classification' needs one label per sample, int64 [N]; data {self.source.name!r} gives {given}")
        self.data_name = self.source.name
        self.info = TaskInfo(self.name, self.source.num_classes, self.source.example, self.source.class_names)
        self._splits = cut(self.source, options, of_classes=True)
        self._partly_labelled = self._splits.transfer.target is not None and self._splits.transfer.without_label > 0

    def splits(self) -> Splits:
        return self._splits

    def build_model(self, spec: ModelSpec) -> nn.Module:
        return network_for(spec, self.source, (self.source.num_classes,), seen_by_roles(self))

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of logits [B, C] with labels [B] or with probabilities [B, C], mean over the batch.

        Where some samples have no label, mean over those that have one; 0 where none has.
        """
        logits = outputs.logits if outputs.logits.dtype == torch.float64 else outputs.logits.float()
        target = batch.labels.to(logits.dtype) if batch.labels.is_floating_point() else batch.labels
        if not self._partly_labelled or target.is_floating_point():
            return {"cross_entropy": F.cross_entropy(logits, target)}
        total = F.cross_entropy(logits, target, ignore_index=UNLABELLED, reduction="sum")
        return {"cross_entropy": total / (target != UNLABELLED).sum().clamp(min=1)}

    @property
    def counts_samples(self) -> bool:
        return not self._partly_labelled

    def weight(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """The samples; where some have no label, those that have one, while distillation counts all."""
        samples = super().weight(batch)
        assert isinstance(samples, Tensor)
        if not self._partly_labelled:
            return samples
        return {"cross_entropy": (batch.labels != UNLABELLED).sum(), "imitation": samples.to(batch.index.device)}

    def as_teacher(self, network: nn.Module) -> nn.Module:
        """A network that gives as many class logits for these samples, whatever it was trained on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a network of other inputs may warn before it fails
            return checked_network(network, self.source, (self.source.num_classes,), "teacher.task: its network")

    def step(self, target: Columns) -> float:
        """That of one sample."""
        return 100 / len(single(target, "target"))

    def metrics(self, prediction: Columns, target: Columns) -> dict[str, float]:
        """prediction: logits [N, C]; target: [N].

        accuracy and, with more than five classes, top5 in percent; nll in nats; ece, the expected calibration error, as a share 0 .. 1.
        """
        logits, labels = single(prediction, "logits"), single(target, "target")
        # Computed here, because importing torchmetrics takes as long as training a small student does; a test holds both equal.
        log_probabilities = logits.double().log_softmax(1)
        correct = self.right(prediction, target)
        found = {"accuracy": 100 * correct.double().mean().item()}
        if logits.shape[1] > 5:
            found["top5"] = 100 * (logits.topk(5, dim=1).indices == labels[:, None]).any(1).double().mean().item()
        found["nll"] = F.nll_loss(log_probabilities, labels).item()
        found["ece"] = _calibration_error(log_probabilities.amax(1).exp(), correct)
        return found

    def right(self, prediction: Columns, target: Columns) -> Tensor:
        return single(prediction, "logits").argmax(1) == single(target, "target")

    def chance(self, target: Columns) -> float:
        """The commonest label's share in percent, and three standard errors of a share of so many images. target: [N]."""
        labels = single(target, "target")
        share = labels.bincount().max().item() / len(labels)
        return 100 * min(1.0, share + 3 * math.sqrt(share * (1 - share) / len(labels)))

    def agreement_tolerance(self, found: dict[str, float], teacher: Columns) -> dict[str, float]:
        return agreement_tolerance(found, single(teacher, "logits"))

    def agreement(self, prediction: Columns, teacher: Columns) -> dict[str, float]:
        return agreement(single(prediction, "logits"), single(teacher, "logits"))


def _calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Mean over samples of |accuracy - confidence| of the sample's bin, bins of equal width. confidence: float64 [N]; correct: bool [N]."""
    bins = (confidence * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)
    surplus = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=confidence.device)
    surplus.index_add_(0, bins, correct.double() - confidence)
    return surplus.abs().sum().item() / len(confidence)
