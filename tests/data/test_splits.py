import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbench.data.splits import stratified


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 2**40))
def test_a_cut_is_sorted_complete_and_keeps_each_classes_share(labels, share, seed):
    target = torch.tensor(labels)
    size = round(share * len(labels))
    chosen, rest = stratified(target, size, seed)
    assert len(chosen) == size
    assert torch.equal(torch.cat([chosen, rest]).sort().values, torch.arange(len(labels)))
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.equal(rest, rest.sort().values)
    exact = torch.bincount(target, minlength=5) * size / len(labels)
    assert (torch.bincount(target[chosen], minlength=5) - exact).abs().max() < 1


def test_the_same_seed_cuts_alike_and_another_differently():
    target = torch.arange(100) % 10
    assert torch.equal(stratified(target, 30, 0)[0], stratified(target, 30, 0)[0])
    assert not torch.equal(stratified(target, 30, 0)[0], stratified(target, 30, 1)[0])


def test_a_larger_cut_of_equal_classes_holds_the_smaller_one():
    target = torch.arange(100) % 10
    assert set(stratified(target, 20, 3)[0].tolist()) < set(stratified(target, 50, 3)[0].tolist())


@pytest.mark.parametrize("size", [-1, 11])
def test_more_than_there_is_cannot_be_chosen(size):
    with pytest.raises(ValueError, match="of 10 rows"):
        stratified(torch.zeros(10, dtype=torch.long), size, 0)


def test_with_positions_the_choice_does_not_depend_on_the_order_of_the_rows():
    target, index, turned = torch.arange(60) % 3, torch.arange(60) * 7 + 5, torch.arange(59, -1, -1)
    chosen, _ = stratified(target, 20, 3, index)
    again, _ = stratified(target[turned], 20, 3, index[turned])
    assert set(index[chosen].tolist()) == set(index[turned][again].tolist())
    assert set(chosen.tolist()) != set(stratified(target, 20, 3)[0].tolist())
