"""COCO's JSON, written by hand: boxes, masks as pycocotools has them, keypoints, ids; each broken annotation in one line, or counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_masks
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools.coco import COCO

from kdbench.data.coco import coco
from kdbench.data.coco_annotations import mirror_pairs
from kdbench.data.facts import NotHere
from kdbench.data.json_entries import entries
from kdbench.data.kinds import Points
from kdbench.data.loader import in_order, view_batches
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.data.views import Augment
from kdbench.errors import UserError

# Categories with gaps between their ids, as COCO's are, and not in their order.
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 90, "name": "brush", "supercategory": "indoor"}]
SIZES = {139: (30, 40), 285: (48, 32), 632: (20, 20)}  # height and width by the picture's id
STAR = [20.5, 3.1, 24.2, 12.7, 34.9, 13.3, 26.4, 18.8, 29.5, 28.6, 20.1, 22.9, 11.7, 28.2, 14.3, 18.4, 6.2, 13.1, 16.8, 12.2]
TWO_PIECES = [[2.2, 2.7, 9.1, 3.3, 8.8, 9.9], [12.0, 20.0, 18.0, 20.0, 18.0, 26.0, 12.0, 26.0]]


def annotation(number: int, image: int, category: int, bbox: list[float], segmentation: Any, **more: Any) -> dict[str, Any]:
    area = more.pop("area", bbox[2] * bbox[3])
    fields = {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "segmentation": segmentation}
    return {**fields, "area": area, "iscrowd": 0, **more}


def column_counts(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, the first of pixels that are off."""
    flat = mask.T.ravel().astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, flat.size]).tolist()
    return runs if not flat[0] else [0, *runs]


CROWD = np.zeros((48, 32), np.uint8)
CROWD[10:40, 3:9] = CROWD[12:20, 15:31] = 1
HALF = np.zeros((48, 32), np.uint8)
HALF[:24, 4:20] = 1

ANNOTATIONS = [
    annotation(9001, 285, 3, [3, 10, 28, 30], {"size": [48, 32], "counts": column_counts(CROWD)}, iscrowd=1, area=308),
    annotation(11, 139, 18, [6.2, 3.1, 28.7, 25.5], [STAR], area=300.25),
    annotation(7, 139, 90, [2.2, 2.7, 15.8, 23.3], TWO_PIECES),
    annotation(
        2, 285, 18, [4, 0, 16, 24], {"size": [48, 32], "counts": coco_masks.encode(np.asfortranarray(HALF))["counts"].decode()}, area=384
    ),
]


def write(root: Path, part: str, **changed: Any) -> Path:
    """Annotations and pictures of a part; `changed` lists in place of the usual ones."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / part).mkdir(exist_ok=True)
    images = [{"id": number, "file_name": f"{number:012}.png", "height": h, "width": w} for number, (h, w) in SIZES.items()]
    for number, (height, width) in SIZES.items():
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / part / f"{number:012}.png")
    content = {
        "info": {"year": 2017},
        "licenses": [{"id": 1}, 5, "text"],
        "images": images,
        "annotations": ANNOTATIONS,
        "categories": CATEGORIES,
    }
    file = root / "annotations" / f"instances_{part}.json"
    file.write_text(json.dumps({**content, **changed}))
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part in ("train2017", "val2017"):
        write(tmp_path / "coco", part)
    return tmp_path / "coco"


def opened(root: Path, **options: Any) -> Source:
    spec = {"name": "coco", "path": str(root), "size": [24, 32], **options}
    return open_source(DataSpec.model_validate(spec))


# --- what is read ----------------------------------------------------------------------------------------------------


def test_categories_become_classes_in_the_order_of_their_ids_and_the_ids_are_kept(root: Path) -> None:
    source = opened(root)
    assert source.class_names == ("car", "dog", "brush")
    assert source.class_ids == (3, 18, 90)
    labels = source.train.target["labels"]
    assert labels.tolist() == [[1, 2], [0, 1], [-1, -1]]
    assert (
        source.reading
        == f"{root}: read 3 pictures with 4 objects to train on and 3 pictures with 4 objects to test on; nothing is left out"
    )
    assert source.train.index.tolist() == [0, 1, 2]
    assert source.test.index.tolist() == [3, 4, 5]


def test_boxes_move_with_a_letterboxed_picture_and_move_back_exactly(root: Path) -> None:
    source = opened(root, size=[24, 32])
    target = source.train.target
    # 40 x 30 fits into 32 x 24 at 0.8, 32 x 48 at 0.5; 20 x 20 grows by 1.2.
    torch.testing.assert_close(target["scale"], torch.tensor([[0.8, 0.8], [0.5, 0.5], [1.2, 1.2]]))
    assert not target["shift"].any()
    torch.testing.assert_close(target["boxes"][0, 0], torch.tensor([6.2, 3.1, 34.9, 28.6]) * 0.8)
    assert not target["boxes"][2].any()
    back = (target["boxes"] - target["shift"].repeat(1, 2)[:, None]) / target["scale"].repeat(1, 2)[:, None]
    torch.testing.assert_close(back[1], torch.tensor([[3.0, 10, 31, 40], [4, 0, 20, 24]]))
    assert target["size"].tolist() == [[30, 40], [48, 32], [20, 20]]
    assert target["crowd"].tolist() == [[False, False], [True, False], [False, False]]
    assert target["area"].tolist() == [[300.25, pytest.approx(15.8 * 23.3)], [308, 384], [0, 0]]


def test_stretching_moves_boxes_by_its_own_factor_in_each_direction(root: Path) -> None:
    target = opened(root, fitting="stretch").train.target
    torch.testing.assert_close(target["scale"], torch.tensor([[0.8, 0.8], [1.0, 0.5], [1.6, 1.2]]))
    torch.testing.assert_close(target["boxes"][1, 1], torch.tensor([4.0, 0, 20, 12]))


@pytest.mark.parametrize("form", ["as a file", "in another order"])
def test_masks_are_those_of_pycocotools_to_the_bit(root: Path, form: str) -> None:
    file = root / "annotations" / "instances_train2017.json"
    if form == "in another order":
        content = json.loads(file.read_text())
        file.write_text(json.dumps({key: content[key] for key in ("annotations", "categories", "images")}, indent=1))
    reference = COCO(str(file))
    source = opened(root, target="masks")
    masks = source.train.target["masks"]
    labelled = []
    for row, image in enumerate(SIZES):
        rles = masks.rles(row)
        of_image = [entry for entry in reference.anns.values() if entry["image_id"] == image]
        expected = [reference.annToRLE(entry) for entry in of_image]
        assert [rle["counts"] for rle in rles] == [coco_masks.merge([rle])["counts"] for rle in expected]
        assert [int(coco_masks.area(rle)) for rle in rles] == [int(reference.annToMask(entry).sum()) for entry in of_image]
        assert all(rle["size"] == list(SIZES[image]) for rle in rles)
        labelled.append([source.class_ids[label] for label in source.train.target["labels"][row].tolist() if label >= 0])
        assert labelled[-1] == [entry["category_id"] for entry in of_image]
    assert source.train.target["masks"].shape == (3, 1, 24, 32)


def test_without_an_area_the_mask_says_it_or_the_box(root: Path) -> None:
    bare = [{key: value for key, value in entry.items() if key != "area"} for entry in ANNOTATIONS]
    write(root, "train2017", annotations=bare)
    reference = COCO(str(root / "annotations" / "instances_val2017.json"))
    areas = [float(reference.annToMask(reference.anns[number]).sum()) for number in (11, 7, 9001, 2)]
    assert opened(root, target="masks").train.target["area"][:2].flatten().tolist() == areas
    assert opened(root).train.target["area"][0, 0].item() == pytest.approx(28.7 * 25.5)


def test_drawn_masks_lie_in_their_boxes(root: Path) -> None:
    (batch,) = in_order(opened(root, target="masks", size=[96, 128]).train, 3)
    for row, bit in ((0, 0), (1, 1)):
        down, across = (batch.target["masks"][row, 0] >> bit & 1).nonzero().unbind(1)
        found = torch.tensor([across.min(), down.min(), across.max() + 1, down.max() + 1])
        scale = float(batch.target["scale"][row, 0])
        assert (found - batch.target["boxes"][row, bit]).abs().max() <= 1.5 * max(1, scale)  # an outline is drawn to the nearest pixel


def test_several_labels_a_picture_are_the_categories_that_it_shows(root: Path) -> None:
    source = opened(root, target="multi_label")
    assert source.train.target.dtype == torch.uint8
    assert source.train.target.tolist() == [[0, 1, 1], [1, 1, 0], [0, 0, 0]]
    (batch,) = view_batches(source.train, 1, Augment(resized_crop=0.3, flip=True), 1, 3)
    assert batch.target.tolist() == source.train.target.tolist()


def test_some_categories_alone_are_learned(root: Path) -> None:
    source = opened(root, categories=["brush", "dog"], target="masks")
    assert source.class_names == ("dog", "brush")
    assert source.class_ids == (18, 90)
    assert source.train.target["labels"].tolist() == [[0, 1], [0, -1], [-1, -1]]
    assert [len(source.train.target["masks"].rles(row)) for row in range(3)] == [2, 1, 0]
    with pytest.raises(UserError, match=r"instances_train2017.json has no category 'dgo'; did you mean 'dog'\?"):
        opened(root, categories=["dgo"])


def test_the_largest_objects_are_kept_where_there_is_no_room_for_all(root: Path) -> None:
    source = opened(root, most_objects=1, target="masks")
    assert source.train.target["labels"].tolist() == [[2], [1], [-1]]  # areas of 300 and 368, of 308 and 384
    assert len(source.train.target["masks"].rles(0)) == 1
    assert source.reading.endswith(
        " and 3 pictures with 2 objects to test on (without 4 beyond the 1 largest of a picture); nothing is left out"
    )


def test_another_layout_is_named(root: Path) -> None:
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images" / "mine")
    (root / "annotations" / "instances_train2017.json").rename(root / "train.json")
    source = opened(root, train="mine", train_annotations="train.json")
    assert source.image_shape == (3, 24, 32)
    assert source.train.encoded_images.store.name(0) == str(root / "images" / "mine" / "000000000139.png")


# --- keypoints -------------------------------------------------------------------------------------------------------


def person(number: int, image: int, points: list[float] | None) -> dict[str, Any]:
    more = {} if points is None else {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
    return annotation(number, image, 1, [2, 2, 10, 10], [], **more)


@pytest.fixture
def people(root: Path) -> Path:
    category = {"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"], "skeleton": [[1, 2]]}
    found = [person(1, 139, [5, 6, 2, 7.5, 4, 1, 0, 0, 0]), person(2, 139, None), person(3, 285, [4, 4, 2, 8, 4, 2, 4, 8, 2])]
    for part in ("train2017", "val2017"):
        file = write(root, part, annotations=found, categories=[category])
        file.rename(file.with_name(f"person_keypoints_{part}.json"))
    return root


def test_keypoints_move_with_the_picture_and_keep_their_visibility(people: Path) -> None:
    source = opened(people, target="keypoints")
    points = source.train.target["keypoints"]
    assert points.shape == (3, 6, 3)
    torch.testing.assert_close(points[0, :3], torch.tensor([[4.0, 4.8, 2], [6, 3.2, 1], [0, 0, 0]]))
    assert not points[0, 3:].any()
    torch.testing.assert_close(points[1, :3], torch.tensor([[2.0, 2, 2], [4, 2, 2], [2, 4, 2]]))
    assert source.train.kinds["keypoints"] == Points(((1, 2), (4, 5)), mirrors=True)


def test_left_and_right_keypoints_change_places_in_a_mirror(people: Path) -> None:
    part = opened(people, target="keypoints").train
    batches = [next(view_batches(part, view, Augment(flip=True), 3, 3)) for view in range(6)]
    mirrored = [batch for batch in batches if not torch.equal(batch.target["keypoints"][1], part.target["keypoints"][1])]
    assert mirrored
    torch.testing.assert_close(mirrored[0].target["keypoints"][1, :3], torch.tensor([[30.0, 2, 2], [30, 4, 2], [28, 2, 2]]))


def test_pairs_are_names_that_differ_in_left_and_right() -> None:
    assert mirror_pairs(("nose", "left_eye", "right_eye", "left_hip", "tail")) == ((1, 2),)
    assert mirror_pairs(("nose", "tail")) == ()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([1, 2, 2], "annotation 8 has 1 keypoints, and others have 3"),
        ([1, 2, 3] * 3, "annotation 8 has a keypoint whose visibility is not 0, 1 or 2"),
        ([1, 2], "annotation 8 has keypoints that are no list of numbers"),
        ("none", "annotation 8 has keypoints that are no list of numbers"),
    ],
)
def test_broken_keypoints_are_named(people: Path, points: Any, message: str) -> None:
    file = people / "annotations" / "person_keypoints_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"].append({**person(8, 139, [0] * 9), "keypoints": points})
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"person_keypoints_val2017.json: {message}"):
        opened(people, target="keypoints")


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("annotated", ["as stored", "as shown"])
def test_a_picture_is_turned_by_its_tag_only_if_its_annotated_size_says_so(root: Path, annotated: str) -> None:
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:, 20:] = 255  # the right half is white; turned by a quarter clockwise, the lower half
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(root / "train2017" / "000000000139.png", exif=tags)
    height, width = (30, 40) if annotated == "as stored" else (40, 30)
    images = [{"id": 139, "file_name": "000000000139.png", "height": height, "width": width}]
    write_only(root, images)
    source = opened(root, size=[40, 40], fitting="stretch")
    image = source.train.encoded_images.decode(0).float().mean(0)
    (dark, light) = (image[:, :15], image[:, 25:]) if annotated == "as stored" else (image[:15], image[25:])
    assert (dark.max(), light.min()) == (0, 255)
    assert "turned upright" not in source.reading


def write_only(root: Path, images: list[dict[str, Any]]) -> None:
    """The training part with these pictures, which are there already, and no objects."""
    file = root / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps({"images": images, "annotations": [], "categories": CATEGORIES}))


def test_a_picture_of_another_size_than_annotated_is_named_when_it_is_reached(root: Path) -> None:
    write_only(root, [{"id": 139, "file_name": "000000000139.png", "height": 31, "width": 40}])
    with pytest.raises(
        UserError, match=r"000000000139.png has 40 x 30 pixels, and its annotation or mask 40 x 31; mend one of the two, or"
    ):
        list(in_order(opened(root).train, 2))


# --- what is broken --------------------------------------------------------------------------------------------------


def add(content: dict[str, Any], **changed: Any) -> None:
    content["annotations"].append({**annotation(77, 139, 3, [1, 1, 8, 8], [[1, 1, 9, 1, 9, 9]]), **changed})


def box(*bbox: float) -> Callable[[dict[str, Any]], None]:
    return lambda content: add(content, bbox=list(bbox))


def segmentation(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: add(content, segmentation=value)


def field(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: add(content, **changed)


def image(**changed: Any) -> Callable[[dict[str, Any]], None]:
    entry = {"id": 5, "file_name": "000000000632.png", "height": 20, "width": 20}
    return lambda content: content["images"].append({**entry, **changed})


BROKEN = [
    (box(1, 1, 0, 8), r"annotation 77 has a box without area, \[1, 1, 1, 9\]", "1 boxes without area"),
    (box(1, 1, -3, 8), "annotation 77 has a box without area", "1 boxes without area"),
    (
        box(35, 1, 9, 8),
        r"annotation 77 has a box outside of its picture of 40 x 30 pixels, \[35, 1, 44, 9\]",
        "1 boxes outside of their picture",
    ),
    (box(-2, 1, 9, 8), "annotation 77 has a box outside", "1 boxes outside of their picture"),
    (box(40.2, 1, 0.7, 8), "annotation 77 has a box outside", "1 boxes outside of their picture"),
    (box(1, 1, 8), r"annotation 77 has the bbox \[1, 1, 8\], expected x, y, width and height", "1 objects without a box"),
    (box(1, 1, float("nan"), 8), r"annotation 77 has the bbox \[1, 1, nan, 8\]", "1 objects without a box"),
    (field(bbox=None), "annotation 77 has the bbox None", "1 objects without a box"),
    (field(area=0), "annotation 77 has the area 0, expected a number above 0", "1 objects without area"),
    (field(id=7), "annotation 7 is listed twice", "1 objects listed twice"),
    (field(id="x"), "annotation 'x' has an id that is no whole number", "1 annotations without an id"),
    (field(category_id=4), "annotation 77 has the category_id 4, which no category has", "1 objects of an unknown category"),
    (field(image_id=1), "annotation 77 has the image_id 1, which no image has", "1 objects of an unknown picture"),
    (field(iscrowd=2), "annotation 77 has iscrowd 2, expected 0 or 1", "1 objects with a damaged iscrowd"),
    (segmentation([[1, 1, 9, 9]]), "annotation 77 has a polygon of 2 points; expected at least 3", "1 objects with a broken mask"),
    (segmentation([[1, 1, 9, 9, 5]]), "annotation 77 has a polygon of 5 numbers; expected pairs", "1 objects with a broken mask"),
    (segmentation([]), "annotation 77 has a segmentation without a polygon", "1 objects with a broken mask"),
    (segmentation(None), "annotation 77 has no segmentation", "1 objects without a mask"),
    (segmentation([["1", 1, 9, 9, 5, 5]]), "annotation 77 has a segmentation that is no list of polygons", "1 objects with a broken mask"),
    (segmentation([[1, 1, 900, 9, 5, 5]]), "annotation 77 has a polygon far outside of the picture", "1 objects with a broken mask"),
    (segmentation([[1, 1, float("nan"), 9, 5, 5]]), "annotation 77 has a polygon far outside", "1 objects with a broken mask"),
    (segmentation([[0, 0, 40, 30] * 500]), "annotation 77 has a polygon with an implausibly long outline", "1 objects with a broken mask"),
    (segmentation([[1, 1, 1.01, 1, 1, 1.01]]), "annotation 77 has a segmentation that covers no pixel", "1 masks without a pixel"),
    (
        segmentation({"size": [40, 30], "counts": [1200]}),
        r"annotation 77 has an RLE of the size \[40, 30\], and its picture has \[30, 40\]",
        "1 objects with a broken mask",
    ),
    (
        segmentation({"size": [30, 40], "counts": [7, 0, 1193]}),
        "annotation 77 has a segmentation that covers no pixel",
        "1 masks without a pixel",
    ),
    (
        segmentation({"size": [30, 40], "counts": [3, 8]}),
        "annotation 77 has an RLE whose counts do not add up to the 1200 pixels",
        "1 objects with a broken mask",
    ),
    (segmentation({"size": [30, 40], "counts": [-3, 1203]}), "annotation 77 has an RLE whose counts", "1 objects with a broken mask"),
    (segmentation({"size": [30, 40], "counts": "5:é"}), "annotation 77 has an RLE with damaged counts", "1 objects with a broken mask"),
    (segmentation({"size": [30, 40], "counts": "5:"}), "annotation 77 has an RLE whose counts", "1 objects with a broken mask"),
    (segmentation({"size": [30, 40], "counts": "o" * 9}), "annotation 77 has an RLE with damaged counts", "1 objects with a broken mask"),
    (segmentation({"size": [30, 40], "counts": ""}), "annotation 77 has an RLE with damaged counts", "1 objects with a broken mask"),
    (image(file_name="gone.png"), "image 5 has no file: there is none at .*/train2017/gone.png", "1 pictures without a file"),
    (
        image(file_name="../val2017/000000000632.png"),
        "image 5 has the file_name .*, which is no path below its folder",
        "1 pictures without a path",
    ),
    (image(file_name="/etc/passwd"), "image 5 has the file_name '/etc/passwd', which is no path", "1 pictures without a path"),
    (image(file_name="a\nb.png"), "image 5 has the file_name .*, which is no path", "1 pictures without a path"),
    (image(height=0), "image 5 has the size 20 x 0", "1 pictures without a size"),
    (image(height=10**6, width=10**6), "image 5 has the size 1000000 x 1000000", "1 pictures without a size"),
    (image(id=139), "image 139 is listed twice", "1 pictures listed twice"),
    (lambda content: content["categories"].append({"id": 3, "name": "bus"}), "category 3 is listed twice", "1 categories listed twice"),
]


@pytest.mark.parametrize(("damage", "message", "counted"), BROKEN, ids=[counted + message[:30] for _, message, counted in BROKEN])
def test_what_is_broken_is_named_in_one_line_or_left_out_and_counted(root: Path, damage: Any, message: str, counted: str) -> None:
    file = root / "annotations" / "instances_train2017.json"
    sound = opened(root, target="masks").train
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"data coco: .*instances_train2017.json: {message}.*Mend it, or set broken: drop$") as caught:
        coco(root, "masks", (24, 32))
    assert "\n" not in str(caught.value)
    source = coco(root, "masks", (24, 32), broken="drop")
    assert source.read.endswith(f"; left out: {counted}")
    assert source.train.sha256() == sound.sha256()


def test_objects_of_a_picture_that_is_left_out_are_left_out_with_it(root: Path) -> None:
    (root / "train2017" / "000000000139.png").unlink()
    source = opened(root, broken="drop", target="masks")
    assert len(source.train) == 2
    assert [len(source.train.target["masks"].rles(row)) for row in range(2)] == [2, 0]
    assert source.read.startswith(f"{root}: read 2 pictures with 2 objects to train on")


def test_a_box_that_rounding_puts_beside_its_picture_stays_as_it_is(root: Path) -> None:
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    box(-0.5, 0, 41, 30.9)(content)
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    target = opened(root, size=[30, 40]).train.target
    torch.testing.assert_close(target["boxes"][0, 2], torch.tensor([-0.5, 0, 40.5, 30.9]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "train2017").rename(root / "trian2017"),
            r"has no folder 'train2017' of pictures; did you mean 'trian2017'\?",
        ),
        (
            lambda root: (root / "annotations/instances_train2017.json").unlink(),
            r"there is no file .*instances_train2017.json; did you mean .*val",
        ),
        (
            lambda root: (root / "annotations/instances_val2017.json").write_text("[]"),
            "val2017.json must hold an object with the lists images",
        ),
        (lambda root: (root / "annotations/instances_val2017.json").write_text('{"images": [{'), "val2017.json is cut off"),
        (
            lambda root: (root / "annotations/instances_val2017.json").write_text('{"images": [1]}'),
            "entry 0 of images is a int, expected an obj",
        ),
        (
            lambda root: (root / "annotations/instances_val2017.json").write_text('{"images": [{]}'),
            "val2017.json is not valid JSON at '{]}'",
        ),
        (
            lambda root: (root / "annotations/instances_val2017.json").write_bytes(b'{"\xff": 1}'),
            "val2017.json is not valid JSON: it is not UTF-8",
        ),
        (
            lambda root: (root / "annotations/instances_val2017.json").write_text("{}"),
            "val2017.json lists no pictures that are in .*val2017",
        ),
        (lambda root: write(root, "val2017", categories=[]), "val2017.json lists no categories"),
        (
            lambda root: write(root, "val2017", categories=[*CATEGORIES[:2], {"id": 90, "name": "comb"}]),
            "must have the same categories; 90 is 'brush' and 'comb'",
        ),
        (lambda root: write(root, "val2017", categories=CATEGORIES[:2]), "must have the same categories; 90 is 'brush' and missing"),
        (lambda root: write(root, "val2017", categories=[{"id": 1}]), "category 1 must have a name"),
        (
            lambda root: write(root, "val2017", categories=[*CATEGORIES, {"id": 91, "name": "car"}]),
            "category 91 has the name 'car', which another",
        ),
    ],
)
def test_files_that_are_no_data_set_are_refused_in_one_line(root: Path, damage: Any, message: str) -> None:
    damage(root)
    with pytest.raises(UserError, match=message) as caught:
        opened(root)
    assert "\n" not in str(caught.value)


# --- what somebody else wrote ----------------------------------------------------------------------------------------


def test_entries_come_one_after_the_other_whatever_the_pieces_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"a": 1, "images": [{"id": k, "name": 'é{[,]}\\"' * k, "n": [k / 7, -k]} for k in range(40)], "b": [[], [1]], "c": {}}
    (tmp_path / "x.json").write_text("\ufeff " + json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for piece in (1, 2, 3, 7, 64, 1 << 20):
        monkeypatch.setattr("kdbench.data.json_entries._PIECE", piece)
        assert list(entries(tmp_path / "x.json", ("images",))) == [("images", entry) for entry in value["images"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": ' + b"[" * 100_000, "is nested too deeply"),
        (b'{"images": [{"id": ' + b"1" * 5_000 + b"}]}", "is not valid JSON at"),
        (b'{"images": [{"id": [' + b"1," * 5_000_000, "has an entry that is not valid JSON, or has more than 8 million characters"),
        (b'{"images": [{}, {}', "is cut off"),
        (b'{"images" [{}]}', "is not valid JSON at"),
        (b"{1: 2}", "is not valid JSON at"),
    ],
)
def test_hostile_json_ends_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(entries(tmp_path / "x.json", ("images",)))
    assert len(str(caught.value)) < 1_000
    assert "\n" not in str(caught.value)


def test_annotations_in_a_pipe_or_a_hole_are_refused(root: Path) -> None:
    file = root / "annotations" / "instances_train2017.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="there is no file"):
        opened(root)
    file.unlink()
    with file.open("wb") as sparse:
        sparse.truncate(1_900_000_000)
    with pytest.raises(UserError, match=r"can't be read: it has 1\.90 GB, most of which is a hole in the file"):
        opened(root)
    with file.open("wb") as sparse:
        sparse.truncate(2_100_000_000)
    with pytest.raises(UserError, match=r"can't be read: it has 2\.1 GB, expected at most 2 GB"):
        opened(root)


def test_a_picture_with_implausibly_many_objects_needs_a_limit(root: Path) -> None:
    many = [annotation(k, 139, 3, [1, 1, 8 + k / 1000, 8], [[1, 1, 9, 1, 9, 9]]) for k in range(1_200)]
    write(root, "train2017", annotations=many)
    with pytest.raises(UserError, match="a picture has 1,200 objects; set most_objects to at most 1,000, which keeps the largest"):
        opened(root)
    assert opened(root, most_objects=5).train.target["area"][0].sort().values.tolist() == pytest.approx(
        [8 * (8 + k / 1000) for k in range(1195, 1200)]
    )


# --- without the data ------------------------------------------------------------------------------------------------


def test_without_the_folder_the_facts_are_known(tmp_path: Path) -> None:
    with pytest.raises(NotHere, match=r"there is no folder .*/nowhere; get COCO from https://cocodataset.org/#download") as caught:
        coco(tmp_path / "nowhere", "masks", (64, 96))
    facts = caught.value.facts
    assert (facts.classes, facts.train, facts.test, facts.side, facts.target) == (80, 118_287, 5_000, (64, 96), "masks")


@pytest.mark.parametrize("target", ["boxes", "masks", "multi_label"])
def test_what_stands_in_has_the_columns_of_the_data(root: Path, target: str) -> None:
    real = opened(root, target=target).train
    with pytest.raises(NotHere) as caught:
        coco(root / "nowhere", target, (24, 32))
    stands_in = open_source(DataSpec.model_validate(json.loads(json.dumps(caught.value.facts.stand_in()))))
    check_alike(real, stands_in.train, but=("masks",))


def test_what_stands_in_for_keypoints_has_their_columns(people: Path) -> None:
    with pytest.raises(NotHere) as caught:
        coco(people / "nowhere", "keypoints", (24, 32))
    stands_in = open_source(DataSpec.model_validate(caught.value.facts.stand_in()))
    check_alike(opened(people, target="keypoints").train, stands_in.train)
    assert stands_in.train.target["keypoints"].shape == (1, 20 * 17, 3)


def check_alike(real: Any, other: Any, but: tuple[str, ...] = ()) -> None:
    assert other.image_size == real.image_size
    if isinstance(real.target, torch.Tensor):
        assert other.target.dtype == real.target.dtype
        assert other.target.ndim == real.target.ndim
        return
    assert other.target.keys() == real.target.keys()
    for name, column in real.target.items():
        assert other.target[name].dtype == column.dtype, name
        assert other.target[name].ndim == column.ndim, name
    assert {name: type(kind) for name, kind in other.kinds.items()} == {name: type(kind) for name, kind in real.kinds.items()}


def test_a_copy_has_the_same_hash_and_what_is_learned_decides_it(root: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(root, tmp_path / "copy")
    base = opened(root, target="masks").sha256
    assert opened(tmp_path / "copy", target="masks").sha256 == base
    assert (
        len(
            {
                base,
                *(
                    opened(root, target="masks", **changed).sha256
                    for changed in ({"fitting": "stretch"}, {"size": 32}, {"padding": [0, 0, 0]})
                ),
            }
        )
        == 4
    )
    write(tmp_path / "copy", "train2017", annotations=[*ANNOTATIONS[:3], {**ANNOTATIONS[3], "segmentation": [[4, 0, 20, 0, 20, 24]]}])
    changed = coco(tmp_path / "copy", "masks", (24, 32))
    assert changed.sha256 != base
    assert coco(tmp_path / "copy", "boxes", (24, 32)).sha256 == opened(root).sha256
