"""How far a computed number may lie from the exact one: bounds that follow from the arithmetic, and so hold on every machine."""

from __future__ import annotations

import torch


def rounding(dtype: torch.dtype, operations: int, scale: float = 1.0) -> float:
    """The largest error of a number that is the result of `operations` roundings one after the other.

    A machine may add n numbers in any order; the sum is off by at most n u sum|x|, u = eps / 2 (Higham, Accuracy and Stability of
    Numerical Algorithms, 2nd ed., section 4.2). The other half of eps covers exp, log, division and the root, which vendors' libraries
    give to one unit in the last place, and the terms of second order.

    Args:
        dtype: the type that is computed in.
        operations: the length of the longest sum, plus a few for what is done to its terms and to its result.
        scale: what the absolute values of the terms add up to, times what the steps behind the sum magnify an error by (their condition).
            For a mean, the largest absolute value of a term.

    Returns:
        The bound, absolute and in the unit of `scale`. The square of such a number has an error of at most the bound's square where
        the exact number is 0.
    """
    return operations * torch.finfo(dtype).eps * scale
