"""A detector's training step as one would write it by hand, after FCOS (arXiv 1904.01355). It knows nothing of kdbench."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss


class MinimalDetectorStep:
    """Trains a network whose levels are [B, C + 4, H, W]: class logits and the logs of the four sides in strides."""

    def __init__(self, network: nn.Module, strides: tuple[int, ...], size: int, mean: tuple[float, ...], std: tuple[float, ...], lr: float):
        self.network, self.strides = network, strides
        self.mean, self.std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))
        centres, of_cells, low, high = [], [], [], []
        for level, stride in enumerate(strides):
            places = (torch.arange(-(-size // stride)) + 0.5) * stride
            y, x = torch.meshgrid(places, places, indexing="ij")
            centres.append(torch.stack([x, y], -1).flatten(0, 1))
            of_cells.append(torch.full((x.numel(),), float(stride)))
            low.append(torch.full((x.numel(),), 0.0 if level == 0 else 2.0 * stride))
            high.append(torch.full((x.numel(),), torch.inf if level == len(strides) - 1 else 4.0 * stride))
        self.centres, self.cell_strides, self.low, self.high = (torch.cat(parts) for parts in (centres, of_cells, low, high))
        self.optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True)

    def __call__(self, images: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """One step on images [B, 3, H, W] in [0, 1] with boxes [B, M, 4] and labels [B, M], -1 in padded rows; returns the loss."""
        levels = self.network((images - self.mean) / self.std).values()
        cells = torch.cat([level.flatten(2).mT for level in levels], 1)
        logits, sides = cells[..., :-4], cells[..., -4:].clamp(max=5).exp() * self.cell_strides[:, None]
        boxes = torch.cat([self.centres - sides[..., :2], self.centres + sides[..., 2:]], -1)
        labels, wanted = self._assigned(target)
        positive = labels >= 0
        count = positive.sum().clamp(min=1)
        one_hot = F.one_hot(labels.clamp(min=0), logits.shape[-1]).to(logits) * positive[..., None]
        loss = sigmoid_focal_loss(logits, one_hot, reduction="sum") / count
        loss = loss + generalized_box_iou_loss(boxes[positive], wanted[positive], reduction="sum") / count
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        total: Tensor = loss.detach()
        return total

    def _assigned(self, target: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        boxes, labels = target["boxes"], target["labels"]
        low, high = (corner[:, None] for corner in boxes.split(2, -1))
        cells = self.centres[None, :, None]
        sides = torch.cat([cells - low, high - cells], -1)
        near = ((cells - (low + high) / 2).abs() <= 1.5 * self.cell_strides[None, :, None, None]).all(-1)
        far = sides.amax(-1)
        learned = (sides.amin(-1) > 0) & near & (far >= self.low[:, None]) & (far <= self.high[:, None]) & (labels >= 0)[:, None]
        area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[:, None].expand(learned.shape).masked_fill(~learned, torch.inf)
        smallest, which = area.min(-1)
        return labels.gather(1, which).masked_fill(smallest.isinf(), -1), boxes.gather(1, which[..., None].expand(-1, -1, 4))
