"""Images in files: the same views as tensors would have, in the same order whatever the threads, and one line for what is wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from kdbench.data import encoded
from kdbench.data.batch import Part
from kdbench.data.draws import Draws
from kdbench.data.encoded import EncodedImages
from kdbench.data.image_folder import image_folder
from kdbench.data.loader import Loader, in_order, view_batches
from kdbench.data.parquet import parquet
from kdbench.data.pixels import unit_range
from kdbench.data.resizing import part_bits, parts
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.data.views import Augment
from kdbench.errors import UserError
from kdbench.tasks.classification import Classification
from tests.data.viewing import augment

SIZE = 16
CLASSES = ("cat", "dog", "eel")
EVERYTHING = Augment(resized_crop=0.3, crop=2, flip=True, operations=1, color=0.3, erase=0.3, mixup=0.2, cutmix=1.0)


def picture(seed: int, width: int = 30, height: int = 22) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def content(seed: int, format: str = "PNG", **size: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, **size).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four training and two test images of each class, of several formats and sizes."""
    root = tmp_path / "pets"
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                format, suffix = (("PNG", "png"), ("JPEG", "JPEG"), ("JPEG", "jpg"), ("WEBP", "webp"))[k]
                seed = 100 * label + k + (1000 if part == "val" else 0)
                (root / part / name / f"{k}.{suffix}").write_bytes(content(seed, format, width=30 + k, height=20 + 9 * (k % 2)))
    return root


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Path]:
    """The same kind of images in Parquet: train a folder of two files with small row groups, test one file."""
    train = tmp_path / "train"
    train.mkdir()
    for number, seeds in enumerate((range(7), range(7, 12))):
        write(train / f"{number}.parquet", [content(seed, "PNG" if seed % 2 else "JPEG") for seed in seeds], [seed % 3 for seed in seeds])
    write(tmp_path / "test.parquet", [content(seed) for seed in range(20, 26)], [seed % 3 for seed in range(20, 26)])
    return {"train": train, "test": tmp_path / "test.parquet"}


def write(path: Path, images: list[Any], labels: list[Any], **columns: Any) -> None:
    pq.write_table(pa.table({"image": images, "label": labels, **columns}), path, row_group_size=3)


def seen(source: Source, spec: Augment = EVERYTHING, batch_size: int = 4, view: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    part = Part(source.train.inputs, source.train.target, source.train.index, classes=source.num_classes)
    batches = list(view_batches(part, view, spec, 7, batch_size))
    return torch.cat([batch.inputs for batch in batches]), torch.cat([batch.target for batch in batches])


# --- what is seen ----------------------------------------------------------------------------------------------------


def test_a_folder_of_images_becomes_a_source(folder: Path) -> None:
    source = open_source(DataSpec.model_validate({"name": "image_folder", "path": str(folder), "size": SIZE}))
    assert source.class_names == CLASSES
    assert source.image_shape == (3, SIZE, SIZE)
    assert source.train.target.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert source.train.index.tolist() == list(range(12))
    assert source.test.index.tolist() == list(range(12, 18))
    assert isinstance(source.train.inputs, EncodedImages)


def test_evaluation_sees_the_centre_of_the_resized_image(folder: Path) -> None:
    source = image_folder(folder, SIZE, resize=18)
    (batch,) = in_order(source.test, 10)
    names = sorted(path.relative_to(folder) for path in (folder / "val").rglob("*.*"))
    for row, name in enumerate(names):
        image = transforms.pil_to_tensor(Image.open(folder / name).convert("RGB"))
        shorter = transforms.resize(image, [18], antialias=True)
        expected = unit_range(transforms.center_crop(shorter, [SIZE, SIZE]))
        torch.testing.assert_close(batch.inputs[row], expected)


def test_in_memory_holds_what_evaluation_would_decode(folder: Path) -> None:
    lazy, ready = image_folder(folder, SIZE), image_folder(folder, SIZE, in_memory=True)
    assert ready.train.pixels.dtype == torch.uint8
    assert torch.equal(next(in_order(lazy.train, 12)).inputs, unit_range(ready.train.pixels))
    rest = EVERYTHING.model_copy(update={"resized_crop": None})
    for one, other in zip(seen(lazy, rest), seen(ready, rest), strict=True):
        assert torch.equal(one, other)


def test_a_random_part_is_cut_out_once_and_resized(folder: Path) -> None:
    source = image_folder(folder, SIZE)
    inputs, _ = seen(source, Augment(resized_crop=0.2), view=3)
    bits = part_bits(Draws(7, source.train.index, 3))
    for row, name in enumerate(sorted(path for path in (folder / "train").rglob("*.*"))):
        image = transforms.pil_to_tensor(Image.open(name).convert("RGB"))
        (box,) = parts(image.shape[1], image.shape[2], bits[row : row + 1], 0.2).tolist()
        torch.testing.assert_close(inputs[row], unit_range(transforms.resized_crop(image, *box, size=[SIZE, SIZE])))


def test_a_random_part_is_cropped_from_the_file_before_it_is_made_small(folder: Path) -> None:
    big = np.zeros((64, 64, 3), np.uint8)
    big[::2] = 255  # lines that only a part of it can show: the whole image, made small, is grey
    for path in (folder / "train").rglob("*.*"):
        path.unlink()
    for name in CLASSES:
        Image.fromarray(big).save(folder / "train" / name / "lines.png")
    source = image_folder(folder, SIZE)
    whole, _ = seen(source, Augment(), view=0)
    assert (whole - 0.5).abs().max() < 0.2
    views = torch.cat([seen(source, Augment(resized_crop=0.02), view=view)[0] for view in range(30)])
    assert views.amax() == 1
    assert len({image.numpy().tobytes() for image in views}) > 50


# --- the same on every worker ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 5])
def test_views_depend_neither_on_the_threads_nor_on_the_batches(folder: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    source = image_folder(folder, SIZE)
    expected = seen(source, batch_size=12)
    monkeypatch.setattr(encoded.torch, "get_num_threads", lambda: threads)
    for batch_size in (1, 5):
        for one, other in zip(expected, seen(source, batch_size=batch_size), strict=True):
            assert torch.equal(one, other)


def test_workers_batches_are_the_views_a_cache_would_hold(folder: Path) -> None:
    task = Classification(Classification.Options(data=DataSpec.model_validate({"name": "image_folder", "path": str(folder), "size": SIZE})))
    part = task.splits().transfer
    (cached,) = view_batches(part, 1, EVERYTHING, 3, len(part))
    for rank in (0, 1):
        loader = Loader(part, 4, augment=EVERYTHING, views=2, data_seed=3, order_seed=9, rank=rank, world_size=2)
        for batch in loader.batches(3):
            rows = (batch.index[:, None] == cached.index).int().argmax(1)
            assert torch.equal(batch.inputs, cached.inputs[rows])
            assert torch.equal(batch.target, cached.target[rows])


def test_a_resumed_epoch_continues_where_it_stopped(folder: Path) -> None:
    source = image_folder(folder, SIZE)
    part = Part(source.train.inputs, source.train.target, source.train.index, classes=3)
    loader = Loader(part, 4, augment=EVERYTHING, views=2, data_seed=3, order_seed=9)
    whole, rest = list(loader.batches(1)), list(loader.batches(1, start_step=1))
    assert [len(whole), len(rest)] == [3, 2]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(whole[1:], rest, strict=True))


def test_leaving_early_ends_the_threads(folder: Path) -> None:
    import threading

    batches = in_order(image_folder(folder, SIZE).train, 2)
    next(batches)
    assert any(thread.name.startswith("decode") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_bits(folder: Path) -> None:
    source = image_folder(folder, SIZE)
    part = Part(source.train.inputs, source.train.target, source.train.index, classes=3)
    here, there = (list(view_batches(part, 1, EVERYTHING, 7, 5, torch.device(name))) for name in ("cpu", "cuda"))
    assert all(torch.equal(a.inputs, b.inputs.cpu()) and b.inputs.is_cuda for a, b in zip(here, there, strict=True))


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_rows_come_in_the_order_of_files_and_rows(table: dict[str, Path]) -> None:
    source = parquet(**table, size=SIZE)
    assert source.class_names == ("0", "1", "2")
    assert source.train.target.tolist() == [seed % 3 for seed in range(12)]
    assert source.test.index.tolist() == list(range(12, 18))
    (batch,) = in_order(source.train, 12)
    for row in (1, 3, 7, 11):  # the PNGs, one of them in the second file
        image = transforms.resize(transforms.pil_to_tensor(picture(row)), [18], antialias=True)
        torch.testing.assert_close(batch.inputs[row], unit_range(transforms.center_crop(image, [SIZE, SIZE])))


def test_parquet_views_do_not_depend_on_what_is_kept_of_the_file(table: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = seen(parquet(**table, size=SIZE))
    monkeypatch.setattr("kdbench.data.parquet._ROW_GROUPS_KEPT", 1)
    for one, other in zip(expected, seen(parquet(**table, size=SIZE)), strict=True):
        assert torch.equal(one, other)


def test_structures_of_bytes_and_labels_that_are_names_are_read_as_hubs_write_them(table: dict[str, Path], tmp_path: Path) -> None:
    for name, count in (("a", 6), ("b", 3)):
        images = [{"bytes": content(seed), "path": None} for seed in range(count)]
        write(tmp_path / f"{name}.parquet", images, [CLASSES[2 - seed % 3] for seed in range(count)])
    source = parquet(tmp_path / "a.parquet", tmp_path / "b.parquet", size=SIZE)
    assert source.class_names == CLASSES
    assert source.train.target.tolist() == [2, 1, 0, 2, 1, 0]
    assert torch.equal(next(in_order(source.train, 6)).inputs[1], next(in_order(parquet(**table, size=SIZE).train, 2)).inputs[1])


# --- what a source is named by ---------------------------------------------------------------------------------------


def test_a_copy_of_a_folder_is_the_same_data_and_a_changed_one_is_not(folder: Path, tmp_path: Path) -> None:
    import shutil

    base = image_folder(folder, SIZE).sha256
    shutil.copytree(folder, tmp_path / "copy")
    assert image_folder(tmp_path / "copy", SIZE).sha256 == base
    assert image_folder(folder, SIZE + 2).sha256 != base
    assert image_folder(folder, SIZE, resize=30).sha256 != base
    (tmp_path / "copy/train/cat/0.png").rename(tmp_path / "copy/train/cat/00.png")
    assert image_folder(tmp_path / "copy", SIZE).sha256 != base
    with (folder / "train/cat/0.png").open("ab") as file:
        file.write(b"\0")
    assert image_folder(folder, SIZE).sha256 != base


def test_a_copy_of_parquet_files_is_the_same_data_and_a_changed_one_is_not(table: dict[str, Path], tmp_path: Path) -> None:
    base = parquet(**table, size=SIZE).sha256
    copy = tmp_path / "copied.parquet"
    copy.write_bytes(table["test"].read_bytes())
    assert parquet(table["train"], copy, size=SIZE).sha256 == base
    write(copy, [content(seed) for seed in range(30, 36)], [seed % 3 for seed in range(20, 26)])
    assert parquet(table["train"], copy, size=SIZE).sha256 != base


def test_a_selection_has_a_hash_of_its_own_and_decodes_nothing(folder: Path) -> None:
    part = image_folder(folder, SIZE).train
    part.inputs.sha256()  # which reads the files, once
    for path in (folder / "train").rglob("*.*"):
        path.write_bytes(b"no image")
    some = part.select(torch.tensor([3, 1]))
    assert [len(some), *some.inputs.shape] == [2, 2, 3, SIZE, SIZE]
    hashes = {part.select(torch.tensor(rows)).inputs.sha256() for rows in ([3, 1], [3, 2], [1, 3], [3])}
    assert len({*hashes, part.inputs.sha256()}) == 5


# --- mistakes --------------------------------------------------------------------------------------------------------


def no_train(folder: Path) -> None:
    (folder / "train").rename(folder / "trian")


def both_tests(folder: Path) -> None:
    (folder / "test").mkdir()


def no_images(folder: Path) -> None:
    for path in (folder / "train/dog").iterdir():
        path.rename(path.with_suffix(".txt"))


def other_class(folder: Path) -> None:
    (folder / "val/eel").rename(folder / "val/fox")


def no_classes(folder: Path) -> None:
    for path in (folder / "val").rglob("*.*"):
        path.unlink()
    for name in CLASSES:
        (folder / "val" / name).rmdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_train, r"there is no folder .*pets/train; did you mean 'trian'\?"),
        (both_tests, r"pets has both test and val; say which"),
        (no_images, r"pets/train/dog holds no images \(it holds 4 \.txt\); expected files ending in \.jpg"),
        (other_class, r"must hold folders of the same classes; 'eel' is only in train"),
        (no_classes, r"pets/val holds no folders; expected one for each class"),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused_in_one_line(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        image_folder(folder, SIZE)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_a_centre_that_does_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        image_folder(folder / "nowhere")
    with pytest.raises(UserError, match="resize is 10, smaller than size, 16"):
        image_folder(folder, SIZE, resize=10)
    with pytest.raises(UserError, match=r"there is no folder .*tset"):
        image_folder(folder, SIZE, test="tset")


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: b"no image at all", lambda content: content[:60]])
def test_a_broken_image_is_named_when_it_is_reached(folder: Path, damage: Any) -> None:
    broken = folder / "train/dog/0.png"
    broken.write_bytes(damage(broken.read_bytes()))
    source = image_folder(folder, SIZE)
    with pytest.raises(UserError, match=r"train/dog/0\.png can't be decoded as an image: ") as caught:
        list(in_order(source.train, 4))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"train/dog/0\.png"):
        image_folder(folder, SIZE, in_memory=True)


def test_an_image_that_went_away_is_named(folder: Path) -> None:
    source = image_folder(folder, SIZE)
    (folder / "train/dog/0.png").unlink()
    with pytest.raises(UserError, match=r"train/dog/0\.png can't be read: No such file"):
        list(in_order(source.train, 4))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": "imge"}, r"train/0\.parquet has no column 'imge'; did you mean 'image'\?"),
        ({"label": "lable"}, r"train/0\.parquet has no column 'lable'; did you mean 'label'\?"),
        ({"image": "label"}, r"column 'label' of .* holds int64; expected the bytes of encoded images"),
        ({"label": "image"}, r"column 'image' of .* holds binary; expected whole numbers or class names"),
        ({"test": Path("nowhere.parquet")}, r"there is no file or folder nowhere\.parquet"),
        ({"resize": 3}, "resize is 3, smaller than size"),
    ],
)
def test_a_wrong_option_of_parquet_is_refused_in_one_line(table: dict[str, Path], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parquet(**{**table, "size": SIZE, **changed})


def test_parquet_that_is_none_or_holds_other_classes_or_gaps_is_refused(table: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"bad\.parquet can't be read as Parquet"):
        parquet(table["train"], bad)
    write(bad, [content(0), content(1)], [0, 1])
    with pytest.raises(UserError, match=r"must have the same classes; 2 is only in train"):
        parquet(table["train"], bad)
    write(bad, [content(0), content(1)], ["cat", "dog"])
    with pytest.raises(UserError, match="one has numbers, the other names"):
        parquet(table["train"], bad)
    write(bad, [content(k) for k in range(3)], [0, None, 1])
    with pytest.raises(UserError, match=r"column 'label' of .*bad\.parquet has no label in 1 rows"):
        parquet(table["train"], bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no files ending in \.parquet"):
        parquet(tmp_path / "empty", bad)


def test_a_row_without_an_image_and_a_broken_one_are_named(table: dict[str, Path]) -> None:
    write(
        table["test"], [content(20), None, content(22), content(23), b"\x89PNG broken", content(25)], [seed % 3 for seed in range(20, 26)]
    )
    source = parquet(**table, size=SIZE)
    with pytest.raises(UserError, match=r"test\.parquet row 1 has no image in column 'image'"):
        list(in_order(source.test, 2))
    with pytest.raises(UserError, match=r"test\.parquet row 4 can't be decoded"):
        list(in_order(source.test.select(torch.tensor([0, 4])), 2))
    write(table["train"] / "1.parquet", [content(k) if k != 4 else b"" for k in range(5)], [0, 1, 2, 0, 1])
    with pytest.raises(UserError, match=r"train/1\.parquet row 4 can't be decoded"):
        list(in_order(parquet(**table, size=SIZE).train, 4))


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_pictures_of_every_mode_become_three_channels_of_bytes(folder: Path, mode: str) -> None:
    path = folder / "train/cat/0.png"
    grey = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    picture = Image.fromarray(grey) if mode == "I;16" else Image.fromarray((grey >> 8).astype(np.uint8)).convert(mode)
    picture.save(path)
    image = image_folder(folder, SIZE).train.inputs.decode(0)
    assert image.dtype == torch.uint8
    assert image.shape == (3, SIZE, SIZE)
    assert image[:, :, -1].float().mean() > 200
    assert image[:, :, 0].float().mean() < 40


def test_views_of_files_are_augmented_as_tensors_are(folder: Path) -> None:
    source = image_folder(folder, SIZE, in_memory=True)
    spec = Augment(crop=3, flip=True, color=0.4)
    inputs, _ = seen(image_folder(folder, SIZE), spec)
    expected, _ = augment(source.train.pixels, source.train.target, source.train.index, 1, 7, spec)
    assert torch.equal(inputs, expected)
