"""What travels through a training step: a batch of samples, and the part of a data set that it is cut from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kdbench.data.columns import Columns, mapped, named
from kdbench.data.encoded import Encoded, EncodedImages
from kdbench.data.encoded_targets import EncodedTarget
from kdbench.data.kinds import Kind
from kdbench.data.samples import UNLABELLED, kinds_of, size_of

INPUTS, TARGET = "inputs", "target"  # what a single tensor is called among names


@dataclass(frozen=True)
class Batch:
    """Some samples, seen through one view.

    inputs: what goes into the networks, such as images, float [B, C, H, W] in [0, 1], already augmented; each model normalises them as it
    was trained to. Several inputs by name.
    target: what the task's loss compares with: int64 [B], soft [B, classes], int64 [B, H, W] (255 = ignored), several tensors by name;
    None where these samples have no labels.
    index:  int64 [B], position in the source data set, the same whatever the split.
    view:   which augmented copy; 0 where there is no augmentation.
    others: further batches by name that a method shows the student in the same step.
    """

    inputs: Columns
    target: Columns | None
    index: Tensor
    view: int = 0
    others: Mapping[str, Batch] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return self.changed(lambda tensor: tensor.to(device, non_blocking=True))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """`change` of all its tensors: to a device, to some of the rows, to the rows of all workers."""
        target = mapped(self.target, change) if self.target is not None else None
        others = {name: other.changed(change) for name, other in self.others.items()}
        return replace(self, inputs=mapped(self.inputs, change), target=target, index=change(self.index), others=others)

    @property
    def labels(self) -> Tensor:
        """The target of a task that has one tensor as its target."""
        assert isinstance(self.target, Tensor), "the target is several tensors, or none"
        return self.target

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Part:
    """Some of a data set's samples.

    inputs:  images uint8 [N, C, H, W], or `EncodedImages`, which stand for such a tensor and are decoded when they are asked for. Several
             inputs by name; at most one of them is encoded.
    target:  [N, ...], several by name, or None where the samples have no labels. In int64 [N], UNLABELLED is no label. Labels per pixel and
             masks may be `EncodedLabels` and `EncodedMasks`, which stand for tensors and are drawn when they are asked for: `standing_in`.
    index:   int64 [N], the positions in the source data set.
    classes: of how many classes a target [N] names one; None where nobody said, and then labels can't be mixed.
    rows:    int64 [N], which of `inputs` are the part's, so that a part of a part shares its pixels; None for all, in their order.
    kinds:   how a view changes each column; a single tensor's is named `inputs` or `target`. Those that are not named have the kind that
             `kinds.kind_of` gives them.
    """

    inputs: Columns | EncodedImages | Mapping[str, Tensor | EncodedImages]
    target: Columns | None
    index: Tensor
    classes: int | None = None
    rows: Tensor | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    _moved: dict[torch.device, Part] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def columns(self) -> Mapping[str, Tensor | EncodedImages]:
        """The inputs by name, a single one as `inputs`. They hold the rows of the whole that the part may be cut from."""
        return self.inputs if isinstance(self.inputs, Mapping) else {INPUTS: self.inputs}

    @property
    def encoded(self) -> str | None:
        """The name in `columns` of the images that are still files; None where all is in memory."""
        return next((name for name, column in self.columns.items() if isinstance(column, EncodedImages)), None)

    @property
    def encoded_images(self) -> EncodedImages:
        """The images that are still files."""
        assert self.encoded is not None, "all of this part is in memory"
        images = self.columns[self.encoded]
        assert isinstance(images, EncodedImages)
        return images

    @property
    def encoded_targets(self) -> dict[str, EncodedTarget]:
        """The targets that are drawn when they are asked for, by name; a single one is called `target`."""
        columns: Mapping[str, Tensor | EncodedTarget] = named(self.target, TARGET) if self.target is not None else {}
        return {name: column for name, column in columns.items() if isinstance(column, EncodedTarget)}

    @property
    def in_memory(self) -> bool:
        """Whether nothing has to be decoded."""
        return self.encoded is None and not self.encoded_targets

    @property
    def pixels(self) -> Tensor:
        """The images of a part that is in memory and has no other inputs, uint8 [N, C, H, W]."""
        assert isinstance(self.inputs, Tensor), "these are not images in memory alone"
        return self.inputs if self.rows is None else self.inputs[self.rows]

    @property
    def labels(self) -> Tensor:
        """The target of a part that has one tensor as its target."""
        assert isinstance(self.target, Tensor), "the target is several tensors, or none"
        return self.target

    @property
    def one_label(self) -> bool:
        """Whether the target is one whole number a sample, such as its class."""
        return isinstance(self.target, Tensor) and self.target.ndim == 1 and not self.target.is_floating_point()

    @property
    def without_label(self) -> int:
        """How many of the samples have no label."""
        if self.target is None:
            return len(self)
        return int((self.labels == UNLABELLED).sum()) if self.one_label and self.labels.dtype == torch.int64 else 0

    @property
    def kinds_of_inputs(self) -> dict[str, Kind]:
        """The kind of each input, a single one's under the name "". Raises UserError for an input that needs one and has none."""
        return kinds_of(self.values, _named_alone(self.kinds, INPUTS), images=True)

    @property
    def kinds_of_target(self) -> dict[str, Kind]:
        """The same of the target; empty for samples without labels."""
        return kinds_of(self.target, _named_alone(self.kinds, TARGET), images=False) if self.target is not None else {}

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the samples' images; None where they have none."""
        return size_of(self.values, self.kinds_of_inputs)

    @property
    def values(self) -> Columns:
        """The inputs. Encoded images stand for a tensor, of which type and shape are known."""
        return self.inputs  # type: ignore[return-value]

    def with_inputs(self, columns: Mapping[str, Tensor | EncodedImages]) -> Part:
        """The same samples with these inputs, named as `columns` names them, which hold the part's rows and no others."""
        inputs = columns if isinstance(self.inputs, Mapping) else columns[INPUTS]
        return replace(self, inputs=inputs, rows=None)

    def select(self, rows: Tensor) -> Part:
        """The samples at `rows`, their pixels copied."""
        where = rows if self.rows is None else self.rows[rows]
        return self._cut(rows).with_inputs({name: column[where] for name, column in self.columns.items()})

    def within(self, rows: Tensor) -> Part:
        """The samples at `rows`, whose pixels stay where they are: a data set that is cut in parts takes no more memory than before."""
        if self.encoded is not None:
            return self.select(rows)
        return replace(self._cut(rows), rows=rows if self.rows is None else self.rows[rows])

    def _cut(self, rows: Tensor) -> Part:
        target = mapped(self.target, lambda tensor: tensor[rows]) if self.target is not None else None
        return replace(self, target=target, index=self.index[rows])

    def on(self, device: torch.device) -> Part:
        """The part with its tensors on the device: copied once, and kept there as long as this part is.

        What has to be decoded first stays on the CPU, and so do the other columns of such a part.
        """
        if not self.in_memory or self.index.device == device:
            return self
        if device not in self._moved:
            own = self.own
            target = mapped(own.target, lambda tensor: tensor.to(device)) if own.target is not None else None
            columns = {name: column.to(device) for name, column in own.columns.items() if isinstance(column, Tensor)}
            self._moved[device] = replace(own, target=target, index=own.index.to(device)).with_inputs(columns)
        return self._moved[device]

    @property
    def own(self) -> Part:
        """The part with no more rows in its inputs than its own; encoded images have no others."""
        return self if self.rows is None else self.select(torch.arange(len(self)))

    def sha256(self) -> str:
        """Content hash of inputs, targets and positions; of encoded columns `Encoded.sha256`. Of several columns names count too."""
        digest = hashlib.sha256()
        own = self.own
        target = named(own.target, TARGET) if own.target is not None else {}
        several = isinstance(own.inputs, Mapping) or len(target) != 1 or TARGET not in target
        for name, content in [*own.columns.items(), *target.items(), ("index", own.index)]:
            if several:
                digest.update(f"{name} ".encode())
            digest.update(str((tuple(content.shape), content.dtype)).encode())
            if isinstance(content, Encoded):
                digest.update(content.sha256().encode())
            else:
                digest.update(content.contiguous().numpy().tobytes())
        return digest.hexdigest()


def standing_in(target: EncodedTarget | Mapping[str, Tensor | EncodedTarget]) -> Columns:
    """A target for `Part`, some of whose columns are encoded: they stand for tensors, of which type and shape are known."""
    return dict(target) if isinstance(target, Mapping) else target  # type: ignore[arg-type, return-value]


def _named_alone(kinds: Mapping[str, Kind], only: str) -> Mapping[str, Kind]:
    """The kinds with that of the column `only`, which has no name of its own, under the name ""."""
    return {"": kinds[only]} if only in kinds else kinds
