"""Student and method as one module: the only thing that is wrapped for several workers, and one forward a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed.nn.functional as exchange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdbench.data.batch import Batch
from kdbench.data.columns import Columns, mapped, tensors
from kdbench.errors import UserError
from kdbench.methods.base import Method, Progress, loss_precision
from kdbench.models.batch_norm import guard_batch_norms
from kdbench.models.outputs import Outputs
from kdbench.models.taps import Taps
from kdbench.tasks.base import Role, Task

IMITATION = "imitation"  # what `Task.weight` calls the terms of methods that count as the task's do
TOTAL = "total"  # the name of the sum of all loss terms


@dataclass(frozen=True)
class Weights:
    """By what a term of one worker's micro-batch is multiplied, so that their sum over micro-batches and mean over workers is the batch's.

    samples: of terms that are means over samples. counted: of those that are means over what the task counts, one for all or by name; None
    where that is the samples.
    """

    samples: float = 1.0
    counted: Tensor | Mapping[str, Tensor] | None = None

    def by_samples(self, term: Tensor) -> Tensor:
        return term if self.samples == 1 else self.samples * term

    def as_task(self, name: str, term: Tensor) -> Tensor:
        """A term that is a mean over what the task counts. Raises UserError where the task says no weight for it."""
        if self.counted is None:
            return self.by_samples(term)
        if isinstance(self.counted, Mapping):
            check_counted({name}, self.counted)
        return (self.counted[name] if isinstance(self.counted, Mapping) else self.counted).to(term.dtype) * term


def check_counted(names: Collection[str], counted: Mapping[str, Tensor]) -> None:
    """Raise UserError where a task's `weight` says nothing of a term that is a mean over what it counts."""
    if missing := sorted(set(names) - counted.keys()):
        raise UserError(f"the task's `weight` says nothing of {missing[0]!r}; it has: {', '.join(counted)}")


Shown = tuple[Batch, Batch | None]  # this worker's batch, and that of all workers where a method sees it


class Distiller(nn.Module):
    """Runs the student, and the method's peers of it, and adds up the task's loss and the method's terms."""

    def __init__(
        self,
        student: nn.Module,
        method: Method,
        task: Task,
        call: Callable[[Columns], Any] | None = None,
        peers: Iterable[nn.Module] = (),
        name: str | None = None,
        role: Role = "student",
    ) -> None:
        """call: the student's compiled form, which runs in its place where the method has no taps on it; peers: as many as it asks for.

        name: what errors call the method; its class's name by default. role: `teacher` where the network that learns is to be one.
        """
        super().__init__()
        self.name = name or type(method).__name__
        self.student = student
        self.method = method
        self.task = task
        self.role = role
        self.peers = nn.ModuleList(peers)
        self.weighed: frozenset[str] = frozenset()  # by their names in `Task.weight`, the terms of the last step that are means over it
        guard_batch_norms(self)
        # Plain distillation on a task that compares samples compares them too.
        self.coupled = method.batch_coupled or (task.batch_coupled and bool(method.weighs_as_task))
        self._taps = Taps(student, method.student_taps, call=call)
        self._peer_taps = tuple(Taps(peer, method.student_taps) for peer in self.peers)
        if self.coupled:
            # All workers compute them from the joined batch, so they are equal without being sent round at every step.
            apart = [f"method.{name}" for name, _ in method.named_buffers()]
            stepped = {id(one) for own in method.own_optimizers() if own.by_method for one in own.part.parameters()}
            apart += [f"method.{name}" for name, one in method.named_parameters() if id(one) in stepped]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, apart)

    def forward(
        self,
        batch: Batch,
        teacher: Outputs | None,
        at: Progress,
        autocast: torch.autocast,
        shares: Sequence[int] = (),
        weights: Weights = Weights(),
        shown: Shown | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms by name, with `total` to step on. The networks run under `autocast`, the losses outside it.

        shares: how many samples of the batch each worker has. weights: of the terms that are means over this worker's own.
        shown: what `show` gave for the batch, where it was asked before; it is asked here otherwise.

        Without a target the task's own loss is left out.

        Where method or task are batch-coupled and there are several workers, they see the joined batch; gradients flow back to each one's
        part.
        Raises UserError for a term that is no scalar, and for a name that stands for two terms.
        """
        several = len(shares) > 1 and (self.coupled or self.task.batch_coupled)
        batch, joined_batch = shown or self.show(batch, at, shares)
        inputs = self.task.inputs_for(self.role, batch.inputs)
        with autocast:
            truth = self.task.truth(batch)
            outputs = self._taps(inputs, **truth)
            outputs.peers = tuple(taps(inputs, **truth) for taps in self._peer_taps)
            outputs.others = {
                name: self._taps(self.task.inputs_for(self.role, other.inputs), **self.task.truth(other))
                for name, other in batch.others.items()
            }
        everyones: tuple[Outputs, Batch] | None = None
        if several:
            # Only a coupled method sees what the others' networks gave beside; what one shows by itself need not be of one size.
            seen = outputs if self.coupled else replace(outputs, peers=(), others={})
            everyones = _joined(seen, shares), joined_batch or _joined_batch(replace(batch, others={}), shares)
        whole = everyones if self.task.batch_coupled else None
        tasks = self.task.loss(*(whole or (outputs, batch))) if batch.target is not None else {}
        check_terms(f"task {self.task.name}", tasks)
        task_weight = self.method.task_weight(at)
        weighted = {name: task_weight * loss for name, loss in tasks.items()}
        own = weighted if whole is not None else {name: weights.as_task(name, loss) for name, loss in weighted.items()}
        joined: dict[str, Tensor] = {}
        if self.coupled and everyones is not None:
            joined = self.method(everyones[0], _joined(teacher, shares) if teacher else None, everyones[1], at)
            check_terms(f"method {self.name}", joined, tasks)
        else:
            added = self.method(outputs, teacher, batch, at)
            check_terms(f"method {self.name}", added, tasks)
            counted = self.method.weighs_as_task
            self.weighed = frozenset(tasks) | ({IMITATION} if counted & added.keys() else set())
            own |= {name: weights.as_task(IMITATION, term) if name in counted else weights.by_samples(term) for name, term in added.items()}
        terms = own | joined
        rest = [_nothing(outputs.prediction)] if batch.target is None else []
        terms[TOTAL] = torch.stack([*terms.values(), *rest]).sum()
        return terms

    def show(self, batch: Batch, at: Progress, shares: Sequence[int] = ()) -> Shown:
        """What the method shows the student in place of the loader's batch: this worker's, and all workers' where the method sees that.

        Where it changes how much the task counts, it is asked before the first micro-batch is trained: see `loop.train_step`.
        """
        if not self.method.makes_batches:
            return batch, None
        if len(shares) > 1 and self.coupled:
            joined = self._shown(_joined_batch(batch, shares), at)
            return _own_part(joined, shares), joined
        return self._shown(batch, at), None

    def _shown(self, batch: Batch, at: Progress) -> Batch:
        """What the method shows in place of this batch. Raises UserError for what is no batch, or can't be cut for workers as it is."""
        shown: Any = self.method.shown(batch, at)
        others = shown.others if isinstance(shown, Batch) else {}
        made = {"in its place": shown, **{f"as {name!r}": other for name, other in others.items()}}
        for what, one in made.items():
            if not isinstance(one, Batch):
                raise UserError(f"method {self.name}: `shown` returned a {type(one).__name__} {what}; return a Batch")
            whole = self.coupled or (self.task.batch_coupled and one is shown)
            if not len(one) or (whole and len(one) % len(batch)):
                counts = f"{len(one)} samples {what} for a batch of {len(batch)}"
                raise UserError(f"method {self.name}: `shown` returned {counts}; return a multiple of these")
        return cast(Batch, shown)


def _own_part(whole: Batch, shares: Sequence[int]) -> Batch:
    """This worker's rows of a batch that a method made for all, and of those beside it."""
    rank, samples = torch.distributed.get_rank(), sum(shares)
    times = len(whole) // samples
    first, rows = times * sum(shares[:rank]), times * shares[rank]
    others = {name: _own_part(other, shares) for name, other in whole.others.items()}
    return replace(replace(whole, others={}).changed(lambda tensor: tensor[first : first + rows]), others=others)


def _nothing(prediction: Columns) -> Tensor:
    """0, with a gradient of 0 for all that predicts: samples without labels leave the task's loss out, and no part of the network.

    A method may look at a place in the middle alone, or add nothing at all, and workers exchange the gradients of every parameter.
    """
    return torch.stack([0.0 * tensor.sum() for tensor in loss_precision(*tensors(prediction)) if tensor.is_floating_point()]).sum()


def check_terms(of: str, terms: Mapping[str, Tensor], taken: Iterable[str] = ()) -> None:
    """Raise UserError for a term that can't be added to the loss. of: who returned the terms; taken: the names of the task's terms."""
    for name, term in terms.items():
        if name in taken:
            raise UserError(
                f"{of}: its loss term {name!r} has the name of the task's own loss, which it would replace; give it another name"
            )
        if name == TOTAL:
            raise UserError(f"{of}: its loss term {name!r} has the name of the sum of all terms; rename it")
        if not isinstance(term, Tensor):
            raise UserError(f"{of}: its loss term {name!r} is a {type(term).__name__}; return a tensor without dimensions")
        if term.ndim:
            shape = list(term.shape)
            raise UserError(f"{of}: its loss term {name!r} has the shape {shape}; return one number, such as the mean over the samples")


def check_same_terms(of: str, terms: Iterable[str], before: Iterable[str]) -> None:
    """Raise UserError unless `terms`, the names of one step, are those of the steps `before` it."""
    found, known = set(terms), set(before)
    for name in sorted(found ^ known):
        change = "is new at this step" if name in found else "is missing at this step"
        raise UserError(f"{of}: the loss term {name!r} {change}; return the same terms at every step, 0 where one does not count")


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
    """All workers' outputs. shares: of the loader's batch; a method may have shown a multiple of it."""
    own = _of_all(len(tensors(outputs.prediction)[0]), shares)
    maps = {name: _join(tensor, own) for name, tensor in outputs.maps.items()}
    prediction = mapped(outputs.prediction, lambda tensor: _join(tensor, own))
    others = {name: _joined(other, shares) for name, other in outputs.others.items()}
    return Outputs(prediction, maps, tuple(_joined(peer, shares) for peer in outputs.peers), others, outputs.reading)


def _of_all(rows: int, shares: Sequence[int]) -> list[int]:
    """How many rows each worker has of a batch of which this one has `rows`."""
    times = rows // shares[torch.distributed.get_rank()]
    return [times * share for share in shares]


def _joined_batch(batch: Batch, shares: Sequence[int]) -> Batch:
    own = _of_all(len(batch), shares)
    return batch.changed(lambda tensor: _join_values(tensor, own))
