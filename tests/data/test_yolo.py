"""YOLO's text folders, written by hand: shares of width and height, polygons, pictures without objects, and paths of other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from kdbench.data.loader import in_order
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.data.yolo import yolo
from kdbench.errors import UserError

YAML = """
path: ../datasets/pets  # of whoever wrote it
train: images/train
val: images/val
nc: 2
names: [cat, dog]
"""
LABELS = {"a": "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.2 0.4\n", "b": "0 0.1 0.2 0.9 0.2 0.5 0.8\n"}
SIZES = {"a": (40, 20), "b": (30, 30), "c": (16, 24)}  # width and height


def picture(path: Path, size: tuple[int, int], orientation: int | None = None) -> None:
    tags = Image.Exif()
    if orientation is not None:
        tags[ExifTags.Base.Orientation] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, exif=tags)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for part in ("train", "val"):
        (root / "labels" / part).mkdir(parents=True)
        for name, size in SIZES.items():
            picture(root / "images" / part / f"{name}.png", size)
        for name, lines in LABELS.items():
            (root / "labels" / part / f"{name}.txt").write_text(lines)
    (root / "data.yaml").write_text(YAML)
    return root


def opened(root: Path, **options: Any) -> Source:
    return open_source(DataSpec.model_validate({"name": "yolo", "path": str(root), "size": [20, 40], **options}))


def test_boxes_are_centre_and_size_in_shares_of_the_picture(root: Path) -> None:
    source = opened(root)
    target = source.train.target
    assert source.class_names == ("cat", "dog")
    torch.testing.assert_close(target["boxes"][0], torch.tensor([[15.0, 5, 25, 15], [0, 0, 8, 8]]))
    torch.testing.assert_close(target["boxes"][1, 0], torch.tensor([3.0, 6, 27, 24]) * 20 / 30)  # around a polygon
    assert target["labels"].tolist() == [[1, 0], [0, -1], [-1, -1]]
    assert target["size"].tolist() == [[20, 40], [30, 30], [24, 16]]
    assert target["area"][0].tolist() == [100, 64]
    assert not target["crowd"].any()
    told = "read 3 pictures with 3 objects to train on and 3 pictures with 3 objects to test on; nothing is left out"
    assert source.reading == f"{root / 'data.yaml'}: {told}"


def test_shares_are_of_the_picture_as_it_is_shown(root: Path) -> None:
    picture(root / "images" / "train" / "a.png", (40, 20), orientation=6)  # shown 20 wide and 40 high
    source = opened(root, size=[40, 40], fitting="stretch")
    assert source.train.target["size"][0].tolist() == [40, 20]
    torch.testing.assert_close(source.train.target["boxes"][0, 0], torch.tensor([15.0, 10, 25, 30]))
    assert source.reading.endswith("turned upright by their EXIF tag: 1")


def test_several_labels_a_picture_are_its_classes(root: Path) -> None:
    assert opened(root, target="multi_label").train.target.tolist() == [[1, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize(
    "change",
    [
        lambda root, text: text.replace("names: [cat, dog]", "names:\n  0: cat\n  1: dog"),
        lambda root, text: text.replace("path: ../datasets/pets", "path: /home/somebody/pets"),
        lambda root, text: text.replace("images/train", "../images/train"),
        lambda root, text: text.replace("images/train", "[images/train]"),
        lambda root, text: text.replace("images/train", "train.txt"),
        lambda root, text: text.replace("path: ../datasets/pets", "path: .").replace("nc: 2", ""),
    ],
)
def test_what_exporters_write_names_the_same_data(root: Path, change: Any) -> None:
    expected = opened(root).sha256
    (root / "train.txt").write_text("./images/train/a.png\nimages/train/b.png\n\nimages/train/c.png\n")
    (root / "other.yaml").write_text(change(root, YAML))
    assert yolo(root / "other.yaml", size=(20, 40)).sha256 == expected


def test_labels_may_lie_beside_pictures_or_in_folders_inside(root: Path) -> None:
    for name in SIZES:
        (root / "images" / "train" / f"{name}.png").rename(root / f"{name}.png")
        if name in LABELS:
            (root / "labels" / "train" / f"{name}.txt").rename(root / f"{name}.txt")
    (root / "list.txt").write_text("a.png\nb.png\nc.png\n")
    (root / "data.yaml").write_text(YAML.replace("train: images/train", "train: list.txt"))
    assert opened(root).train.target["labels"].tolist() == [[1, 0], [0, -1], [-1, -1]]
    (root / "images" / "val" / "deep").mkdir()
    (root / "images" / "val" / "a.png").rename(root / "images" / "val" / "deep" / "a.png")
    (root / "labels" / "val" / "deep").mkdir()
    (root / "labels" / "val" / "a.txt").rename(root / "labels" / "val" / "deep" / "a.txt")
    assert yolo(root).test.target["labels"].tolist() == [[0, -1], [-1, -1], [1, 0]]
    assert len(list(in_order(yolo(root, size=32).test, 2))) == 2


def test_the_last_folder_called_images_is_the_one_with_labels_beside_it(root: Path) -> None:
    (root / "images" / "old").mkdir()
    for kind in ("images", "labels"):
        (root / kind / "train").rename(root / "images" / "old" / kind)
    (root / "data.yaml").write_text(YAML.replace("images/train", "images/old/images"))
    assert opened(root).train.target["labels"].tolist() == [[1, 0], [0, -1], [-1, -1]]


BROKEN = [
    ("2 0.5 0.5 0.2 0.2", "line 1 has the class 2, expected a whole number from 0 to 1", "1 objects of an unknown class"),
    ("0.5 0.5 0.5 0.2 0.2", "line 1 has the class 0.5", "1 objects of an unknown class"),
    ("-1 0.5 0.5 0.2 0.2", "line 1 has the class -1", "1 objects of an unknown class"),
    ("0 0.5 0.5 0 0.2", "line 1 has a box without area", "1 boxes without area"),
    ("0 0.5 0.5 1.4 0.2", "line 1 has a box outside of its picture of 40 x 20 pixels", "1 boxes outside of their picture"),
    ("0 15 5 10 10", "line 1 has a box outside of its picture", "1 boxes outside of their picture"),
    ("0 0.5 0.5 0.2", "line 1 has 4 numbers, expected a class and x, y, width and height", "1 lines that are no object"),
    ("0 0.5 0.5 0.2 0.2 0.9", "line 1 has 6 numbers", "1 lines that are no object"),
    ("0 0.5 0.5 0.2 0.2 0.9 0.8 0.1", "line 1 has 8 numbers", "1 lines that are no object"),
    ("cat 0.5 0.5 0.2 0.2", "line 1 is 'cat 0.5 0.5 0.2 0.2', which is no list of numbers", "1 lines that are no object"),
    ("0 nan 0.5 0.2 0.2", "line 1 is '0 nan 0.5 0.2 0.2', in which a number is not finite", "1 lines that are no object"),
]


@pytest.mark.parametrize(("line", "message", "counted"), BROKEN)
def test_a_broken_line_is_named_or_left_out(root: Path, line: str, message: str, counted: str) -> None:
    (root / "labels" / "train" / "a.txt").write_text(line + "\n0 0.5 0.5 0.5 0.5\n")
    with pytest.raises(UserError, match=f"data yolo: .*labels/train/a.txt: {message}.*Mend it, or set broken: drop$"):
        yolo(root)
    source = yolo(root, broken="drop")
    assert source.read.endswith(f"left out: {counted}")
    assert source.train.target["labels"].tolist() == [[0, -1], [0, -1], [-1, -1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / "data.yaml").rename(root / "pets.yaml"),
            "data.yaml can't be read: No such file or directory; did you mean 'pets.yaml'",
        ),
        (lambda root: (root / "data.yaml").write_text("- 1"), "data.yaml must have the keys names, train and val"),
        (lambda root: (root / "data.yaml").write_text("a: ["), "data.yaml: line 1, column 5: not valid YAML"),
        (
            lambda root: (root / "data.yaml").write_text(YAML.replace("[cat, dog]", "{0: cat, 2: dog}")),
            "from 0 without a gap, and 1 is missing",
        ),
        (lambda root: (root / "data.yaml").write_text(YAML.replace("nc: 2", "nc: 3")), "nc is 3, and names lists 2 classes"),
        (lambda root: (root / "data.yaml").write_text(YAML.replace("names", "nmes")), "must list the classes"),
        (
            lambda root: (root / "data.yaml").write_text(YAML.replace("images/train", "images/tarin")),
            "train is 'images/tarin', which is neither",
        ),
        (
            lambda root: (root / "data.yaml").write_text(YAML.replace("images/train", "/etc")),
            "train is '/etc', which is neither a folder nor",
        ),
        (lambda root: (root / "data.yaml").write_text(YAML.replace("images/train", "3")), "train is 3, expected a folder or a file"),
        (lambda root: (root / "data.yaml").write_text(YAML.replace("val:", "vla:")), "has no key 'val'; did you mean 'vla'"),
        (
            lambda root: (root / "labels" / "train").rename(root / "lables"),
            "no picture of train has a label file; .*a.png would have .*train/a.txt",
        ),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused_in_one_line(root: Path, change: Any, message: str) -> None:
    change(root)
    with pytest.raises(UserError, match=message) as caught:
        opened(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["../val/a.png", "/etc/passwd", "a\x1b.png"])
def test_a_list_that_leads_outside_is_refused(root: Path, line: str) -> None:
    (root / "train.txt").write_text(line)
    (root / "data.yaml").write_text(YAML.replace("images/train", "train.txt"))
    with pytest.raises(UserError, match=r"train.txt lists .*, which is no path below"):
        opened(root)


def test_a_listed_picture_that_is_missing_is_named_or_left_out(root: Path) -> None:
    (root / "train.txt").write_text("images/train/a.png\nimages/train/gone.png\n")
    (root / "data.yaml").write_text(YAML.replace("images/train", "train.txt"))
    with pytest.raises(UserError, match=r"gone.png is listed, and there is no such file\. Mend it"):
        yolo(root)
    assert yolo(root, broken="drop").read.endswith("left out: 1 pictures without a file")


def test_a_picture_that_is_none_is_named(root: Path) -> None:
    (root / "images" / "train" / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"images/train/b.png can't be decoded as an image"):
        opened(root)
