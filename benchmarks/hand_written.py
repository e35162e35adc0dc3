"""As little as a script does before its first step: read the embedded images, make a network, train a batch. The measure of a start."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from benchmarks.minimal_loop import MinimalLoop, Settings

COUNT, SIDE = 64, 28


def main(images_file: str, stamp: str) -> None:
    table = pq.read_table(images_file).slice(0, COUNT).combine_chunks()
    pixels = np.frombuffer(table["image"].chunk(0).buffers()[1], np.uint8)[: COUNT * SIDE * SIDE]
    images = torch.from_numpy(pixels.reshape(COUNT, 1, SIDE, SIDE).copy())
    labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
    student = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    student(torch.zeros(2, 1, SIDE, SIDE))
    MinimalLoop(student, images, labels, Settings((0.286,), (0.353,), batch_size=COUNT, epochs=1)).train_epoch()
    Path(stamp).write_text(repr(time.time()))


if __name__ == "__main__":
    main(sys.argv[1], os.environ[sys.argv[2]])
