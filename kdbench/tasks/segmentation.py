"""Semantic segmentation: one label per pixel, cross-entropy, mean intersection over union in percent."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.data.columns import Columns, alone, described, single, wide
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.data.views import IGNORED
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Outputs
from kdbench.tasks.agreement import agreement, agreement_tolerance
from kdbench.tasks.base import Splits, Task, TaskInfo
from kdbench.tasks.by_class import of_class
from kdbench.tasks.networks import network_for, seen_by_roles
from kdbench.tasks.splits import SplitOptions, cut

_SAMPLES_AT_ONCE = 64  # stored predictions are half precision and large; only this many are widened at a time


class Segmentation(Task):
    """Which of the classes each pixel belongs to. Pixels labelled 255 count nowhere."""

    name = "segmentation"
    version = 2  # since 2, several workers and micro-batches count by labelled pixels and no more by images
    gives = frozenset({"pixel logits"})
    primary = "miou"
    bounds = (0.0, 100.0)

    class Options(SplitOptions):
        data: DataSpec = DataSpec(name="shapes")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.source: Source = open_source(options.data)
        target = self.source.train.target
        if target is None or not alone(target) or single(target, "target").ndim != 3 or single(target, "target").dtype.is_floating_point:
            given = "one per image" if self.source.train.one_label else described(target)
            raise UserError(f"task 'segmentation' needs one label per pixel; data {self.source.name!r} gives {given}")
        if self.source.ignore_index not in (None, IGNORED):
            raise UserError(f"data {self.source.name!r}: ignored pixels must be labelled {IGNORED}, not {self.source.ignore_index}")
        self.data_name = self.source.name
        self.info = TaskInfo(self.name, self.source.num_classes, self.source.example, self.source.class_names)
        self._splits = cut(self.source, options)

    def splits(self) -> Splits:
        return self._splits

    def build_model(self, spec: ModelSpec) -> nn.Module:
        return network_for(spec, self.source, (self.source.num_classes, *self.source.image_shape[1:]), seen_by_roles(self))

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of logits [B, C, H, W] with labels [B, H, W], mean over the pixels that count; 0 where none does."""
        logits = wide(outputs.logits)
        total = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="sum")
        return {"cross_entropy": total / (batch.labels != IGNORED).sum().clamp(min=1)}

    def weight(self, batch: Batch) -> Tensor:
        """The pixels that count."""
        return (batch.labels != IGNORED).sum()

    def metrics(self, prediction: Columns, target: Columns) -> dict[str, float]:
        """prediction: logits [N, C, H, W]; target: [N, H, W].

        miou: intersection over union of each class over all pixels of all images, then the mean over the classes that occur in the
        prediction or the target; in percent. iou/NAME: of each of these classes. pixel_accuracy in percent. nll in nats a pixel.
        """
        from torchmetrics.classification import MulticlassJaccardIndex  # takes seconds, so only who measures a segmentation pays

        given, expected = single(prediction, "logits"), single(target, "target")
        # Every worker has all predictions, and rank 0 alone measures a test set: torchmetrics must not wait for the others.
        jaccard = MulticlassJaccardIndex(given.shape[1], average="macro", ignore_index=IGNORED, sync_on_compute=False)
        jaccard = jaccard.to(given.device)
        correct, counted, nll = 0, 0, 0.0
        for logits, labels in zip(given.split(_SAMPLES_AT_ONCE), expected.long().split(_SAMPLES_AT_ONCE), strict=True):
            best = logits.argmax(1)
            jaccard.update(best, labels)
            correct += int((best == labels).sum())
            counted += int((labels != IGNORED).sum())
            nll += F.cross_entropy(logits.double(), labels, ignore_index=IGNORED, reduction="sum").item()
        numbers = {"miou": 100 * jaccard.compute().item(), "pixel_accuracy": 100 * correct / counted, "nll": nll / counted}
        shared, either = jaccard.confmat.diag(), jaccard.confmat.sum(0) + jaccard.confmat.sum(1) - jaccard.confmat.diag()
        ious = zip(self.source.class_names, shared.tolist(), either.tolist(), strict=True)
        return numbers | {of_class("iou", name): 100 * both / one for name, both, one in ious if one}

    def chance(self, target: Columns) -> float:
        """The mIoU of the commonest class everywhere: its share of the pixels that count, over the number of classes. target: [N, H, W]."""
        labels = single(target, "target")
        counts = labels[labels != IGNORED].long().bincount()
        return 100 * counts.max().item() / counts.sum().item() / int((counts > 0).sum())

    def agreement_tolerance(self, found: dict[str, float], teacher: Columns) -> dict[str, float]:
        return agreement_tolerance(found, single(teacher, "logits"))

    def agreement(self, prediction: Columns, teacher: Columns) -> dict[str, float]:
        """Over all pixels, those labelled 255 too: the label isn't asked for."""
        return agreement(single(prediction, "logits"), single(teacher, "logits"))
