"""Student and method as one module: the only thing that is wrapped for several workers, and one forward a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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

    def forward(
        self, batch: Batch, teacher: Outputs | None, at: Progress, autocast: torch.autocast, shares: Sequence[int] = ()
    ) -> dict[str, Tensor]:
        """Loss terms by name, with `total` to step on. The networks run under `autocast`, the losses outside it.

        shares: how many samples of the batch each worker has. Where they differ, a term that is a mean over a worker's own samples counts
        by how many these are, so that the mean over workers is the mean over samples.

        Where the method is batch-coupled and there are several workers, it sees the joined batch; gradients flow back to each one's part.
        """
        with autocast:
            outputs = self._taps(batch.inputs)
            outputs.peers = tuple(taps(batch.inputs) for taps in self._peer_taps)
        own = {name: self.method.params.task_weight * loss for name, loss in self.task.loss(outputs, batch).items()}
        joined: dict[str, Tensor] = {}
        if self.method.batch_coupled and len(shares) > 1:
            outputs, teacher = _joined(outputs, shares), _joined(teacher, shares) if teacher else None
            joined = self.method(outputs, teacher, _joined_batch(batch, shares), at)
        else:
            own |= self.method(outputs, teacher, batch, at)
        if len(set(shares)) > 1:
            weight = shares[torch.distributed.get_rank()] * len(shares) / sum(shares)
            own = {name: weight * term for name, term in own.items()}
        terms = {name: term.sum() for name, term in (own | joined).items()}
        terms["total"] = torch.stack(list(terms.values())).sum()
        return terms


def _join(tensor: Tensor, shares: Sequence[int]) -> Tensor:
    """All workers' rows in rank order, with gradients to this worker's own."""
    if not tensor.requires_grad:
        return _join_values(tensor, shares)
    return _cut(exchange.all_gather(_padded(tensor, shares)), shares)


def _join_values(tensor: Tensor, shares: Sequence[int]) -> Tensor:
    padded = _padded(tensor, shares)
    parts = [torch.empty_like(padded) for _ in shares]
    torch.distributed.all_gather(parts, padded)
    return _cut(parts, shares)


def _padded(tensor: Tensor, shares: Sequence[int]) -> Tensor:
    """As many rows as the worker has that has most: an exchange is of equal parts."""
    missing = max(shares) - len(tensor)
    return (torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor).contiguous()


def _cut(parts: Sequence[Tensor], shares: Sequence[int]) -> Tensor:
    return torch.cat([part[:rows] for part, rows in zip(parts, shares, strict=True)])


def _joined(outputs: Outputs, shares: Sequence[int]) -> Outputs:
    prediction = outputs.prediction
    joined = {name: _join(t, shares) for name, t in prediction.items()} if isinstance(prediction, dict) else _join(prediction, shares)
    maps = {name: _join(tensor, shares) for name, tensor in outputs.maps.items()}
    return Outputs(joined, maps, tuple(_joined(peer, shares) for peer in outputs.peers))


def _joined_batch(batch: Batch, shares: Sequence[int]) -> Batch:
    inputs, target, index = (_join_values(tensor, shares) for tensor in (batch.inputs, batch.target, batch.index))
    return replace(batch, inputs=inputs, target=target, index=index)
