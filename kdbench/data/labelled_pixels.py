"""Pictures and the files that label their pixels, as the part of a data set: nothing but headers is read before they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from kdbench.data.batch import Part, standing_in
from kdbench.data.content import READERS
from kdbench.data.encoded import EncodedImages
from kdbench.data.encoded_targets import EncodedLabels
from kdbench.data.frames import Frame
from kdbench.data.image_folder import Files
from kdbench.data.label_map import LabelMap
from kdbench.data.pictures import size_in_header


def labelled_parts(train: tuple[Files, Files], test: tuple[Files, Files], frame: Frame, label_map: LabelMap) -> tuple[Part, Part, str]:
    """Both parts, each of pictures and their labels, and in words what they hold. Raises UserError as `labelled_part` does."""
    first = labelled_part(*train, frame, label_map, 0)
    second = labelled_part(*test, frame, label_map, len(first))
    return first, second, f"read {len(first):,} pictures with labels to train on and {len(second):,} to test on"


def labelled_part(pictures: Files, labels: Files, frame: Frame, label_map: LabelMap, first: int) -> Part:
    """Pictures with a label per pixel, uint8 [N, height, width].

    A picture is turned by its EXIF tag only if that gives it the size of its labels.

    Args:
        pictures, labels: files, row by row.
        frame: how they fill the input.
        label_map: what the pixels of the label files mean.
        first: the first sample's position.

    Raises:
        UserError: names a label file whose header can't be read.
    """
    rows = torch.arange(len(pictures.names))
    with ThreadPoolExecutor(READERS) as readers:
        sizes = list(readers.map(lambda row: size_in_header(labels.folder / labels.names[row], labels.name(row), True), range(len(rows))))
    images = EncodedImages(pictures, rows, frame.size, frame.resize, frame.fitting, frame.padding, torch.tensor(sizes).view(-1, 2))
    return Part(images, standing_in(EncodedLabels(labels, rows, frame, label_map)), rows + first)


def sizes_in_headers(pictures: Files) -> list[tuple[int, int]]:
    """Height and width of each picture as it is shown. Raises UserError, naming a file whose header can't be read."""
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda row: size_in_header(pictures.folder / pictures.names[row], pictures.name(row)), _rows(pictures)))


def _rows(files: Files) -> Sequence[int]:
    return range(len(files.names))
