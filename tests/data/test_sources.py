import subprocess
import sys

import pytest
import torch

from kdbench.data.batch import Part
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.errors import UserError

CALLS = []


def part(count: int = 4, first: int = 0, **changed) -> Part:
    fields = {
        "inputs": torch.zeros(count, 3, 8, 8, dtype=torch.uint8),
        "target": torch.arange(count) % 2,
        "index": torch.arange(count) + first,
    }
    return Part(**{**fields, **changed})


def source(**changed) -> Source:
    fields = {
        "name": "mine",
        "train": part(),
        "test": part(2, first=4),
        "num_classes": 2,
        "class_names": ("a", "b"),
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
    }
    return Source(**{**fields, **changed})


def mine(count: int = 4) -> Source:
    CALLS.append(count)
    return source(train=part(count), test=part(2, first=count))


UNSOUND = {
    "no source": (lambda: 3, "must return a kdbench.data.sources.Source, got int"),
    "floats": (
        lambda: source(train=part(inputs=torch.zeros(4, 3, 8, 8))),
        r"train a column float32 \[4, 3, 8, 8\] needs a kind",
    ),
    "lengths": (
        lambda: source(train=part(target=torch.zeros(3, dtype=torch.long))),
        "as many inputs and targets as indices.*got 4 indices, 4 inputs, 3 target",
    ),
    "empty": (lambda: source(test=part(0)), "test must hold .* at least one"),
    "int32 index": (lambda: source(train=part(index=torch.arange(4, dtype=torch.int32))), "index must be int64"),
    "small masks": (lambda: source(train=part(target=torch.zeros(4, 4, 4, dtype=torch.long))), r"got torch.int64 \[4, 4, 4\]"),
    "class 2 of 2": (lambda: source(train=part(target=torch.tensor([0, 1, 2, 0]))), r"targets must be 0 \.\. 1 for 2 classes, found 2"),
    "ignored everywhere": (
        lambda: source(train=part(target=torch.full((4, 8, 8), 255)), ignore_index=255),
        "targets are all 255",
    ),
    "sizes": (lambda: source(test=part(2, 4, inputs=torch.zeros(2, 3, 9, 9, dtype=torch.uint8))), "their sizes must agree"),
    "same index twice": (lambda: source(test=part(2, first=3)), "two samples have the same index"),
    "same index in validation": (lambda: source(val=part(2, first=5)), "train and test and val together must count every sample once"),
    "validation without labels": (
        lambda: source(val=part(2, first=9, target=torch.tensor([-1, 0]))),
        r"val targets must be 0 \.\. 1 for 2 classes, found -1",
    ),
    "small validation images": (
        lambda: source(val=part(2, 9, inputs=torch.zeros(2, 3, 4, 4, dtype=torch.uint8))),
        "train images are .* and val images .*; their sizes must agree",
    ),
    "same index in a further part": (lambda: source(more={"web": part(2, first=5, target=None)}), "train and test and web together must"),
    "further part called noise": (
        lambda: source(more={"noise": part(2, first=9)}),
        "can't be called 'noise', which has a meaning of its own",
    ),
    "small further images": (
        lambda: source(more={"web": part(2, 9, inputs=torch.zeros(2, 3, 4, 4, dtype=torch.uint8))}),
        r"train images are \[4, 3, 8, 8\] and web images \[2, 3, 4, 4\]; their sizes must agree",
    ),
    "further classes": (
        lambda: source(more={"web": part(3, 9, target=torch.tensor([-1, 0, 2]))}),
        r"web targets must be 0 \.\. 1 .* found 2",
    ),
    "further masks": (
        lambda: source(more={"web": part(2, 9, target=torch.zeros(2, 8, 8, dtype=torch.long))}),
        r"web has the target int64 \[8, 8\], the training part has int64",
    ),
    "unlabelled training": (lambda: source(train=part(target=torch.tensor([0, 1, -1, 0]))), r"targets must be 0 \.\. 1 .* found -1"),
    "names": (lambda: source(class_names=("a",)), "1 class_names for 2 classes"),
    "mean": (lambda: source(mean=(0.5,)), "one number for each of the 3 channels"),
    "std": (lambda: source(std=(0.0,) * 3), "std above 0"),
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This file under a name that a dotted path can use."""
    monkeypatch.setitem(sys.modules, "my_data", sys.modules[__name__])


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_source_is_refused_with_what_is_wrong(monkeypatch, name):
    make, message = UNSOUND[name]

    def unsound() -> Source:
        return make()

    monkeypatch.setattr(sys.modules[__name__], "mine", unsound)
    # An own path per case, since sources are kept by name.
    monkeypatch.setitem(sys.modules, f"my_data_{abs(hash(name))}", sys.modules[__name__])
    with pytest.raises(UserError, match=message):
        open_source(DataSpec(name=f"my_data_{abs(hash(name))}:mine"))


def test_a_users_function_works_by_dotted_path_and_is_called_once_per_options():
    CALLS.clear()
    first = open_source(DataSpec.model_validate({"name": "my_data:mine", "count": 6}))
    assert open_source(DataSpec.model_validate({"name": "my_data:mine", "count": 6})) is first
    assert open_source(DataSpec.model_validate("my_data:mine")) is not first
    assert CALLS == [6, 4]
    assert len(first.train) == 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fashon_mnist", "unknown data 'fashon_mnist'; did you mean 'fashion_mnist'"),
        ({"name": "shapes", "sizze": 3}, "data 'shapes': unknown key 'sizze'; did you mean 'size'"),
        ({"name": "shapes", "size": 3}, "size: expected greater than or equal to 16, got 3"),
        ({"name": "shapes", "target": "box"}, "target: expected 'mask', 'class', .* or 'relation', got 'box'; did you mean 'boxes'"),
        ({"name": "my_data:mine", "count": "many"}, "count: expected a whole number, got 'many'"),
        ("my_data:yours", "has no 'yours'"),
        ("no_such_module:data", "no module 'no_such_module'"),
    ],
)
def test_a_wrong_name_or_option_is_one_readable_line(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(DataSpec.model_validate(spec))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"train": part(target=torch.tensor([0, 0, 0, 1]))},
        {"test": part(2, first=5)},
        {"mean": (0.4,) * 3},
        {"ignore_index": 255},
    ],
)
def test_the_hash_changes_with_content_and_facts(changed):
    assert source(**changed).sha256 != source().sha256


def test_the_hash_does_not_depend_on_the_name():
    assert source(name="other").sha256 == source().sha256


def test_the_catalogue_is_read_without_torch():
    code = "import sys, kdbench.data; assert kdbench.data.DATA and 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_further_part_may_lack_labels_and_counts_in_the_hash_of_the_data_alone(monkeypatch):
    unlabelled, partly = part(3, 9, target=None), part(3, 20, target=torch.tensor([-1, 0, -1]))
    monkeypatch.setattr(sys.modules[__name__], "mine", lambda: source(more={"web": unlabelled, "shop": partly}))
    mine.__annotations__ = {"return": Source}
    found = open_source(DataSpec(name=f"{__name__}:mine"))
    assert (found.more["web"].without_label, found.more["shop"].without_label, found.train.without_label) == (3, 2, 0)
    assert found.train_sha256 == source().train_sha256
    others = {source(more=more).sha256 for more in ({"web": unlabelled}, {"web": partly}, {"shop": unlabelled}, {})}
    assert len(others | {found.sha256}) == 5
