"""Several methods at once: `vitkd+nkd` adds up the terms of its parts, which keep parameters of their own."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any, ClassVar, cast

import torch
from pydantic import Field, create_model, field_validator
from torch import Tensor, nn

from kdbench.data.batch import Batch, Part
from kdbench.errors import UserError
from kdbench.methods.base import WHOLE, Method, OwnOptimizer, Paper, Progress, Stage
from kdbench.models.outputs import Outputs, Shapes
from kdbench.models.trace import Example
from kdbench.search.space import Dimension
from kdbench.tasks.base import TaskInfo


class Combination(Method):
    """What all combinations do; `combined` makes the class of one. `Params` has `task_weight` and, under each part's name, that part's."""

    kinds: ClassVar[Mapping[str, type[Method]]] = {}

    def __init__(self, params: Method.Params | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__(params, generator)
        self.parts = nn.ModuleList(kind(getattr(self.params, name), generator) for name, kind in self.kinds.items())
        methods = list(self._named().values())
        self.student_taps, self.teacher_taps = _union(methods, "student_taps"), _union(methods, "teacher_taps")

    def _named(self) -> dict[str, Method]:
        return dict(zip(self.kinds, cast(Iterable[Method], self.parts), strict=True))

    @property
    def taps_chosen(self) -> bool:
        return all(part.taps_chosen for part in self._named().values())

    @property
    def peer_count(self) -> int:
        return sum(part.peer_count for part in self._named().values())

    def choose_taps(self, student: Shapes, teacher: Shapes | None) -> Method.Params:
        chosen = {name: part.choose_taps(student, teacher) for name, part in self._named().items()}
        return self.params.model_copy(update=chosen)

    def suited(self, student: Shapes, teacher: Shapes | None, gives: frozenset[str]) -> tuple[Method.Params, dict[str, Dimension]]:
        """What suits each part, the ranges by dotted names."""
        found = {name: part.suited(student, teacher, gives) for name, part in self._named().items()}
        ranges = {f"{name}.{key}": dimension for name, (_, own) in found.items() for key, dimension in own.items()}
        changed = {name: params for name, (params, _) in found.items() if params is not getattr(self.params, name)}
        return (self.params.model_copy(update=changed) if changed else self.params), ranges

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        for part in self._named().values():
            part.build(student, teacher if part.needs_teacher or part.needs_teacher_network else None, task)

    def own_optimizers(self) -> tuple[OwnOptimizer, ...]:
        return tuple(own for part in self._named().values() for own in part.own_optimizers())

    def use_optimizers(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        left = iter(optimizers)
        for part in self._named().values():
            part.use_optimizers(tuple(islice(left, sum(own.by_method for own in part.own_optimizers()))))

    def stages(self) -> tuple[Stage, ...]:
        """Those of the one part that has some."""
        return self._staged.stages() if self._staged is not None else WHOLE

    def begin(self, stage: int, student: nn.Module) -> nn.Module:
        if self._staged is not None:
            student = self._staged.begin(stage, student)
            self.student_taps = _union(list(self._named().values()), "student_taps")
        return student

    @property
    def _staged(self) -> Method | None:
        return next((part for part in self._named().values() if _has_stages(type(part))), None)

    def task_weight(self, at: Progress) -> float:
        """The weight that all share, times what each part makes of it in the course of a training: a part's own weight is 1."""
        return self.params.task_weight * math.prod(part.task_weight(at) for part in self._named().values())

    @property
    def makes_batches(self) -> bool:
        return any(part.makes_batches for part in self._named().values())

    def shown(self, batch: Batch, at: Progress) -> Batch:
        """What the parts make of it, one after the other. Raises UserError where one undoes what another shows."""
        for name, part in self._named().items():
            after = part.shown(batch, at)
            if undone := [key for key, other in batch.others.items() if after.others.get(key) is not other]:
                raise UserError(
                    f"method {'+'.join(self.kinds)}: {name} takes away the batch {undone[0]!r} that another part shows; "
                    "let its `shown` keep `batch.others`, and use names of its own"
                )
            batch = after
        return batch

    def use_teacher(self, network: nn.Module, example: Example) -> None:
        for part in self._named().values():
            if part.needs_teacher_network:
                part.use_teacher(network, example)

    def use_samples(self, samples: Part) -> None:
        for part in self._named().values():
            part.use_samples(samples)

    def adapt_student(self, student: nn.Module) -> nn.Module:
        """Raises UserError where a part changes the student and another looks inside it: its places were those of the plain one."""
        parts = self._named()
        for name, part in parts.items():
            adapted = part.adapt_student(student)
            if adapted is not student and (inside := [other for other in parts if other != name and parts[other].student_taps]):
                raise UserError(
                    f"method {'+'.join(parts)}: {name} changes the student, so {inside[0]} would not find what it looks at there; "
                    f"combine {name} with methods that read predictions alone"
                )
            student = adapted
        self.student_taps = _union(list(parts.values()), "student_taps")
        return student

    def export_student(self, student: nn.Module) -> nn.Module:
        for part in reversed(self._named().values()):
            student = part.export_student(student)
        return student

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """The terms of all parts, each with its own peers; those whose name several parts use have the part's name and a dot in front.

        Raises UserError where a term then has the name of another.
        """
        found, peers = {}, iter(s.peers)
        for name, part in self._named().items():
            ours = replace(s, peers=tuple(islice(peers, part.peer_count)))
            found[name] = part(ours, t if part.needs_teacher else None, batch, at)
        uses = Counter(term for terms in found.values() for term in terms)
        joined: dict[str, Tensor] = {}
        for name, terms in found.items():
            for term, value in terms.items():
                called = term if uses[term] == 1 else f"{name}.{term}"
                if called in joined:
                    raise UserError(f"method {'+'.join(found)}: two loss terms are called {called!r}; rename the term {term!r} of {name}")
                joined[called] = value
        return joined

    @classmethod
    def supports(cls, gives: frozenset[str]) -> bool:
        return all(kind.supports(gives) for kind in cls.kinds.values())

    def warmup_epochs(self, total_epochs: float) -> float:
        return max(part.warmup_epochs(total_epochs) for part in self._named().values())


@cache
def combined(kinds: tuple[tuple[str, type[Method]], ...]) -> type[Combination]:
    """The method that is all of `kinds`, (name, class) in the order in which they were written, at once.

    Raises UserError where two of them have stages.
    """
    if len(staged := [name for name, kind in kinds if _has_stages(kind)]) > 1:
        whole = "+".join(name for name, _ in kinds)
        raise UserError(f"method {whole}: {staged[0]} and {staged[1]} both train in stages; combine one of them with other methods")
    names, methods = " and ".join(name for name, _ in kinds), [kind for _, kind in kinds]
    facts = {
        "__doc__": f"The losses of {names} together; the task's own counts once.",
        "kinds": dict(kinds),
        "paper": Paper(
            "; ".join(method.paper.title for method in methods),
            formula=f"L = w_task L_task + the terms of {names}, each with its own weights",
            checked_against="; ".join(dict.fromkeys(method.paper.checked_against or "its formula" for method in methods)),
        ),
        "version": sum(method.version for method in methods),  # rises with any part's
        "reads": frozenset[str]().union(*(method.reads for method in methods)),
        "needs_labels": any(method.needs_labels for method in methods),
        "needs_teacher": any(method.needs_teacher for method in methods),
        "needs_teacher_network": any(method.needs_teacher_network for method in methods),
        "batch_coupled": any(method.batch_coupled for method in methods),
        "weighs_as_task": frozenset(called for name, kind in kinds for term in kind.weighs_as_task for called in (term, f"{name}.{term}")),
        "student_taps": _union(methods, "student_taps"),
        "teacher_taps": _union(methods, "teacher_taps"),
        "Params": _params(kinds),
    }
    return type("+".join(name for name, _ in kinds), (Combination,), facts)


def _has_stages(kind: type[Method]) -> bool:
    return kind.stages is not Method.stages


def _union(methods: list[Any], taps: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for method in methods for name in getattr(method, taps)))


def _params(kinds: tuple[tuple[str, type[Method]], ...]) -> type[Method.Params]:
    """One `task_weight`, the first part's with its range, and each part's parameters under its name."""
    weight = kinds[0][1].Params.model_fields["task_weight"]
    parts = {name: _without_task_weight(kind) for name, kind in kinds}
    documentation = "\n".join(f"{name}: {inspect.cleandoc(kind.Params.__doc__)}" for name, kind in kinds if kind.Params.__doc__)
    fields: dict[str, Any] = {name: (part, Field(default_factory=part)) for name, part in parts.items()}
    fields["task_weight"] = (weight.annotation, weight)
    return create_model("Params", __base__=Method.Params, __doc__=documentation, **fields)


def _without_task_weight(kind: type[Method]) -> type[Method.Params]:
    """The parameters of a part: the one that all share is neither set, searched nor shown there."""

    def refuse(value: object) -> object:
        raise ValueError("there is one task_weight for all parts; write it beside `name`")

    hidden: Any = (float, Field(default=1.0, exclude=True, validate_default=False))
    checks: Any = {"refuse": field_validator("task_weight", mode="before")(refuse)}
    theirs = kind.Params
    return create_model(theirs.__qualname__, __base__=theirs, __doc__=theirs.__doc__, __validators__=checks, task_weight=hidden)
