"""Image-text retrieval: images and texts in one space, so that each finds the other; recall at 1 in percent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.data.columns import Columns, described, several, single
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Outputs
from kdbench.tasks.base import Splits, Task, TaskInfo
from kdbench.tasks.networks import network_for, seen_by_roles
from kdbench.tasks.similarity import contrastive_loss, recall, similarities, similarity_divergence
from kdbench.tasks.splits import SplitOptions, cut


class ImageText(Task):
    """Which of many texts belongs to an image, and which image to a text.

    Inputs are `image` and `tokens` [B, L]; the target int64 [B] is equal for pairs whose texts say the same. A network gives the embeddings
    `image` [B, D] and `text` [B, D], whose inner products are logits.
    """

    name = "image_text"
    gives = frozenset({"embedding", "imitation"})
    primary = "recall_at_1"
    bounds = (0.0, 100.0)
    batch_coupled = True

    class Options(SplitOptions):
        data: DataSpec = DataSpec(name="shapes", target="caption")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.source: Source = open_source(options.data)
        train = self.source.train
        if not {"image", "tokens"} <= train.columns.keys() or not train.one_label:
            way_out = "; use target: caption" if self.source.name == "shapes" else ""
            raise UserError(
                f"task 'image_text' needs the inputs `image` and `tokens` and one number a pair; data {self.source.name!r} gives "
                f"{', '.join(train.columns)} and {described(train.target)}{way_out}"
            )
        self.data_name = self.source.name
        self.info = TaskInfo(self.name, self.source.num_classes, self.source.example, self.source.class_names, _imitation)
        self._splits = cut(self.source, options)

    def splits(self) -> Splits:
        return self._splits

    def build_model(self, spec: ModelSpec) -> nn.Module:
        return network_for(spec, self.source, {"image": (None,), "text": (None,)}, seen_by_roles(self))

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The contrastive loss of CLIP (arXiv 2103.00020); texts of the batch that say the same share an image's target."""
        found = several(outputs.prediction)
        return {"contrast": contrastive_loss(found["image"], found["text"], batch.labels[:, None] == batch.labels)}

    def metrics(self, prediction: Columns, target: Columns) -> dict[str, float]:
        """recall_at_1: of the images whose most similar text says the same, and of the texts likewise, the mean of both in percent.

        image_to_text, text_to_image: each way alone. recall_at_5: the mean with five candidates.
        """
        found, pairs = several(prediction), single(target, "target")
        first, five = (recall(found["image"], found["text"], pairs, k) for k in (1, 5))
        return {
            "recall_at_1": first.mean,
            "image_to_text": first.image_to_text,
            "text_to_image": first.text_to_image,
            "recall_at_5": five.mean,
        }

    def agreement(self, prediction: Columns, teacher: Columns) -> dict[str, float]:
        """agreement: the share of images that find the same text as the teacher's do."""
        ours, theirs = (_nearest(several(columns)) for columns in (prediction, teacher))
        return {"agreement": (ours == theirs).double().mean().item()}


def _nearest(embeddings: dict[str, Tensor]) -> Tensor:
    """int64 [N]: each image's most similar text, a few images at a time."""
    return torch.cat([similarities(some, embeddings["text"]).argmax(1) for some in embeddings["image"].split(1024)])


def _imitation(student: Outputs, teacher: Outputs, batch: Batch, temperature: float) -> Tensor:
    ours, theirs = (similarities(found["image"], found["text"]) for found in map(several, (student.prediction, teacher.prediction)))
    return similarity_divergence(ours, theirs, temperature)
