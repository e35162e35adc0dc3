"""Folders of pictures and labels: the numbers that files hold become the classes that people mean, or end in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdbench.data.decoding import check_decodable
from kdbench.data.facts import NotHere
from kdbench.data.loader import in_order
from kdbench.data.masks_folder import masks_folder
from kdbench.data.named_label_maps import NAMES, named_label_map, own_label_map
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.data.views import IGNORED
from kdbench.errors import UserError
from tests.data.holding import palette_png, png

SIZE = (20, 30)  # height and width

# Of each map some numbers or colours with their class, from the data sets' own documentation; None counts nowhere.
KNOWN: dict[str, list[tuple[Any, str | None]]] = {
    "cityscapes": [
        (7, "road"),
        (8, "sidewalk"),
        (24, "person"),
        (26, "car"),
        (33, "bicycle"),
        (0, None),
        (3, None),
        (29, None),
        (30, None),
    ],
    "ade20k": [(1, "wall"), (2, "building"), (13, "person"), (21, "car"), (150, "flag"), (0, None)],
    "camvid": [
        ((128, 128, 128), "sky"),
        ((128, 64, 128), "road"),
        ((128, 0, 192), "road"),
        ((0, 0, 192), "pavement"),
        ((64, 0, 128), "car"),
        ((0, 128, 192), "bicyclist"),
        ((192, 0, 192), "bicyclist"),
        ((0, 0, 0), None),
    ],
    "coco_stuff": [
        (0, "person"),
        (2, "car"),
        (12, "stop sign"),
        (89, "toothbrush"),
        (91, "banner"),
        (156, "sky-other"),
        (181, "wood"),
        (255, None),
    ],
}
COUNTS = {"cityscapes": 19, "ade20k": 150, "camvid": 11, "coco_stuff": 171}
FILES = {
    "cityscapes": ("leftImg8bit/{part}/ulm/ulm_{k:06}_leftImg8bit.png", "gtFine/{part}/ulm/ulm_{k:06}_gtFine_labelIds.png", "train", "val"),
    "ade20k": ("images/{part}/ADE_{k:08}.jpg", "annotations/{part}/ADE_{k:08}.png", "training", "validation"),
    "camvid": ("{part}/0016E5_{k:05}.png", "{part}_labels/0016E5_{k:05}_L.png", "train", "test"),
    "coco_stuff": ("{part}/{k:012}.jpg", "stuffthingmaps/{part}/{k:012}.png", "train2017", "val2017"),
    "identity": ("images/{part}/p{k}.jpg", "masks/{part}/p{k}.png", "train", "val"),
}


def labels_of(values: list[Any]) -> np.ndarray:
    """Columns of each value in turn."""
    table = np.array(values, np.uint8)
    return table[np.tile(np.arange(SIZE[1]) % len(values), (SIZE[0], 1))]


def write(root: Path, name: str, values: list[Any], count: int = 2) -> Path:
    """A data set in its layout: `count` pictures a part, whose labels hold these values."""
    images, labels, *parts = FILES[name]
    for part in parts:
        for k in range(count):
            picture, mask = (root / pattern.format(part=part, k=k) for pattern in (images, labels))
            picture.parent.mkdir(parents=True, exist_ok=True)
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(k).integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(picture)
            mask.write_bytes(png(labels_of(values)))
    return root


def opened(root: Path, **options: Any) -> Source:
    spec = {"name": "masks_folder", "path": str(root), "size": list(SIZE), "fitting": "stretch", **options}
    return open_source(DataSpec.model_validate(spec))


@pytest.mark.parametrize("name", NAMES)
def test_a_named_map_turns_what_files_hold_into_the_classes_that_are_learned(tmp_path: Path, name: str) -> None:
    values, expected = zip(*KNOWN[name], strict=True)
    source = opened(write(tmp_path / "data", name, list(values)), labels=name)
    assert source.num_classes == len(source.class_names) == len(set(source.class_names)) == COUNTS[name]
    assert source.ignore_index == IGNORED
    (batch,) = in_order(source.train, 2)
    numbers = [IGNORED if each is None else source.class_names.index(each) for each in expected]
    assert torch.equal(batch.target[1], torch.from_numpy(labels_of(numbers)).long())
    assert source.reading == f"{tmp_path / 'data'}: read 2 pictures with labels to train on and 2 to test on; nothing is left out"


def test_maps_name_each_number_once_in_the_order_of_the_data_set() -> None:
    for name in ("cityscapes", "ade20k", "coco_stuff"):
        learned = {number: label for number, label in named_label_map(name).numbers.items() if label != IGNORED}
        assert [learned[number] for number in sorted(learned)] == list(range(COUNTS[name]))
    assert len(named_label_map("cityscapes").numbers) == 34
    assert len(named_label_map("camvid").colours) == 32
    assert len(named_label_map("coco_stuff").numbers) == 172


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("cityscapes", [0, 255], "has a pixel of value 255, which label map 'cityscapes' of 19 classes does not name"),  # train ids
        ("ade20k", [0, 151], "has a pixel of value 151, which label map 'ade20k' of 150 classes does not name"),
        ("coco_stuff", [0, 182], "has a pixel of value 182, which label map 'coco_stuff' of 171 classes does not name"),
        ("coco_stuff", [0, 11], "has a pixel of value 11, which label map 'coco_stuff'"),  # id 12, which no picture has
        ("camvid", [3, 4], "holds numbers, and label map 'camvid' is of colours"),
        ("camvid", [(1, 2, 3)], r"has a pixel of colour \[1, 2, 3\], which label map 'camvid'"),
    ],
)
def test_files_of_another_map_end_in_one_line_before_the_training(tmp_path: Path, name: str, values: list[Any], message: str) -> None:
    source = opened(write(tmp_path, name, values), labels=name)
    others = ", ".join(other for other in NAMES if other != name)
    way_out = f"Set labels to the map of these files: {others}, or a mapping of each number to its class"
    with pytest.raises(UserError, match=rf"{message}.*\. {way_out}") as caught:
        check_decodable(source.train, "training")
    assert "\n" not in str(caught.value)


def test_without_a_map_a_number_beyond_the_classes_names_the_file_the_value_and_the_maps(tmp_path: Path) -> None:
    source = opened(write(tmp_path, "identity", [0, 1, 7]), classes=["sky", "sea", "sand"])
    maps = "cityscapes, ade20k, camvid, coco_stuff"
    with pytest.raises(
        UserError, match=rf"masks/train/p0.png has a pixel of value 7, which label map 'identity' of 3 classes .*{maps}, or a map"
    ):
        list(in_order(source.train, 1))


def test_without_a_map_each_number_is_its_class_and_255_counts_nowhere(tmp_path: Path) -> None:
    source = opened(write(tmp_path, "identity", [0, 2, 255]), classes=["sky", "sea", "sand"])
    assert next(in_order(source.train, 2)).target[0, 0, :3].tolist() == [0, 2, IGNORED]


def test_a_map_of_ones_own_names_every_number_that_occurs(tmp_path: Path) -> None:
    root = write(tmp_path, "identity", [10, 20, 30])
    source = opened(root, classes=["sky", "sea"], labels={"10": 1, 20: 0, 30: 255})
    assert next(in_order(source.train, 2)).target[0, 0, :3].tolist() == [1, 0, IGNORED]
    with pytest.raises(UserError, match="has a pixel of value 30, which label map 'labels' of 2 classes does not name"):
        list(in_order(opened(root, classes=["sky", "sea"], labels={10: 1, 20: 0}).train, 2))
    assert own_label_map({0: 1}, ("a", "b")).numbers == {0: 1, 255: 255}


def test_palettes_are_read_as_indices(tmp_path: Path) -> None:
    root = write(tmp_path, "identity", [0])
    (root / "masks" / "train" / "p0.png").write_bytes(palette_png(labels_of([0, 1])))
    assert next(in_order(opened(root, classes=["sky", "sea"]).train, 1)).target[0, 0, :4].tolist() == [0, 1, 0, 1]


def test_files_are_found_by_patterns_and_paired_by_what_the_stars_stand_for(tmp_path: Path) -> None:
    for place in ("north/a", "north/b", "south/a"):
        (tmp_path / "scenes" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "scenes" / f"{place}_rgb.png")
        mask = tmp_path / "truth" / place.replace("/", "-")
        mask.parent.mkdir(exist_ok=True)
        mask.with_suffix(".png").write_bytes(png(labels_of([1 if place == "south/a" else 0])))
    (tmp_path / "scenes" / "north" / "c_depth.png").write_bytes(b"")
    source = masks_folder(
        tmp_path, classes=("x", "y"), images="scenes/{part}/*_rgb.png", masks="truth/{part}-*.png", train="north", test="south", size=16
    )
    assert [len(source.train), len(source.test)] == [2, 1]
    assert source.train.encoded_images.store.name(1).endswith("scenes/north/b_rgb.png")
    (batch,) = in_order(source.test, 1)
    assert sorted(batch.target.unique().tolist()) == [1, IGNORED]  # letterboxed
    with pytest.raises(UserError, match=r"images 'scenes/\*/\*.png' and masks 'truth/\*.png' must have as many \* each"):
        masks_folder(tmp_path, classes=("x", "y"), images="scenes/*/*.png", masks="truth/*.png")


@pytest.mark.parametrize("pattern", ["../*.png", "/etc/*", "images/x.png", "a/../../*.jpg"])
def test_a_pattern_that_leads_outside_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match="expected a path below `path` with a "):
        masks_folder(write(tmp_path, "identity", [0]), classes=("x",), images=pattern)


def test_a_picture_without_labels_is_named_or_left_out(tmp_path: Path) -> None:
    root = write(tmp_path, "identity", [0])
    (root / "masks" / "train" / "p1.png").unlink()
    with pytest.raises(
        UserError, match=r"images/train/p1.jpg has no labels: there is no file .*masks/train/p1.png\. Mend it, or set broken: drop"
    ):
        masks_folder(root, classes=("x",))
    source = masks_folder(root, classes=("x",), broken="drop")
    assert (len(source.train), source.read.partition("; ")[2]) == (1, "left out: 1 pictures without labels")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "classes must list the names of the classes, or labels name a map: cityscapes, ade20k"),
        ({"labels": "camvid", "classes": ["x"]}, "labels: camvid names the classes itself; leave classes out"),
        ({"labels": {0: 3}, "classes": ["x"]}, "labels has the class 3, and classes lists 1 names"),
        ({"labels": {0: -1}, "classes": ["x"]}, "labels has the class -1, and classes lists 1 names"),
        ({"labels": {70_000: 0}, "classes": ["x"]}, "labels has the number 70000, expected 0 .. 65535"),
        ({"labels": "cityscape"}, "labels.literal.*: expected 'identity', 'cityscapes'"),
        ({"classes": ["x"], "train": "trian"}, r"has no pictures 'images/trian/\*'; it holds images, masks"),
        ({"labels": "cityscapes"}, r"has no pictures 'leftImg8bit/train/\*/\*_leftImg8bit.png'"),
    ],
)
def test_wrong_options_are_refused_in_one_line_each(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(write(tmp_path, "identity", [0]), **options)


def test_a_label_file_that_is_none_is_named_when_the_data_are_opened(tmp_path: Path) -> None:
    root = write(tmp_path, "identity", [0])
    (root / "masks" / "train" / "p1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"masks/train/p1.png can't be decoded as an image: it is none of BMP, GIF, PNG"):
        masks_folder(root, classes=("x",))


def test_a_picture_of_another_size_than_its_labels_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, "identity", [0])
    (root / "masks" / "train" / "p1.png").write_bytes(png(np.zeros((10, 12), np.uint8)))
    source = masks_folder(root, classes=("x",), size=16)
    with pytest.raises(
        UserError, match=r"images/train/p1.jpg has 30 x 20 pixels, and its annotation or mask 12 x 10; mend one of the two, or"
    ):
        list(in_order(source.train, 2))


@pytest.mark.parametrize("name", NAMES)
def test_without_the_folder_a_stand_in_has_its_columns(tmp_path: Path, name: str) -> None:
    real = opened(write(tmp_path / "data", name, [KNOWN[name][0][0]]), labels=name)
    with pytest.raises(NotHere, match=f"there is no folder .*nowhere; get {name} from http") as caught:
        masks_folder(tmp_path / "nowhere", name, size=SIZE)
    stands_in = open_source(DataSpec.model_validate(json.loads(json.dumps(caught.value.facts.stand_in()))))
    assert (stands_in.num_classes, stands_in.image_shape, stands_in.ignore_index) == (real.num_classes, real.image_shape, real.ignore_index)
    assert (stands_in.train.target.dtype, stands_in.train.target.shape[1:]) == (real.train.target.dtype, real.train.target.shape[1:])
    with pytest.raises(UserError, match=r"there is no folder .*nowhere$"):
        masks_folder(tmp_path / "nowhere", classes=("x",))


def test_segmentation_trains_on_such_files_and_is_measured(tmp_path: Path) -> None:
    from kdbench.tasks.segmentation import Segmentation
    from kdbench.training.evaluate import targets_of

    write(tmp_path, "camvid", [(128, 128, 128), (128, 64, 128), (0, 0, 0)], count=6)
    data = {"name": "masks_folder", "path": str(tmp_path), "labels": "camvid", "size": 32}
    task = Segmentation(Segmentation.Options(data=DataSpec.model_validate(data), val_size=2))
    splits = task.splits()
    target = targets_of(splits.test)
    assert target.shape == (6, 32, 32)
    assert sorted(target.unique().tolist()) == [0, 3, IGNORED]
    prediction = torch.nn.functional.one_hot(target.long().where(target != IGNORED, 0), 11).movedim(-1, 1).float() * 10
    assert task.metrics(prediction, target)["miou"] == 100
    assert 0 < task.chance(target) < 50
