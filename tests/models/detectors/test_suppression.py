from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdbench.models.detectors.suppression import best_of_each_image


def best(scores: Tensor, boxes: Tensor, count: int, levels: tuple[int, ...] = (), most: int = 1000) -> dict[str, Tensor]:
    return best_of_each_image(scores, boxes, count, lowest=0.05, overlap=0.5, levels=levels or (boxes.shape[1],), most=most)


def test_a_better_box_of_the_same_class_removes_those_that_overlap_it() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 4.9], [20, 20, 30, 30]]])
    scores = torch.tensor([[[0.8, 0], [0.9, 0], [0.7, 0], [0.5, 0]]])
    kept = best(scores, boxes, 3)
    # 0.9 of the first box is the second. The third has a little more than half of the second: 49 of 90.
    assert kept["boxes"][0].tolist() == [[0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 0, 0]]
    assert kept["scores"][0].tolist() == pytest.approx([0.9, 0.5, 0])
    assert kept["classes"][0].tolist() == [0, 0, 0]


def test_boxes_of_other_classes_stay_also_beyond_the_images_edge() -> None:
    # Without care, the offset between classes is the largest coordinate plus one: 3, by which these two would be one box.
    boxes = torch.tensor([[[-1.0, -1, 2, 2], [-4.0, -4, -1, -1]]])
    kept = best(torch.tensor([[[0.9, 0], [0, 0.8]]]), boxes, 2)
    assert kept["boxes"].tolist() == boxes.tolist()
    assert kept["classes"].tolist() == [[0, 1]]


def test_one_place_may_be_kept_for_two_classes() -> None:
    kept = best(torch.tensor([[[0.9, 0.8]]]), torch.tensor([[[0.0, 0, 4, 4]]]), 2)
    assert kept["classes"].tolist() == [[0, 1]]


def test_low_scores_numbers_that_are_nan_and_boxes_without_a_side_are_left_out() -> None:
    scores = torch.tensor([[[math.nan], [0.049], [0.051], [0.9]]])
    boxes = torch.tensor([[[0.0, 0, 4, 4], [8, 8, 12, 12], [20, 20, 24, 24], [3, 3, 3, 9]]])
    kept = best(scores, boxes, 3)
    assert (kept["scores"] > 0).tolist() == [[True, False, False]]
    assert kept["boxes"][0, 0].tolist() == [20, 20, 24, 24]


@pytest.mark.parametrize("count", [1, 2, 100])
def test_only_the_best_are_kept_and_shapes_are_fixed(count: int) -> None:
    boxes = torch.tensor([[[float(x), 0, x + 4, 4] for x in (0, 8, 16)]])
    kept = best(torch.tensor([[[0.6], [0.9], [0.7]]]), boxes, count)
    assert [kept[name].shape for name in ("boxes", "scores", "classes")] == [(1, count, 4), (1, count), (1, count)]
    assert kept["boxes"][0, :3, 0].tolist() == [8, 16, 0][:count]
    assert kept["classes"].dtype == torch.int64


def test_equal_scores_stand_in_the_order_of_the_places() -> None:
    boxes = torch.tensor([[[float(x), 0, x + 4, 4] for x in (16, 0, 8)]])
    assert best(torch.full((1, 3, 1), 0.5), boxes, 3)["boxes"][0, :, 0].tolist() == [16, 0, 8]
    assert best(torch.full((1, 3, 1), 0.5), boxes, 3, levels=(1, 2))["boxes"][0, :, 0].tolist() == [16, 0, 8]


def test_each_level_has_so_many_candidates() -> None:
    boxes = torch.tensor([[[float(x), 0, x + 4, 4] for x in (0, 8, 16, 24)]])
    kept = best(torch.tensor([[[0.9], [0.8], [0.3], [0.2]]]), boxes, 4, levels=(2, 2), most=1)
    assert kept["boxes"][0, :, 0].tolist() == [0, 16, 0, 0]
    assert kept["scores"][0].tolist() == pytest.approx([0.9, 0.3, 0, 0])


def test_images_do_not_see_each_other() -> None:
    boxes = torch.tensor([[[0.0, 0, 8, 8], [9, 9, 20, 20]], [[9.0, 9, 20, 20], [0, 0, 8, 8]]])
    scores = torch.tensor([[[0.9], [0.8]], [[0.3], [0.01]]])
    together = best(scores, boxes, 2)
    for row in range(2):
        for name, values in best(scores[row : row + 1], boxes[row : row + 1], 2).items():
            assert torch.equal(values[0], together[name][row])
