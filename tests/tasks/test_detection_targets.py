import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from kdbench.data.shapes import shapes
from kdbench.models.detectors.fcos import tiny_fcos
from kdbench.models.detectors.positions import positions
from kdbench.tasks.detection_targets import (
    Assignment,
    assign,
    average_precision,
    best_boxes,
    detection_losses,
    focal_loss,
    giou_loss,
    imitation_loss,
    size_ranges,
)

CENTRES, STRIDES = positions((32, 32), (4, 8))  # 64 cells, then 16
Target = dict[str, Tensor]


def target(*objects: tuple[tuple[float, ...], int], rows: int = 3) -> Target:
    """One image's objects, padded to `rows`."""
    boxes, labels = torch.zeros(1, rows, 4), torch.full((1, rows), -1)
    for row, (box, label) in enumerate(objects):
        boxes[0, row], labels[0, row] = torch.tensor(box), label
    return {"boxes": boxes, "labels": labels}


def cells(assignment: Assignment) -> dict[tuple[float, float, float], int]:
    """The label of each positive cell of the first image, by its centre and stride."""
    found = assignment.positive[0].nonzero().flatten().tolist()
    return {(*CENTRES[cell].tolist(), STRIDES[cell].item()): int(assignment.labels[0, cell]) for cell in found}


class TestAssignment:
    def test_cells_inside_the_box_and_near_its_centre_learn_it(self):
        # Centre (10, 10): cells of stride 4 at 6, 10 and 14 are within 6 pixels. From 6, the farthest side is 9 + 4 = 13 <= 16.
        found = cells(assign(target(((5.0, 5.0, 15.0, 15.0), 2)), CENTRES, STRIDES))
        assert found == {(x, y, 4): 2 for x in (6, 10, 14) for y in (6, 10, 14)}

    def test_cells_far_from_the_centre_are_background_though_they_are_in_the_box(self):
        # Centre (16, 4): across, only cells up to 6 pixels away. The reach leaves the whole box to the fine level.
        found = cells(assign(target(((2.0, 0.0, 30.0, 8.0), 0)), CENTRES, STRIDES, reach=100))
        assert found == {(x, y, 4): 0 for x in (10, 14, 18, 22) for y in (2, 6)}

    def test_each_level_takes_the_cells_whose_farthest_side_is_in_its_range(self):
        # Of the fine level, x = 14 and 18 have a side 16 pixels away, x = 10 and 22 one of 20. The coarse level takes 16 and more.
        found = cells(assign(target(((2.0, 0.0, 30.0, 8.0), 0)), CENTRES, STRIDES))
        assert found == {(x, y, 4): 0 for x in (14, 18) for y in (2, 6)} | {(x, 4, 8): 0 for x in (4, 12, 20, 28)}

    def test_large_objects_belong_to_the_coarse_level(self):
        found = cells(assign(target(((0.0, 0.0, 32.0, 32.0), 1)), CENTRES, STRIDES))
        assert {stride for _, _, stride in found} == {8}
        assert {(x, y) for x, y, _ in found} == {(x, y) for x in (4, 12, 20, 28) for y in (4, 12, 20, 28)}

    def test_ranges_of_neighbouring_levels_meet_and_the_ends_are_open(self):
        ranges = size_ranges(torch.tensor([4.0, 8.0, 16.0]))
        assert ranges.tolist() == [[0, 16], [16, 32], [32, math.inf]]
        assert size_ranges(torch.tensor([8.0, 16.0]), reach=8).tolist() == [[0, 64], [64, math.inf]]
        assert size_ranges(torch.tensor([4.0, 4.0])).tolist() == [[0, math.inf]] * 2

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_the_smallest_object_wins_a_cell_that_lies_in_two(self, order: tuple[int, int]):
        objects = [((4.0, 4.0, 16.0, 16.0), 0), ((8.0, 8.0, 12.0, 12.0), 1)]
        assignment = assign(target(*(objects[i] for i in order)), CENTRES, STRIDES)
        found = cells(assignment)
        assert found[10, 10, 4] == 1
        assert found[6, 6, 4] == 0
        cell = int((CENTRES == 10).all(1).nonzero()[0])
        assert assignment.boxes[0, cell].tolist() == [8, 8, 12, 12]

    def test_a_cell_on_the_edge_of_a_box_is_outside(self):
        assert (6, 10, 4) not in cells(assign(target(((6.0, 6.0, 14.0, 14.0), 0)), CENTRES, STRIDES))

    def test_padded_rows_change_nothing(self):
        objects = [((5.0, 5.0, 15.0, 15.0), 2), ((18.0, 18.0, 30.0, 29.0), 0)]
        few, many = (assign(target(*objects, rows=rows), CENTRES, STRIDES) for rows in (2, 7))
        assert torch.equal(few.labels, many.labels)
        assert torch.equal(few.boxes[few.positive], many.boxes[many.positive])
        moved = target(*objects, rows=4)
        moved["boxes"][0, 3] = torch.tensor([0.0, 0.0, 9.0, 9.0])  # still labelled as padding
        assert torch.equal(assign(moved, CENTRES, STRIDES).labels, few.labels)

    @pytest.mark.parametrize("rows", [0, 3])
    def test_an_image_without_objects_is_background(self, rows: int):
        assignment = assign(target(rows=rows), CENTRES, STRIDES)
        assert (assignment.labels == -1).all()
        assert assignment.labels.shape == (1, 80)
        assert assignment.boxes.shape == (1, 80, 4)
        assert assignment.counts.tolist() == [0]

    def test_positive_cells_are_counted_by_image(self):
        one, other = target(((5.0, 5.0, 15.0, 15.0), 2)), target(((0.0, 0.0, 32.0, 32.0), 1))
        both = {name: torch.cat([one[name], target()[name], other[name]]) for name in one}
        assert assign(both, CENTRES, STRIDES).counts.tolist() == [9, 0, 16]

    @pytest.mark.parametrize("size", [32, 64])
    def test_every_generated_object_is_learned_by_some_cell(self, size: int):
        wanted = shapes(train=40, test=1, size=size, target="boxes").train.target
        assignment = assign(wanted, *positions((size, size), (4, 8)))
        for image, (boxes, labels) in enumerate(zip(wanted["boxes"], wanted["labels"], strict=True)):
            for box in boxes[labels >= 0]:
                assert (assignment.boxes[image][assignment.positive[image]] == box).all(1).any()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def boxes_around(centres: Tensor, images: int) -> Tensor:
    sides = noise(images, len(centres), 4).exp() * 4
    return torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], dim=-1)


class TestLosses:
    def test_the_focal_loss_is_that_of_its_authors(self):
        logits, labels = 3 * noise(2, 7, 4), torch.tensor([[0, 3, -1, -1, 2, 1, -1], [-1] * 7])
        one_hot = F.one_hot(labels.clamp(min=0), 4) * (labels >= 0)[..., None]
        expected = sigmoid_focal_loss(logits, one_hot.double(), alpha=0.25, gamma=2, reduction="sum")
        torch.testing.assert_close(focal_loss(logits, labels), expected, rtol=1e-12, atol=0)

    def test_without_focus_it_is_half_the_cross_entropy(self):
        logits, labels = noise(3, 4), torch.tensor([0, -1, 2])
        one_hot = torch.stack([F.one_hot(torch.tensor(0), 4), torch.zeros(4), F.one_hot(torch.tensor(2), 4)]).double()
        expected = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum") / 2
        torch.testing.assert_close(focal_loss(logits, labels, alpha=0.5, gamma=0), expected)

    @pytest.mark.parametrize("size", [1e3, -1e3])
    def test_extreme_logits_have_finite_losses_and_gradients(self, size: float):
        logits = torch.full((1, 2, 3), size, requires_grad=True)
        loss = focal_loss(logits, torch.tensor([[1, -1]]))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        # Five wrong classes at 0.75 each, or one missed at 0.25.
        assert loss.item() == pytest.approx(5 * 0.75 * 1e3 if size > 0 else 0.25 * 1e3)

    def test_half_precision_is_widened(self):
        logits, labels = noise(5, 4).bfloat16(), torch.tensor([0, 1, -1, 2, -1])
        assert focal_loss(logits, labels).dtype == torch.float32
        torch.testing.assert_close(focal_loss(logits, labels), focal_loss(logits.float(), labels))

    def test_giou_of_boxes_by_hand(self):
        # Equal: 0. Half over each other: IoU 1/3, no empty hull. Apart by one width: IoU 0, a third of the hull is empty.
        assignment = Assignment(torch.tensor([[0, 1, 0, -1]]), torch.tensor([[[0.0, 0, 2, 2]] * 4]))
        predicted = torch.tensor([[[0.0, 0, 2, 2], [1, 0, 3, 2], [4, 0, 6, 2], [50, 50, 60, 60]]])
        assert giou_loss(predicted[:, :1], Assignment(assignment.labels[:, :1], assignment.boxes[:, :1])).item() == pytest.approx(
            0, abs=1e-6
        )
        assert giou_loss(predicted, assignment).item() == pytest.approx(0 + (1 - 1 / 3) + (1 + 1 / 3), abs=1e-5)

    def test_gradients_are_those_of_the_values(self):
        wanted = target(((5.0, 5.0, 15.0, 15.0), 1), ((18.0, 17.0, 30.0, 29.0), 0))
        wanted["boxes"] = wanted["boxes"].double()
        assignment = assign(wanted, CENTRES.double(), STRIDES.double())
        logits, boxes = noise(1, 80, 2).requires_grad_(), boxes_around(CENTRES, 1).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: focal_loss(x, assignment.labels), logits)
        assert torch.autograd.gradcheck(lambda x: giou_loss(x, assignment), boxes)

    def test_both_are_divided_by_the_positive_cells_of_the_batch(self):
        assignment = assign(target(((5.0, 5.0, 15.0, 15.0), 1)), CENTRES, STRIDES)
        prediction = {"logits": noise(1, 80, 2), "boxes": boxes_around(CENTRES, 1)}
        losses = detection_losses(prediction, assignment)
        torch.testing.assert_close(losses["focal"], focal_loss(prediction["logits"], assignment.labels) / 9)
        torch.testing.assert_close(losses["giou"], giou_loss(prediction["boxes"], assignment) / 9)

    def test_parts_of_a_batch_weighted_by_their_positive_cells_give_the_whole(self):
        images = [target(((5.0, 5.0, 15.0, 15.0), 1)), target(((0.0, 0.0, 32.0, 32.0), 0)), target(((1.0, 2.0, 9.0, 9.0), 0))]
        wanted = {name: torch.cat([image[name] for image in images]) for name in images[0]}
        prediction = {"logits": noise(3, 80, 2), "boxes": boxes_around(CENTRES, 3)}

        def part(rows: slice) -> tuple[dict[str, Tensor], int]:
            assignment = assign({name: values[rows] for name, values in wanted.items()}, CENTRES, STRIDES)
            return detection_losses({name: values[rows] for name, values in prediction.items()}, assignment), int(assignment.counts.sum())

        whole, count = part(slice(None))
        parts = [part(slice(0, 1)), part(slice(1, 3))]
        for name, value in whole.items():
            torch.testing.assert_close(sum(weight * losses[name] for losses, weight in parts) / count, value)

    def test_an_image_without_objects_has_its_background_loss_alone(self):
        assignment = assign(target(), CENTRES, STRIDES)
        boxes = boxes_around(CENTRES, 1).requires_grad_()
        losses = detection_losses({"logits": torch.zeros(1, 80, 2), "boxes": boxes}, assignment)
        assert losses["focal"].item() == pytest.approx(160 * 0.75 * 0.25 * math.log(2), rel=1e-6)
        assert losses["giou"] == 0
        (gradient,) = torch.autograd.grad(losses["giou"], boxes)
        assert not gradient.any()


class TestImitation:
    def test_equal_predictions_cost_nothing_and_pull_nowhere(self):
        teacher = {"logits": 4 * noise(2, 80, 3), "boxes": boxes_around(CENTRES, 2)}
        student = {name: values.clone().requires_grad_() for name, values in teacher.items()}
        loss = imitation_loss(student, teacher, STRIDES, temperature=2)
        assert loss.item() == pytest.approx(0, abs=1e-12)
        for gradient in torch.autograd.grad(loss, list(student.values())):
            assert gradient.abs().max() < 1e-15

    def test_it_is_the_cross_entropy_less_the_teachers_entropy_and_the_weighted_distance_in_strides(self):
        student, teacher = ({"logits": 2 * noise(2, 80, classes), "boxes": None} for classes in (3, 3))
        teacher["logits"] = teacher["logits"].flip(0)
        student["boxes"] = boxes_around(CENTRES, 2)
        teacher["boxes"] = student["boxes"] + STRIDES[:, None] * torch.tensor([1.0, -2.0, 0.0, 1.0])
        divided, wanted = student["logits"] / 2, (teacher["logits"] / 2).sigmoid()
        entropy = F.binary_cross_entropy(wanted, wanted, reduction="sum")
        expected = 4 * (F.binary_cross_entropy_with_logits(divided, wanted, reduction="sum") - entropy)
        expected = expected + teacher["logits"].sigmoid().amax(-1).sum()  # the four sides differ by one stride on average
        torch.testing.assert_close(imitation_loss(student, teacher, STRIDES, temperature=2), expected)

    def test_gradients_are_those_of_the_values_and_none_reach_the_teacher(self):
        student = {"logits": noise(1, 80, 2).requires_grad_(), "boxes": boxes_around(CENTRES, 1).requires_grad_()}
        teacher = {"logits": noise(1, 80, 3)[..., :2].clone().requires_grad_(), "boxes": (boxes_around(CENTRES, 1) + 1).requires_grad_()}

        def loss(logits: Tensor, boxes: Tensor) -> Tensor:
            return imitation_loss({"logits": logits, "boxes": boxes}, teacher, STRIDES)

        assert torch.autograd.gradcheck(loss, (student["logits"], student["boxes"]))
        loss(**student).backward()
        assert all(values.grad is None for values in teacher.values())

    @pytest.mark.parametrize("temperature", [0.05, 1.0])
    def test_extreme_logits_are_finite(self, temperature: float):
        logits = torch.tensor([[[1e3, -1e3, 1e3, -1e3]]], requires_grad=True)
        boxes = torch.zeros(1, 1, 4)
        teacher = {"logits": torch.tensor([[[1e3, -1e3, -1e3, 1e3]]]), "boxes": boxes}
        loss = imitation_loss({"logits": logits, "boxes": boxes}, teacher, torch.tensor([4.0]), temperature)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(temperature * 2e3)
        assert gradient.isfinite().all()

    def test_half_precision_is_widened(self):
        half = {"logits": noise(1, 80, 3).half(), "boxes": boxes_around(CENTRES, 1).half()}
        assert imitation_loss(half, half, STRIDES).dtype == torch.float32


def prediction_of(wanted: Target, score: float = 0.9, classes: int = 5) -> dict[str, Tensor]:
    """What a detector gives that knows each object at one cell and sees nothing elsewhere."""
    images, rows = wanted["labels"].shape
    logits = torch.full((images, 80, classes), -10.0)
    boxes = CENTRES.repeat(1, 2).expand(images, -1, -1).clone()
    for image in range(images):
        for row in range(rows):
            if wanted["labels"][image, row] >= 0:
                boxes[image, 7 * row] = wanted["boxes"][image, row]
                logits[image, 7 * row, wanted["labels"][image, row]] = math.log(score / (1 - score))
    return {"logits": logits, "boxes": boxes}


class TestBestBoxes:
    def test_a_better_box_of_the_same_class_removes_those_that_overlap_it(self):
        boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 4.9], [20, 20, 30, 30]]])
        logits = torch.tensor([[[2.0, -9], [3.0, -9], [1.0, -9], [0.0, -9]]])
        kept = best_boxes({"logits": logits, "boxes": boxes}, 3)
        # 0.9 of the first box is the second. The third has a little more than half of the second: 49 of 90.
        assert kept["boxes"][0].tolist() == [[0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 0, 0]]
        torch.testing.assert_close(kept["scores"][0], torch.tensor([3.0, 0.0, -math.inf]).sigmoid())
        assert kept["classes"][0].tolist() == [0, 0, 0]

    def test_boxes_of_other_classes_stay_also_beyond_the_images_edge(self):
        # Without care, the offset between classes is the largest coordinate plus one: 3, by which these two would be one box.
        boxes = torch.tensor([[[-1.0, -1, 2, 2], [-4.0, -4, -1, -1]]])
        logits = torch.tensor([[[2.0, -9], [-9, 1.0]]])
        kept = best_boxes({"logits": logits, "boxes": boxes}, 2)
        assert kept["boxes"].tolist() == boxes.tolist()
        assert kept["classes"].tolist() == [[0, 1]]

    def test_one_cell_may_be_kept_for_two_classes(self):
        kept = best_boxes({"logits": torch.tensor([[[2.0, 1.0]]]), "boxes": torch.tensor([[[0.0, 0, 4, 4]]])}, 2)
        assert kept["classes"].tolist() == [[0, 1]]

    def test_low_scores_and_numbers_that_are_nan_are_left_out(self):
        logits = torch.tensor([[[math.nan], [math.log(0.049 / 0.951)], [math.log(0.051 / 0.949)]]])
        boxes = torch.tensor([[[0.0, 0, 4, 4], [8, 8, 12, 12], [20, 20, 24, 24]]])
        kept = best_boxes({"logits": logits, "boxes": boxes}, 3)
        assert (kept["scores"] > 0).tolist() == [[True, False, False]]
        assert kept["boxes"][0, 0].tolist() == [20, 20, 24, 24]

    def test_only_the_best_are_kept_and_shapes_are_fixed(self):
        wanted = target(*(((float(x), 0.0, x + 4.0, 4.0), x % 5) for x in (0, 8, 16)))
        for count in (1, 2, 100):
            kept = best_boxes(prediction_of(wanted), count)
            assert [kept[name].shape for name in ("boxes", "scores", "classes")] == [(1, count, 4), (1, count), (1, count)]
            assert int((kept["scores"] > 0).sum()) == min(count, 3)
            assert kept["classes"].dtype == torch.int64

    def test_equal_scores_stand_in_the_order_of_the_cells(self):
        wanted = target(*(((float(x), 0.0, x + 4.0, 4.0), 0) for x in (16, 0, 8)))
        assert best_boxes(prediction_of(wanted), 3)["boxes"][0, :, 0].tolist() == [16, 0, 8]

    def test_images_do_not_see_each_other(self):
        one, other = target(((0.0, 0.0, 8.0, 8.0), 0)), target(((0.0, 0.0, 8.0, 8.0), 0), ((9.0, 9.0, 20.0, 20.0), 1))
        both = {name: torch.cat([one[name], other[name]]) for name in one}
        kept = best_boxes(prediction_of(both), 4)
        for row, image in enumerate((one, other)):
            for name, values in best_boxes(prediction_of(image), 4).items():
                assert torch.equal(values[0], kept[name][row])


def wanted_of(images: int, size: int = 32) -> Target:
    boxes = shapes(train=images, test=1, size=size, target="boxes").train.target
    assert isinstance(boxes, dict)
    return boxes


class TestAveragePrecision:
    def test_a_perfect_prediction_has_100(self):
        wanted = wanted_of(20)
        assert average_precision(best_boxes(prediction_of(wanted), 10), wanted) == pytest.approx({"ap": 100, "ap50": 100, "ap75": 100})

    def test_no_prediction_has_0_and_so_has_a_target_without_objects(self):
        wanted, nothing = wanted_of(3), target()
        empty = best_boxes({"logits": torch.full((3, 80, 5), -20.0), "boxes": torch.zeros(3, 80, 4)}, 10)
        assert average_precision(empty, wanted) == {"ap": 0, "ap50": 0, "ap75": 0}
        some = best_boxes(prediction_of(target(((0.0, 0.0, 8.0, 8.0), 0))), 10)
        assert average_precision(some, nothing) == {"ap": 0, "ap50": 0, "ap75": 0}

    def test_overlap_is_counted_at_ten_thresholds(self):
        # Four fifths of the box: a hit at 0.50 .. 0.80, which are seven of ten.
        kept = best_boxes(prediction_of(target(((0.0, 0.0, 10.0, 8.1), 0))), 5)
        assert average_precision(kept, target(((0.0, 0.0, 10.0, 10.0), 0))) == pytest.approx({"ap": 70, "ap50": 100, "ap75": 100})

    def test_a_wrong_class_and_a_missed_object_count(self):
        wanted = target(((0.0, 0.0, 10.0, 10.0), 0), ((20.0, 20.0, 30.0, 30.0), 1))
        missed = best_boxes(prediction_of(target(((0.0, 0.0, 10.0, 10.0), 0))), 5)
        assert average_precision(missed, wanted)["ap50"] == pytest.approx(50)
        wrong = best_boxes(prediction_of(target(((0.0, 0.0, 10.0, 10.0), 0), ((20.0, 20.0, 30.0, 30.0), 2))), 5)
        assert average_precision(wrong, wanted)["ap50"] == pytest.approx(50)

    def test_a_false_box_counts_only_where_its_score_is_higher(self):
        wanted = {
            name: values.repeat(1, 1, 1) if values.ndim == 3 else values for name, values in target(((0.0, 0.0, 10.0, 10.0), 0)).items()
        }
        for false_score, expected in ((0.99, 50), (0.6, 100)):
            prediction = prediction_of(wanted)
            prediction["boxes"][0, 50] = torch.tensor([20.0, 20.0, 30.0, 30.0])
            prediction["logits"][0, 50, 0] = math.log(false_score / (1 - false_score))
            assert average_precision(best_boxes(prediction, 5), wanted)["ap50"] == pytest.approx(expected)

    def test_padding_changes_nothing(self):
        wanted = wanted_of(10)
        prediction = prediction_of(wanted, score=0.7)
        prediction["boxes"] = prediction["boxes"] + 0.7
        few = average_precision(best_boxes(prediction, 3), wanted)
        padded = {"boxes": F.pad(wanted["boxes"], (0, 0, 0, 4)), "labels": F.pad(wanted["labels"], (0, 4), value=-1)}
        assert average_precision(best_boxes(prediction, 150), padded) == few
        assert 0 < few["ap"] < 100

    def test_a_row_of_score_0_is_padding_whatever_its_box(self):
        wanted = target(((0.0, 0.0, 10.0, 10.0), 0), ((20.0, 20.0, 30.0, 30.0), 0))
        kept = {"boxes": wanted["boxes"], "scores": torch.tensor([[0.9, 0.0, 0.0]]), "classes": torch.zeros(1, 3, dtype=torch.int64)}
        # One of two objects: precision 1 up to a recall of one half, which are 51 of the 101 points that COCO looks at.
        assert average_precision(kept, wanted)["ap50"] == pytest.approx(100 * 51 / 101)

    def test_half_precision_is_read(self):
        wanted = wanted_of(4)
        kept = best_boxes(prediction_of(wanted), 5)
        stored = {name: values.half() if values.is_floating_point() else values for name, values in kept.items()}
        assert average_precision(stored, wanted) == pytest.approx({"ap": 100, "ap50": 100, "ap75": 100})


def test_a_small_detector_learns_eight_scenes_by_heart():
    torch.manual_seed(0)
    source = shapes(train=8, test=1, size=32, target="boxes")
    images, wanted = (source.train.inputs / 255 - 0.5) / 0.2, source.train.target
    model = tiny_fcos(num_classes=5, in_channels=3)
    assignment = assign(wanted, *positions((32, 32), model.strides))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        sum(detection_losses(model(images), assignment).values()).backward()
        optimizer.step()
    with torch.no_grad():
        prediction = model.eval()(images)
    assert average_precision(best_boxes(prediction, 10), wanted)["ap50"] > 80
