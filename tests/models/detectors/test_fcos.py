import math

import pytest
import torch
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.detectors.cells import CellReading
from kdbench.models.detectors.fcos import FCOS, tiny_fcos
from kdbench.models.detectors.positions import positions
from kdbench.models.detectors.readings import Dense


def detector(**options: int) -> FCOS:
    torch.manual_seed(0)
    return tiny_fcos(num_classes=5, in_channels=3, **options).eval()


def dense(model: FCOS, images: Tensor) -> Dense:
    return model.reading.dense(model(images), (images.shape[-2], images.shape[-1]))


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(32, 64), (28, 28), (30, 45)])
def test_a_prediction_has_the_shapes_that_its_reading_says_at_any_size(levels: int, size: tuple[int, int]):
    model = detector(levels=levels)
    prediction = model(torch.rand(2, 3, *size))
    assert {name: tuple(values.shape[1:]) for name, values in prediction.items()} == model.reading.shapes(size)
    assert list(prediction) == [f"level:{level}" for level in range(levels)]
    logits, boxes = dense(model, torch.rand(2, 3, *size))
    cells = len(positions(size, model.reading.strides)[0])
    assert (logits.shape, boxes.shape) == ((2, cells, 5), (2, cells, 4))


def test_a_cell_is_read_where_it_stands():
    """Row by row, level by level: the value written at a level's row and column is read at that cell's place."""
    reading = CellReading(1, (4, 8))
    prediction = {name: torch.zeros(1, *shape) for name, shape in reading.shapes((16, 24)).items()}
    prediction["level:0"][0, 0, 2, 5] = 3.0
    prediction["level:1"][0, 1:, 1, 2] = math.log(2)
    logits, boxes = reading.dense(prediction, (16, 24))
    (cell,) = logits[0, :, 0].nonzero().flatten().tolist()
    assert positions((16, 24), (4, 8))[0][cell].tolist() == [22, 10]
    assert boxes[0, 24 + 3 + 2].tolist() == pytest.approx([20 - 16, 12 - 16, 20 + 16, 12 + 16])
    assert boxes[0, 0].tolist() == [2 - 4, 2 - 4, 2 + 4, 2 + 4]


def test_a_box_is_written_around_its_cell():
    sides = torch.tensor([[0.0, math.log(2), math.log(3), math.log(0.5)]])[None]
    reading = CellReading(5, (4, 8))
    box = reading.boxes(sides, torch.tensor([[10.0, 20.0]]), torch.tensor([4.0]))
    torch.testing.assert_close(box, torch.tensor([[[6.0, 12.0, 22.0, 22.0]]]))
    assert reading.boxes(torch.full((1, 1, 4), 1e4), torch.zeros(1, 2), torch.ones(1)).isfinite().all()
    linear = CellReading(5, (4, 8), exponential=False)
    assert linear.boxes(torch.tensor([[[1.0, 2, 3, 0]]]), torch.tensor([[10.0, 20.0]]), torch.tensor([4.0])).tolist() == [[[6, 12, 22, 20]]]


def test_boxes_are_cut_at_the_pictures_edge_before_they_are_suppressed():
    reading = CellReading(1, (4, 8))
    prediction = {name: torch.zeros(1, *shape) - 9 for name, shape in reading.shapes((16, 16)).items()}
    prediction["level:0"][0, :, 1, 2] = torch.tensor([2.0, 0.0, 0.0, 3.0, 0.0])
    for valid, edge in ((None, 16), (torch.tensor([[16, 12]]), 12)):
        kept = reading.detections(prediction, (16, 16), 2, valid)
        assert kept["boxes"][0, 0].tolist() == [6, 2, edge, 10]
        assert kept["scores"][0].tolist() == pytest.approx([torch.tensor(2.0).sigmoid().item(), 0])


def test_the_centre_ness_lowers_a_score():
    reading = CellReading(2, (4,), centreness=True)
    prediction = {"level:0": torch.zeros(1, 7, 2, 2) - 9}
    prediction["level:0"][0, :, 0, 0] = torch.tensor([1.0, -9.0, 0.0, 0.0, 0.0, 0.0, -0.5])
    kept = reading.detections(prediction, (8, 8), 3)
    assert kept["scores"][0].tolist() == pytest.approx([math.sqrt(1 / (1 + math.exp(-1)) / (1 + math.exp(0.5))), 0, 0])


def test_before_training_every_class_has_the_prior_score_and_boxes_reach_one_stride_to_each_side():
    model = detector()
    for layer in (model.classes, model.sides):
        nn.init.zeros_(layer.weight)
    logits, boxes = dense(model, torch.rand(1, 3, 16, 16))
    torch.testing.assert_close(logits.sigmoid(), torch.full((1, 20, 5), 0.01))
    centres, strides = positions((16, 16), model.reading.strides)
    expected = torch.cat([centres - strides[:, None], centres + strides[:, None]], dim=1)
    torch.testing.assert_close(boxes[0], expected)


def test_first_predictions_are_near_the_prior():
    model = detector()
    logits, boxes = dense(model, torch.randn(4, 3, 32, 32))
    scores = logits.sigmoid()
    strides = positions((32, 32), model.reading.strides)[1]
    sizes = (boxes[..., 2:] - boxes[..., :2]) / (2 * strides[:, None])
    assert sizes.min() > 0.6
    assert sizes.max() < 1.6
    assert scores.min() > 0.005
    assert scores.max() < 0.02


def test_an_output_belongs_to_the_place_of_its_cell():
    """A change of one corner of a large image moves the predictions of cells there and of none far away."""
    model, images = detector(levels=2), torch.rand(1, 3, 128, 128)
    model.class_tower[1] = nn.Identity()  # a group norm looks at the whole map
    changed = images.clone()
    changed[..., :8, -8:] = 0
    moved = (dense(model, images).logits != dense(model, changed).logits).any(-1)[0]
    centres, _ = positions((128, 128), model.reading.strides)
    assert moved.any()
    assert centres[moved, 0].min() > 64
    assert centres[moved, 1].max() < 64


def test_each_level_is_one_tappable_map_of_its_stride_and_stages_are_the_backbones():
    model, seen = detector(width=4, levels=3), {}
    for path in (*model.level_modules, *model.stage_modules):
        model.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: seen.update({path: output.shape[1:]}))
    model(torch.rand(1, 3, 32, 64))
    assert [seen[path] for path in model.level_modules] == [(12, 8, 16), (12, 4, 8), (12, 2, 4)]
    assert [seen[path] for path in model.stage_modules] == [(4, 16, 32), (8, 8, 16), (16, 4, 8), (32, 2, 4)]


def test_what_the_coarsest_map_sees_reaches_the_finest():
    model = detector(levels=2)
    images = torch.rand(1, 3, 32, 32)
    before = model(images)["level:0"]
    with torch.no_grad():
        model.lateral[1].bias += 1
    assert not torch.equal(model(images)["level:0"], before)


def test_boxes_are_decoded_in_single_precision_under_autocast():
    model, images = detector(), torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(images)
        logits, boxes = model.reading.dense(prediction, (32, 32))
    assert prediction["level:0"].dtype == torch.bfloat16
    assert (logits.dtype, boxes.dtype) == (torch.float32, torch.float32)
    assert dense(detector().double(), images.double()).boxes.dtype == torch.float64


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_every_weight_is_used(levels: int):
    model = detector(levels=levels).train()
    prediction = model(torch.rand(2, 3, 32, 32))
    total: Tensor = sum(values.square().sum() for values in prediction.values())
    total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_width_widens_every_layer():
    narrow, wide = detector(width=4), detector(width=8)
    assert wide.classes.in_channels == 2 * narrow.classes.in_channels == 24
    assert [stage[0].out_channels for stage in wide.stages] == [16, 32]
    assert sum(parameter.numel() for parameter in wide.parameters()) == 30_123


def test_a_width_of_one_works():
    assert detector(width=1)(torch.rand(2, 3, 16, 16))["level:0"].isfinite().all()


@pytest.mark.parametrize("levels", [0, 5])
def test_a_number_of_levels_outside_is_refused(levels: int):
    with pytest.raises(UserError, match=rf"levels must be 1 to 4, got {levels}"):
        detector(levels=levels)


def test_it_is_built_by_name_with_its_options():
    spec = ModelSpec(name="tiny_fcos", width=4, levels=3)
    model = build_model(spec, num_classes=2, in_channels=1, image_size=32, mean=(0.5,), std=(0.2,))
    assert model(torch.rand(1, 1, 32, 32))["level:2"].shape == (1, 6, 2, 2)


def test_it_can_be_exported_with_a_named_output_a_level():
    model, images = detector(), torch.rand(2, 3, 32, 32)
    exported = torch.export.export(model, (images,)).module()(images)
    for name, values in model(images).items():
        torch.testing.assert_close(exported[name], values)
