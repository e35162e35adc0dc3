import pytest
import torch

from kdbench.errors import UserError
from kdbench.models.detectors.positions import positions, strides_of_count, strides_of_levels


def test_cells_stand_in_the_middle_of_their_squares_level_by_level_and_row_by_row():
    centres, strides = positions((8, 16), (4, 8))
    assert centres.tolist() == [[2, 2], [6, 2], [10, 2], [14, 2], [2, 6], [6, 6], [10, 6], [14, 6], [4, 4], [12, 4]]
    assert strides.tolist() == [4] * 8 + [8] * 2
    assert centres.dtype == strides.dtype == torch.float32


def test_a_size_that_the_stride_does_not_divide_has_cells_up_to_its_edge():
    centres, strides = positions((9, 5), (4, 8))
    assert len(centres) == 3 * 2 + 2 * 1
    assert centres[:6].amax(0).tolist() == [6, 10]
    assert strides.tolist() == [4] * 6 + [8] * 2


def test_strides_double():
    assert strides_of_levels(1) == (4,)
    assert strides_of_levels(3) == (4, 8, 16)


@pytest.mark.parametrize("size", [(32, 32), (30, 45), (64, 128)])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_the_number_of_cells_tells_the_levels(size: tuple[int, int], levels: int):
    strides = strides_of_levels(levels)
    assert strides_of_count(size, len(positions(size, strides)[0])) == strides


def test_a_number_of_cells_that_no_pyramid_has_is_refused():
    with pytest.raises(UserError, match=r"81 positions has no pyramid with strides 4, 8, 16, 32 for inputs of 32x32"):
        strides_of_count((32, 32), 81)
