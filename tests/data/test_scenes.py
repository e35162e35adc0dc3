import numpy as np
import pytest

from kdbench.data.scenes import COLOURS, KINDS, MOST_IMAGES, PREDICATES, Scene, draw, draw_at_least, predicate

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


@pytest.mark.parametrize(
    ("subject", "other", "name"),
    [
        ((5.0, 1.0), (6.0, 3.0), "above"),
        ((5.0, 3.0), (6.0, 1.0), "below"),
        ((1.0, 5.0), (3.0, 6.0), "left of"),
        ((3.0, 5.0), (1.0, 6.0), "right of"),
        ((1.0, 1.0), (3.0, 3.0), "left of"),  # equal distances count as beside
    ],
)
def test_a_predicate_follows_the_longer_distance(subject: tuple[float, float], other: tuple[float, float], name: str):
    assert PREDICATES[predicate(subject, other)] == name


def test_centres_are_the_first_keypoint_before_rounding():
    for shape in (shape for scene in SCENES for shape in scene.objects):
        assert np.array_equal(shape.keypoints[0, :2], np.float32(shape.centre))


def test_pictures_are_drawn_on_until_one_has_enough_objects():
    drawn_again = 0
    for index in range(30):
        enough, plain = draw_at_least(2, seed=3, index=index, size=16), draw(3, index, 16)
        assert len(enough.objects) >= 2
        tried = 0
        while len(draw(3, index + tried * 2 * MOST_IMAGES, 16).objects) < 2:
            tried += 1
        assert np.array_equal(enough.image, draw(3, index + tried * 2 * MOST_IMAGES, 16).image)
        assert (tried == 0) == (len(plain.objects) >= 2)
        drawn_again += tried > 0
    assert 0 < drawn_again < 30
