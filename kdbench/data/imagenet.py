"""ImageNet-1k (ILSVRC 2012) in its usual layout, train/<class>/* and val/<class>/*, wherever it lies on this machine."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from kdbench.data.encoded import IMAGENET_MEAN, IMAGENET_STD
from kdbench.data.facts import Facts, NotHere
from kdbench.data.image_folder import image_folder
from kdbench.data.options import ImageSide
from kdbench.data.sources import Source
from kdbench.errors import UserError

CLASSES, TRAIN, VAL = 1000, 1_281_167, 50_000
FOLDERS = ("", "imagenet", "ImageNet", "imagenet-1k", "ILSVRC2012")


def imagenet(size: ImageSide = 224, resize: ImageSide | None = None) -> Source:
    """Colour images `size` x `size` in 1000 classes: 1,281,167 to train on; ILSVRC's 50,000 validation images, with public labels, to test.

    Looked for in `KDBENCH_DATA` and in `data`; it is never downloaded, since its licence has to be asked for. resize: as of `image_folder`.
    Raises UserError for a folder of another number of classes, NotHere where there is none.
    """
    roots = [Path(named)] if (named := os.environ.get("KDBENCH_DATA")) else []
    roots.append(Path("data"))
    places = [root / folder for root in roots for folder in FOLDERS]
    place = next((place for place in places if (place / "train").is_dir() and (place / "val").is_dir()), None)
    if place is None:
        looked = ", ".join(map(str, roots))
        raise NotHere(
            f"data imagenet: no train and val below {looked}; get ILSVRC 2012 from https://image-net.org, sort it into train/<class>/* and "
            "val/<class>/*, and let KDBENCH_DATA name the folder",
            Facts("imagenet", CLASSES, size, IMAGENET_MEAN, IMAGENET_STD, TRAIN, VAL),
        )
    source = image_folder(place, size, resize, test="val")
    if source.num_classes != CLASSES:
        raise UserError(f"data imagenet: {place} holds {source.num_classes} classes, expected {CLASSES}; use image_folder for a part of it")
    return replace(source, name="imagenet")
