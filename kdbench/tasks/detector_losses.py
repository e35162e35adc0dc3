"""What a detector learns, by the family that its prediction belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from kdbench.errors import UserError
from kdbench.models.detectors.anchors import AnchorReading, DefaultBoxReading
from kdbench.models.detectors.cells import CellReading
from kdbench.models.detectors.mask_rcnn import MaskReading
from kdbench.models.detectors.readings import Reading
from kdbench.models.detectors.two_stage import TwoStageReading
from kdbench.tasks.anchor_losses import AnchorLosses, DefaultBoxLosses
from kdbench.tasks.cell_losses import CellLosses
from kdbench.tasks.mask_losses import MaskLosses
from kdbench.tasks.two_stage_losses import TwoStageLosses


class DetectorLosses(Protocol):
    """The losses of one family."""

    draws: ClassVar[bool]  # whether it learns a part of its places only, which are drawn

    def losses(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """The terms by name, float32 or wider, each divided by what `weights` says of it, or by 1 where that is 0.

        Args:
            prediction: What the network gave in training.
            target: Boxes [B, M, 4], labels [B, M] and the further columns that the data have; for a family
                that draws, `draws` int64 [B], bits of each image and view.
            size: Height and width of the images.
        """
        ...

    def weights(self, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """How much each term is a mean of, from the target alone: see `Task.weight`."""
        ...


_LOSSES: dict[type[Reading], Callable[[Any], DetectorLosses]] = {
    CellReading: CellLosses,
    AnchorReading: AnchorLosses,
    DefaultBoxReading: DefaultBoxLosses,
    TwoStageReading: TwoStageLosses,
    MaskReading: MaskLosses,
}


def losses_of(reading: Reading) -> DetectorLosses:
    """The losses of the family of this reading. Raises UserError for a reading of no family."""
    family = next((kind for kind in type(reading).__mro__ if kind in _LOSSES), None)
    if family is None:
        known = ", ".join(kind.__name__ for kind in _LOSSES)
        raise UserError(f"a network's reading is a {type(reading).__name__}, of which nobody knows what it learns; use one of {known}")
    return _LOSSES[family](reading)
