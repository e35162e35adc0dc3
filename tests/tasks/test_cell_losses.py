import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from kdbench.data.shapes import shapes
from kdbench.models.detectors.cells import CellReading
from kdbench.models.detectors.fcos import tiny_fcos
from kdbench.models.detectors.positions import positions
from kdbench.tasks.average_precision import average_precision
from kdbench.tasks.cell_losses import Assignment, CellLosses, assign, centreness, focal_loss, giou_loss, size_ranges
from tests.tasks.scenes import CENTRES, STRIDES, boxes_around, levels, noise, sides_of, target

LEARNED = CellLosses(CellReading(2, (4, 8)))


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
        ranges = size_ranges(torch.tensor([4.0, 8.0, 16.0]), reach=4)
        assert ranges.tolist() == [[0, 16], [16, 32], [32, math.inf]]
        assert size_ranges(torch.tensor([8.0, 16.0]), reach=8).tolist() == [[0, 64], [64, math.inf]]
        assert size_ranges(torch.tensor([4.0, 4.0]), reach=4).tolist() == [[0, math.inf]] * 2

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
        wanted = target(((5.0, 5.0, 15.0, 15.0), 1))
        logits, boxes = noise(1, 80, 2), boxes_around(CENTRES, 1)
        losses = LEARNED.losses(levels(logits, sides_of(boxes)), wanted, (32, 32))
        assignment = assign(wanted, CENTRES, STRIDES)
        assert LEARNED.weights(wanted, (32, 32)) == {"focal": 9, "giou": 9}
        torch.testing.assert_close(losses["focal"], focal_loss(logits, assignment.labels) / 9)
        torch.testing.assert_close(losses["giou"], giou_loss(boxes, assignment) / 9)

    def test_parts_of_a_batch_weighted_by_what_they_count_give_the_whole(self):
        images = [target(((5.0, 5.0, 15.0, 15.0), 1)), target(((0.0, 0.0, 32.0, 32.0), 0)), target(((1.0, 2.0, 9.0, 9.0), 0))]
        wanted = {name: torch.cat([image[name] for image in images]) for name in images[0]}
        given = levels(torch.cat([noise(3, 80, 2)], -1), noise(3, 80, 4))
        given = {name: F.pad(level, (0, 0, 0, 0, 0, 1), value=0.3) for name, level in given.items()}
        learned = CellLosses(CellReading(2, (4, 8), centreness=True))

        def part(rows: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            few = {name: values[rows] for name, values in wanted.items()}
            return learned.losses({name: level[rows] for name, level in given.items()}, few, (32, 32)), learned.weights(few, (32, 32))

        whole, counts = part(slice(None))
        assert whole.keys() == counts.keys() == {"focal", "giou", "centreness"}
        parts = [part(slice(0, 1)), part(slice(1, 3))]
        for name, value in whole.items():
            torch.testing.assert_close(sum(weights[name] * losses[name] for losses, weights in parts) / counts[name], value)

    def test_an_image_without_objects_has_its_background_loss_alone(self):
        given = {name: level.requires_grad_() for name, level in levels(torch.zeros(1, 80, 2), torch.zeros(1, 80, 4)).items()}
        losses = LEARNED.losses(given, target(), (32, 32))
        assert losses["focal"].item() == pytest.approx(160 * 0.75 * 0.25 * math.log(2), rel=1e-6)
        assert losses["giou"] == 0
        for gradient in torch.autograd.grad(losses["giou"], list(given.values())):
            assert not gradient.any()

    def test_a_crowd_is_learned_by_no_cell(self):
        wanted = target(((5.0, 5.0, 15.0, 15.0), 1), ((20.0, 20.0, 30.0, 30.0), 0))
        alone = assign(target(((5.0, 5.0, 15.0, 15.0), 1)), CENTRES, STRIDES)
        found = assign({**wanted, "crowd": torch.tensor([[False, True, False]])}, CENTRES, STRIDES)
        assert torch.equal(found.labels, alone.labels)

    def test_the_centre_ness_is_1_in_the_middle_and_falls_towards_the_sides(self):
        """Eq. 3: from (6, 10) the sides of (5, 5, 15, 15) are 1, 5, 9, 5 away."""
        assignment = assign(target(((5.0, 5.0, 15.0, 15.0), 1)), CENTRES, STRIDES)
        found = centreness(assignment, CENTRES)[0]
        at = {tuple(centre): value.item() for centre, value, stride in zip(CENTRES.tolist(), found, STRIDES, strict=True) if stride == 4}
        assert at[10.0, 10.0] == 1
        assert at[6.0, 10.0] == pytest.approx(math.sqrt(1 / 9))
        assert at[6.0, 6.0] == pytest.approx(1 / 9)
        assert at[2.0, 2.0] == 0


def test_a_small_detector_learns_eight_scenes_by_heart():
    torch.manual_seed(0)
    source = shapes(train=8, test=1, size=32, target="boxes")
    images, wanted = (source.train.inputs / 255 - 0.5) / 0.2, source.train.target
    model = tiny_fcos(num_classes=5, in_channels=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        sum(CellLosses(model.reading).losses(model(images), wanted, (32, 32)).values()).backward()
        optimizer.step()
    with torch.no_grad():
        kept = model.reading.detections(model.eval()(images), (32, 32), 10)
    assert average_precision(kept, wanted)["ap50"] > 80
