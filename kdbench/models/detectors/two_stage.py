"""Faster R-CNN with the modules of torchvision inside, on any backbone: a first stage proposes boxes, a second says what they hold.

Source: Ren et al., "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", NIPS 2015 (arXiv 1506.01497), on a
feature pyramid (Lin et al., CVPR 2017, arXiv 1612.03144).

The second stage looks at a fixed number of the best proposals, so that every tensor has a fixed shape, the losses lie in the task and the
network can be exported. In training, the true boxes join the proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead

from kdbench.data.columns import wide
from kdbench.errors import UserError
from kdbench.models.detectors.anchors import BOX, AnchorReading, Weights, anchor_sizes, decode
from kdbench.models.detectors.one_stage import by_anchor
from kdbench.models.detectors.pretrained import WithTorchvisionsWeights
from kdbench.models.detectors.proposals import best_proposals, pooled
from kdbench.models.detectors.pyramids import EPSILON, IMAGENET, Pyramid, below_backbone, check_preset, norm_of
from kdbench.models.detectors.readings import Dense, Reading, suppressed
from kdbench.models.inputs import InputSpec

ROI_WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)
_BINS = 7  # of a box, across and down
_TURN = 3.5  # the second level is looked at for boxes of 112 pixels, where the finest level's anchors have 32


@dataclass(frozen=True)
class TwoStageReading(Reading):
    """Levels of the first stage, [B, A (1 + 4), H, W]: of each of a cell's A anchors the logit that it lies on an object, and four offsets.

    Beside them, `proposals` [B, R, 4] in pixels, rows beyond an image's proposals 0; `roi_logits` [B, R, C + 1], the background first; and
    `roi_offsets` [B, R, C, 4], which move a proposal to an object of each class. R is `proposals`; in training it is another one.

    `dense`, and so `kd`, reads the first stage alone: the proposals of two networks lie at different places.

    sizes, ratios: of the anchors, see `AnchorReading`. lowest, overlap: of the suppression.
    """

    wants_valid: ClassVar[bool] = True
    wants_truth: ClassVar[bool] = True

    sizes: tuple[tuple[int, ...], ...] = ()
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    proposals: int = 1000
    lowest: float = 0.05
    overlap: float = 0.5

    @property
    def first(self) -> AnchorReading:
        """How the levels are read: anchors that lie on an object or not."""
        return AnchorReading(1, self.strides, sizes=self.sizes, ratios=self.ratios, above=0.7, below=0.3)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.level_names, "proposals", "roi_logits", "roi_offsets")

    @property
    def of_places(self) -> str:
        return self.first.of_places

    @property
    def places(self) -> tuple[str, tuple[int, ...]]:
        return self.first.places

    def shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        second = {
            "proposals": (self.proposals, BOX),
            "roi_logits": (self.proposals, self.num_classes + 1),
            "roi_offsets": (self.proposals, self.num_classes, BOX),
        }
        return self.first.shapes(size) | second

    def dense(self, prediction: Mapping[str, Tensor], size: tuple[int, int]) -> Dense:
        return self.first.dense(prediction, size)

    def second(self, prediction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the second stage says of each proposal: scores [B, R, C] and boxes [B, R, C, 4], float32 or wider."""
        boxes = decode(wide(prediction["roi_offsets"]), wide(prediction["proposals"])[:, :, None], ROI_WEIGHTS)
        return wide(prediction["roi_logits"]).softmax(-1)[..., 1:], boxes

    def detections(
        self, prediction: Mapping[str, Tensor], size: tuple[int, int], count: int, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        scores, boxes = self.second(prediction)
        every = scores.shape[1]
        return suppressed(
            scores, boxes, size, count, valid, lowest=self.lowest, overlap=self.overlap, candidates=(every,), most=every * self.num_classes
        )


class _FirstStage(nn.Module):
    """Under the name that torchvision gives it."""

    def __init__(self, width: int, anchors: int) -> None:
        super().__init__()
        self.head = RPNHead(width, anchors)


class _SecondStage(nn.Module):
    """Under the names that torchvision gives it."""

    def __init__(self, width: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.box_head = TwoMLPHead(width * _BINS**2, hidden)
        self.box_predictor = FastRCNNPredictor(hidden, num_classes + 1)


class FasterRCNN(WithTorchvisionsWeights):
    """A pyramid, a first stage of three anchors a cell and a second one with two hidden layers: see `TwoStageReading`.

    level_modules, stage_modules: paths of the modules that give the pyramid's and the backbone's maps, the finest first.
    """

    reading: TwoStageReading

    def __init__(
        self,
        backbone: str,
        width: int,
        finest: int,
        levels: int,
        anchor: int,
        hidden: int,
        proposals: int,
        learned: int,
        preset: str,
        epsilon: float = EPSILON,
        *,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        check_preset(preset, in_channels)
        if levels < 2:
            raise UserError("levels must be 2 or more for a detector of two stages: the second does not look at the coarsest.")
        self.backbone = Pyramid(
            backbone, width=width, finest=finest, levels=levels, in_channels=in_channels, norm=norm_of(preset, epsilon), learned=False
        )
        self.reading = TwoStageReading(num_classes, self.backbone.strides, sizes=anchor_sizes(anchor, levels, 1), proposals=proposals)
        self.rpn = _FirstStage(width, len(self.reading.ratios))
        self.roi_heads = _SecondStage(width, hidden, num_classes)
        self.level_modules = below_backbone(self.backbone.level_modules)
        self.stage_modules = below_backbone(self.backbone.stage_modules)
        self.input_spec: InputSpec | None = IMAGENET if preset else None
        self._learned, self._turn = learned, _TURN * anchor
        self._most = 1000  # candidates of a level before suppression

    def forward(
        self, images: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What both stages say, by name: see `TwoStageReading`.

        Args:
            images: Normalised, [B, in_channels, H, W].
            boxes: The true ones, [B, M, 4], which join the proposals in training.
            labels: Of the true boxes, [B, M]; rows labelled -1 are padding.
            valid: [B, 2], height and width of the picture in each image; None where it fills the image.
        """
        return self.in_two_stages(self.backbone(images), (images.shape[-2], images.shape[-1]), boxes, labels, valid)

    def in_two_stages(
        self, maps: list[Tensor], size: tuple[int, int], boxes: Tensor | None, labels: Tensor | None, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """What both stages say of the pyramid's maps for images of `size`."""
        levels = {name: self._proposed(level) for name, level in zip(self.reading.level_names, maps, strict=True)}
        with torch.no_grad():
            proposals = self._proposals(levels, size, valid)
            if self.training and boxes is not None and labels is not None:
                real = (labels >= 0)[..., None]
                proposals = torch.cat([proposals, torch.where(real, boxes.to(proposals), 0)], dim=1)
        count = proposals.shape[1]
        second = self.roi_heads
        seen = pooled(maps[:-1], self.reading.strides[:-1], proposals, bins=_BINS, turn=self._turn)
        logits, offsets = second.box_predictor(second.box_head(seen))
        offsets = offsets.view(-1, count, self.reading.num_classes + 1, BOX)[:, :, 1:]
        return levels | {"proposals": proposals, "roi_logits": logits.view(-1, count, logits.shape[-1]), "roi_offsets": offsets}

    def _proposed(self, level: Tensor) -> Tensor:
        head = self.rpn.head
        seen = head.conv(level)
        return by_anchor([head.cls_logits(seen), head.bbox_pred(seen)], len(self.reading.ratios))

    def _proposals(self, levels: Mapping[str, Tensor], size: tuple[int, int], valid: Tensor | None) -> Tensor:
        first = self.reading.first
        logits, boxes = first.dense(levels, size)
        count = self._learned if self.training else self.reading.proposals
        places = first.places_of_levels(size)
        return best_proposals(boxes, logits[..., 0], places, size, valid, count=count, most=self._most, overlap=0.7)


def faster_rcnn(
    *,
    num_classes: int,
    in_channels: int,
    backbone: str = "resnet50",
    width: int = 256,
    finest: int = 4,
    levels: int = 5,
    anchor: int = 32,
    hidden: int = 1024,
    proposals: int = 1000,
    learned: int = 512,
    preset: str = "",
) -> FasterRCNN:
    """proposals, learned: boxes that the second stage looks at in evaluation and in training."""
    sizes = (backbone, width, finest, levels, anchor, hidden, proposals, learned)
    return FasterRCNN(*sizes, preset, num_classes=num_classes, in_channels=in_channels)


def _on(backbone: str, epsilon: float) -> Callable[..., FasterRCNN]:
    def build(
        *,
        num_classes: int,
        in_channels: int,
        width: int = 256,
        finest: int = 4,
        levels: int = 5,
        anchor: int = 32,
        hidden: int = 1024,
        proposals: int = 1000,
        learned: int = 512,
        preset: str = "",
    ) -> FasterRCNN:
        sizes = (backbone, width, finest, levels, anchor, hidden, proposals, learned)
        return FasterRCNN(*sizes, preset, epsilon, num_classes=num_classes, in_channels=in_channels)

    return build


fasterrcnn_resnet18_fpn = _on("resnet18", EPSILON)
fasterrcnn_resnet50_fpn = _on("resnet50", 0.0)
