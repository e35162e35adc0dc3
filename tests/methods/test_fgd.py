"""FGD: masks of objects and of what is behind them, attentions, context blocks, and the batches that a detector really sees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Progress
from kdbench.methods.build import MethodSpec, fitted, params_of
from kdbench.methods.fgd import (
    FGD,
    GlobalContext,
    attention_distance,
    background,
    channel_attention,
    focal_distance,
    foreground,
    objects_of,
    spatial_attention,
)
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.tasks.base import TaskInfo

DONE = Progress(epoch=1.0, step=1, total_steps=1)
TASK = TaskInfo("detection", 3, (3, 64, 64))


def mask_of(*boxes: tuple[float, ...], size: tuple[int, int] = (64, 64), grid: tuple[int, int] = (8, 8)) -> Tensor:
    """The foreground of one picture with these boxes."""
    rows = torch.tensor([boxes], dtype=torch.float64).reshape(1, len(boxes), 4)
    return foreground(rows, torch.ones(1, len(boxes), dtype=torch.bool), torch.tensor([size]), grid)[0]


def painted(rows: slice, columns: slice, value: float, grid: tuple[int, int] = (8, 8)) -> Tensor:
    mask = torch.zeros(grid, dtype=torch.float64)
    mask[rows, columns] = value
    return mask


# masks


def test_a_box_covers_the_cells_from_floor_to_ceiling_both_included() -> None:
    assert torch.equal(mask_of((17, 9, 30, 40)), painted(slice(1, 6), slice(2, 5), 1 / (5 * 3)))
    assert torch.equal(mask_of((16, 8, 32, 40)), painted(slice(1, 6), slice(2, 5), 1 / (5 * 3)))  # one cell more than its pixels


def test_rows_follow_the_height_and_columns_the_width_of_the_picture() -> None:
    found = mask_of((80, 8, 159, 11), size=(40, 160), grid=(5, 10))
    assert torch.equal(found, painted(slice(1, 3), slice(5, 10), 1 / (2 * 6), (5, 10)))


def test_the_area_of_a_box_at_the_border_counts_the_cells_beyond_it() -> None:
    assert torch.equal(mask_of((0, 0, 64, 64)), painted(slice(8), slice(8), 1 / 81))
    assert torch.equal(mask_of((56, 56, 200, 64)), painted(slice(7, 8), slice(7, 8), 1 / (2 * 19)))


def test_a_box_that_begins_left_of_the_picture_is_cut_and_does_not_come_in_again_at_the_right() -> None:
    assert torch.equal(mask_of((-20, -9, 8, 16)), painted(slice(0, 3), slice(0, 2), 1 / (3 * 2)))


def test_a_box_whose_corners_are_the_wrong_way_round_covers_nothing() -> None:
    assert torch.equal(mask_of((24, 24, 15, 60)), torch.zeros(8, 8, dtype=torch.float64))  # it is no cell wide, and has no area


def test_where_boxes_overlap_the_smallest_wins() -> None:
    outer, inner = mask_of((0, 0, 48, 48)), mask_of((17, 17, 23, 23))
    assert torch.equal(mask_of((0, 0, 48, 48), (17, 17, 23, 23)), torch.maximum(outer, inner))
    assert mask_of((0, 0, 48, 48), (17, 17, 23, 23))[2, 2] == 1 / 4
    assert torch.equal(mask_of((17, 17, 23, 23), (0, 0, 48, 48)), torch.maximum(outer, inner))


def test_rows_that_do_not_count_leave_no_trace() -> None:
    boxes = torch.tensor([[[0.0, 0, 64, 64], [8, 8, 15, 15]]])
    found = foreground(boxes, torch.tensor([[False, True]]), torch.tensor([[64, 64]]), (8, 8))[0].double()
    assert torch.equal(found, mask_of((8, 8, 15, 15)).float().double())


@pytest.mark.parametrize("rows", [0, 3])
def test_a_picture_without_an_object_is_background_everywhere(rows: int) -> None:
    none = foreground(torch.zeros(2, rows, 4), torch.zeros(2, rows, dtype=torch.bool), torch.full((2, 2), 64), (4, 8))
    assert torch.equal(none, torch.zeros(2, 4, 8))
    assert torch.equal(background(none), torch.full((2, 4, 8), 1 / 32))


def test_the_background_shares_one_among_the_cells_that_no_box_covers() -> None:
    covered = torch.stack([mask_of((0, 0, 31, 64)), mask_of((0, 0, 64, 64))])
    behind = background(covered)
    assert torch.equal(behind[0], painted(slice(8), slice(5, 8), 1 / 24))
    assert behind[1].count_nonzero() == 0  # nothing is left, and nothing is divided by 0


# attentions and distances


def maps(samples: int = 2, channels: int = 3, size: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(samples, channels, size, size + 1, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def test_attentions_have_a_mean_of_one_and_follow_the_size_of_features() -> None:
    features = torch.tensor([[[[1.0, -3.0]], [[2.0, 1.0]]]], dtype=torch.float64)  # [1, 2, 1, 2]
    space = [math.exp(1.5 / 0.5), math.exp(2.0 / 0.5)]
    channels = [math.exp(2.0 / 0.5), math.exp(1.5 / 0.5)]
    assert spatial_attention(features, 0.5).flatten().tolist() == pytest.approx([2 * x / sum(space) for x in space], rel=1e-12)
    assert channel_attention(features, 0.5).flatten().tolist() == pytest.approx([2 * x / sum(channels) for x in channels], rel=1e-12)
    student, _ = maps()
    assert spatial_attention(student, 0.3).mean((1, 2)).tolist() == pytest.approx([1, 1])
    assert channel_attention(student, 0.3).mean(1).tolist() == pytest.approx([1, 1])


def test_the_focal_distance_is_a_sum_over_elements_and_a_mean_over_samples() -> None:
    student, teacher = torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4, 5), 2.0)
    mask, spatial, channel = torch.full((2, 4, 5), 0.5), torch.full((2, 4, 5), 3.0), torch.tensor([[1.0, 0, 2], [1, 0, 2]])
    assert focal_distance(student, teacher, mask, spatial, channel).item() == 4 * 0.5 * 3 * (4 * 5) * (1 + 0 + 2)


def test_equal_maps_give_zero_everywhere() -> None:
    _, teacher = maps()
    weights = torch.ones(2, 4, 5), torch.ones(2, 4, 5), torch.ones(2, 3)
    assert focal_distance(teacher, teacher, *weights).item() == 0
    assert attention_distance(teacher, teacher, 0.5).item() == 0


def test_a_context_block_begins_as_the_identity_and_learns() -> None:
    block, (features, _) = GlobalContext(4).double(), maps(channels=4)
    assert torch.equal(block(features), features)
    block(features).square().sum().backward()
    assert block.add[3].weight.grad.count_nonzero()
    with torch.no_grad():
        block.add[3].bias.fill_(1.5)
    torch.testing.assert_close(block(features), features + 1.5)


def test_a_context_is_the_mean_that_the_block_weighs() -> None:
    block, (features, _) = GlobalContext(4).double(), torch.randn(2, 4, 3, 3, dtype=torch.float64).split([1, 1])
    nn.init.normal_(block.add[3].weight)
    weights = torch.einsum("bchw,c->bhw", features, block.weigh.weight[0, :, 0, 0]).add(block.weigh.bias).flatten(1).softmax(1)
    context = torch.einsum("bcp,bp->bc", features.flatten(2), weights)
    hidden = context @ block.add[0].weight[:, :, 0, 0].T + block.add[0].bias
    hidden = nn.functional.layer_norm(hidden, [2]).relu()
    torch.testing.assert_close(block(features), features + (hidden @ block.add[3].weight[:, :, 0, 0].T)[..., None, None])


# the method


def built(levels: int = 2, widths: tuple[int, int] = (4, 6), **params: Any) -> FGD:
    """FGD for pyramids of maps 8x8, 4x4, ...; its context blocks not at their beginning, where they teach nothing."""
    torch.manual_seed(0)
    shapes = [pyramid(width, levels) for width in widths]
    spec = MethodSpec.model_validate({"name": "fgd", **params})
    method = fitted(spec, *shapes, gives=frozenset({"boxes"}))
    student, teacher = shapes
    method.build(student, teacher, TASK)
    for level in method.levels:
        for block in (level.student, level.teacher):
            nn.init.normal_(block.add[3].weight)
    assert isinstance(method, FGD)
    return method.double()


def pyramid(width: int, levels: int) -> Shapes:
    """Of `levels` levels for pictures of 64x64, the finest of stride 8."""
    taps = {f"level:{level}": TapShape("map", (width, 8 >> level, 8 >> level)) for level in range(levels)}
    return Shapes({"logits": (80, 3), "boxes": (80, 4)}, taps)


def outputs(
    width: int, levels: int = 2, samples: int = 2, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    size = [(samples, width, 8 >> level, 8 >> level) for level in range(levels)]
    drawn = {
        f"level:{level}": (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for level, shape in enumerate(size)
    }
    return Outputs({"logits": torch.zeros(samples, 80, 3), "boxes": torch.zeros(samples, 80, 4)}, drawn)


def batch(boxes: Tensor, labels: Tensor, **further: Tensor) -> Batch:
    index = torch.arange(len(boxes))
    return Batch(torch.zeros(len(boxes), 3, 64, 64), {"boxes": boxes, "labels": labels, **further}, index)


BOXES = torch.tensor([[[0.0, 0, 64, 64], [10, 20, 30, 50]], [[5, 5, 20, 20], [0, 0, 0, 0]]])
LABELS = torch.tensor([[0, 2], [1, -1]])
SEEN = batch(BOXES, LABELS)


def test_each_level_adds_its_terms() -> None:
    both, coarse = built(2), built(1)
    coarse.levels[0].load_state_dict(both.levels[1].state_dict())
    s, t = outputs(4), outputs(6, seed=1)
    whole = both(s, t, SEEN, DONE)
    assert whole.keys() == {"foreground", "background", "attention", "relation"}
    fine = built(1)
    fine.levels[0].load_state_dict(both.levels[0].state_dict())
    for name, term in whole.items():
        alone = [
            method(Outputs(s.prediction, {"level:0": s.maps[tap]}), Outputs(t.prediction, {"level:0": t.maps[tap]}), SEEN, DONE)[name]
            / getattr(method.params, WEIGHTS[name])
            for method, tap in ((fine, "level:0"), (coarse, "level:1"))
        ]
        torch.testing.assert_close(term / getattr(both.params, WEIGHTS[name]), alone[0] + alone[1])


WEIGHTS = {"foreground": "alpha", "background": "alpha", "attention": "gamma", "relation": "relation"}


def test_every_weight_multiplies_its_term_and_beta_is_half_of_alpha() -> None:
    s, t = outputs(4), outputs(6, seed=1)
    weights = {"alpha": 0.5, "gamma": 0.25, "relation": 0.125}
    base = built(**weights)(s, t, SEEN, DONE)
    for key, names in (("alpha", {"foreground", "background"}), ("gamma", {"attention"}), ("relation", {"relation"})):
        found = built(**{**weights, key: 4 * weights[key]})(s, t, SEEN, DONE)
        assert {name for name in found if not torch.equal(found[name], base[name])} == names
        for name in names:
            torch.testing.assert_close(found[name], 4 * base[name])
    own = built(**weights, beta=1.0)(s, t, SEEN, DONE)
    torch.testing.assert_close(own["background"], 4 * base["background"])
    assert torch.equal(own["foreground"], base["foreground"])


@pytest.mark.parametrize(
    ("boxes", "labels"),
    [
        (BOXES, LABELS),
        pytest.param(BOXES[:, :1], torch.zeros(2, 1, dtype=torch.long), marks=pytest.mark.slow),  # one class
        pytest.param(torch.tensor([[[0.0, 0, 64, 64]], [[60, 60, 64, 64]]]), torch.tensor([[0], [1]]), marks=pytest.mark.slow),  # border
        (torch.tensor([[[0.0, 0, 60, 60], [8, 8, 40, 40], [9, 9, 17, 17]]] * 2), torch.tensor([[0, 1, 2]] * 2)),  # nested
        (BOXES, torch.full((2, 2), -1)),  # no object at all
        (torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long)),
    ],
)
@pytest.mark.parametrize("levels", [1, pytest.param(2, marks=pytest.mark.nodes)])
def test_gradients_are_derivatives_for_whatever_boxes_a_picture_has(boxes: Tensor, labels: Tensor, levels: int) -> None:
    method, s, t = built(levels, alpha=0.5, gamma=0.1, relation=0.02), outputs(4, levels), outputs(6, levels, seed=1)
    seen = batch(boxes, labels)
    learned = [*method.parameters()]

    def whole(*given: Tensor) -> Tensor:
        student = dict(zip(s.maps, given[:levels], strict=True))
        return torch.stack(list(method(Outputs(s.prediction, student), t, seen, DONE).values())).sum()

    assert gradcheck(whole, [features.requires_grad_() for features in s.maps.values()])
    gradients = torch.autograd.grad(whole(*s.maps.values()), learned, allow_unused=False)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_value_and_gradient_are_finite_at_the_limits(dtype: torch.dtype, scale: float, temperature: float) -> None:
    method = built(temperature=temperature).float()
    s, t = outputs(4, scale=scale, dtype=dtype, samples=1), outputs(6, seed=1, scale=scale, dtype=dtype, samples=1)
    for features in s.maps.values():
        features.requires_grad_()
    terms = method(s, t, batch(BOXES[:1], LABELS[:1]), DONE)
    assert all(term.dim() == 0 and term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert all(features.grad is not None and features.grad.isfinite().all() for features in s.maps.values())


def test_padded_rows_lost_boxes_and_crowds_are_no_objects() -> None:
    method, s, t = built(), outputs(4), outputs(6, seed=1)
    plain = method(s, t, SEEN, DONE)
    more_boxes = torch.cat([BOXES, torch.tensor([[[1.0, 1, 40, 40], [0, 0, 0, 0], [3, 3, 9, 9]]] * 2)], dim=1)
    more_labels = torch.cat([LABELS, torch.tensor([[-1, 1, 2]] * 2)], dim=1)
    crowd = torch.zeros(2, 5, dtype=torch.bool)
    crowd[:, 4] = True
    padded = method(s, t, batch(more_boxes, more_labels, crowd=crowd), DONE)
    assert all(torch.equal(padded[name], term) for name, term in plain.items())
    counted = method(s, t, batch(more_boxes, more_labels), DONE)
    assert not torch.equal(counted["foreground"], plain["foreground"])


def test_every_sample_counts_for_itself() -> None:
    """The terms of a batch are the means of those of its samples: micro-batches and workers may cut it anywhere."""
    method, s, t = built(), outputs(4), outputs(6, seed=1)
    whole = method(s, t, SEEN, DONE)
    parts = []
    for row in range(2):
        ours, theirs = (Outputs(given.prediction, {name: features[[row]] for name, features in given.maps.items()}) for given in (s, t))
        parts.append(method(ours, theirs, batch(BOXES[[row]], LABELS[[row]]), DONE))
    for name, term in whole.items():
        torch.testing.assert_close(term, (parts[0][name] + parts[1][name]) / 2)
    assert not FGD.batch_coupled


def test_the_size_of_a_picture_is_that_of_the_input_not_of_the_map() -> None:
    wide = Batch(torch.zeros(2, 3, 32, 96), {"boxes": BOXES, "labels": LABELS}, torch.arange(2))
    boxes, counts, sizes = objects_of(wide)
    assert sizes.tolist() == [[32, 96], [32, 96]]
    assert counts.tolist() == [[True, True], [True, False]]
    assert torch.equal(boxes, BOXES)
    named = Batch({"size": torch.zeros(2, 2), "image": wide.inputs}, wide.target, wide.index)  # type: ignore[dict-item]
    assert torch.equal(objects_of(named)[2], sizes)


def test_all_that_is_made_on_the_way_lies_where_the_maps_lie() -> None:
    """On `meta`, which refuses to meet tensors of the CPU as a GPU does."""
    method, there = built().to("meta"), torch.device("meta")
    s, t = (Outputs(given.prediction, {name: maps.to(there) for name, maps in given.maps.items()}) for given in (outputs(4), outputs(6)))
    terms = method(s, t, SEEN.to(there), DONE)
    assert all(term.device == there and term.dim() == 0 for term in terms.values())


def test_maps_of_unequal_size_are_compared_at_the_smaller_one() -> None:
    spec = MethodSpec.model_validate({"name": "fgd", "student_taps": ["level:0"], "teacher_taps": ["level:1"]})
    shapes = pyramid(6, 2)
    method = fitted(spec, shapes, shapes)
    method.build(shapes, shapes, TASK)
    s, t = outputs(6), outputs(6, seed=1)
    pooled = nn.functional.avg_pool2d(s.maps["level:0"], 2)
    found = method.double()(s, t, SEEN, DONE)
    same = method(Outputs(s.prediction, {"level:0": pooled}), t, SEEN, DONE)
    assert all(torch.equal(found[name], same[name]) for name in found)


def test_a_network_without_levels_is_refused_with_the_way_out() -> None:
    plain = Shapes({"logits": (80, 3), "boxes": (80, 4)}, {"stage:-1": TapShape("map", (4, 8, 8))})
    with pytest.raises(UserError, match=r"method fgd: one of the networks names no levels .*; name student_taps and teacher_taps"):
        fitted(MethodSpec(name="fgd"), plain, pyramid(4, 2))


def test_a_weight_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="beta: expected greater than or equal to 0"):
        params_of(MethodSpec.model_validate({"name": "fgd", "beta": -1}))
