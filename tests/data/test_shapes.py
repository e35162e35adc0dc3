import numpy as np
import pytest
import torch

from kdbench.data.shapes import COLOURS, KINDS, MOST_IMAGES, Scene, draw, shapes

SCENES = [draw(seed=3, index=index, size=48) for index in range(60)]


def test_a_picture_depends_on_its_seed_and_index_alone():
    drawn_first = draw(seed=3, index=59, size=48)
    assert np.array_equal(drawn_first.image, SCENES[59].image)
    assert not np.array_equal(draw(4, 59, 48).image, drawn_first.image)
    assert not np.array_equal(draw(3, 58, 48).image, drawn_first.image)


def test_every_kind_and_number_of_objects_occurs():
    assert {shape.name for scene in SCENES for shape in scene.objects} == set(KINDS)
    assert {len(scene.objects) for scene in SCENES} == {1, 2, 3}


def test_masks_do_not_overlap_and_make_up_the_class_map():
    for scene in SCENES:
        covered = sum(shape.mask.astype(int) for shape in scene.objects)
        assert covered.max() == 1
        assert np.array_equal(covered == 0, scene.classes == 0)
        assert all((scene.classes[shape.mask] == shape.kind).all() for shape in scene.objects)


def test_boxes_touch_the_visible_mask_on_all_sides():
    for shape in (shape for scene in SCENES for shape in scene.objects):
        x0, y0, x1, y1 = shape.box
        cut = shape.mask[y0:y1, x0:x1]
        assert cut.sum() == shape.mask.sum() > 0
        assert cut[0].any()
        assert cut[-1].any()
        assert cut[:, 0].any()
        assert cut[:, -1].any()


def test_objects_have_their_named_colour_within_shade_and_noise():
    for shape, image in ((shape, scene.image) for scene in SCENES for shape in scene.objects):
        mean = image[:, shape.mask].mean(1) / 255
        assert np.abs(mean - COLOURS[shape.colour]).max() < 0.17


def test_objects_are_large_enough_to_see_and_differ_from_the_ground():
    for scene in SCENES:
        ground = scene.image[:, scene.classes == 0].mean(1)
        for shape in scene.objects:
            assert shape.mask.sum() > 40
            assert np.abs(scene.image[:, shape.mask].mean(1) - ground).max() > 15


def area(name: str) -> float:
    return {"circle": np.pi, "square": 2.0, "triangle": 3 * np.sqrt(3) / 4, "ring": 0.75 * np.pi, "cross": 4 * 0.66 * 0.94 - 0.66**2}[name]


def test_lone_objects_have_the_area_of_their_kind():
    for index in range(40):
        (shape,) = draw(seed=1, index=index, size=256, most=1).objects
        centre, tips = shape.keypoints[0, :2], shape.keypoints[1:, :2]
        reach = np.linalg.norm(tips[0] - centre) / (0.94 if shape.name in ("circle", "ring", "cross") else 1)
        assert shape.mask.sum() == pytest.approx(area(shape.name) * reach**2, rel=0.03)


def test_keypoints_lie_on_their_object_and_are_hidden_where_another_covers_them():
    seen = hidden = 0
    for scene in SCENES:
        owner = scene_owner(scene)
        for number, shape in enumerate(scene.objects):
            expected = 4 if shape.name == "triangle" else 5
            assert (shape.keypoints[expected:] == 0).all()
            for x, y, visible in shape.keypoints[:expected]:
                x0, y0, x1, y1 = shape.box
                above = owner[min(int(y), 47), min(int(x), 47)] > number
                assert visible == (not above)
                seen, hidden = seen + bool(visible), hidden + (not visible)
                if visible and all(other is shape or not overlaps(other.box, shape.box) for other in scene.objects):
                    assert x0 - 1 <= x <= x1 + 1
                    assert y0 - 1 <= y <= y1 + 1
    assert seen > hidden > 0


def scene_owner(scene: Scene) -> np.ndarray:
    owner = np.full(scene.image.shape[1:], -1)
    for number, shape in enumerate(scene.objects):
        owner[shape.mask] = number
    return owner


def overlaps(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_captions_say_what_there_is_and_how_the_first_two_lie():
    relations = {"above": (1, 1), "below": (1, -1), "left of": (0, 1), "right of": (0, -1)}
    found = set()
    for scene in SCENES:
        for shape in scene.objects:
            assert f"a {shape.colour} {shape.name}" in scene.caption
        if len(scene.objects) > 1:
            relation = next(words for words in relations if f" {words} " in scene.caption)
            axis, sign = relations[relation]
            first, second = (shape.keypoints[0, :2] for shape in scene.objects[:2])
            assert sign * (second - first)[axis] > 0
            assert abs((second - first)[axis]) >= abs((second - first)[1 - axis])
            found.add(relation)
    assert found == set(relations)


def test_the_mask_source_labels_pixels_and_ignores_255():
    source = shapes(train=20, test=5, size=24, seed=2)
    assert source.train.inputs.shape == (20, 3, 24, 24)
    assert source.train.target.shape == (20, 24, 24)
    assert source.num_classes == len(source.class_names) == 6
    assert source.ignore_index == 255
    scene = draw(2, 7, 24)
    assert np.array_equal(source.train.inputs[7].numpy(), scene.image)
    assert np.array_equal(source.train.target[7].numpy(), scene.classes)


def test_the_class_source_shows_one_object_an_image():
    source = shapes(train=50, test=5, size=24, target="class")
    assert source.num_classes == 5
    assert set(source.train.target.tolist()) == set(range(5))
    (shape,) = draw(0, 11, 24, most=1).objects
    assert source.train.target[11] == shape.kind - 1


def test_test_images_stay_the_same_whatever_the_training_sets_size():
    few, many = shapes(train=3, test=4, size=16), shapes(train=9, test=4, size=16)
    assert few.test.sha256() == many.test.sha256()
    assert torch.equal(few.train.inputs, many.train.inputs[:3])
    assert few.test.index.tolist() == [MOST_IMAGES + i for i in range(4)]


def test_mean_and_deviation_are_those_of_the_training_images():
    source = shapes(train=10, test=1, size=16)
    images = source.train.inputs.double() / 255
    assert source.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert source.std == pytest.approx(images.std((0, 2, 3), correction=0).tolist(), abs=1e-4)
