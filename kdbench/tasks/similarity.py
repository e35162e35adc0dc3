"""What image-text tasks compute from two embeddings a pair: contrastive loss, recall, and how alike two networks' similarities are.

Embeddings are such that their inner product is the logit of a pair; a network's temperature is inside them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES_AT_ONCE = 1 << 22  # of a gallery and some queries, 16 MB in float32


class Recall(NamedTuple):
    """In percent of the queries, for images that look for their text and for texts that look for their image."""

    image_to_text: float
    text_to_image: float

    @property
    def mean(self) -> float:
        return (self.image_to_text + self.text_to_image) / 2


def similarities(image: Tensor, text: Tensor) -> Tensor:
    """Inner products [N, M] of images [N, D] and texts [M, D], in float32 or wider."""
    image, text = _widened(image), _widened(text)
    return image @ text.T


def contrastive_loss(image: Tensor, text: Tensor, same: Tensor | None = None) -> Tensor:
    """Cross-entropy of each image's text among the batch's texts and of each text's image among its images, mean of both, in nats.

    Args:
        image: [B, D].
        text: [B, D]. Pair i is image i and text i; inner products are logits.
        same: boolean [B, B], symmetric and true on the diagonal: which pairs have the same caption. An image's target is spread evenly
            over the texts that are the same as its own, and a text's likewise. None where all captions differ: this is the loss of CLIP
            (Radford et al., ICML 2021, arXiv 2103.00020, figure 3).

    Returns:
        A scalar, float32 or wider. Its least value is the mean of log n over the batch, with n captions the same as a sample's own.
    """
    logits = similarities(image, text)
    if same is None:
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    target = same.to(logits.dtype)
    target = target / target.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def similarity_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Plain distillation of a batch's similarities: T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over rows and columns.

    The rows are images that choose among the batch's texts, the columns texts that choose among its images: each is a classification as in
    Hinton, Vinyals & Dean (2015, arXiv 1503.02531, section 2). The two networks' embeddings may differ in length.

    Args:
        student: logits [N, M], as `similarities` gives them.
        teacher: likewise.
        temperature: T, above 0.

    Returns:
        A scalar in nats, float32 or wider: the mean of the rows' mean and the columns' mean, 0 where student and teacher are equal.
    """
    student, teacher = _widened(student) / temperature, _widened(teacher) / temperature
    return temperature**2 * (_mean_divergence(student, teacher) + _mean_divergence(student.T, teacher.T)) / 2


def recall(image: Tensor, text: Tensor, pair_ids: Tensor, k: int = 1) -> Recall:
    """How often what belongs to a query is among the k most similar.

    A candidate with the query's pair id is a hit. A candidate that is as similar as the best hit counts as more similar, and so does one
    whose similarity is nan: a network that gives one embedding to all inputs, or that diverged, gains nothing by the order of samples.

    Args:
        image: [N, D].
        text: [N, D].
        pair_ids: int64 [N], of image i and of text i; pairs whose captions are the same have the same id.
        k: how many candidates are looked at.

    Returns:
        Both ways, in percent. N x N similarities never lie in memory at once.
    """
    image, text = _widened(image), _widened(text)
    return Recall(_share_found(image, text, pair_ids, k), _share_found(text, image, pair_ids, k))


def _share_found(queries: Tensor, gallery: Tensor, pair_ids: Tensor, k: int) -> float:
    """Percent of queries [N, D] that have a hit among the k most similar rows of gallery [N, D]."""
    rows = max(1, _SIMILARITIES_AT_ONCE // len(gallery))
    found = sum(
        int((_wrong_in_front(some @ gallery.T, ids[:, None] == pair_ids) < k).sum())
        for some, ids in zip(queries.split(rows), pair_ids.split(rows), strict=True)
    )
    return 100 * found / len(queries)


def _wrong_in_front(scores: Tensor, hits: Tensor) -> Tensor:
    """int64 [N]: how many wrong candidates each query puts in front of its best hit or beside it. scores, hits: [N, M]."""
    best = scores.masked_fill(~hits, -torch.inf).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~hits).sum(dim=1)


def _mean_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(teacher) || softmax(student)), logits [N, M]."""
    log_q, log_p = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
