"""Object detection: boxes of the objects in an image, their classes and scores; average precision in percent."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.data.columns import Columns, described, several
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.models.detectors.positions import positions
from kdbench.models.outputs import Outputs
from kdbench.tasks.base import Splits, Task, TaskInfo
from kdbench.tasks.detection_targets import (
    Assignment,
    assign,
    average_precision,
    best_boxes,
    detection_losses,
    imitation_loss,
    shared_boxes,
)
from kdbench.tasks.networks import network_for
from kdbench.tasks.splits import SplitOptions, cut


class Detection(Task):
    """Where the objects of an image are, and what they are.

    A target is `boxes` [B, M, 4] of x0, y0, x1, y1 in pixels with `labels` [B, M], -1 in padded rows. A network gives `logits` [B, P, C]
    and `boxes` [B, P, 4] at the P cells of a pyramid, in the order of `models.detectors.positions`.
    """

    name = "detection"
    gives = frozenset({"boxes", "imitation"})
    imitation_needs_labels = True  # it is a mean over the cells that learn an object
    primary = "ap"

    class Options(SplitOptions):
        data: DataSpec = DataSpec(name="shapes", target="boxes", size=64)
        strides: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (4, 8)  # of the pyramid's levels, in pixels
        kept_boxes: Annotated[int, Field(ge=1, le=300)] = 20  # of each image, the best are stored and measured

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.source: Source = open_source(options.data)
        target, size = self.source.train.target, self.source.train.image_size
        if not isinstance(target, dict) or not {"boxes", "labels"} <= target.keys() or size is None:
            raise UserError(
                f"task 'detection' needs images with `boxes` [N, M, 4] and `labels` [N, M]; data {self.source.name!r} gives "
                f"{described(target)}" + ("; use target: boxes" if self.source.name == "shapes" else "")
            )
        self.data_name = self.source.name
        self._centres, self._strides = positions(size, options.strides)
        imitation = partial(_imitation, centres=self._centres, strides=self._strides)
        self.info = TaskInfo(self.name, self.source.num_classes, self.source.example, self.source.class_names, imitation)
        self._splits = cut(self.source, options)

    def splits(self) -> Splits:
        return self._splits

    def build_model(self, spec: ModelSpec) -> nn.Module:
        cells = len(self._strides)
        return network_for(spec, self.source, {"logits": (cells, self.source.num_classes), "boxes": (cells, 4)})

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Focal loss of all cells and GIoU loss of those that learn an object, both over the number of the latter (arXiv 1904.01355)."""
        return detection_losses(several(outputs.prediction), self._assigned(batch))

    def weight(self, batch: Batch) -> Tensor:
        """The cells that learn an object. A batch without one keeps the loss of its background."""
        return self._assigned(batch).counts.sum()

    def _assigned(self, batch: Batch) -> Assignment:
        return _assigned(batch, self._centres, self._strides)

    def kept(self, prediction: Columns) -> Columns:
        """The best boxes of each image, after non-maximum suppression."""
        return best_boxes(several(prediction), self.options.kept_boxes)

    def metrics(self, prediction: Columns, target: Columns) -> dict[str, float]:
        """prediction: as `kept` gives it. ap: over overlaps of 0.50 to 0.95; ap50, ap75; in percent, means over classes."""
        return average_precision(several(prediction), several(target))

    def agreement(self, prediction: Columns, teacher: Columns) -> dict[str, float]:
        """agreement: of the boxes that student and teacher keep, the share that the other has too (`shared_boxes`)."""
        return {"agreement": shared_boxes(several(prediction), several(teacher))}


def _assigned(batch: Batch, centres: Tensor, strides: Tensor) -> Assignment:
    device = batch.index.device
    return assign(several(batch.target), centres.to(device), strides.to(device))


def _imitation(student: Outputs, teacher: Outputs, batch: Batch, temperature: float, centres: Tensor, strides: Tensor) -> Tensor:
    """`imitation_loss` over the number of cells that learn an object, as the task's own terms are."""
    positives = _assigned(batch, centres, strides).counts.sum().clamp(min=1)
    return imitation_loss(several(student.prediction), several(teacher.prediction), strides.to(positives.device), temperature) / positives
