"""Cut-outs of real objects pasted on photographs, from a seed: pictures whose masks, boxes, classes and captions are known exactly.

The pixels come from two Debian packages, which are under the GPL and are no part of kdbench: they are read where they are installed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import TARGET, Part
from kdbench.data.drawn import PIXEL_BYTES, Arrays, check_memory, columns_of, put, statistics, tensors_of
from kdbench.data.facts import Facts
from kdbench.data.kinds import NO_OBJECT, Boxes, Kind, Masks, Plain
from kdbench.data.options import Seed
from kdbench.data.scenes import MOST_IMAGES, box_around
from kdbench.data.sources import Source
from kdbench.data.stamp_files import OPAQUE, Library, Pool, Stamp, open_library
from kdbench.data.views import IGNORED
from kdbench.data.vocabulary import Vocabulary, words_of

TargetName = Literal["mask", "class", "present", "boxes", "masks", "caption"]

MOST_OBJECTS = 8
CAPTION_WORDS = 12  # of one object: 95 of 100 captions have no more
_JOINED = ", with "
_SIDES, _STEPS = (0.3, 0.6), 8  # of an object's longer side, as a share of the picture's; so many sizes from the least to the most
_ZOOMS = (1.0, 1.5, 2.0, 2.5, 3.0)  # the shorter side of a photograph, in sides of the picture that shows a part of it
_KEPT_BYTES, _PIECE_BYTES = 64_000_000, 9  # of all pieces that a painter keeps, and of a pixel of one
_TRIES = 8  # for a place, before an object is left out
_FIRST = {"train": 0, "val": 2 * MOST_IMAGES, "test": MOST_IMAGES}  # index of a part's first scene
_STANDARD = Facts("stamps", 16, 48, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 2000, 500)


@dataclass(frozen=True)
class Pasted:
    """An object in a scene. mask: bool [H, W], its visible pixels, at least half of it."""

    stamp: Stamp
    mask: NDArray[np.bool_]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Around the visible pixels, see `box_around`."""
        return box_around(self.mask)


@dataclass(frozen=True)
class StampScene:
    """image: uint8 [H, W, 3]. objects: at least one, from the back to the front."""

    image: NDArray[np.uint8]
    objects: tuple[Pasted, ...]


def stamps(
    train: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 2000,
    val: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 300,
    test: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 500,
    size: Annotated[int, Field(ge=16, le=1024)] = 48,
    seed: Seed = 0,
    target: TargetName = "mask",
    most: Annotated[int, Field(ge=1, le=MOST_OBJECTS)] = 3,
    categories: Annotated[tuple[str, ...], Field(min_length=1)] | None = None,
) -> Source:
    """Real objects on photographs, in pictures of `size` x `size` pixels. Each is a function of the files, `seed` and its index.

    It needs the Debian packages tuxpaint-stamps-default and mate-backgrounds, or their files in KDBENCH_DATA. Every fourth object of a
    category and every fourth photograph occur in the test part alone, and as many in the validation part alone. All categories are
    equally frequent.

    Args:
        train: Number of training pictures.
        val: Number of validation pictures. A task cuts none from the training part, so it takes no `val_size`.
        test: Number of test pictures.
        size: Height and width in pixels.
        seed: Another seed gives other pictures of the same objects.
        target: What is asked. The inputs are the pictures, uint8 [N, 3, size, size], with `caption` also tokens. C are the categories.
            mask: uint8 [N, size, size], one label per pixel, 0 is the ground.
            class: int64 [N]; these pictures have one object.
            present: uint8 [N, C], which categories a picture shows.
            boxes: boxes float32 [N, most, 4] of x0, y0, x1, y1 in pixels, labels int64 [N, most]; padded rows are 0 and -1.
            masks: those of boxes, and masks int64 [N, 1, size, size]: bit k of a pixel says that it shows object k.
            caption: inputs image and tokens int64 [N, L]; target int64 [N], equal for pictures with equal captions.
        most: Objects in a picture, at most.
        categories: Folders of stamps, such as animals, food and vehicles; all but `symbols` by default.

    Raises:
        NotHere: A package is not installed.
        TooMuch: The pictures do not fit in memory.
        UserError: A category is unknown or has fewer than three usable pictures.
    """
    numbers = {"train": train, "val": val, "test": test}
    check_memory("stamps", numbers, size, 3 + 8 if target == "masks" else PIXEL_BYTES)
    library = open_library(categories, round(_SIDES[1] * size), round(_ZOOMS[-1] * size), _STANDARD)
    asked = _Target(library, target, 1 if target == "class" else most)
    parts = {name: _part(name, numbers[name], size, seed, library, asked) for name in numbers}
    mean, std = statistics(parts["train"][0])
    names = library.categories if target != "mask" else ("ground", *library.categories)
    ignored = IGNORED if target == "mask" else None
    (_, first), (_, between), (_, last) = parts.values()
    return Source("stamps", first, last, len(names), names, mean, std, ignored, library.read, asked.vocabulary, val=between)


class Painter:
    """Draws scenes of a pool in pictures of `size` x `size` pixels. What it makes of a stamp or a photograph is kept for the next scene."""

    def __init__(self, pool: Pool, size: int) -> None:
        self.pool, self.size = pool, size
        largest = round(_SIDES[1] * size)
        self._piece = lru_cache(maxsize=max(1, _KEPT_BYTES // (_PIECE_BYTES * largest * largest)))(self._made_piece)
        self._ground = lru_cache(maxsize=None)(self._made_ground)

    def draw(self, seed: int, index: int, most: int) -> StampScene:
        """Scene `index` of the series `seed`, with 1 .. `most` objects."""
        random, size = np.random.Generator(np.random.PCG64([seed, index])), self.size
        image = self._background(random)
        owner = np.full((size, size), -1, np.int8)
        objects: list[Stamp] = []
        areas: list[int] = []
        for _ in range(1 + int(random.random() * most)):
            category = int(random.random() * len(self.pool.stamps))
            place = int(random.random() * len(self.pool.stamps[category]))
            piece = self._piece(category, place, int(random.random() * _STEPS))
            height, width = piece.opaque.shape
            for across, down in random.random((_TRIES, 2)).tolist():
                left, top = int(across * (size - width + 1)), int(down * (size - height + 1))
                there = slice(top, top + height), slice(left, left + width)
                if _leaves_enough(owner, there, piece.opaque, areas):
                    image[there] = piece.over(image[there])
                    owner[there][piece.opaque] = len(objects)
                    objects.append(self.pool.stamps[category][place])
                    areas.append(piece.area)
                    break
        return StampScene(image, tuple(Pasted(stamp, owner == number) for number, stamp in enumerate(objects)))

    def _background(self, random: np.random.Generator) -> NDArray[np.uint8]:
        """A square part of a photograph, maybe mirrored, [size, size, 3]."""
        photograph = self._ground(int(random.random() * len(self.pool.grounds)), int(random.random() * len(_ZOOMS)))
        top, left = (int(random.random() * (length - self.size + 1)) for length in photograph.shape[:2])
        shown = photograph[top : top + self.size, left : left + self.size]
        return (shown[:, ::-1] if random.random() < 0.5 else shown).copy()

    def _made_ground(self, place: int, zoom: int) -> NDArray[np.uint8]:
        """A photograph, [H, W, 3], of which the picture covers 1 / zoom of the shorter side; it is enlarged only to cover all of it."""
        photograph = self.pool.grounds[place]
        shortest = min(photograph.size)
        side = max(self.size, min(round(_ZOOMS[zoom] * self.size), shortest))
        width, height = ((2 * length * side + shortest) // (2 * shortest) for length in photograph.size)
        return np.asarray(photograph.resize((width, height), Image.Resampling.BILINEAR))

    def _made_piece(self, category: int, place: int, step: int) -> _Piece:
        """A stamp at one of the sizes that objects have."""
        picture = self.pool.stamps[category][place].picture
        longest = max(2, int((_SIDES[0] + (_SIDES[1] - _SIDES[0]) * step / (_STEPS - 1)) * self.size))
        long = max(picture.size)
        width, height = (max(1, (2 * side * longest + long) // (2 * long)) for side in picture.size)
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)).astype(np.uint16)
        alpha = pixels[..., 3]
        opaque = alpha >= min(OPAQUE, int(alpha.max()))  # what is thin may have no pixel that is half opaque
        return _Piece(opaque, int(opaque.sum()), pixels[..., :3] * alpha[..., None] + np.uint16(127), np.uint16(255) - alpha[..., None])


@dataclass(frozen=True)
class _Piece:
    """A stamp as it is pasted. opaque: bool [h, w], `area` pixels of it. colours: uint16 [h, w, 3], times alpha. rest: 255 - alpha."""

    opaque: NDArray[np.bool_]
    area: int
    colours: NDArray[np.uint16]
    rest: NDArray[np.uint16]

    def over(self, ground: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The object over the ground, by its alpha; in whole numbers, so that every machine has the same bytes."""
        return ((self.colours + ground * self.rest) // np.uint16(255)).astype(np.uint8)


def _leaves_enough(owner: NDArray[np.int8], there: tuple[slice, slice], opaque: NDArray[np.bool_], areas: list[int]) -> bool:
    """Whether half of each object stays visible if another covers its pixels `opaque` at `there`. areas: of the objects when pasted."""
    if not areas or (hidden := owner[there][opaque]).max() < 0:
        return True
    visible = np.bincount(owner.ravel().astype(np.intp) + 1, minlength=len(areas) + 1)[1:]
    covered = np.bincount(hidden.astype(np.intp) + 1, minlength=len(areas) + 1)[1:]
    return bool((2 * (visible - covered) >= np.array(areas)).all())


class _Target:
    """What is asked of scenes."""

    def __init__(self, library: Library, name: TargetName, most: int) -> None:
        self.name, self.most, self.classes = name, most, len(library.categories)
        self.vocabulary: Vocabulary | None = None
        if name == "caption":
            words = {word for caption in (_JOINED, *library.captions) for word in words_of(caption)[:CAPTION_WORDS]}
            self.vocabulary = Vocabulary(tuple(sorted(words)))
            self.length = most * CAPTION_WORDS + (most - 1) * len(words_of(_JOINED))

    def of(self, scene: StampScene) -> tuple[Arrays, Arrays]:
        """Further inputs of a scene, and its target."""
        kinds: dict[TargetName, Callable[[StampScene], Arrays]] = {
            "mask": self._mask,
            "class": lambda scene: {"": np.array(scene.objects[0].stamp.category, np.int64)},
            "present": self._present,
            "boxes": self._boxes,
            "masks": self._masks,
        }
        if self.name != "caption":
            return {}, kinds[self.name](scene)
        assert self.vocabulary is not None
        tokens = self.vocabulary.encode(caption_of(scene), self.length)
        digest = hashlib.sha256(np.array(tokens, "<i8").tobytes()).digest()
        return {"tokens": np.array(tokens, np.int64)}, {"": np.array(int.from_bytes(digest[:8], "little") >> 1, np.int64)}

    def _mask(self, scene: StampScene) -> Arrays:
        labels = np.zeros(scene.image.shape[:2], np.uint8)
        for shown in scene.objects:
            labels[shown.mask] = shown.stamp.category + 1
        return {"": labels}

    def _present(self, scene: StampScene) -> Arrays:
        present = np.zeros(self.classes, np.uint8)
        present[[shown.stamp.category for shown in scene.objects]] = 1
        return {"": present}

    def _boxes(self, scene: StampScene) -> Arrays:
        boxes, labels = np.zeros((self.most, 4), np.float32), np.full(self.most, NO_OBJECT, np.int64)
        for row, shown in enumerate(scene.objects):
            boxes[row], labels[row] = shown.box, shown.stamp.category
        return {"boxes": boxes, "labels": labels}

    def _masks(self, scene: StampScene) -> Arrays:
        planes = np.zeros((1, *scene.image.shape[:2]), np.int64)
        for row, shown in enumerate(scene.objects):
            planes[0, shown.mask] |= np.int64(1) << row
        return {"masks": planes, **self._boxes(scene)}


def caption_of(scene: StampScene) -> str:
    """The objects' captions from the back to the front: `a koala, with an onion`."""
    return _JOINED.join(" ".join(words_of(shown.stamp.caption)[:CAPTION_WORDS]) for shown in scene.objects)


def _part(name: str, count: int, size: int, seed: int, library: Library, asked: _Target) -> tuple[Tensor, Part]:
    """The pictures, and the part that holds them."""
    painter, images = Painter(library.pools[name], size), np.empty((count, 3, size, size), np.uint8)
    inputs: Arrays = {}
    target: Arrays = {}
    for row in range(count):
        scene = painter.draw(seed, _FIRST[name] + row, asked.most)
        images[row] = scene.image.transpose(2, 0, 1)
        further, wanted = asked.of(scene)
        put(inputs, row, count, further)
        put(target, row, count, wanted)
    pictures = torch.from_numpy(images)
    shown = {"image": pictures, **tensors_of(inputs)} if inputs else pictures
    of_target: dict[str, dict[str, Kind]] = {
        "boxes": {"boxes": Boxes()},
        "masks": {"boxes": Boxes(), "masks": Masks()},
        "caption": {TARGET: Plain()},
    }
    kinds = of_target.get(asked.name, {})
    return pictures, Part(shown, columns_of(target), torch.arange(_FIRST[name], _FIRST[name] + count), kinds=kinds)
