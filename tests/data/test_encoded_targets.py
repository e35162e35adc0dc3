"""Labels per pixel in files and masks as run-lengths: drawn with the placement of their picture, moved as what is in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pycocotools.mask as coco_masks
import pytest
import torch

from kdbench.data.batch import Part, standing_in
from kdbench.data.decoding import check_decodable, measured_target
from kdbench.data.encoded import EncodedImages
from kdbench.data.encoded_targets import EncodedLabels, EncodedMasks, groups_of
from kdbench.data.frames import Frame
from kdbench.data.kinds import Boxes, Masks, has_box
from kdbench.data.label_map import LabelMap
from kdbench.data.loader import Loader, in_order, view_batches
from kdbench.data.run_lengths import Runs
from kdbench.data.sources import Source
from kdbench.data.views import IGNORED, Augment
from kdbench.errors import UserError
from tests.data.holding import Contents, palette_png, png

NUMBERED = LabelMap("test", ("a", "b", "c"), {0: 0, 1: 1, 2: 2, 255: IGNORED})
EVERY_MOVE = Augment(crop=3, flip=True, operations=2, color=0.3, erase=0.5)
SIZES = ((30, 40), (40, 24), (20, 20), (33, 47), (30, 40), (25, 61))


def scene(row: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int, int]]]:
    """A picture, its labels and the boxes x0, y0, x1, y1 of two rectangles in it, which a pixel's colour tells of."""
    random = np.random.default_rng(row)
    labels = np.zeros((height, width), np.uint8)
    boxes = []
    for label in (1, 2):
        x0, y0 = int(random.integers(0, width // 2)), int(random.integers(0, height // 2))
        x1, y1 = x0 + int(random.integers(6, width - x0 + 1)), y0 + int(random.integers(6, height - y0 + 1))
        labels[y0:y1, x0:x1] = label
        boxes.append((x0, y0, x1, y1))
    return np.stack([labels * 100, 255 - labels * 50, np.full_like(labels, 9)], axis=-1), labels, boxes


def runs_of(masks: list[list[np.ndarray]], sizes: Any = SIZES) -> Runs:
    """Run-lengths that pycocotools wrote."""
    counts = [coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"] for each in masks for mask in each]
    ends = np.cumsum([0, *map(len, counts)])
    first = np.cumsum([0, *map(len, masks)])
    return Runs(np.frombuffer(b"".join(counts), np.uint8), ends, first, np.array(sizes, np.int64))


def part_of(fitting: str = "letterbox", size: tuple[int, int] = (28, 32), rows: int = len(SIZES)) -> Part:
    """Pictures of several sizes with labels per pixel, boxes and masks."""
    frame = Frame(size, fitting, 34)
    scenes = [scene(row, *sides) for row, sides in enumerate(SIZES[:rows])]
    pictures = EncodedImages(Contents([png(image) for image, _, _ in scenes]), torch.arange(rows), size, 34, fitting)
    labels = EncodedLabels(Contents([png(labels) for _, labels, _ in scenes]), torch.arange(rows), frame, NUMBERED)
    placed = torch.zeros(rows, 2, 4)
    masks = []
    for row, (_, own, boxes) in enumerate(scenes):
        placement = frame.place(*own.shape)
        scale, shift = (torch.tensor(numbers).repeat(2) for numbers in (placement.scale, placement.shift))
        placed[row] = torch.tensor(boxes) * scale + shift
        masks.append([_filled(own.shape, box) for box in boxes])
    target = {"labels": labels, "boxes": placed, "masks": EncodedMasks(runs_of(masks, SIZES[:rows]), torch.arange(rows), frame, 1)}
    return Part(pictures, standing_in(target), torch.arange(rows) + 10, kinds={"boxes": Boxes(), "masks": Masks()})


def _filled(shape: tuple[int, ...], box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def target_of(part: Part) -> Any:
    """Its columns by name, whatever they are."""
    return part.target


def drawn(part: Part) -> Part:
    """The same part in memory, as evaluation sees it."""
    target = {name: torch.stack([column.drawn(row) for row in range(len(part))]) for name, column in part.encoded_targets.items()}
    pixels = torch.stack([part.encoded_images.decode(row) for row in range(len(part))])
    return replace(part, inputs=pixels, target={**part.target, **target})


def box_of(mask: torch.Tensor) -> list[int]:
    """x0, y0, x1, y1 of the pixels that are set, bool [H, W]."""
    down, across = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [int(across.min()), int(down.min()), int(across.max()) + 1, int(down.max()) + 1]


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fitting", ["centre", "letterbox", "stretch"])
def test_labels_and_masks_lie_where_their_picture_does(fitting: str) -> None:
    part = part_of(fitting)
    (batch,) = in_order(part, 10)
    for row in range(len(part)):
        labels, red = batch.target["labels"][row], batch.inputs[row, 0] * 255
        of_mask = [batch.target["masks"][row, 0] >> bit & 1 for bit in (0, 1)]
        for label in (1, 2):
            # An antialiased picture blends colours at edges; away from them it says which label a pixel has.
            sure = torch.nn.functional.max_pool2d((red - label * 100).abs()[None, None], 3, 1, 1)[0, 0] < 2
            assert (labels[sure] == label).all()
        assert torch.equal(of_mask[1] == 1, labels == 2)
        assert ((of_mask[0] == 1) | (labels != 1)).all()


def test_labels_outside_of_a_letterboxed_picture_are_ignored_and_masks_have_no_bit_there() -> None:
    part = part_of("letterbox")
    (batch,) = in_order(part, 10)
    for row, sides in enumerate(SIZES):
        height, width = part.encoded_images.frame.place(*sides).resized
        for outside in ((slice(height, None), slice(None)), (slice(None), slice(width, None))):
            assert (batch.target["labels"][row][outside] == IGNORED).all()
            assert not batch.target["masks"][row, 0][outside].any()
        assert (batch.target["labels"][row, :height, :width] != IGNORED).all()


def test_the_box_of_a_drawn_mask_is_the_moved_box_to_within_a_pixel() -> None:
    for fitting in ("letterbox", "stretch"):
        (batch,) = in_order(part_of(fitting), 10)
        for masks, boxes in zip(batch.target["masks"], batch.target["boxes"], strict=True):
            for bit, box in enumerate(boxes):
                found = torch.tensor(box_of((masks[0] >> bit & 1).bool()))
                assert (found - box).abs().max() <= 1


def test_masks_are_the_bits_that_pycocotools_decodes_for_more_objects_than_a_number_has_bits() -> None:
    random = np.random.default_rng(0)
    masks = [random.random((9, 7)) < 0.5 for _ in range(130)]
    column = EncodedMasks(runs_of([masks], [(9, 7)]), torch.tensor([0]), Frame((9, 7), "stretch"), groups_of(130))
    bits = column.drawn(0)
    assert bits.shape == (3, 9, 7) == column.shape[1:]
    assert bits.min() >= 0
    for k, mask in enumerate(masks):
        assert torch.equal((bits[k // 63] >> (k % 63) & 1).bool(), torch.from_numpy(mask))
    assert [coco_masks.decode(rle).astype(bool).tolist() for rle in column.rles(0)] == [mask.tolist() for mask in masks]
    assert groups_of(63) == 1
    assert groups_of(64) == 2
    assert groups_of(0) == 1


def test_a_picture_without_an_object_has_no_bit() -> None:
    column = EncodedMasks(runs_of([[], [np.ones((4, 4))]], [(4, 4), (4, 4)]), torch.arange(2), Frame((8, 8), "stretch"), 1)
    assert not column.drawn(0).any()
    assert column.drawn(1).eq(1).all()
    assert column.rles(0) == []


@pytest.mark.parametrize("form", ["bytes", "sixteen bits", "palette", "bits", "colours"])
def test_labels_are_the_numbers_that_a_file_holds(form: str) -> None:
    numbers = (np.arange(48).reshape(6, 8) % (2 if form == "bits" else 3)).astype(np.uint8)
    colours = np.array([[9, 0, 0], [0, 0, 7], [255, 255, 255]], np.uint8)
    files = {
        "bytes": lambda: png(numbers),
        "sixteen bits": lambda: png(numbers.astype(np.uint16) * 300),
        "palette": lambda: palette_png(numbers),
        "bits": lambda: png(numbers * 255, "1"),
        "colours": lambda: png(colours[numbers]),
    }
    table: dict[str, Any] = {"numbers": {0: 0, 1: 1, 2: 2}}
    if form == "sixteen bits":
        table = {"numbers": {0: 0, 300: 1, 600: 2}}
    if form == "colours":
        table = {"colours": {tuple(colour): label for label, colour in enumerate(colours.tolist())}}
    column = EncodedLabels(Contents([files[form]()]), torch.tensor([0]), Frame((6, 8), "stretch"), LabelMap("x", ("a", "b", "c"), **table))
    assert column.drawn(0).tolist() == numbers.tolist()


# --- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fitting", ["letterbox", "stretch"])
def test_views_of_what_is_drawn_are_those_of_the_same_columns_in_memory(fitting: str) -> None:
    part = part_of(fitting)
    for view in range(3):
        (one,) = view_batches(part, view, EVERY_MOVE, 7, 10)
        (other,) = view_batches(drawn(part), view, EVERY_MOVE, 7, 10)
        assert torch.equal(one.inputs, other.inputs)
        assert one.target.keys() == other.target.keys()
        assert all(torch.equal(one.target[name], other.target[name]) for name in one.target)


def test_a_random_part_of_the_file_takes_boxes_masks_and_labels_with_it() -> None:
    seen = 0
    for fitting in ("letterbox", "stretch"):
        part = part_of(fitting)
        for view in range(8):
            (batch,) = view_batches(part, view, Augment(resized_crop=0.2), 3, 10)
            assert batch.target["labels"].ne(IGNORED).all()  # a part fills the input
            for row in range(len(part)):
                masks, boxes = batch.target["masks"][row, 0], batch.target["boxes"][row]
                assert torch.equal((masks >> 1 & 1).bool(), batch.target["labels"][row] == 2)
                for bit in has_box(boxes).nonzero().flatten().tolist():
                    found = torch.tensor(box_of((masks >> bit & 1).bool()))
                    # A pixel of the file may be several of the input's, and the box ends anywhere in it.
                    assert (found - boxes[bit]).abs().max() <= 1 + 1e-3
                    seen += 1
    assert seen > 100


def test_a_flip_of_a_random_part_moves_all_columns_alike() -> None:
    (plain,) = view_batches(part_of(), 1, Augment(resized_crop=0.5), 3, 10)
    (flipped,) = view_batches(part_of(), 1, Augment(resized_crop=0.5, flip=True), 3, 10)
    turned = [row for row in range(6) if not torch.equal(plain.inputs[row], flipped.inputs[row])]
    assert turned
    for row in turned:
        assert torch.equal(flipped.inputs[row], plain.inputs[row].flip(-1))
        assert torch.equal(flipped.target["masks"][row], plain.target["masks"][row].flip(-1))
        assert torch.equal(flipped.target["labels"][row], plain.target["labels"][row].flip(-1))
        x0, x1 = plain.target["boxes"][row, :, 0], plain.target["boxes"][row, :, 2]
        gone = ~has_box(plain.target["boxes"][row])
        torch.testing.assert_close(flipped.target["boxes"][row, :, 0], torch.where(gone, 0, 32 - x1), atol=1e-4, rtol=0)
        torch.testing.assert_close(flipped.target["boxes"][row, :, 2], torch.where(gone, 0, 32 - x0), atol=1e-4, rtol=0)


def test_a_random_part_is_refused_where_the_centre_has_already_cut_the_boxes() -> None:
    with pytest.raises(UserError, match="resized_crop is done where a file is decoded, and the column 'boxes' would not follow"):
        next(view_batches(part_of("centre"), 0, Augment(resized_crop=0.5), 3, 10))
    in_memory = replace(part_of("stretch"), target=drawn(part_of("stretch")).target["labels"], kinds={})
    with pytest.raises(UserError, match="the column 'target' would not follow; leave it out"):
        next(view_batches(in_memory, 0, Augment(resized_crop=0.5), 3, 10))


def test_what_is_erased_hides_neither_box_nor_mask() -> None:
    (whole,) = view_batches(part_of(), 0, Augment(), 3, 10)
    (erased,) = view_batches(part_of(), 0, Augment(erase=1.0), 3, 10)
    assert not torch.equal(erased.inputs, whole.inputs)
    assert torch.equal(erased.target["masks"], whole.target["masks"])
    assert torch.equal(erased.target["boxes"], whole.target["boxes"])
    assert (erased.target["labels"] == IGNORED).sum() > (whole.target["labels"] == IGNORED).sum()


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_depend_neither_on_the_threads_nor_on_their_size_nor_on_the_workers(monkeypatch: Any, threads: int) -> None:
    augment = Augment(resized_crop=0.4, flip=True, crop=2)
    (expected,) = view_batches(part_of(), 1, augment, 5, 10)
    monkeypatch.setattr("kdbench.data.decoding.torch.get_num_threads", lambda: threads)
    pieces = list(view_batches(part_of(), 1, augment, 5, 4))
    for name in expected.target:
        assert torch.equal(torch.cat([piece.target[name] for piece in pieces]), expected.target[name])
    for rank in (0, 1):
        loader = Loader(part_of(), 4, augment=augment, views=2, data_seed=5, order_seed=1, rank=rank, world_size=2)
        for batch in loader.batches(1):
            rows = batch.index - 10
            assert torch.equal(batch.inputs, expected.inputs[rows])
            assert all(torch.equal(batch.target[name], expected.target[name][rows]) for name in expected.target)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_bits() -> None:
    augment = Augment(resized_crop=0.4, flip=True, operations=1)
    here, there = (next(view_batches(part_of(), 1, augment, 5, 10, torch.device(name))) for name in ("cpu", "cuda"))
    assert all(there.target[name].is_cuda and torch.equal(here.target[name], there.target[name].cpu()) for name in ("labels", "masks"))
    torch.testing.assert_close(there.target["boxes"].cpu(), here.target["boxes"])


def test_pictures_in_memory_may_have_labels_in_files() -> None:
    encoded = part_of("stretch")
    part = replace(drawn(encoded), target=encoded.target["labels"], kinds={})
    expected = replace(drawn(encoded), target=drawn(encoded).target["labels"], kinds={})
    augment = Augment(resized_crop=0.5, flip=True)
    for one, other in zip(view_batches(part, 2, augment, 7, 4), view_batches(expected, 2, augment, 7, 4), strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.target, other.target)


# --- what metrics get, hashes, mistakes ------------------------------------------------------------------------------


def test_metrics_get_labels_as_tensors_and_masks_as_they_are() -> None:
    part = part_of()
    target = measured_target(part.select(torch.tensor([4, 1])))
    assert torch.equal(target["labels"], drawn(part).target["labels"][[4, 1]])
    assert isinstance(target["masks"], EncodedMasks)
    assert [rle["size"] for rle in target["masks"].rles(0)] == [[30, 40]] * 2
    alone = measured_target(replace(part, target=part.target["labels"], kinds={}))
    assert torch.equal(alone, drawn(part).target["labels"])


def test_selecting_samples_decodes_nothing() -> None:
    part = part_of()
    some = part.within(torch.tensor([5, 2])).select(torch.tensor([1]))
    assert part.encoded_images.store.reads == part.target["labels"].store.reads == []
    assert torch.equal(next(in_order(some, 1)).target["labels"][0], drawn(part).target["labels"][2])


def test_the_hash_says_all_that_decides_what_is_drawn() -> None:
    part = part_of()
    labels, masks = target_of(part)["labels"], target_of(part)["masks"]
    table = replace(NUMBERED, numbers={0: 0, 1: 2, 2: 1, 255: IGNORED})
    frame = Frame((28, 32), "letterbox", 34, (0, 0, 0))
    other = [
        replace(labels, store=Contents(labels.store.files[::-1])),
        replace(labels, label_map=table),
        replace(labels, frame=frame),
        labels[torch.tensor([0, 1])],
    ]
    assert len({each.sha256() for each in [labels, *other]}) == 5
    fewer = replace(masks.runs, first=np.array([0, 1, 4, 6, 8, 10, 12]))
    assert len({each.sha256() for each in (masks, replace(masks, runs=fewer), replace(masks, groups=2), masks[torch.tensor([0])])}) == 4
    assert replace(labels, label_map=replace(NUMBERED, name="another")).sha256() == labels.sha256()
    assert part.sha256() == part_of().sha256()
    assert part.sha256() != replace(part, target={**part.target, "labels": other[1]}).sha256()
    images = part.encoded_images
    shown = [replace(images, **changed) for changed in ({}, {"fitting": "stretch"}, {"padding": (0, 0, 0)}, {"size": (32, 28)})]
    annotated = replace(images, sizes=torch.tensor(SIZES))
    assert len({each.sha256() for each in [*shown, annotated]}) == 5


def test_a_source_may_have_labels_in_files_and_its_map_must_have_its_classes() -> None:
    from kdbench.data.sources import _problem

    part = replace(part_of(), target=part_of().target["labels"], kinds={})
    test = replace(part, index=part.index + 100)
    sound = Source("x", part, test, 3, ("a", "b", "c"), (0.5,) * 3, (0.5,) * 3, IGNORED)
    assert _problem(sound) is None
    assert _problem(replace(sound, num_classes=2, class_names=("a", "b"))) == "train has a label map of 3 classes, and the data has 2"


def test_a_label_that_the_map_does_not_name_ends_in_one_line_before_the_training() -> None:
    files = list(part_of().target["labels"].store.files)
    files[3] = png(np.full(SIZES[3], 7, np.uint8))
    labels = replace(target_of(part_of())["labels"], store=Contents(files), label_map=replace(NUMBERED, way_out="Name another map."))
    part = replace(part_of(), target=labels, kinds={})
    with pytest.raises(UserError, match=r"file 3 has a pixel of value 7, which label map 'test' of 3 classes does not name\. Name another"):
        check_decodable(part, "training")
    files[3] = png(np.zeros((*SIZES[3], 3), np.uint8))
    with pytest.raises(UserError, match=r"file 3 holds colours, and label map 'test' is of numbers"):
        check_decodable(replace(part, target=replace(labels, store=Contents(files))), "training")
    files[3] = b"no picture"
    with pytest.raises(UserError, match=r"file 3 can't be decoded as an image: it is none of BMP, GIF, PNG, PPM, TIFF"):
        list(in_order(replace(part, target=replace(labels, store=Contents(files))), 2))


def test_labels_of_another_size_than_their_picture_end_in_one_line() -> None:
    files = list(part_of().target["labels"].store.files)
    files[2] = png(np.zeros((10, 20), np.uint8))
    part = replace(part_of(), target=replace(target_of(part_of())["labels"], store=Contents(files)), kinds={})
    with pytest.raises(UserError, match=r"file 2 has 20 x 10 pixels and its picture 20 x 20; labels must be as large as the picture"):
        list(in_order(part, 2))
    with pytest.raises(UserError, match=r"file 2 has 20 x 10 pixels"):
        check_decodable(part, "training")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"numbers": {0: 3}}, "has the label 3 and 2 classes"),
        ({"numbers": {0: 0}, "others": 2}, "has the label 2 and 2 classes"),
        ({"numbers": {-1: 0}}, "has the number -1; expected 0"),
        ({}, "must have numbers or colours"),
    ],
)
def test_a_label_map_that_makes_no_sense_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelMap("x", ("a", "b"), **changed)


def test_other_numbers_and_colours_become_the_label_for_others() -> None:
    numbers = LabelMap("x", ("a", "b"), {5: 1}, others=IGNORED)
    assert numbers.labels(np.array([[5, 6, 65_535]], np.uint16), "f").tolist() == [[1, IGNORED, IGNORED]]
    colours = LabelMap("x", ("a", "b"), colours={(1, 2, 3): 1, (0, 0, 0): 0}, others=IGNORED)
    assert colours.labels(np.array([[[1, 2, 3], [0, 0, 0], [255, 255, 255], [1, 2, 2]]], np.uint8), "f").tolist() == [[1, 0, 255, 255]]
    with pytest.raises(UserError, match=r"f has a pixel of colour \[9, 9, 9\]"):
        replace(colours, others=None).labels(np.full((1, 1, 3), 9, np.uint8), "f")
