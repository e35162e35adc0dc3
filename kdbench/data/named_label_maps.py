"""Label maps of data sets that people train on: what their files hold, and which classes are learned of it. Sources are beside each."""

from __future__ import annotations

from kdbench.data.label_map import LabelMap
from kdbench.data.views import IGNORED


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


# Cordts et al., CVPR 2016 (arXiv 1604.01685): 34 ids, of which 19 are evaluated, in the order of their train ids.
_CITYSCAPES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
_CITYSCAPES_IDS = 34

# Zhou et al., CVPR 2017 (arXiv 1608.05442), the scene parsing challenge: 1 .. 150, and 0 for what is none of them.
_ADE20K = _words(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
    mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
    fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
    sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen
    door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove,
    palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
    chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
    escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
    microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
    ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag"""
)

# Brostow et al., ECCV 2008: 31 colours and black for void. The eleven classes are those of Sturgess et al., BMVC 2009, which SegNet and
# most work since take: a class is the colours that stand in its row.
_CAMVID: dict[str, tuple[tuple[int, int, int], ...]] = {
    "sky": ((128, 128, 128),),
    "building": ((128, 0, 0), (64, 192, 0), (64, 0, 64), (0, 128, 64), (192, 0, 128)),  # and wall, tunnel, bridge, archway
    "pole": ((192, 192, 128), (0, 0, 64)),  # and traffic cone
    "road": ((128, 64, 128), (128, 0, 192), (192, 0, 64)),  # and lane markings, for driving and others
    "pavement": ((0, 0, 192), (64, 192, 128), (128, 128, 192)),  # sidewalk, parking block, road shoulder
    "tree": ((128, 128, 0), (192, 192, 0)),  # and other vegetation
    "sign": ((192, 128, 128), (128, 128, 64), (0, 64, 64)),  # and other text, traffic light
    "fence": ((64, 64, 128),),
    "car": ((64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)),  # and van, truck or bus, train, other moving
    "pedestrian": ((64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)),  # and child, cart or pram, animal
    "bicyclist": ((0, 128, 192), (192, 0, 192)),  # and motorcycle or scooter
}
_CAMVID_VOID = (0, 0, 0)

# Caesar et al., CVPR 2018 (arXiv 1612.03716), the pixel maps: a byte is the id less 1, 255 for what is unlabelled. Of the ids 1 .. 182,
# eleven of things are in no picture.
_STUFF_ABSENT = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})
_STUFF_IDS = 182
_STUFF = _words(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
    meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
    suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
    racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
    pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell
    phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush,
    banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile,
    cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
    floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill,
    house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other,
    plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other,
    skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree,
    vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops,
    window-blind, window-other, wood"""
)

NAMES = ("cityscapes", "ade20k", "camvid", "coco_stuff")
_WAY_OUT = "Set labels to the map of these files: {others}, or a mapping of each number to its class"


def named_label_map(name: str) -> LabelMap:
    """The map of a data set, one of NAMES."""
    way_out = _WAY_OUT.format(others=", ".join(other for other in NAMES if other != name))
    if name == "cityscapes":
        ids = dict.fromkeys(range(_CITYSCAPES_IDS), IGNORED) | {number: label for label, number in enumerate(_CITYSCAPES.values())}
        return LabelMap(name, tuple(_CITYSCAPES), ids, way_out=way_out)
    if name == "ade20k":
        return LabelMap(name, _ADE20K, {0: IGNORED} | {label + 1: label for label in range(len(_ADE20K))}, way_out=way_out)
    if name == "camvid":
        colours = {colour: label for label, each in enumerate(_CAMVID.values()) for colour in each} | {_CAMVID_VOID: IGNORED}
        return LabelMap(name, tuple(_CAMVID), colours=colours, way_out=way_out)
    present = [number for number in range(1, _STUFF_IDS + 1) if number not in _STUFF_ABSENT]
    return LabelMap(name, _STUFF, {255: IGNORED} | {number - 1: label for label, number in enumerate(present)}, way_out=way_out)


def own_label_map(numbers: dict[int, int] | None, classes: tuple[str, ...]) -> LabelMap:
    """A map that somebody wrote: the label of each number, 255 for one that doesn't count; without one, each number is its label.

    What the files hold beside these numbers is no label: it ends in an error, and so does a number beyond the classes. 255 stays 255.
    """
    table = dict(enumerate(range(len(classes)))) if numbers is None else dict(numbers)
    return LabelMap(
        "identity" if numbers is None else "labels", classes, {IGNORED: IGNORED} | table, way_out=_WAY_OUT.format(others=", ".join(NAMES))
    )
