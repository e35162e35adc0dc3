"""Three thousand pictures with masks train in less than a gigabyte: pictures and masks stay in files until their batch is made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PICTURES, DISTINCT, OBJECTS = 3_000, 6, 7  # COCO has seven objects a picture
HEIGHT, WIDTH = 480, 640
IN_MEMORY = PICTURES * HEIGHT * WIDTH * (3 + 8)  # bytes of pictures and bit planes: 10 GB
MOST = 1_000_000  # kilobytes

# Of one file that ends with the maximum of what was ever resident, without what its parent had: see `tests.peak_memory`.
TRAINING = """
import json, sys, torch
from kdbench.data.coco import coco
from kdbench.data.loader import Loader
from kdbench.data.views import Augment

torch.set_num_threads(2)
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
source = coco(__import__("pathlib").Path(sys.argv[1]), "masks", (480, 640))
network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, stride=8), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 1))
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
loader = Loader(source.train, 4, augment=Augment(resized_crop=0.3, flip=True), views=None, data_seed=0, order_seed=0)
losses, seen = [], 0
for batch in loader.batches(0):
    covered = torch.nn.functional.avg_pool2d((batch.target["masks"] != 0).float(), 8)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(network(batch.inputs), covered)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    seen += len(batch)
with open("/proc/self/status") as status:
    most = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
print(json.dumps([most, seen, sum(losses[:60]) / 60, sum(losses[-60:]) / 60]))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A few pictures, linked as often as is needed, each with polygons on the bright discs that it shows."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    outlines = []
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for number in range(DISTINCT):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        outlines.append([])
        for _ in range(OBJECTS):
            radius = random.uniform(20, 90)
            x, y = random.uniform(radius, WIDTH - radius), random.uniform(radius, HEIGHT - radius)
            pixels[(columns - x) ** 2 + (rows - y) ** 2 < radius**2] += 150
            points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1).round(2)
            box = [x - radius, y - radius, 2 * radius, 2 * radius]
            outlines[-1].append((points.ravel().tolist(), box, np.pi * radius**2))
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg", quality=90)
    for part, count in (("train2017", PICTURES), ("val2017", 2)):
        (tmp_path / part).mkdir()
        images, annotations = [], []
        for number in range(count):
            os.link(tmp_path / f"{number % DISTINCT}.jpg", tmp_path / part / f"{number}.jpg")
            images.append({"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH})
            for outline, box, area in outlines[number % DISTINCT]:
                entry = {"id": len(annotations), "image_id": number, "category_id": 1, "segmentation": [outline], "bbox": box, "area": area}
                annotations.append({**entry, "iscrowd": 0})
        (tmp_path / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "disc"}]}
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.slow
@pytest.mark.nodes  # minutes; CI has 45
@pytest.mark.timeout(900)
def test_three_thousand_pictures_with_masks_train_in_less_than_a_gigabyte(root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TRAINING, str(root)], capture_output=True, text=True, check=True)
    most, seen, first, last = json.loads(done.stdout.splitlines()[-1])
    assert seen == PICTURES
    assert last < 0.7 * first  # it learns where the discs are
    assert most < MOST
    assert IN_MEMORY > 5_000 * MOST
