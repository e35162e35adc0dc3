from dataclasses import replace

import pytest
import torch

from kdbench.data.sources import DataSpec, Source, open_source
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


def test_numbers_that_are_no_classes_are_cut_like_samples_without_classes():
    source = replace(CLASSES, train=replace(CLASSES.train, target=torch.rand(120)), test=replace(CLASSES.test, target=torch.rand(20)))
    found = splits(source, val_size=30)
    assert (len(found.train), len(found.val)) == (90, 30)
    assert found.train.classes is None


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


def test_what_is_not_asked_for_changes_no_hash():
    """The values were computed by the code before there were these options."""
    source = open_source(DataSpec.model_validate({"name": "shapes", "target": "class", "train": 60, "test": 10, "size": 16}))
    found = splits(source, val_size=10, transfer_size=30, transfer="train", labelled=None, teacher_share=1.0)
    hashes = found.data_hash, found.hash, found.learned_hash, found.learned_hash_of("teacher"), found.test_hash
    assert [text[:16] for text in hashes] == [
        "5175591567dd2f4c",
        "3733a6d8125ca482",
        "bdb8c2ebeed70909",
        "bdb8c2ebeed70909",
        "e4697c45ea4d9734",
    ]
    assert found.learned_by("teacher") is found.train


# --- transfer ----------------------------------------------------------------------------------------------------------

FURTHER = open_source(DataSpec(name="tests.data.further:with_more"))


def test_students_learn_from_noise_of_as_many_images_as_training_has_or_as_are_asked_for():
    plain, found = splits(), splits(transfer="noise")
    assert (found.transfer.target, found.transfer.pixels.shape) == (None, (100, 3, 16, 16))
    assert torch.equal(found.transfer.pixels, splits(transfer="noise").transfer.pixels)
    assert torch.equal(found.train.index, plain.train.index)
    assert torch.equal(found.val.index, plain.val.index)
    assert not set(found.transfer.index.tolist()) & {*CLASSES.train.index.tolist(), *CLASSES.test.index.tolist()}
    more = splits(transfer="noise", transfer_size=250).transfer
    assert len(more) == 250
    assert torch.equal(more.pixels[:100], found.transfer.pixels)
    assert not torch.equal(splits(transfer="noise", split_seed=1).transfer.pixels, found.transfer.pixels)


@pytest.mark.parametrize("name", ["unlabelled", "partly"])
def test_students_learn_from_a_further_part_of_the_data(name):
    found = splits(FURTHER, transfer=name, transfer_size=33)
    assert set(found.transfer.index.tolist()) < set(FURTHER.more[name].index.tolist())
    assert len(found.transfer) == 33
    assert found.transfer.without_label in {"unlabelled": [33], "partly": [16, 17]}[name]
    assert torch.equal(splits(FURTHER, transfer=name).transfer.index, FURTHER.more[name].index)
    assert set(found.val.index.tolist()) | set(found.train.index.tolist()) == set(FURTHER.train.index.tolist())


def test_what_students_learn_from_is_in_the_hashes_of_cut_and_learning_and_not_of_the_test_part():
    asked = [{"transfer": name} for name in ("train", "noise", "unlabelled", "partly")] + [{"transfer": "noise", "split_seed": 3}]
    found = [splits(FURTHER, **options) for options in asked]
    assert len({cut.hash for cut in found}) == len({cut.learned_hash for cut in found}) == 5
    assert len({cut.test_hash for cut in found}) == len({cut.data_hash for cut in found}) == 1


def test_the_content_of_a_further_part_is_in_the_hash_of_learning_where_students_learn_from_it():
    part = FURTHER.more["unlabelled"]
    other = replace(FURTHER, more={"unlabelled": replace(part, inputs=part.pixels.flip(0)), "partly": FURTHER.more["partly"]})
    assert splits(other).learned_hash == splits(FURTHER).learned_hash
    assert splits(other, transfer="unlabelled").learned_hash != splits(FURTHER, transfer="unlabelled").learned_hash


def with_validation(shift: int = 0) -> Source:
    """CLASSES with ten samples of their own for validation, shifted in brightness."""
    apart = CLASSES.test.select(torch.arange(10))
    first = 1 + int(CLASSES.test.index.max())
    return replace(CLASSES, val=replace(apart, inputs=apart.pixels + shift, index=torch.arange(first, first + 10)))


def test_samples_that_a_data_set_sets_apart_for_validation_are_used_and_none_are_cut_from_training():
    apart = with_validation()
    found = splits(apart, transfer_size=30)
    assert torch.equal(found.val.index, apart.val.index)
    assert torch.equal(found.train.index, CLASSES.train.index)
    assert set(found.transfer.index.tolist()) < set(CLASSES.train.index.tolist())
    noise = splits(apart, transfer="noise").transfer
    assert int(noise.index.min()) > int(apart.val.index.max())
    with pytest.raises(UserError, match=r"^val_size: data 'shapes' has 10 validation samples of its own, .*; leave val_size out$"):
        splits(apart, val_size=0.2)
    with pytest.raises(UserError, match=r"^transfer_size 121 is more than the 120 images of data 'shapes' that are left for training$"):
        splits(apart, transfer_size=121)


def test_their_content_is_in_the_hashes_of_data_and_learning_and_not_of_the_test_part():
    one, other, none = (splits(source) for source in (with_validation(), with_validation(1), CLASSES))
    assert len({found.learned_hash for found in (one, other, none)}) == 3
    assert len({found.data_hash for found in (one, other, none)}) == 3
    assert len({found.test_hash for found in (one, other, none)}) == 1


# --- labels ------------------------------------------------------------------------------------------------------------


def labelled(source=CLASSES, **options) -> Splits:
    return cut(source, SplitOptions(**options), of_classes=True)


def test_so_many_samples_keep_their_label_and_each_class_its_share():
    plain, found = labelled().transfer, labelled(labelled=25).transfer
    assert torch.equal(plain.index, found.index)
    kept = found.labels != -1
    assert int(kept.sum()) == 25
    assert found.without_label == 75
    assert torch.equal(found.labels[kept], plain.labels[kept])
    shares, whole = (torch.bincount(labels, minlength=5) / len(labels) for labels in (found.labels[kept], plain.labels))
    assert (shares - whole).abs().max() <= 1 / 25
    assert labelled(labelled=0.25).transfer.without_label == 75
    assert labelled().train.without_label == labelled(labelled=25).train.without_label == labelled(labelled=25).val.without_label == 0


def test_which_labels_are_kept_follows_from_the_seed_and_nothing_else():
    found = labelled(labelled=25).transfer
    assert torch.equal(labelled(labelled=25).transfer.labels, found.labels)
    assert not torch.equal(labelled(labelled=25, split_seed=1).transfer.labels != -1, found.labels != -1)


def test_of_a_part_that_lacks_labels_those_it_has_can_be_fewer():
    found = labelled(FURTHER, transfer="partly", labelled=10).transfer
    assert (len(found), found.without_label) == (80, 70)
    assert bool((found.labels[1::2] == -1).all())


# --- the teacher's samples -----------------------------------------------------------------------------------------------


def test_a_teacher_learns_from_a_share_of_the_training_samples_and_students_as_before():
    plain, found = labelled(transfer_size=40), labelled(transfer_size=40, teacher_share=0.3)
    taught = found.learned_by("teacher")
    assert len(taught) == 30
    assert set(taught.index.tolist()) < set(found.train.index.tolist())
    assert torch.equal(found.learned_by("student").index, plain.transfer.index)
    both = set(taught.index.tolist()) & set(found.transfer.index.tolist())
    assert 0 < len(both) < 30  # the two choices are independent
    assert cut(MASKS, SplitOptions(teacher_share=0.5)).learned_by("teacher").target.shape == (25, 16, 16)


def test_a_teacher_learns_from_some_classes_by_name_or_number():
    found = labelled(teacher_classes=[0, "square"])
    names = CLASSES.class_names
    wanted = {0, names.index("square")}
    taught, train = found.learned_by("teacher"), found.train
    assert set(taught.labels.tolist()) == wanted
    assert len(taught) == sum(int(label) in wanted for label in train.labels)
    assert len(labelled(teacher_classes=[0, "square"], teacher_share=0.5).learned_by("teacher")) == round(len(taught) / 2)


def test_what_a_teacher_learns_from_is_in_its_hash_and_in_none_of_the_students():
    plain, shared, some = labelled(), labelled(teacher_share=0.5), labelled(teacher_classes=[1])
    assert plain.learned_hash == shared.learned_hash == some.learned_hash == some.learned_hash_of("student")
    assert plain.hash == shared.hash == some.hash
    assert len({found.learned_hash_of("teacher") for found in (plain, shared, some)}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transfer": "noize"}, r"^transfer: data 'with_more' has no part 'noize'; did you mean 'noise'\?$"),
        ({"transfer": "web"}, r"^transfer: data 'with_more' has no part 'web'; there is: noise, partly, train, unlabelled$"),
        (
            {"transfer": "partly", "transfer_size": 81},
            "^transfer_size 81 is more than the 80 images of data 'with_more' of the part 'partly'$",
        ),
        ({"transfer": "noise", "labelled": 5}, "^labelled: the samples of transfer: noise have no labels; leave labelled out$"),
        ({"transfer": "unlabelled", "labelled": 5}, "^labelled: the samples of transfer: unlabelled have no labels; leave labelled out$"),
        (
            {"transfer": "partly", "labelled": 41},
            r"^labelled 41 is 41 of the 80 samples .* learn from; expected 1 \.\. 40, which is how many",
        ),
        ({"labelled": 0.001}, r"^labelled 0.001 is 0 of the 50 samples"),
        ({"teacher_share": 0.001}, "^teacher_share 0.001 is 0 of 50 training samples; expected one or more$"),
        ({"teacher_classes": ["sqare"]}, r"^teacher_classes: data 'with_more' has no class 'sqare'; did you mean 'square'\?$"),
        ({"teacher_classes": [5]}, r"^teacher_classes: data 'with_more' has the classes 0 \.\. 4, got 5$"),
        ({"teacher_classes": [1, 1]}, r"^teacher_classes: class 1 \(square\) is listed twice; list it once$"),
    ],
)
def test_what_the_data_cant_give_is_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message):
        labelled(FURTHER, **options)


@pytest.mark.parametrize("options", [{"labelled": 5}, {"teacher_classes": [0]}])
def test_options_on_classes_are_refused_where_a_sample_has_none(options):
    key = next(iter(options))
    with pytest.raises(
        UserError, match=f"^{key} needs one class a sample, which this task's samples of data 'shapes' don't have; leave it out$"
    ):
        splits(MASKS, **options)
