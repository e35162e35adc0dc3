import pytest
import torch

from kdbench.data.sources import DataSpec, open_source
from kdbench.errors import UserError
from kdbench.tasks.base import Splits
from kdbench.tasks.splits import SplitOptions, cut

CLASSES = open_source(DataSpec.model_validate({"name": "shapes", "target": "class", "train": 120, "test": 20, "size": 16}))
MASKS = open_source(DataSpec.model_validate({"name": "shapes", "train": 60, "test": 20, "size": 16}))


def splits(source=CLASSES, **options) -> Splits:
    return cut(source, SplitOptions(**options))


@pytest.mark.parametrize("source", [CLASSES, MASKS])
@pytest.mark.parametrize("options", [{}, {"val_size": 0.4}, {"val_size": 7, "transfer_size": 9}])
def test_train_and_val_make_up_the_training_images_and_transfer_is_a_part_of_train(source, options):
    found = splits(source, **options)
    train, transfer, val, test = (set(part.index.tolist()) for part in (found.train, found.transfer, found.val, found.test))
    assert not train & val
    assert train | val == set(source.train.index.tolist())
    assert transfer <= train
    assert test == set(source.test.index.tolist())


def test_sizes_are_what_was_asked_for():
    assert len(splits().val) == 20
    assert len(splits(val_size=0.25).val) == 30
    found = splits(val_size=10, transfer_size=33)
    assert (len(found.val), len(found.train), len(found.transfer)) == (10, 110, 33)


def test_each_part_keeps_the_classes_shares():
    whole = torch.bincount(CLASSES.train.target, minlength=5) / 120
    found = splits(val_size=30, transfer_size=40)
    for part in (found.train, found.transfer, found.val):
        shares = torch.bincount(part.target, minlength=5) / len(part)
        assert (shares - whole).abs().max() <= 1.5 / len(part)


def test_students_learn_from_all_training_images_unless_told_otherwise():
    found = splits()
    assert torch.equal(found.transfer.index, found.train.index)


def test_the_hash_names_the_cut_and_the_data():
    assert splits().hash == splits().hash
    hashes = {splits(**o).hash for o in ({}, {"val_size": 10}, {"transfer_size": 10}, {"split_seed": 1})} | {splits(MASKS).hash}
    assert len(hashes) == 5
    assert splits().data_hash == CLASSES.sha256


def test_another_seed_cuts_differently():
    assert splits(split_seed=0).val.index.tolist() != splits(split_seed=1).val.index.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_size": 120}, r"val_size 120 is 120 of the 120 training images of data 'shapes'; expected 1 \.\. 119"),
        ({"val_size": 0.001}, "val_size 0.001 is 0 of the 120"),
        ({"transfer_size": 101}, "transfer_size 101 is more than the 100 images of data 'shapes'"),
    ],
)
def test_a_cut_that_is_too_large_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        splits(**options)
