"""PASCAL VOC's files, written by hand: pixels counted from 1, difficult objects, palettes with a border; no XML that does more than say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdbench.data.facts import NotHere
from kdbench.data.loader import in_order, view_batches
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.data.views import IGNORED, Augment
from kdbench.data.voc import CLASSES, voc
from kdbench.data.xml_tree import InvalidXML, parse_xml
from kdbench.errors import UserError
from tests.data.holding import palette_png, png

SIZES = {"2007_000027": (48, 32), "2007_000032": (30, 40), "2007_000033": (20, 20)}  # height and width
XML = """<annotation>
	<folder>VOC2012</folder>
	<filename>{name}.jpg</filename>
	<size><width>{width}</width><height>{height}</height><depth>3</depth></size>
	<segmented>1</segmented>{objects}
</annotation>
"""
OBJECT = """
	<object>
		<name>{name}</name>
		<pose>Unspecified</pose>
		<truncated>0</truncated>
		<difficult>{difficult}</difficult>
		<bndbox>
			<xmin>{0}</xmin>
			<ymin>{1}</ymin>
			<xmax>{2}</xmax>
			<ymax>{3}</ymax>
		</bndbox>{more}
	</object>"""
PART = "<part><name>head</name><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></part>"


def thing(name: str, *box: Any, difficult: Any = 0, more: str = "") -> str:
    return OBJECT.format(*box, name=name, difficult=difficult, more=more)


OBJECTS = {
    "2007_000027": [thing("person", 4, 11, 31, 40, more=PART), thing("dog", 1, 1, 32, 48, difficult=1)],
    "2007_000032": [thing("aeroplane", "6.5", 3, 35, 29)],
    "2007_000033": [],
}


def annotate(root: Path, name: str, objects: list[str]) -> Path:
    height, width = SIZES[name]
    file = root / "Annotations" / f"{name}.xml"
    file.write_text(XML.format(name=name, width=width, height=height, objects="".join(objects)))
    return file


def labels_of(name: str) -> np.ndarray:
    height, width = SIZES[name]
    labels = np.zeros((height, width), np.uint8)
    labels[4:16, 4:16] = 255
    labels[6:14, 6:14] = 15
    return labels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("Annotations", "JPEGImages", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for number, name in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZES[name], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        annotate(root, name, OBJECTS[name])
        (root / "SegmentationClass" / f"{name}.png").write_bytes(palette_png(labels_of(name)))
    for kind in ("Main", "Segmentation"):
        (root / "ImageSets" / kind / "train.txt").write_text("2007_000027\n2007_000032\n")
        (root / "ImageSets" / kind / "val.txt").write_text("2007_000033 -1\n")
    return root


def opened(root: Path, **options: Any) -> Source:
    return open_source(DataSpec.model_validate({"name": "voc", "path": str(root), "size": [24, 32], **options}))


def test_boxes_count_pixels_from_one_and_include_the_last(root: Path) -> None:
    source = opened(root, size=[48, 64])
    target = source.train.target
    assert source.class_names == CLASSES
    scale = target["scale"].repeat(1, 2)[:, None]
    torch.testing.assert_close(
        target["boxes"] / scale, torch.tensor([[[3.0, 10, 31, 40], [0, 0, 32, 48]], [[5.5, 2, 35, 29], [0, 0, 0, 0]]])
    )
    assert target["labels"].tolist() == [[CLASSES.index("person"), CLASSES.index("dog")], [CLASSES.index("aeroplane"), -1]]
    assert target["size"].tolist() == [[48, 32], [30, 40]]
    assert target["area"][0].tolist() == [28 * 30, 32 * 48]
    assert source.test.target["labels"].tolist() == [[-1, -1]]
    assert (
        source.reading
        == f"{root}: read 2 pictures with 3 objects to train on and 1 pictures with 0 objects to test on; nothing is left out"
    )


def test_difficult_objects_are_not_learned(root: Path) -> None:
    assert opened(root).train.target["crowd"].tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("where", ["", "..", "../.."])
def test_the_year_is_found_from_the_folder_above(root: Path, where: str) -> None:
    assert opened((root / where).resolve()).train.sha256() == opened(root).train.sha256()


def test_several_labels_a_picture_are_its_classes_difficult_ones_too(root: Path) -> None:
    target = opened(root, target="multi_label").train.target
    assert target.shape == (2, 20)
    assert [[CLASSES[k] for k in row.nonzero().flatten()] for row in target] == [["dog", "person"], ["aeroplane"]]


def test_labels_per_pixel_are_palette_indices_with_a_border_that_counts_nowhere(root: Path) -> None:
    source = opened(root, target="segmentation", size=[48, 32], fitting="stretch")
    assert source.class_names == ("background", *CLASSES)
    assert (source.num_classes, source.ignore_index) == (21, IGNORED)
    (batch,) = in_order(source.train, 2)
    assert torch.equal(batch.target[0], torch.from_numpy(labels_of("2007_000027")).long())
    assert sorted(batch.target.unique().tolist()) == [0, 15, IGNORED]
    for view in range(3):
        (moved,) = view_batches(source.train, view, Augment(resized_crop=0.5, crop=2, flip=True), 0, 2)
        assert set(moved.target.unique().tolist()) <= {0, 15, IGNORED}


def test_labels_of_a_class_that_is_none_end_in_one_line(root: Path) -> None:
    (root / "SegmentationClass" / "2007_000032.png").write_bytes(palette_png(np.full((30, 40), 21, np.uint8)))
    with pytest.raises(
        UserError, match=r"2007_000032.png has a pixel of value 21, which label map 'voc' of 21 classes does not name\. Segment"
    ):
        list(in_order(opened(root, target="segmentation").train, 2))
    (root / "SegmentationClass" / "2007_000032.png").write_bytes(png(np.zeros((30, 40, 3), np.uint8)))
    with pytest.raises(UserError, match=r"2007_000032.png holds colours, and label map 'voc' is of numbers"):
        list(in_order(voc(root, "segmentation", 32).train, 2))


def test_the_centre_is_for_labels_alone(root: Path) -> None:
    (batch,) = in_order(opened(root, target="segmentation", fitting="centre", size=16).train, 2)
    assert batch.target.shape == (2, 16, 16)
    with pytest.raises(UserError, match="fitting: centre is of target: segmentation, since it would cut boxes off"):
        opened(root, fitting="centre")


BROKEN = [
    ([thing("dog", 3, 3, 2, 9)], r"object 1 has a box without area, \[2, 2, 2, 9\]", "1 boxes without area"),
    ([thing("dog", 3, 3, 60, 9)], "object 1 has a box outside of its picture of 40 x 30 pixels", "1 boxes outside of their picture"),
    ([thing("dog", 3, 3, 30, "x")], "object 1 has no bndbox of xmin, ymin, xmax and ymax", "1 objects without a box"),
    ([thing("dog", 3, 3, 30, "inf")], "object 1 has no bndbox", "1 objects without a box"),
    ([thing("dgo", 3, 3, 30, 9)], "object 1 has the class 'dgo', which the option classes does not name", "1 objects of an unknown class"),
    ([thing("dog", 3, 3, 30, 9, difficult=2)], "object 1 has difficult '2', expected 0 or 1", "1 objects with a damaged difficult"),
]


@pytest.mark.parametrize(("objects", "message", "counted"), BROKEN)
def test_a_broken_object_is_named_or_left_out(root: Path, objects: list[str], message: str, counted: str) -> None:
    annotate(root, "2007_000032", objects)
    with pytest.raises(UserError, match=f"data voc: .*2007_000032.xml: {message}.*Mend it, or set broken: drop$"):
        voc(root)
    source = voc(root, broken="drop")
    assert source.read.endswith(f"read 2 pictures with 2 objects to train on and 1 pictures with 0 objects to test on; left out: {counted}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "2007_000032.xml can't be read: No such file"),
        ("<annotation><size>", "2007_000032.xml is not valid XML: no element found"),
        ("<annotation/>", "2007_000032.xml has no size with a height and a width"),
        ("<annotation><size><width>1e9</width><height>1e8</height></size></annotation>", "has no size"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "declares a document type, which is not read"),
    ],
)
def test_a_broken_annotation_is_named_or_left_out(root: Path, content: str | None, message: str) -> None:
    file = root / "Annotations" / "2007_000032.xml"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        voc(root)
    assert "\n" not in str(caught.value)
    assert len(voc(root, broken="drop").train) == 1


@pytest.mark.parametrize("target", ["boxes", "segmentation"])
def test_a_missing_picture_is_named_or_left_out(root: Path, target: str) -> None:
    (root / "JPEGImages" / "2007_000032.jpg").unlink()
    with pytest.raises(UserError, match=r"has no picture: there is no file 2007_000032 in .*JPEGImages. Mend it, or set broken: drop"):
        voc(root, target)
    assert len(voc(root, target, broken="drop").train) == 1


def test_missing_labels_are_named_or_left_out(root: Path) -> None:
    (root / "SegmentationClass" / "2007_000032.png").unlink()
    with pytest.raises(UserError, match=r"train: 2007_000032 has no labels: there is no file .*SegmentationClass/2007_000032.png"):
        voc(root, "segmentation")
    assert voc(root, "segmentation", broken="drop").read.endswith("left out: 1 pictures without labels")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("../../x\n", r"Main/train.txt lists '../../x', which is no name of a picture"),
        ("", "Main/train.txt lists no pictures"),
        ("2007_000027\n2007_000027\n", "lists '2007_000027' twice; list it once"),
        ("\x1b[31m\n", "which is no name of a picture"),
    ],
)
def test_a_list_that_is_none_is_refused(root: Path, lines: str, message: str) -> None:
    (root / "ImageSets" / "Main" / "train.txt").write_text(lines)
    with pytest.raises(UserError, match=message):
        voc(root)


def test_an_unknown_list_is_refused_with_the_nearest(root: Path) -> None:
    with pytest.raises(UserError, match=r"Main/trian.txt can't be read: No such file or directory; did you mean 'train'\?"):
        voc(root, train="trian")


# --- what somebody else wrote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>', "declares a document type"),
        (b'<!DOCTYPE x SYSTEM "file:///etc/passwd"><x/>', "declares a document type"),
        (b"<a>" * 60 + b"</a>" * 60, "has more than 50 levels or 50,000 elements"),
        (b"<a>" + b"<b/>" * 60_000 + b"</a>", "has more than 50 levels or 50,000 elements"),
        (b"<a>&b;</a>", "is not valid XML: undefined entity"),
        (b'<?xml version="1.0" encoding="rot13"?><a/>', "is not valid XML"),
        (b"", "is not valid XML: no element found"),
        (b"\xff\xfe\x00", "is not valid XML"),
    ],
)
def test_xml_that_does_more_than_say_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(InvalidXML, match=message):
        parse_xml(content)


def test_xml_that_is_too_long_is_left_alone(root: Path) -> None:
    (root / "Annotations" / "2007_000032.xml").write_bytes(b"<annotation>" + b" " * 4_000_000 + b"</annotation>")
    with pytest.raises(UserError, match=r"2007_000032.xml can't be read: it has more than 4 MB\. Mend it"):
        voc(root)


def test_xml_gives_its_elements() -> None:
    tree = parse_xml(b"<a x='1'><b>one</b><b>tw&amp;o</b></a>")
    assert [tree.tag, tree.attrib, [b.text for b in tree.findall("b")]] == ["a", {"x": "1"}, ["one", "tw&o"]]


# --- without the data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "form", "classes"), [("boxes", "boxes", 20), ("segmentation", "labels", 21), ("multi_label", "present", 20)]
)
def test_without_the_folder_a_stand_in_has_its_columns(root: Path, target: str, form: str, classes: int) -> None:
    with pytest.raises(NotHere, match=r"there is no folder .*nowhere; get VOC2012 from") as caught:
        voc(root / "nowhere", target, (24, 32))
    assert (caught.value.facts.target, caught.value.facts.classes) == (form, classes)
    stands_in = open_source(DataSpec.model_validate(json.loads(json.dumps(caught.value.facts.stand_in()))))
    real = opened(root, target=target)
    assert stands_in.num_classes == real.num_classes
    assert stands_in.image_shape == real.image_shape
    assert stands_in.ignore_index == real.ignore_index
    if target == "boxes":
        assert stands_in.train.target.keys() == real.train.target.keys()
    else:
        assert (stands_in.train.target.dtype, stands_in.train.target.shape[1:]) == (real.train.target.dtype, real.train.target.shape[1:])
    list(view_batches(stands_in.train, 0, Augment(flip=True, crop=2), 0, 8))
