"""Losses and recall of images with texts: values against formulas written out, duplicates, ties, numbers that are none, bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from kdbench.tasks import similarity
from kdbench.tasks.similarity import Recall, contrastive_loss, recall, similarities, similarity_divergence
from tests.tolerances import rounding

COUNT, DIM = 6, 4
DOUBLE = rounding(torch.float64, 100, 10.0)
IDS = torch.tensor([0, 1, 0, 2, 1, 0])


def embeddings(count: int = COUNT, seed: int = 0, dim: int = DIM) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, count, dim, dtype=torch.float64, generator=random)
    return image, text


def equal_ids(ids: Tensor) -> Tensor:
    return ids[:, None] == ids


class TestContrastiveLoss:
    def test_without_duplicates_it_is_clips(self) -> None:
        image, text = embeddings()
        logits = image @ text.T
        rows = [-(logits[i, i] - logits[i].exp().sum().log()) for i in range(COUNT)]
        columns = [-(logits[i, i] - logits[:, i].exp().sum().log()) for i in range(COUNT)]
        expected = pytest.approx((sum(rows) + sum(columns)).item() / (2 * COUNT))
        assert contrastive_loss(image, text).item() == expected
        assert contrastive_loss(image, text, torch.eye(COUNT).bool()).item() == expected

    def test_targets_are_spread_evenly_over_duplicates(self) -> None:
        image, text = embeddings()
        logits = image @ text.T
        expected = 0.0
        for direction in (logits, logits.T):
            for i in range(COUNT):
                alike = [j for j in range(COUNT) if IDS[j] == IDS[i]]
                expected -= sum(direction[i].log_softmax(0)[j].item() for j in alike) / len(alike)
        assert contrastive_loss(image, text, equal_ids(IDS)).item() == pytest.approx(expected / (2 * COUNT))

    def test_its_least_value_is_the_entropy_of_the_targets(self) -> None:
        vectors = 10 * F.one_hot(IDS).double()
        counts = (3, 2, 3, 1, 2, 3)
        assert contrastive_loss(vectors, vectors, equal_ids(IDS)).item() == pytest.approx(sum(map(math.log, counts)) / COUNT)

    def test_images_and_texts_play_the_same_part(self) -> None:
        image, text = embeddings()
        assert contrastive_loss(image, text, equal_ids(IDS)).item() == pytest.approx(contrastive_loss(text, image, equal_ids(IDS)).item())

    @pytest.mark.parametrize("same", [None, equal_ids(IDS)], ids=["distinct", "duplicates"])
    def test_gradients_are_those_of_finite_differences(self, same: Tensor | None) -> None:
        image, text = embeddings()
        assert gradcheck(lambda x, y: contrastive_loss(x, y, same), (image.requires_grad_(), text.requires_grad_()))

    @pytest.mark.parametrize("same", [None, torch.ones(1, 1, dtype=torch.bool)])
    def test_a_batch_of_one_has_no_loss(self, same: Tensor | None) -> None:
        image, text = embeddings(1)
        assert contrastive_loss(image, text, same) == 0

    @pytest.mark.parametrize("same", [None, equal_ids(IDS)], ids=["distinct", "duplicates"])
    def test_large_logits_stay_finite(self, same: Tensor | None) -> None:
        image, text = (1e3 * one.float().requires_grad_() for one in embeddings())
        loss = contrastive_loss(image, text, same)
        image.retain_grad()
        loss.backward()
        assert loss.isfinite()
        assert image.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_anything_is_computed(dtype: torch.dtype) -> None:
    image, text = (one.to(dtype) for one in embeddings())
    assert similarities(image, text).equal(image.float() @ text.float().T)
    loss = contrastive_loss(image, text)
    assert loss.dtype == torch.float32
    assert loss == contrastive_loss(image.float(), text.float())
    divergence = similarity_divergence(image @ text.T, text @ image.T, 2.0)
    assert divergence.dtype == torch.float32
    assert divergence == similarity_divergence((image @ text.T).float(), (text @ image.T).float(), 2.0)


class TestSimilarityDivergence:
    def logits(self) -> tuple[Tensor, Tensor]:
        """Of a student and of a teacher whose embeddings are longer."""
        return similarities(*embeddings(dim=3)), similarities(*embeddings(seed=1))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    @pytest.mark.parametrize("images", [COUNT, COUNT - 2])
    def test_it_is_the_mean_divergence_of_rows_and_columns(self, temperature: float, images: int) -> None:
        student, teacher = (one[:images] for one in self.logits())
        expected = 0.0
        for ours, theirs in ((student, teacher), (student.T, teacher.T)):
            for our_row, their_row in zip(ours, theirs, strict=True):
                p, q = (their_row / temperature).softmax(0), (our_row / temperature).softmax(0)
                expected += (p * (p / q).log()).sum().item() / len(ours)
        found = similarity_divergence(student, teacher, temperature)
        assert found.item() == pytest.approx(temperature**2 * expected / 2)

    def test_it_is_zero_where_the_similarities_are_equal(self) -> None:
        student, _ = self.logits()
        student.requires_grad_()
        loss = similarity_divergence(student, student.detach(), 3.0)
        loss.backward()
        assert loss == 0
        assert student.grad.abs().max() <= DOUBLE

    def test_a_constant_added_to_all_similarities_changes_nothing(self) -> None:
        student, teacher = self.logits()
        assert similarity_divergence(student + 5, teacher, 1.0).item() == pytest.approx(similarity_divergence(student, teacher, 1.0).item())

    def test_gradients_are_those_of_finite_differences(self) -> None:
        student, teacher = self.logits()
        assert gradcheck(lambda x: similarity_divergence(x, teacher, 2.0), (student.requires_grad_(),))

    def test_large_logits_and_low_temperatures_stay_finite(self) -> None:
        student, teacher = (1e3 * one.float() for one in self.logits())
        student.requires_grad_()
        loss = similarity_divergence(student, teacher, 0.05)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


class TestRecall:
    def slow(self, image: Tensor, text: Tensor, ids: Tensor, k: int) -> Recall:
        """Sort every query's candidates."""
        shares = []
        for queries, gallery in ((image, text), (text, image)):
            order = (queries @ gallery.T).argsort(dim=1, descending=True)[:, :k]
            shares.append(100 * sum(ids[i] in ids[order[i]] for i in range(len(ids))) / len(ids))
        return Recall(*shares)

    @pytest.mark.parametrize("k", [1, 2, 5, 40])
    @pytest.mark.parametrize("classes", [4, 1000])
    @pytest.mark.parametrize("at_once", [1, 100, 1 << 22])
    def test_it_is_the_share_of_queries_with_a_hit_among_the_first(
        self, k: int, classes: int, at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(similarity, "_SIMILARITIES_AT_ONCE", at_once)
        image, text = embeddings(40)
        text = text + image
        ids = torch.randint(0, classes, (40,), generator=torch.Generator().manual_seed(1))
        found, expected = recall(image, text, ids, k), self.slow(image, text, ids, k)
        assert found == pytest.approx(expected)
        assert found.image_to_text > 0

    def test_the_two_ways_are_told_apart(self) -> None:
        image, text = (
            torch.eye(2),
            torch.tensor([[3.0, 0.0], [2.0, 1.0]]),
        )  # similarities [[3, 2], [0, 1]]: image 0 is nearest to both texts
        assert recall(image, text, torch.arange(2)) == Recall(image_to_text=100.0, text_to_image=50.0)
        assert recall(text, image, torch.arange(2)) == Recall(image_to_text=50.0, text_to_image=100.0)

    def test_any_sample_of_the_same_pair_id_is_a_hit(self) -> None:
        image = torch.eye(3)
        text = torch.eye(3)[[1, 0, 2]]  # images 0 and 1 find each other's text
        assert recall(image, text, torch.tensor([7, 7, 9])) == Recall(100.0, 100.0)
        assert recall(image, text, torch.tensor([7, 8, 9])) == pytest.approx((100 / 3, 100 / 3))
        assert recall(image, text, torch.tensor([7, 8, 9]), k=3).mean == 100

    def test_one_embedding_for_all_finds_nothing(self) -> None:
        vectors = torch.ones(5, 3)
        assert recall(vectors, vectors, torch.arange(5), k=4) == Recall(0.0, 0.0)
        assert recall(vectors, vectors, torch.arange(5), k=5) == Recall(100.0, 100.0)
        assert recall(vectors, vectors, torch.zeros(5, dtype=torch.int64)) == Recall(100.0, 100.0)

    @pytest.mark.parametrize("broken", ["image", "text"])
    def test_a_network_that_diverged_finds_nothing(self, broken: str) -> None:
        good, nan = torch.eye(4), torch.full((4, 4), torch.nan)
        found = recall(nan, good, torch.arange(4)) if broken == "image" else recall(good, nan, torch.arange(4))
        assert found == Recall(0.0, 0.0)

    def test_the_mean_is_of_both_ways(self) -> None:
        assert Recall(40.0, 60.0).mean == 50

    def test_stored_half_precision_is_widened(self) -> None:
        image, text = (one.half() for one in embeddings(40))
        assert recall(image, text, torch.arange(40), 3) == recall(image.float(), text.float(), torch.arange(40), 3)

    def test_ten_thousand_pairs_never_make_a_large_matrix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        largest = []
        compute = similarity._wrong_in_front

        def measured(scores: Tensor, hits: Tensor) -> Tensor:
            largest.append(scores.numel())
            return compute(scores, hits)

        monkeypatch.setattr(similarity, "_wrong_in_front", measured)
        image = F.normalize(torch.randn(10_000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
        assert recall(image, image, torch.arange(10_000)) == Recall(100.0, 100.0)
        assert max(largest) <= 1 << 22
        assert sum(largest) == 2 * 10_000**2
