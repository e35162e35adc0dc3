import torch
from hypothesis import given
from hypothesis import strategies as st

from kdbench.data.hashing import below, hash64

MASK = (1 << 64) - 1


def splitmix(state: int) -> int:
    """SplitMix64 in Python's unbounded integers, as in its paper."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_hash_of_a_seed_alone_is_the_published_first_number_of_splitmix64():
    assert int(hash64(1234567)) & MASK == 6457827717110365317


@given(st.integers(0, MASK), st.lists(st.tuples(st.integers(0, 2**62), st.booleans()), min_size=1, max_size=4))
def test_hash_equals_unbounded_arithmetic_on_every_input(seed, counters):
    expected = splitmix(seed)
    for counter, _ in counters:
        expected = splitmix((expected + counter) & MASK)
    as_given = [torch.tensor([counter]) if is_tensor else counter for counter, is_tensor in counters]
    assert int(hash64(seed, *as_given)) & MASK == expected


def test_counters_are_told_apart_by_their_place():
    assert hash64(0, 1, 2) != hash64(0, 2, 1)


def test_numbers_below_a_limit_are_spread_evenly():
    counts = torch.bincount(below(hash64(3, torch.arange(90_000)), 9), minlength=9)
    assert len(counts) == 9
    assert (counts - 10_000).abs().max() < 500
