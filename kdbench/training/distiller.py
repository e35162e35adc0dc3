"""Student and method as one module: the only thing that is wrapped for several workers, and one forward a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed.nn.functional as exchange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, Progress
from kdbench.models.outputs import Outputs
from kdbench.models.taps import Taps
from kdbench.tasks.base import Task


class Distiller(nn.Module):
    """Runs the student, and the method's peers of it, and adds up the task's loss and the method's terms."""

    def __init__(
        self,
        student: nn.Module,
        method: Method,
        task: Task,
        call: Callable[[Tensor], Any] | None = None,
        peers: Iterable[nn.Module] = (),
    ) -> None:
        """call: the student's compiled form, which runs in its place where the method has no taps on it; peers: as many as it asks for."""
        super().__init__()
        self.student = student
        self.method = method
        self.task = task
        self.peers = nn.ModuleList(peers)
        self._taps = Taps(student, method.student_taps, call=call)
        self._peer_taps = tuple(Taps(peer, method.student_taps) for peer in self.peers)
        if method.batch_coupled:
            # All workers compute them from the joined batch, so they are equal without being sent round at every step.
            buffers = [f"method.{name}" for name, _ in method.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, buffers)

    def forward(self, batch: Batch, teacher: Outputs | None, at: Progress, autocast: torch.autocast) -> dict[str, Tensor]:
        """Loss terms by name, with `total` to step on. The networks run under `autocast`, the losses outside it.

        Where the method is batch-coupled and there are several workers, it sees the joined batch; gradients flow back to each one's part.
        """
        with autocast:
            outputs = self._taps(batch.inputs)
            outputs.peers = tuple(taps(batch.inputs) for taps in self._peer_taps)
        terms = {name: self.method.params.task_weight * loss for name, loss in self.task.loss(outputs, batch).items()}
        if self.method.batch_coupled and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            outputs, teacher, batch = _joined(outputs), _joined(teacher) if teacher else None, _joined_batch(batch)
        terms |= self.method(outputs, teacher, batch, at)
        terms = {name: term.sum() for name, term in terms.items()}
        terms["total"] = torch.stack(list(terms.values())).sum()
        return terms


def _join(tensor: Tensor) -> Tensor:
    """All workers' rows in rank order, with gradients to this worker's own."""
    return torch.cat(exchange.all_gather(tensor.contiguous())) if tensor.requires_grad else _join_values(tensor)


def _join_values(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _joined(outputs: Outputs) -> Outputs:
    prediction = outputs.prediction
    joined = {name: _join(t) for name, t in prediction.items()} if isinstance(prediction, dict) else _join(prediction)
    maps = {name: _join(tensor) for name, tensor in outputs.maps.items()}
    return Outputs(joined, maps, tuple(_joined(peer) for peer in outputs.peers))


def _joined_batch(batch: Batch) -> Batch:
    return replace(batch, inputs=_join_values(batch.inputs), target=_join_values(batch.target), index=_join_values(batch.index))
