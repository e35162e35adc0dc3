"""Contrastive representation distillation, CRD (Tian et al., ICLR 2020, arXiv 1910.10699)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch, Part
from kdbench.errors import UserError
from kdbench.methods.base import Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, embeddings
from kdbench.models.adapters import as_vector
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_EPSILON = 1e-7


def contrastive_loss(log_scores: Tensor, samples: int) -> Tensor:
    """Noise-contrastive estimation: tell the sample itself from K others (eq. 17 and 18, summed over candidates, mean over the batch).

    log_scores: [B, 1 + K], logarithms of h, the sample's own first; samples: how many there are to draw from.
    With c = K / samples: -mean_b (log(h_0 / (h_0 + c)) + sum_k log(c / (h_k + c))). Returns a scalar in nats.
    """
    noise = (log_scores.shape[1] - 1) / samples
    surplus = log_scores - math.log(noise + _EPSILON)
    own, others = -F.logsigmoid(surplus[:, 0]), -F.logsigmoid(-surplus[:, 1:])
    return (own + (others + math.log1p(_EPSILON / noise)).sum(1)).mean()


class Contrast(nn.Module):
    """Embeddings of two taps on one sphere, and a memory of every training sample's embedding on either side.

    The student's embedding is compared with the memory of the teacher's, the teacher's with that of the student's.
    """

    memory_student: Tensor
    memory_teacher: Tensor
    log_partition: Tensor

    def __init__(self, student: int, teacher: int, dimensions: int) -> None:
        """student, teacher: how wide the vectors are that are embedded."""
        super().__init__()
        self.embed_student = nn.Linear(student, dimensions)
        self.embed_teacher = nn.Linear(teacher, dimensions)

    def remember(self, samples: int, generator: torch.Generator | None) -> None:
        """Make the memories, float [samples, D], of entries of chance, and the logarithms of the two partition functions, not known yet."""
        dimensions = self.embed_student.out_features
        for name in ("memory_student", "memory_teacher"):
            chance = 2 * torch.rand(samples, dimensions, generator=generator) - 1
            self.register_buffer(name, chance * math.sqrt(3 / dimensions))
        self.register_buffer("log_partition", torch.full((2,), math.nan))

    def forward(self, student: Tensor, teacher: Tensor, candidates: Tensor, temperature: float, momentum: float) -> Tensor:
        """Both sides' losses, summed. student, teacher: [B, ...] at the taps; candidates: int64 [B, 1 + K], rows of the memory.

        A sample's own row stands first. Moves the memory of the batch's samples towards what they are now.
        """
        student, teacher = loss_precision(student, teacher)
        ours = F.normalize(self.embed_student(as_vector(student)), dim=1)
        theirs = F.normalize(self.embed_teacher(as_vector(teacher)), dim=1)
        scores = [
            # Autograd needs the memory as it was, and it moves before the backward pass.
            (embedding @ memory.clone().T).gather(1, candidates) / temperature
            for embedding, memory in ((ours, self.memory_teacher), (theirs, self.memory_student))
        ]
        samples = len(self.memory_student)
        self._settle(scores, samples)
        self._move(self.memory_student, candidates[:, 0], ours, momentum)
        self._move(self.memory_teacher, candidates[:, 0], theirs, momentum)
        losses = [contrastive_loss(score - logarithm, samples) for score, logarithm in zip(scores, self.log_partition, strict=True)]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _settle(self, scores: list[Tensor], samples: int) -> None:
        """Estimate the partition functions from the first batch; they stay as they are from then on."""
        estimates = torch.stack([score.logsumexp((0, 1)) - math.log(score.numel() / samples) for score in scores])
        self.log_partition.copy_(torch.where(self.log_partition.isnan(), estimates, self.log_partition))

    @staticmethod
    @torch.no_grad()
    def _move(memory: Tensor, rows: Tensor, embedding: Tensor, momentum: float) -> None:
        memory[rows] = F.normalize(momentum * memory[rows] + (1 - momentum) * embedding, dim=1)


class CRD(FeatureMethod):
    """Pull a sample's embeddings by student and teacher together, and push them away from those of samples of other classes.

    The others are drawn anew for each sample and step, with replacement (the authors draw without, where there are enough of them).
    """

    paper = Paper(
        "Contrastive Representation Distillation",
        arxiv="1910.10699",
        venue="ICLR 2020",
        formula="L = w_task CE + weight (NCE(e_s, memory_t) + NCE(e_t, memory_s)),  e = W f / |W f|,  h = exp(e . m / T) / Z",
        checked_against="megvii-research/mdistiller@a08d46f",
    )
    needs_labels = True
    batch_coupled = True  # its memory holds all samples: every worker moves the same rows of it

    class Params(FeatureMethod.Params):
        """negatives: samples of other classes that each one is told from. momentum: what an entry of the memory keeps of itself."""

        weight: Annotated[float, Range(0.1, 2.0, log=True), Field(ge=0)] = 0.8
        temperature: Annotated[float, Range(0.05, 0.2, log=True), Field(gt=0)] = 0.07
        negatives: Annotated[int, Range(256, 16_384, log=True), Field(ge=1, le=2**20)] = 16_384
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
        dimensions: Annotated[int, Field(ge=1, le=2**16)] = 128

    params: Params
    row_of: Tensor
    by_class: Tensor
    first_alike: Tensor
    alike: Tensor

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        return embeddings(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        pairs = self.pairs(student, teacher)
        self.contrasts = nn.ModuleList(Contrast(ours.channels, theirs.channels, self.params.dimensions) for ours, theirs in pairs)

    def use_samples(self, samples: Part) -> None:
        """Give every sample a row of the memories, and lay out which others are of another class. Raises UserError for a single class."""
        _, classes, sizes = samples.labels.unique(return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise UserError(f"method {self.name} draws samples of other classes, and all {len(samples)} training samples are of one")
        row_of = torch.full((int(samples.index.max()) + 1,), -1)
        row_of[samples.index] = torch.arange(len(samples))
        layout = {
            "row_of": row_of,  # position in the source data set -> row
            "by_class": classes.argsort(stable=True),  # the rows, class after class
            "first_alike": (sizes.cumsum(0) - sizes)[classes],  # of each row: where its class begins in `by_class`
            "alike": sizes[classes],  # and how many are of it
        }
        for name, table in layout.items():
            self.register_buffer(name, table, persistent=False)
        for contrast in self.contrasts:
            assert isinstance(contrast, Contrast)
            contrast.remember(len(samples), self.generator)

    def candidates(self, index: Tensor) -> Tensor:
        """Rows of the memories, int64 [B, 1 + negatives]: each sample's own, then others by chance. index: positions in the source, [B]."""
        rows = self.row_of[index]
        # Drawn on the CPU whatever the device: every worker and every machine draws the same.
        chance = torch.rand(len(index), self.params.negatives, generator=self.generator).to(index.device)
        first, alike = self.first_alike[rows].unsqueeze(1), self.alike[rows].unsqueeze(1)
        others = len(self.by_class) - alike
        drawn = (chance * others).long().minimum(others - 1)
        return torch.cat([rows.unsqueeze(1), self.by_class[drawn + alike * (drawn >= first)]], dim=1)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        return self.contrasted(s, t, self.candidates(batch.index))

    def contrasted(self, s: Outputs, t: Outputs | None, candidates: Tensor) -> dict[str, Tensor]:
        """As `forward`, with the candidates that `candidates` draws."""
        assert t is not None
        temperature, momentum = self.params.temperature, self.params.momentum
        taps = zip(self.student_taps, self.teacher_taps, self.contrasts, strict=True)
        losses = [contrast(s.maps[ours], t.maps[theirs], candidates, temperature, momentum) for ours, theirs, contrast in taps]
        return {"crd": self.params.weight * torch.stack(losses).sum()}
