"""Stamps on photographs: which files are read, what each part is made of, and that masks, boxes, classes and captions say one thing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdbench.data import sources, stamp_files
from kdbench.data.columns import several
from kdbench.data.facts import NotHere
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.data.stamp_files import GROUNDS, INSTALLED, PARTS, STAMPS, Library, open_library
from kdbench.data.stamps import _STANDARD, Painter, caption_of
from kdbench.errors import TooMuch, UserError
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from tests.data.stamp_share import disc, write_share
from tests.each_task import MASKS
from tests.training.units import layout, unit

COLOURS = {"animals": (250, 10, 10), "food": (10, 250, 10), "town": (10, 10, 250)}
NUMBERS = {"train": 24, "val": 8, "test": 8}
HERE = (INSTALLED / STAMPS).is_dir() and (INSTALLED / GROUNDS).is_dir()


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the layout of /usr/share: four or more objects of three categories, symbols, and twelve photographs."""
    write_share(tmp_path, COLOURS)
    monkeypatch.setenv("KDBENCH_DATA", str(tmp_path))
    sources._opened.cache_clear()
    yield tmp_path
    sources._opened.cache_clear()


def library(categories: tuple[str, ...] | None = None) -> Library:
    return open_library(categories, 20, 64, _STANDARD)


def opened(**options: Any) -> Source:
    sources._opened.cache_clear()
    return open_source(DataSpec.model_validate({"name": "stamps", "size": 32, **NUMBERS, **options}))


# files


def test_every_form_of_transparency_is_read_and_what_has_none_is_left_out(share: Path) -> None:
    folder = share / STAMPS / "food"
    grey = disc((90, 90, 90)).convert("LA")
    grey.save(folder / "x-grey.png")
    palette = disc((10, 250, 10)).convert("RGB").quantize(4)
    corner = palette.getpixel((0, 0))
    assert isinstance(corner, int)
    Image.fromarray(np.where(np.asarray(disc((0, 0, 0)).getchannel("A")) > 0, 1 - corner, corner).astype(np.uint8), "P").save(
        folder / "x-palette.png", transparency=corner
    )
    keyed = np.full((40, 60, 3), 255, np.uint8)
    keyed[10:30, 20:50] = (10, 250, 10)
    Image.fromarray(keyed).save(folder / "x-keyed.png", transparency=(255, 255, 255))
    disc((1, 2, 3)).convert("RGB").save(folder / "x-opaque.png")
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(folder / "x-nothing.png")
    disc((10, 250, 10)).save(folder / "food-0_mirror.png")
    (folder / "x-link.png").symlink_to(folder / "x-grey.png")
    found = library()
    names = {stamp.name.rpartition("/")[2] for pool in found.pools.values() for stamp in pool.stamps[1]}
    assert names == {*(f"food-{number}.png" for number in range(5)), "x-grey.png", "x-palette.png", "x-keyed.png"}
    assert all(stamp.picture.mode == "RGBA" for pool in found.pools.values() for those in pool.stamps for stamp in those)
    (cut,) = [stamp.picture for pool in found.pools.values() for stamp in pool.stamps[1] if stamp.name.endswith("x-keyed.png")]
    assert cut.size == (20, 13)  # 30 x 20 pixels are opaque, of which the longer side may have 20
    assert found.read == (
        "data stamps: 18 objects of 3 categories on 12 photographs; left out: 3 of other categories, 1 mirror images of another, "
        "2 without transparent pixels"
    )


def test_captions_are_the_first_line_or_the_name_of_the_file(share: Path) -> None:
    (share / STAMPS / "food" / "tame" / "food-2.txt").unlink()
    captions = library(("food",)).captions
    assert "A food number 0" in captions
    assert "food 2" in captions
    assert not any("Autre" in caption for caption in captions)


def test_each_object_and_each_ground_is_in_one_part_alone(share: Path) -> None:
    found = library()
    assert found.categories == ("animals", "food", "town")
    for category in range(3):
        names = {part: [stamp.name for stamp in found.pools[part].stamps[category]] for part in PARTS}
        assert [len(names[part]) for part in PARTS] == [3, 1, 1]
        everything = sorted(name for those in names.values() for name in those)
        assert len(set(everything)) == 5
        assert names["val"] == [everything[1]]
        assert names["test"] == [everything[2]]  # of five, every fourth
    shades = {part: {np.asarray(ground)[0, 0, 0].item() // 10 for ground in found.pools[part].grounds} for part in PARTS}
    assert [len(shades[part]) for part in PARTS] == [6, 3, 3]
    assert len(set().union(*shades.values())) == 12


def test_symbols_are_read_if_they_are_asked_for(share: Path) -> None:
    assert library(("symbols", "food")).categories == ("symbols", "food")


@pytest.mark.parametrize(
    ("categories", "said"),
    [
        (("animal",), "there is no category 'animal'; did you mean 'animals'?"),
        (("food", "food"), "category 'food' is listed twice; list it once"),
        (("food", "few"), "category 'few' has 2 usable pictures, expected 3 or more; leave it out"),
    ],
)
def test_categories_that_can_not_be_shared_out_are_refused(share: Path, categories: tuple[str, ...], said: str) -> None:
    (share / STAMPS / "few").mkdir()
    for name in "ab":
        disc((5, 5, 5)).save(share / STAMPS / "few" / f"{name}.png")
    with pytest.raises(UserError) as caught:
        library(categories)
    assert str(caught.value) == f"data stamps: {said}"
    assert library().categories == ("animals", "food", "town")
    assert "2 of categories with too few" in library().read


def test_a_package_that_is_missing_is_named(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamp_files, "INSTALLED", share / "nowhere")
    for inside, package in ((GROUNDS, "mate-backgrounds"), (STAMPS, "tuxpaint-stamps-default")):
        (share / inside).rename(share / "away")
        with pytest.raises(NotHere) as caught:
            opened()
        (share / "away").rename(share / inside)
        said = str(caught.value)
        assert f"data stamps: there is no folder {share / inside} and {share / 'nowhere' / inside}; run `apt-get install {package}`" in said
        assert "\n" not in said
    assert opened().name == "stamps"


def test_a_damaged_picture_is_named(share: Path) -> None:
    file = share / STAMPS / "food" / "tame" / "food-0.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"^{file} can't be decoded as an image: "):
        opened()
    file.write_bytes(b"")
    with pytest.raises(UserError, match=rf"^{file} can't be decoded as an image: the file is empty"):
        opened()


# scenes


NOT_HERE = pytest.mark.skipif(not HERE, reason="apt-get install tuxpaint-stamps-default mate-backgrounds")


@pytest.fixture(params=["stand-in", pytest.param("installed", marks=[NOT_HERE, pytest.mark.slow])])
def real(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The stand-in, and the packages themselves where they are installed."""
    if request.param == "stand-in":
        request.getfixturevalue("share")
    else:
        monkeypatch.delenv("KDBENCH_DATA", raising=False)
    return str(request.param)


def test_scenes_show_what_their_masks_say(share: Path) -> None:
    """In the stand-in an object's pixels have its category's colour where it is opaque, and the ground is grey."""
    found = library()
    colours = torch.tensor([COLOURS[name] for name in found.categories]).int()
    counts = []
    for index in range(40):
        scene = Painter(found.pools["train"], 48).draw(3, index, 3)
        counts.append(len(scene.objects))
        taken = np.zeros((48, 48), int)
        for shown in scene.objects:
            pixels = torch.from_numpy(scene.image[shown.mask]).int()
            assert len(pixels) >= 20
            off = (pixels - colours[shown.stamp.category]).abs().amax(1)
            assert (off <= 200).all()  # at the rim it is blended with what is behind, or with the rim of what is in front
            assert (off <= 3).float().mean() > 0.5
            taken += shown.mask
            x0, y0, x1, y1 = shown.box
            rim = shown.mask[y0:y1, x0:x1]
            assert rim[0].any()
            assert rim[-1].any()
            assert rim[:, 0].any()
            assert rim[:, -1].any()
            assert shown.mask.sum() == rim.sum()
            assert max(shown.stamp.picture.size) >= 14
        assert taken.max() == 1
        ground = scene.image[taken == 0].astype(int)
        neutral = np.ptp(ground, axis=1) <= 12
        assert neutral.mean() > 0.75  # the rest are half transparent rims
    assert set(counts) == {1, 2, 3}


def test_all_columns_tell_of_the_same_scenes(real: str) -> None:
    masks, boxes, present, captions = (opened(target=target) for target in ("mask", "boxes", "present", "caption"))
    each = opened(target="masks")
    assert masks.class_names == ("ground", *boxes.class_names)
    assert present.class_names == boxes.class_names
    assert captions.vocabulary is not None
    for part in ("train", "val", "test"):
        labels = getattr(masks, part).labels
        rows = several(getattr(boxes, part).target)
        shown = getattr(present, part).labels
        objects = several(getattr(each, part).target)
        assert torch.equal(objects["boxes"], rows["boxes"])
        assert torch.equal(objects["labels"], rows["labels"])
        assert torch.equal(getattr(masks, part).pixels, getattr(boxes, part).pixels)
        assert torch.equal(getattr(masks, part).pixels, several(getattr(captions, part).inputs)["image"])
        for row in range(NUMBERS[part]):
            there = rows["labels"][row] >= 0
            classes = {int(label) for label in rows["labels"][row][there]}
            assert classes == set(shown[row].nonzero().flatten().tolist())
            assert classes == {int(label) - 1 for label in labels[row].unique() if label}
            assert (rows["boxes"][row][~there] == 0).all()
            for number in there.nonzero().flatten().tolist():
                own = (objects["masks"][row, 0] >> number & 1).bool()
                assert (labels[row][own] == rows["labels"][row, number] + 1).all()
                down, across = own.nonzero().unbind(1)
                edges = [int(across.min()), int(down.min()), int(across.max()) + 1, int(down.max()) + 1]
                assert edges == rows["boxes"][row, number].int().tolist()
            assert torch.equal(objects["masks"][row, 0] != 0, labels[row] != 0)
            covered = torch.zeros(32, 32, dtype=torch.bool)
            for x0, y0, x1, y1 in rows["boxes"][row][there].int().tolist():
                assert 0 <= x0 < x1 <= 32
                assert 0 <= y0 < y1 <= 32
                covered[y0:y1, x0:x1] = True
            assert not (labels[row].bool() & ~covered).any()
            text = captions.vocabulary.decode(several(getattr(captions, part).inputs)["tokens"][row].tolist())
            assert text.count(", with") >= int(there.sum()) - 1
            assert "[unknown]" not in text


def test_a_picture_is_a_function_of_the_files_the_seed_and_its_index(real: str) -> None:
    one, again, more, other = opened(), opened(), opened(train=30), opened(seed=1)
    assert one.sha256 == again.sha256
    assert torch.equal(more.train.pixels[:24], one.train.pixels)
    assert torch.equal(more.test.pixels, one.test.pixels)
    assert torch.equal(more.train.labels[:24], one.train.labels)
    assert not torch.equal(other.train.pixels, one.train.pixels)
    assert len({one.sha256, more.sha256, other.sha256}) == 3
    parts = [part for part in (one.train, one.val, one.test) if part is not None]
    assert len(torch.cat([part.index for part in parts]).unique()) == 40


def test_other_files_are_other_data(share: Path) -> None:
    before = opened()
    for number in range(5):
        place = "wild" if number % 2 else "tame"
        disc((250, 200, 10)).save(share / STAMPS / "food" / place / f"food-{number}.png")
    after = opened()
    assert before.sha256 != after.sha256
    assert before.train_sha256 != after.train_sha256
    assert before.val_sha256 != after.val_sha256


def test_objects_that_overlap_leave_half_of_each_other_visible(share: Path) -> None:
    found = library()
    overlaps = 0
    for index in range(60):
        many = Painter(found.pools["train"], 32).draw(0, index, 8)
        for shown in many.objects:
            x0, y0, x1, y1 = shown.box
            width, height = shown.stamp.picture.size
            # An ellipse covers pi / 4 of its box. Its longer side is 0.3 to 0.6 of 32 pixels.
            long = max(x1 - x0, y1 - y0)
            smallest = 0.5 * 0.7 * long * long * min(width, height) / max(width, height) if long >= 9 else 0
            assert shown.mask.sum() >= min(smallest, 0.5 * 0.7 * 9 * 9 * 0.6)
        overlaps += len(many.objects) > 3
    assert overlaps > 10


def test_all_categories_are_equally_frequent(share: Path) -> None:
    extra = share / STAMPS / "food"
    for number in range(40):
        disc((10, 250, 10)).save(extra / f"more-{number}.png")
    labels = opened(target="class", train=300).train.labels
    counts = labels.bincount(minlength=3)
    assert counts.min() > 70


def test_a_class_belongs_to_pictures_of_one_object(share: Path) -> None:
    classes = opened(target="class")
    assert classes.train.classes is None
    found = library()
    for index in range(10):
        scene = Painter(found.pools["train"], 32).draw(0, index, 1)
        assert len(scene.objects) == 1
        assert classes.train.labels[index] == scene.objects[0].stamp.category


def test_captions_name_the_objects_from_the_back_to_the_front_and_equal_ones_have_one_number(share: Path) -> None:
    captions = opened(target="caption", train=80, most=1)
    assert captions.vocabulary is not None
    texts = [captions.vocabulary.decode(tokens.tolist()) for tokens in several(captions.train.inputs)["tokens"]]
    numbers = captions.train.labels.tolist()
    assert len(set(texts)) == 9  # three objects of each category are in the training part
    assert len(set(zip(texts, numbers, strict=True))) == 9
    assert min(numbers) >= 0
    scene = Painter(library().pools["train"], 32).draw(0, 0, 3)
    assert caption_of(scene) == ", with ".join(shown.stamp.caption.lower() for shown in scene.objects)


def test_what_does_not_fit_in_memory_is_refused(share: Path) -> None:
    with pytest.raises(TooMuch, match=r"data stamps: .* lower train, val, test or size"):
        opened(train=1_000_000, size=1024)


# parts


def test_validation_is_the_sources_own_part(share: Path) -> None:
    task = build_task(
        TaskSpec.model_validate({"name": "segmentation", "data": {"name": "stamps", "size": 32, **NUMBERS}, "transfer_size": 10})
    )
    splits, source = task.splits(), opened()
    assert source.val is not None
    assert torch.equal(splits.val.index, source.val.index)
    assert torch.equal(splits.val.labels, source.val.labels)
    assert torch.equal(splits.train.index, source.train.index)
    assert len(splits.transfer) == 10
    more = build_task(
        TaskSpec.model_validate({"name": "segmentation", "data": {"name": "stamps", "size": 32, **NUMBERS, "val": 9}, "transfer_size": 10})
    )
    assert more.splits().learned_hash != splits.learned_hash
    assert more.splits().test_hash == splits.test_hash
    with pytest.raises(UserError, match=r"^val_size: data 'stamps' has 8 validation samples of its own, .*; leave val_size out$"):
        build_task(TaskSpec.model_validate({"name": "segmentation", "data": {"name": "stamps", "size": 32, **NUMBERS}, "val_size": 4}))


@pytest.mark.parametrize(
    ("name", "target", "student"),
    [
        ("segmentation", "mask", {"name": "tiny_fcn", "width": 4}),
        ("detection", "boxes", {"name": "tiny_fcos", "width": 4}),
        ("instance_masks", "masks", MASKS),
        ("classification", "class", {"name": "tiny_cnn", "width": 4}),
        ("image_text", "caption", {"name": "tiny_towers", "width": 8, "depth": 1}),
    ],
)
def test_tasks_train_on_them(real: str, tmp_path: Path, name: str, target: str, student: dict[str, Any]) -> None:
    task = {"name": name, "data": {"name": "stamps", "size": 32, "target": target, **NUMBERS}}
    of = unit("none", task=task, student=student, recipe={"epochs": 1, "batch_size": 8, "lr": 0.01, "augment": {"crop": 2, "flip": True}})
    record = fit(of, LocalSession(), layout(tmp_path))
    assert record.test_metric is not None
    assert record.status == "ok"
