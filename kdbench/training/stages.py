"""The stages of a training: which epochs each of them has, and by which recipe its weights are moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kdbench.errors import UserError
from kdbench.experiment import Recipe, validated
from kdbench.methods.base import Method, Stage

# Keys of the recipe that a stage may change: how weights are moved. All others hold for the whole training.
CHANGEABLE = frozenset(
    {
        "optimizer",
        "lr",
        "momentum",
        "nesterov",
        "weight_decay",
        "no_decay_on_norms",
        "schedule",
        "warmup_epochs",
        "milestones",
        "decay_rate",
    }
)
_ROUNDING = 1e-6  # of shares such as three thirds


def epochs_of(stages: Sequence[Stage], epochs: int, name: str) -> tuple[range, ...]:
    """The epochs of each stage. name: what errors call the method.

    Raises UserError where one has no epoch, and where the shares do not add up to 1.
    """
    if wrong := [stage for stage in stages if not isinstance(stage, Stage)]:
        raise UserError(f"method {name}: `stages` must return Stages, one of them is a {type(wrong[0]).__name__}")
    if odd := [stage for stage in stages if not 0 < stage.share <= 1]:
        raise UserError(f"method {name}: the stage {odd[0].name!r} has the share {odd[0].share:g}; expected a number above 0 and at most 1")
    if twice := [called for called, count in Counter(stage.name for stage in stages).items() if count > 1]:
        raise UserError(f"method {name}: two of its stages are called {twice[0]!r}; give each a name of its own")
    if not stages or abs(sum(stage.share for stage in stages) - 1) > _ROUNDING:
        shares = ", ".join(f"{stage.name} {stage.share:g}" for stage in stages)
        raise UserError(f"method {name}: the shares of its stages ({shares}) do not add up to 1")
    ends = [round(epochs * sum(stage.share for stage in stages[: number + 1])) for number in range(len(stages))]
    found = tuple(range(first, end) for first, end in zip([0, *ends[:-1]], ends, strict=True))
    if empty := [stage.name for stage, here in zip(stages, found, strict=True) if not here]:
        raise UserError(
            f"recipe.epochs: {epochs} leave{'s' if epochs == 1 else ''} the stage {empty[0]!r} of method {name} without an epoch; "
            "raise epochs, or the stage's share"
        )
    return found


def epochs_by_stage(method: Method, epochs: int, name: str) -> dict[str, int]:
    """Epochs of each stage by its name, one after the other; empty where a training has one stage."""
    stages = method.stages()
    return {stage.name: len(here) for stage, here in zip(stages, epochs_of(stages, epochs, name), strict=True)} if len(stages) > 1 else {}


def recipe_of(recipe: Recipe, stages: Sequence[Stage], number: int, name: str) -> Recipe:
    """By what the weights are moved in a stage: the recipe with the stage's changes, its schedule as short as the stage is.

    Warm-up and milestones shrink with the stage. Raises UserError for a change that makes no sense, naming method and stage.
    """
    here = epochs_of(stages, recipe.epochs, name)[number]
    stage = stages[number]
    where = f"method {name}: stage {stage.name!r}"
    if foreign := sorted(stage.changes.keys() - CHANGEABLE):
        raise UserError(f"{where}: a stage can't change recipe.{foreign[0]}; it can change: {', '.join(sorted(CHANGEABLE))}")
    if len(stages) == 1 and not stage.changes:
        return recipe
    changed = validated(Recipe, {**recipe.model_dump(), **stage.changes}, where)
    share = len(here) / recipe.epochs
    milestones = tuple(share * epoch for epoch in changed.milestones) if changed.milestones is not None else None
    return changed.model_copy(update={"epochs": len(here), "warmup_epochs": share * changed.warmup_epochs, "milestones": milestones})
