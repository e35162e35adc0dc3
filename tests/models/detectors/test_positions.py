import torch

from kdbench.models.detectors.positions import positions, strides_of_levels


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
