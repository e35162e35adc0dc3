"""The loop that one would write by hand for a single training: what kdbench's is measured against. It knows nothing of kdbench."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (rows of the training set, view) -> the teacher's logits [B, C] and its map [B, D, H, W] for them
Teacher = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]


@dataclass
class Settings:
    """As in an experiment's recipe. dtype: what autocast narrows to; float32 turns it off."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int = 128
    epochs: int = 5
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop: int = 2
    flip: bool = True
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    temperature: float = 4.0
    task_weight: float = 1.0
    kd_weight: float = 0.0
    hint_weight: float = 0.0


class MinimalLoop:
    """Trains `student` on images (uint8 [N, C, H, W]) and labels (int64 [N]), epoch after epoch.

    teacher: for KD and for a hint. hint: a module of the student, and the regressor that brings its map near the teacher's.
    """

    def __init__(
        self,
        student: nn.Module,
        images: Tensor,
        labels: Tensor,
        settings: Settings,
        teacher: Teacher | None = None,
        hint: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        self.settings = settings
        self.student = student.to(memory_format=settings.memory_format)
        self.images, self.labels, self.teacher = images, labels, teacher
        self.mean, self.std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (settings.mean, settings.std))
        self.maps: dict[str, Tensor] = {}
        parameters = list(student.parameters())
        self.regressor = None
        if hint is not None:
            hint[0].register_forward_hook(self._keep)
            self.regressor = hint[1]
            parameters += list(self.regressor.parameters())
        self.optimizer = torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
        self.epoch = 0

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.maps["student"] = output

    def train_epoch(self, view: int = 0) -> float:
        """One epoch; returns its mean loss. view: which augmented copy the teacher's outputs are of."""
        settings, steps = self.settings, len(self.images) // self.settings.batch_size
        self.student.train()
        order = torch.randperm(len(self.images))
        total = torch.zeros(())
        for step in range(steps):
            rows = order[step * settings.batch_size : (step + 1) * settings.batch_size]
            done = (self.epoch * steps + step) / (settings.epochs * steps)
            for group in self.optimizer.param_groups:
                group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * done))
            loss = self._loss(rows, view)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.detach()
        self.epoch += 1
        return total.item() / steps

    def _loss(self, rows: Tensor, view: int) -> Tensor:
        settings = self.settings
        images = (augmented(self.images[rows], settings.crop, settings.flip).float() / 255 - self.mean) / self.std
        images = images.to(memory_format=settings.memory_format)
        with torch.autocast("cpu", dtype=settings.dtype, enabled=settings.dtype != torch.float32):
            logits = self.student(images)
        logits = logits.float()
        loss = settings.task_weight * F.cross_entropy(logits, self.labels[rows])
        if self.teacher is None:
            return loss
        teacher_logits, teacher_map = self.teacher(rows, view)
        if settings.kd_weight:
            temperature = settings.temperature
            soft_student = F.log_softmax(logits / temperature, dim=1)
            soft_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
            divergence = F.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
            loss = loss + settings.kd_weight * temperature**2 * divergence
        if self.regressor is not None and teacher_map is not None:
            loss = loss + settings.hint_weight * F.mse_loss(self.regressor(self.maps["student"].float()), teacher_map)
        return loss


def augmented(images: Tensor, crop: int, flip: bool) -> Tensor:
    """Each image shifted by up to `crop` pixels and mirrored half of the time, as one operation on the batch."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (crop,) * 4)
    rows = torch.randint(0, 2 * crop + 1, (batch, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * crop + 1, (batch, 1)) + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def from_arrays(logits: np.ndarray, maps: np.ndarray | None = None) -> Teacher:
    """A teacher whose outputs lie in (memory-mapped) arrays [views, N, ...]."""

    def look_up(rows: Tensor, view: int) -> tuple[Tensor, Tensor | None]:
        where = rows.numpy()
        found = torch.from_numpy(logits[view, where].astype(np.float32))
        return found, None if maps is None else torch.from_numpy(maps[view, where].astype(np.float32))

    return look_up
