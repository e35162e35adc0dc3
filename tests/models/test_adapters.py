"""Maps read as tokens, tokens as maps, both as vectors, and two maps brought to one size."""

from __future__ import annotations

import pytest
import torch

from kdbench.errors import UserError
from kdbench.models.adapters import as_map, as_tokens, as_vector, class_tokens, map_shape, to_smaller
from kdbench.models.outputs import TapShape


@pytest.mark.parametrize(("count", "side", "prefix"), [(16, 4, 0), (17, 4, 1), (18, 4, 2), (196, 14, 0), (197, 14, 1), (198, 14, 2)])
def test_tokens_lie_on_a_square_behind_their_class_tokens(count: int, side: int, prefix: int) -> None:
    shape = TapShape("tokens", (count, 6))
    assert map_shape(shape) == (6, side, side)
    assert class_tokens(shape) == prefix
    tokens = torch.randn(3, count, 6)
    grid = as_map(tokens, shape)
    assert torch.equal(grid[:, :, 1, 2], tokens[:, prefix + side + 2])
    assert torch.equal(as_tokens(tokens, shape), tokens[:, prefix:])
    assert torch.equal(as_tokens(grid, TapShape("map", (6, side, side))), tokens[:, prefix:])


def test_a_map_is_left_as_it_is() -> None:
    features = torch.randn(2, 5, 3, 4)
    assert as_map(features, TapShape("map", (5, 3, 4))) is features
    assert map_shape(TapShape("map", (5, 3, 4))) == (5, 3, 4)


def test_what_is_no_grid_is_refused() -> None:
    with pytest.raises(UserError, match="15 tokens make no square grid"):
        map_shape(TapShape("tokens", (15, 6)))
    with pytest.raises(UserError, match="vector of 64 numbers can't be read as a map"):
        map_shape(TapShape("vector", (64,)))


def test_every_kind_has_a_mean_vector() -> None:
    features = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(as_vector(features), features.flatten(2).mean(2))
    torch.testing.assert_close(as_vector(features.flatten(2).transpose(1, 2)), features.flatten(2).mean(2))
    assert torch.equal(as_vector(features[:, :, 0, 0]), features[:, :, 0, 0])


def test_the_larger_map_is_averaged_down_to_the_smaller() -> None:
    large, small = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    ours, theirs = to_smaller(large, small)
    assert theirs is small or torch.equal(theirs, small)
    torch.testing.assert_close(ours[0, 0, 0, 0], large[0, 0, :2, :2].mean())
    assert to_smaller(small, large)[1].shape == (2, 3, 4, 4)
    same = torch.randn(2, 3, 8, 8)
    assert to_smaller(large, same) == (large, same)
