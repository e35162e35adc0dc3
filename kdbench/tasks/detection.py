"""Object detection: boxes of the objects in an image, their classes and scores; average precision in percent."""

from __future__ import annotations

import copy
from functools import cached_property, partial
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.data.columns import Columns, alone, described, named, several, single
from kdbench.data.frames import Colour
from kdbench.data.hashing import hash64
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec, build_model, without_weights
from kdbench.models.detectors.readings import Reading
from kdbench.models.inputs import InputSpec, model_inputs
from kdbench.models.outputs import Outputs, main_output, predicted, reading_of
from kdbench.tasks.average_precision import MOST_BOXES, average_precision, shared_boxes
from kdbench.tasks.base import Splits, Task, TaskInfo
from kdbench.tasks.cell_losses import learned_labels
from kdbench.tasks.detector_imitation import imitation
from kdbench.tasks.detector_losses import losses_of
from kdbench.tasks.networks import checked_network
from kdbench.tasks.splits import SplitOptions, cut

_DRAWS = 0xD3  # seed of the bits from which a family draws the places that it learns


class Detection(Task):
    """Where the objects of an image are, and what they are.

    A target is `boxes` [B, M, 4] of x0, y0, x1, y1 in pixels of the network's input with `labels` [B, M], -1 in padded rows; `crowd`,
    `area`, `scale`, `shift` and `size` where the data have them (`average_precision`). A network gives a tensor for each level of its
    pyramid, `level:0`, `level:1`, ..., and says in its attribute `reading` how they are read (`models.detectors.readings`).
    """

    name = "detection"
    version = 2  # since 2, networks give raw levels, and `kd` counts by images
    gives = frozenset({"boxes", "imitation"})
    primary = "ap"
    bounds = (0.0, 100.0)
    kept_exactly = True

    class Options(SplitOptions):
        data: DataSpec = DataSpec(name="shapes", target="boxes", size=64)
        kept_boxes: Annotated[int, Field(ge=1, le=300)] = MOST_BOXES  # of each image, the best are stored and measured
        primary: Literal["ap", "ap50"] = "ap"  # what runs are chosen and ranked by: COCO's, or that of Pascal VOC
        confident: Annotated[float, Field(ge=0, le=1)] = 0.3  # the score from which `kd` imitates a teacher's box

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.source: Source = open_source(options.data)
        target, size = self.source.train.target, self.source.train.image_size
        if target is None or not {"boxes", "labels"} <= named(target, "").keys() or size is None:
            raise UserError(
                f"task {self.name!r} needs images with `boxes` [N, M, 4] and `labels` [N, M]; data {self.source.name!r} gives "
                f"{described(target)}" + ("; use target: boxes" if self.source.name in ("shapes", "stamps") else "")
            )
        self.size, self.primary = size, options.primary
        self.data_name = self.source.name
        imitates = partial(imitation, size=size, confident=options.confident)
        self.info = TaskInfo(self.name, self.source.num_classes, self.source.example, self.source.class_names, imitates)
        self._splits = cut(self.source, options)
        self._read: Reading | None = None  # how the network that learns is read
        self._readings: dict[str, Reading] = {}  # of networks that were asked for, by how they are built

    def splits(self) -> Splits:
        return self._splits

    def build_model(self, spec: ModelSpec) -> nn.Module:
        who = f"model {spec.name!r}"
        model = build_model(spec, **self.source.network_facts, class_ids=self.source.class_ids)
        reading, inputs = reading_of(model), model.input_spec
        if not isinstance(reading, Reading):
            raise UserError(
                f"{who} has no `reading`, which says what the raw levels of a detector hold; set one, such as "
                "kdbench.api.CellReading(num_classes, strides), or name a detector that has one (kdbench list models)"
            )
        losses_of(reading)
        if isinstance(inputs, InputSpec) and inputs.size is not None and (inputs.size, inputs.size) != self.size:
            raise UserError(f"{who} resizes images to {inputs.size} pixels, and boxes would not follow; give the data that size")
        model.prediction_names = reading.names  # type: ignore[assignment]
        return checked_network(model, self.source, cast(Any, reading.shapes(self.size)), who)

    def reading(self, spec: ModelSpec) -> Reading:
        known = spec.model_dump_json(exclude={"weights", "pretrained"})
        if known not in self._readings:
            with without_weights(), torch.random.fork_rng(devices=[]):
                self._readings[known] = reading_of(build_model(spec, **self.source.network_facts))
        return self._readings[known]

    def learned_by(self, network: nn.Module) -> Detection:
        bound = copy.copy(self)
        bound._read = reading_of(network)
        return bound

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The losses of the network's family, see `detector_losses`."""
        losses = losses_of(outputs.reading)
        target = several(batch.target)
        if losses.draws:
            target = target | {"draws": hash64(_DRAWS, batch.index, batch.view)}
        return losses.losses(several(outputs.prediction), target, self.size)

    def truth(self, batch: Batch) -> dict[str, Tensor]:
        """The boxes of the objects, and their classes, for a detector whose second stage learns at them."""
        if self._read is None or not self._read.wants_truth or batch.target is None:
            return {}
        target = several(batch.target)
        return {"boxes": target["boxes"], "labels": learned_labels(target)}

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        """What the family's losses are divided by; `kd` is a mean over images."""
        assert self._read is not None, "the frame says by `learned_by` which network learns"
        return {**losses_of(self._read).weights(several(batch.target), self.size), "imitation": torch.tensor(len(batch))}

    def predict(self, model: nn.Module, inputs: Columns) -> Columns:
        """The best boxes of each image: boxes [B, K, 4] in pixels of the input, scores [B, K], classes [B, K]."""
        found = self.found(model, inputs)
        return {name: found[name] for name in ("boxes", "scores", "classes")}

    def found(self, model: nn.Module, inputs: Columns) -> dict[str, Tensor]:
        """All that the network's reading finds in the inputs.

        Padding is shown to the network as the mean that it subtracts, and no box reaches into it: as torchvision's detectors, which pad
        after they normalise and cut proposals and boxes at the picture.
        """
        reading: Reading = reading_of(model)
        valid = self._valid(inputs)
        if valid is None:
            return reading.detections(several(predicted(model, inputs)), self.size, self.options.kept_boxes)
        seen = model_inputs(model, self._with_mean_padding(model, single(inputs, "inputs"), valid))
        output = model(seen, valid=valid) if reading.wants_valid else model(seen)
        return reading.detections(several(main_output(model, output)), self.size, self.options.kept_boxes, valid)

    @cached_property
    def _padding(self) -> Colour | None:
        """The colour beside pictures that do not fill their input; None where all do."""
        test = self._splits.test
        images = test.encoded_images if test.encoded is not None else None
        return images.padding if images is not None and images.fitting == "letterbox" else None

    def _valid(self, inputs: Columns) -> Tensor | None:
        """int64 [B, 2], height and width of the picture in each input's upper left corner: what is not the colour of the padding.

        None where no input is padded. A network is exported and measured without the data set, so the input itself has to tell.
        """
        if self._padding is None or not alone(inputs):
            return None
        images = single(inputs, "inputs")
        colour = images.new_tensor(self._padding)[:, None, None] / 255
        picture = ((images - colour).abs() > 0.5 / 255).any(1)
        sides = [_last(picture.any(along)) for along in (2, 1)]
        valid = torch.stack(sides, dim=1)
        return None if bool((valid == valid.new_tensor(self.size)).all()) else valid

    def _with_mean_padding(self, model: nn.Module, images: Tensor, valid: Tensor) -> Tensor:
        spec = getattr(model, "input_spec", None)  # as `model_inputs` asks
        if not isinstance(spec, InputSpec):
            return images
        mean = images.new_tensor(spec.mean)[:, None, None]
        rows, columns = (torch.arange(side, device=images.device) for side in self.size)
        inside = (rows[:, None] < valid[:, 0, None, None]) & (columns < valid[:, 1, None, None])
        return torch.where(inside[:, None], images, mean)

    def metrics(self, prediction: Columns, target: Columns) -> dict[str, float]:
        """Average precision in percent, of all, by size and by class: see `average_precision`."""
        return average_precision(several(prediction), several(target), self.source.class_names)

    def agreement(self, prediction: Columns, teacher: Columns) -> dict[str, float]:
        """agreement: of the boxes that student and teacher keep, the share that the other has too (`shared_boxes`)."""
        return {"agreement": shared_boxes(several(prediction), several(teacher))}


def _last(there: Tensor) -> Tensor:
    """[B, L] -> int64 [B], the place after the last that is true; L where none is."""
    length = there.shape[1]
    places = torch.arange(1, length + 1, device=there.device)
    return torch.where(there.any(1), (there * places).amax(1), length)
