from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdbench.data.columns import Columns, named
from kdbench.data.scenes import COLOURS, KINDS, MOST_IMAGES, PREDICATES, draw, draw_at_least
from kdbench.data.shape_targets import ANSWERS, QUESTIONS, TARGETS, VOCABULARY
from kdbench.data.shapes import shapes


@pytest.mark.parametrize(
    ("target", "sha256"),
    [
        ("mask", "db9a64d2d325d716567797c54fd904e1fd419ea126d041d7120199756fee2534"),
        ("class", "96af420c886533adb3330a910f73a94ef6d64a90cfeaad6ffce16fc457a35bd0"),
    ],
)
def test_masks_and_classes_have_the_content_that_earlier_results_were_made_with(target: str, sha256: str):
    assert shapes(train=6, test=3, size=24, seed=5, target=target).sha256 == sha256


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


def read(columns: Columns) -> list[str]:
    return [VOCABULARY.decode(row.tolist()) for row in named(columns, "")["tokens"]]


@pytest.mark.parametrize("target", TARGETS)
def test_a_sample_stays_the_same_whatever_the_training_sets_size(target: str):
    few, many = (shapes(train=train, test=4, size=16, seed=9, target=target) for train in (3, 9))
    for part, other in ((few.train, many.train), (few.test, many.test)):
        for columns, others in ((part.inputs, other.inputs), (part.target, other.target)):
            for name, values in named(columns, "").items():
                assert torch.equal(values, named(others, "")[name][: len(values)])
    assert many.train.index.tolist() == list(range(9))


@pytest.mark.parametrize("target", TARGETS)
def test_another_seed_gives_other_targets_and_pictures(target: str):
    one, other = (shapes(train=20, test=1, size=16, seed=seed, target=target).train for seed in (1, 2))
    assert not torch.equal(named(one.inputs, "image")["image"], named(other.inputs, "image")["image"])
    assert any(not torch.equal(values, named(other.target, "")[name]) for name, values in named(one.target, "").items())


@pytest.mark.parametrize("target", ["present", "boxes", "keypoints", "caption", "question"])
def test_what_is_asked_leaves_the_pictures_as_they_are(target: str):
    asked, masks = shapes(train=8, test=2, size=16, target=target), shapes(train=8, test=2, size=16)
    for part, other in ((asked.train, masks.train), (asked.test, masks.test)):
        assert torch.equal(named(part.inputs, "image")["image"], other.inputs)
    assert (asked.mean, asked.std) == (masks.mean, masks.std)


def test_present_kinds_are_those_of_the_mask():
    present, masks = shapes(train=30, test=1, size=24, target="present"), shapes(train=30, test=1, size=24)
    assert present.train.target.dtype == torch.uint8
    assert present.class_names == KINDS
    for row, mask in zip(present.train.target, masks.train.target, strict=True):
        assert [kind + 1 for kind in row.nonzero().flatten().tolist()] == sorted(set(mask.flatten().tolist()) - {0})
    assert set(present.train.target.sum(1).tolist()) == {1, 2, 3}


def test_boxes_enclose_the_mask_and_padded_rows_are_empty():
    boxes, masks = shapes(train=30, test=1, size=24, target="boxes").train.target, shapes(train=30, test=1, size=24).train.target
    assert (boxes["boxes"].dtype, boxes["boxes"].shape) == (torch.float32, (30, 3, 4))
    assert (boxes["labels"].dtype, boxes["labels"].shape) == (torch.int64, (30, 3))
    alone = 0
    for corners, labels, mask in zip(boxes["boxes"], boxes["labels"], masks, strict=True):
        count = int((labels >= 0).sum())
        assert (labels[:count] >= 0).all()
        assert (labels[count:] == -1).all()
        assert (corners[count:] == 0).all()
        for label in labels[:count].unique():
            pixels = (mask == label + 1).nonzero()
            of_kind = corners[:count][labels[:count] == label]
            # The mask joins objects of one kind, so its extent is that of their boxes together.
            joined = [*of_kind[:, :2].amin(0).tolist(), *of_kind[:, 2:].amax(0).tolist()]
            assert joined == [*pixels.amin(0).flip(0).tolist(), *(pixels.amax(0).flip(0) + 1).tolist()]
            alone += len(of_kind) == 1
    assert alone > 30


def test_a_scene_checked_by_eye():
    """Picture 4 of seed 0 at 32 pixels, looked at enlarged: a blue square, a red cross at its right, a white circle over both."""
    square, cross, circle = (6, 14, 17, 25), (16, 19, 26, 29), (2, 0, 15, 13)
    boxes = shapes(train=5, test=1, size=32, target="boxes").train.target
    assert boxes["boxes"][4].tolist() == [list(box) for box in (square, cross, circle)]
    assert boxes["labels"][4].tolist() == [1, 3, 0]
    assert shapes(train=5, test=1, size=32, target="present").train.target[4].tolist() == [1, 1, 0, 1, 0]
    caption = shapes(train=5, test=1, size=32, target="caption").train
    assert read(caption.inputs)[4] == "a blue square left of a red cross, with a white circle"
    blue_square, red_cross, white_circle, left_of = 2 * 5 + 1, 0 * 5 + 3, 5 * 5 + 0, 2
    assert caption.target[4] == 30 + 3600 + ((blue_square * 4 + left_of) * 30 + red_cross) * 30 + white_circle


def test_keypoints_are_the_scenes_own_with_boxes_and_labels_beside_them():
    source = shapes(train=12, test=1, size=32, seed=4, target="keypoints")
    points, boxes = source.train.target["points"], shapes(train=12, test=1, size=32, seed=4, target="boxes").train.target
    assert (points.dtype, points.shape) == (torch.float32, (12, 15, 3))
    points = points.unflatten(1, (3, 5))
    for row in range(12):
        objects = draw(4, row, 32).objects
        for number, shape in enumerate(objects):
            assert points[row, number].tolist() == shape.keypoints.tolist()
        assert (points[row, len(objects) :] == 0).all()
    assert torch.equal(source.train.target["boxes"], boxes["boxes"])
    assert torch.equal(source.train.target["labels"], boxes["labels"])


def test_captions_are_read_back_word_for_word():
    source = shapes(train=60, test=2, size=16, seed=6, target="caption")
    assert source.vocabulary == VOCABULARY
    assert source.train.inputs["tokens"].shape == (60, 13)
    assert read(source.train.inputs) == [draw(6, index, 16).caption for index in range(60)]
    assert source.train.inputs["tokens"][:, -1].any()  # the longest caption fills its row


def test_pairs_have_one_number_where_their_captions_are_equal_and_nowhere_else():
    source = shapes(train=1500, test=2, size=16, target="caption")
    captions, pairs = read(source.train.inputs), source.train.target.tolist()
    assert len(set(captions)) == len(set(pairs)) == len(set(zip(captions, pairs, strict=True)))
    assert len(set(captions)) < 1200
    assert max(pairs) < 30 + 30 * 4 * 30 + 30 * 4 * 30 * 30
    for words, first, end in ((3, 0, 30), (7, 30, 3630)):
        assert all(first <= pair < end for caption, pair in zip(captions, pairs, strict=True) if len(caption.split()) == words)


def test_questions_are_answered_by_the_scene():
    source = shapes(train=600, test=2, size=16, seed=2, target="question")
    assert source.class_names == ANSWERS
    counted: Counter[tuple[str, str]] = Counter()
    answers, types = source.train.target["answer"].tolist(), source.train.target["type"].tolist()
    for index, (text, answer, kind) in enumerate(zip(read(source.train.inputs), answers, types, strict=True)):
        objects, said, words = draw(2, index, 16).objects, ANSWERS[answer], text.split()
        if text == "how many shapes are there":
            expected, found = "count", ["one", "two", "three"][len(objects) - 1]
        elif text.startswith("is there a "):
            expected, found = "presence", "yes" if words[-1] in {shape.name for shape in objects} else "no"
        elif text.startswith("what colour is the "):
            (shape,) = (shape for shape in objects if shape.name == words[-1])
            expected, found = "colour", shape.colour
        else:
            relation = text.removeprefix("what is ").removesuffix(f" the {words[-1]}")
            (of,) = (shape for shape in objects if shape.name == words[-1])
            (found,) = (shape.name for shape in objects if shape is not of and lies(shape.centre, of.centre) == relation)
            expected = "place"
        assert (QUESTIONS[kind], said) == (expected, found)
        counted[expected, said] += 1
    assert {answer for _, answer in counted} == set(ANSWERS)
    assert min(sum(count for (kind, _), count in counted.items() if kind == wanted) for wanted in QUESTIONS) > 40
    yes, no = counted["presence", "yes"], counted["presence", "no"]
    assert abs(yes - no) < 4 * (yes + no) ** 0.5  # four standard deviations of a fair coin


def lies(one: tuple[float, float], other: tuple[float, float]) -> str:
    across, down = one[0] - other[0], one[1] - other[1]
    if abs(down) > abs(across):
        return "above" if down < 0 else "below"
    return "left of" if across < 0 else "right of"


def test_relations_name_two_objects_of_the_picture_and_say_how_they_lie():
    source = shapes(train=80, test=2, size=24, seed=3, target="relation")
    assert source.class_names == PREDICATES
    boxes = source.train.inputs["boxes"]
    assert (boxes.dtype, boxes.shape) == (torch.float32, (80, 2, 4))
    later = 0
    for index, (names, pair, label) in enumerate(zip(read(source.train.inputs), boxes.tolist(), source.train.target.tolist(), strict=True)):
        scene = draw_at_least(2, 3, index, 24)
        assert source.train.inputs["image"][index].tolist() == scene.image.tolist()
        numbers = [[list(shape.box) for shape in scene.objects].index(box) for box in pair]
        subject, other = (scene.objects[number] for number in numbers)
        assert subject is not other
        assert names == f"{subject.colour} {subject.name} {other.colour} {other.name}"
        assert PREDICATES[label] == lies(subject.centre, other.centre)
        later += numbers[0] > numbers[1]
    assert set(source.train.target.tolist()) == {0, 1, 2, 3}
    assert 20 < later < 60


def test_the_vocabulary_is_part_of_the_content_and_holds_every_word():
    source = shapes(train=200, test=50, size=16, target="question")
    assert replace(source, vocabulary=None).facts != source.facts
    assert not (source.train.inputs["tokens"] == 4).any()
    assert set(COLOURS) | set(KINDS) <= set(VOCABULARY.words)
