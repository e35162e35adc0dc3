"""What can be asked of a scene of shapes: classes, boxes, keypoints, words, questions, relations. Each has a fixed shape, by padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdbench.data.batch import TARGET
from kdbench.data.drawn import PIXEL_BYTES, Arrays
from kdbench.data.kinds import NO_OBJECT, Boxes, Kind, Masks, Points, Sided
from kdbench.data.scenes import COLOURS, KEYPOINTS, KINDS, MOST_OBJECTS, PREDICATES, Scene, Shape, predicate
from kdbench.data.views import IGNORED
from kdbench.data.vocabulary import Vocabulary

TargetName = Literal["mask", "class", "present", "boxes", "masks", "keypoints", "caption", "question", "relation"]

NUMBERS = ("one", "two", "three")  # as many as objects fit in a scene
ANSWERS = (*COLOURS, *KINDS, *NUMBERS, "yes", "no")
QUESTIONS = ("colour", "presence", "count", "place")  # the types of a question
VOCABULARY = Vocabulary(  # one for all targets, so that a network that learned captions can go on with questions
    (
        "a",
        ",",
        "with",
        "above",
        "below",
        "left",
        "right",
        "of",
        "what",
        "is",
        "the",
        "colour",
        "there",
        "how",
        "many",
        "shapes",
        "are",
        *ANSWERS,
    )
)
CAPTION_TOKENS = 13  # of "a red circle left of a blue square, with a white ring"
QUESTION_TOKENS = 6  # of "what is left of the circle"
NAMES_TOKENS = 4  # of "red circle blue square"

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ShapesTarget:
    """One way of asking.

    names: of the classes. of: further inputs and the target of a scene; the random numbers are the sample's own, beside those that drew it.
    least, most: objects in a scene. ignored: the label of pixels that don't count. vocabulary: of tokens among the inputs.
    kinds: of the columns that need one named, as `Part.kinds` holds them. pixel_bytes: of a picture and its target.
    """

    names: tuple[str, ...]
    of: Callable[[Scene, np.random.Generator], tuple[Arrays, Arrays]]
    least: int = 1
    most: int = MOST_OBJECTS
    ignored: int | None = None
    vocabulary: Vocabulary | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    pixel_bytes: int = PIXEL_BYTES


def _mask(scene: Scene, _: np.random.Generator) -> tuple[Arrays, Arrays]:
    return {}, {"": scene.classes}


def _class(scene: Scene, _: np.random.Generator) -> tuple[Arrays, Arrays]:
    return {}, {"": _number(scene.objects[0].kind - 1)}


def _present(scene: Scene, _: np.random.Generator) -> tuple[Arrays, Arrays]:
    """uint8 [5]: 1 for each kind that the scene shows."""
    present = np.zeros(len(KINDS), np.uint8)
    present[[shape.kind - 1 for shape in scene.objects]] = 1
    return {}, {"": present}


def _boxes(scene: Scene, _: np.random.Generator) -> tuple[Arrays, Arrays]:
    """boxes: float32 [MOST_OBJECTS, 4] of x0, y0, x1, y1 in pixels, 0 in padded rows; labels: int64 [MOST_OBJECTS], NO_OBJECT there.

    Objects stand from the back to the front. A box encloses the visible pixels.
    """
    boxes, labels = np.zeros((MOST_OBJECTS, 4), np.float32), np.full(MOST_OBJECTS, NO_OBJECT, np.int64)
    for row, shape in enumerate(scene.objects):
        boxes[row], labels[row] = shape.box, shape.kind - 1
    return {}, {"boxes": boxes, "labels": labels}


def _masks(scene: Scene, random: np.random.Generator) -> tuple[Arrays, Arrays]:
    """masks: int64 [1, H, W], bit k of a pixel says that it shows the object in row k; with boxes and labels."""
    planes = np.zeros((1, *scene.image.shape[1:]), np.int64)
    for row, shape in enumerate(scene.objects):
        planes[0, shape.mask] |= 1 << row
    return {}, {"masks": planes, **_boxes(scene, random)[1]}


def _keypoints(scene: Scene, random: np.random.Generator) -> tuple[Arrays, Arrays]:
    """points: float32 [MOST_OBJECTS * KEYPOINTS, 3] of x, y in pixels and 1 where visible, object by object, with boxes and labels.

    The last number is 0 for a corner that another object hides, and the whole row is 0 for one that the kind does not have and for a
    padded object. Which corners change places in a mirror differs by kind.
    """
    points = np.zeros((MOST_OBJECTS, KEYPOINTS, 3), np.float32)
    for row, shape in enumerate(scene.objects):
        points[row] = shape.keypoints
    return {}, {"points": points.reshape(-1, 3), **_boxes(scene, random)[1]}


def _caption(scene: Scene, _: np.random.Generator) -> tuple[Arrays, Arrays]:
    return {"tokens": _tokens(scene.caption, CAPTION_TOKENS)}, {"": _number(caption_id(scene))}


def caption_id(scene: Scene) -> int:
    """A number of the scene's caption, 0 .. 111,629: the same for the same caption and different for different ones.

    Scenes of one object have 0 .. 29, then follow those of two objects, then those of three.
    """
    names = len(COLOURS) * len(KINDS)
    first, *rest = (list(COLOURS).index(shape.colour) * len(KINDS) + shape.kind - 1 for shape in scene.objects)
    if not rest:
        return first
    pair = (first * len(PREDICATES) + _predicate(*scene.objects[:2])) * names + rest[0]
    pairs = names * len(PREDICATES) * names
    return names + pair if len(rest) == 1 else names + pairs + pair * names + rest[1]


def _question(scene: Scene, random: np.random.Generator) -> tuple[Arrays, Arrays]:
    """answer: int64, one of ANSWERS; type: int64, one of QUESTIONS."""
    kind, text, answer = ask(scene, random)
    return {"tokens": _tokens(text, QUESTION_TOKENS)}, {"answer": _number(ANSWERS.index(answer)), "type": _number(kind)}


def ask(scene: Scene, random: np.random.Generator) -> tuple[int, str, str]:
    """A question that the scene answers without doubt: its type (of QUESTIONS), its text, and the answer (of ANSWERS).

    All types that the scene allows are equally likely: colour and place ask of a kind that the scene shows once. Half of the questions
    for presence have the answer yes.
    """
    single = [shape for shape in scene.objects if sum(other.kind == shape.kind for other in scene.objects) == 1]
    places = [place for shape in single for place in _places(scene, shape)]
    allowed = [number for number, possible in enumerate((single, True, True, places)) if possible]
    kind = _one_of(allowed, random)
    match QUESTIONS[kind]:
        case "colour":
            shape = _one_of(single, random)
            return kind, f"what colour is the {shape.name}", shape.colour
        case "presence":
            shown = [name for name in KINDS if any(shape.name == name for shape in scene.objects)]
            asked = shown if random.random() < 0.5 else [name for name in KINDS if name not in shown]
            name = _one_of(asked, random)
            return kind, f"is there a {name}", "yes" if name in shown else "no"
        case "count":
            return kind, "how many shapes are there", NUMBERS[len(scene.objects) - 1]
        case _:
            relation, of, answer = _one_of(places, random)
            return kind, f"what is {relation} the {of}", answer


def _places(scene: Scene, of: Shape) -> list[tuple[str, str, str]]:
    """Where exactly one other object lies: the predicate, the name of `of`, the name of the other."""
    lying = [(_predicate(shape, of), shape.name) for shape in scene.objects if shape is not of]
    there = [number for number, _ in lying]
    return [(PREDICATES[number], of.name, name) for number, name in lying if there.count(number) == 1]


def _relation(scene: Scene, random: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Inputs boxes: float32 [2, 4] of subject and object; tokens: their colours and kinds. Target: int64, one of PREDICATES."""
    subject = _one_of(scene.objects, random)
    other = _one_of([shape for shape in scene.objects if shape is not subject], random)
    names = " ".join(f"{shape.colour} {shape.name}" for shape in (subject, other))
    inputs: Arrays = {"boxes": np.array([subject.box, other.box], np.float32), "tokens": _tokens(names, NAMES_TOKENS)}
    return inputs, {"": _number(_predicate(subject, other))}


def _predicate(subject: Shape, other: Shape) -> int:
    return predicate(subject.centre, other.centre)


def _one_of(items: Sequence[_Item], random: np.random.Generator) -> _Item:
    return items[int(random.random() * len(items))]


def _tokens(text: str, length: int) -> NDArray[np.int64]:
    return np.array(VOCABULARY.encode(text, length), np.int64)


def _number(value: int) -> NDArray[np.int64]:
    return np.array(value, np.int64)


TARGETS: dict[TargetName, ShapesTarget] = {
    "mask": ShapesTarget(("ground", *KINDS), _mask, ignored=IGNORED),
    "class": ShapesTarget(KINDS, _class, most=1),
    "present": ShapesTarget(KINDS, _present),
    "boxes": ShapesTarget(KINDS, _boxes, kinds={"boxes": Boxes()}),
    "masks": ShapesTarget(KINDS, _masks, kinds={"boxes": Boxes(), "masks": Masks()}, pixel_bytes=3 + 8),
    "keypoints": ShapesTarget(KINDS, _keypoints, kinds={"boxes": Boxes(), "points": Points(mirrors=False)}),
    "caption": ShapesTarget(KINDS, _caption, vocabulary=VOCABULARY, kinds={"tokens": Sided(), TARGET: Sided()}),
    "question": ShapesTarget(ANSWERS, _question, vocabulary=VOCABULARY, kinds={"tokens": Sided(), "answer": Sided()}),
    "relation": ShapesTarget(PREDICATES, _relation, least=2, vocabulary=VOCABULARY, kinds={"boxes": Boxes(), TARGET: Sided()}),
}
