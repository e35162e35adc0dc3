"""A counter-based hash on tensors: randomness as a pure function of a seed and counters, bit-equal on every device and in every order."""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): the increment, then (shift, multiplier) twice, then a last shift.
_INCREMENT = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_ALL = (1 << 64) - 1


def hash64(seed: int, *counters: Tensor | int) -> Tensor:
    """64 well-mixed bits for (seed, counters), as int64; tensor counters broadcast against each other."""
    # Whole numbers are mixed as such: on a batch of samples a tensor operation costs more than its arithmetic.
    whole = _mix_whole(seed)
    numbers = iter(counters)
    state: Tensor | None = None
    for counter in numbers:
        if isinstance(counter, Tensor):
            state = _mix(counter + _signed(whole))
            break
        whole = _mix_whole(whole + counter)
    if state is None:
        return torch.tensor(_signed(whole))
    for counter in numbers:
        state = _mix(state + counter)
    return state


def below(bits: Tensor, limit: int | Tensor) -> Tensor:
    """Map hashed bits to whole numbers 0 .. limit - 1, uniformly (the bias is limit / 2**63)."""
    return _shifted(bits, 1) % limit


def _mix(state: Tensor) -> Tensor:
    state = state + _signed(_INCREMENT)
    for shift, multiplier in _ROUNDS:
        state = (state ^ _shifted(state, shift)) * _signed(multiplier)
    return state ^ _shifted(state, _LAST_SHIFT)


def _mix_whole(state: int) -> int:
    """`_mix` of one number, its 64 bits as a whole number that is not negative."""
    state = (state + _INCREMENT) & _ALL
    for shift, multiplier in _ROUNDS:
        state = ((state ^ (state >> shift)) * multiplier) & _ALL
    return state ^ (state >> _LAST_SHIFT)


def _shifted(state: Tensor, count: int) -> Tensor:
    """Logical right shift: torch's own drags the sign bit along."""
    return (state >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    """The low 64 bits of `value` as torch's int64 holds them."""
    value &= _ALL
    return value - (1 << 64) if value >> 63 else value
