"""What methods that look inside share: taps that a user may name, and that are chosen for the pair otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdbench.catalogue import nearest
from kdbench.errors import UserError
from kdbench.methods import METHODS
from kdbench.methods.base import Method, loss_precision
from kdbench.models.adapters import as_map, map_shape, shape_of
from kdbench.models.outputs import Outputs, Shapes, TapShape

Names = tuple[str, ...]
_STAGES_OF_A_TRANSFORMER = 4  # one of a single resolution has no stages of its own: this many blocks, evenly spaced, stand for them


class FeatureMethod(Method):
    """A method that compares places of the student with places of the teacher, in pairs: `student_taps[k]` with `teacher_taps[k]`."""

    needs_labels = False

    class Params(Method.Params):
        """student_taps, teacher_taps: what is compared with what, as many of the one as of the other; empty: chosen for the pair."""

        student_taps: tuple[str, ...] = ()
        teacher_taps: tuple[str, ...] = ()

    params: Params

    def __init__(self, params: Method.Params | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__(params, generator)
        self.student_taps, self.teacher_taps = self.params.student_taps, self.params.teacher_taps

    @property
    def name(self) -> str:
        """As a user calls the method."""
        target = f"{type(self).__module__}:{type(self).__qualname__}"
        return next((name for name, entry in METHODS.items() if entry.target == target), target)

    @property
    def taps_chosen(self) -> bool:
        return bool(self.params.student_taps and self.params.teacher_taps)

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """The student's and the teacher's places that are compared unless the user names others."""
        return ("stage:-1",), ("stage:-1",)

    def choose_taps(self, student: Shapes, teacher: Shapes | None) -> Method.Params:
        if teacher is None:
            raise UserError(f"method {self.name} needs a teacher, and there is none; add `teacher: {{model: ...}}`")
        named = self.params.student_taps, self.params.teacher_taps
        try:
            default = named if all(named) else self.default_taps(student, teacher)
        except UserError as error:
            raise UserError(f"method {self.name}: {error}; name student_taps and teacher_taps") from error
        ours, theirs = named[0] or default[0], named[1] or default[1]
        for key, names, shapes in (("student_taps", ours, student), ("teacher_taps", theirs, teacher)):
            if unknown := [name for name in names if name not in shapes.taps]:
                raise UserError(f"method {self.name}: {key}: there is no tap {unknown[0]!r}{nearest(unknown[0], shapes.taps)}")
        if len(ours) != len(theirs):
            raise UserError(
                f"method {self.name}: {len(ours)} student_taps ({', '.join(ours)}) can't be paired with "
                f"{len(theirs)} teacher_taps ({', '.join(theirs)}); name as many of the one as of the other"
            )
        return self.params.model_copy(update={"student_taps": ours, "teacher_taps": theirs})

    def pairs(self, student: Shapes, teacher: Shapes | None) -> list[tuple[TapShape, TapShape]]:
        """What `build` gets, pair by pair."""
        if teacher is None:
            raise UserError(f"method {self.name} needs a teacher")
        return [(student.taps[s], teacher.taps[t]) for s, t in zip(self.student_taps, self.teacher_taps, strict=True)]

    def map_pairs(
        self, student: Shapes, teacher: Shapes | None, over_space: bool = False
    ) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
        """The pairs' [D, H, W], tokens read as maps.

        over_space: the method compares the positions of a map with each other. Raises UserError, naming both taps, where one can't be
        read as a map; with `over_space` also where every pair has come down to a single position.
        """
        found = []
        for position, (ours, theirs) in enumerate(self.pairs(student, teacher)):
            try:
                found.append((map_shape(ours), map_shape(theirs)))
            except UserError as error:
                raise self.unfit(position, ours, theirs, str(error)) from error
        if over_space and found and all(min(ours[1] * ours[2], theirs[1] * theirs[2]) == 1 for ours, theirs in found):
            way_out = "it compares positions of a map, and there is a single one; name taps nearer to the image"
            raise self.unfit(0, *self.pairs(student, teacher)[0], way_out)
        return found

    def read_pairs(self, s: Outputs, t: Outputs | None) -> list[tuple[Tensor, Tensor]]:
        """What the networks gave at the pairs of taps, as it was tapped."""
        assert t is not None, "`pairs` refuses a pair without a teacher"
        return [(s.maps[ours], t.maps[theirs]) for ours, theirs in zip(self.student_taps, self.teacher_taps, strict=True)]

    def read_maps(self, s: Outputs, t: Outputs | None) -> list[tuple[Tensor, Tensor]]:
        """What the networks gave at the pairs of taps, as maps [B, D, H, W], tokens on their grid; float32, or as wide as the student's."""
        found = []
        for ours, theirs in self.read_pairs(s, t):
            (student,) = loss_precision(as_map(ours, shape_of(ours)))
            found.append((student, as_map(theirs, shape_of(theirs)).to(student.dtype)))
        return found

    def unfit(self, position: int, student: TapShape, teacher: TapShape, way_out: str) -> UserError:
        """The error for a pair of taps that can't be compared: names both with their shapes, and says what would work."""
        ours, theirs = self.student_taps[position], self.teacher_taps[position]
        return UserError(
            f"method {self.name} can't compare the student's {ours!r} ({student.kind} {list(student.shape)}) "
            f"with the teacher's {theirs!r} ({teacher.kind} {list(teacher.shape)}): {way_out}"
        )


def stages(shapes: Shapes) -> list[str]:
    """Names of a network's stages, from fine to coarse; of a transformer with one resolution, blocks evenly spaced over its depth.

    Raises UserError where it has none.
    """
    named = _counted(shapes, "stage")
    blocks = _counted(shapes, "block")
    if len(named) > 1 or len(blocks) < 2 or shapes.taps[blocks[-1]].kind != "tokens":
        if not named:
            raise UserError(f"there is no stage in one of the networks{nearest('stage:-1', shapes.taps)}")
        return named
    count = min(_STAGES_OF_A_TRANSFORMER, len(blocks))
    return [blocks[(position + 1) * len(blocks) // count - 1] for position in range(count)]


def paired_stages(student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
    """The last stages of both, as many as the network with fewer has. Raises UserError where one has none."""
    ours, theirs = stages(student), stages(teacher)
    count = min(len(ours), len(theirs))
    return tuple(ours[len(ours) - count :]), tuple(theirs[len(theirs) - count :])


def paired_spatial_stages(student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
    """`paired_stages`, without those where a map has shrunk to a single position: there is nothing to compare over space.

    Where all have, they stay, so that `map_pairs` can say so.
    """
    paired = list(zip(*paired_stages(student, teacher), strict=True))
    spatial = [(ours, theirs) for ours, theirs in paired if min(positions(student.taps[ours]), positions(teacher.taps[theirs])) > 1]
    kept = spatial or paired
    return tuple(ours for ours, _ in kept), tuple(theirs for _, theirs in kept)


def levels(shapes: Shapes) -> list[str]:
    """Names of the maps of a network's pyramid, from fine to coarse; none of a network that has no pyramid."""
    return _counted(shapes, "level")


def paired_levels(student: Shapes, teacher: Shapes) -> tuple[Names, Names] | None:
    """The levels of the two pyramids that have one height and width, from fine to coarse; None where one of the networks has no pyramid.

    Raises UserError where no two levels have one size.
    """
    ours, theirs = levels(student), levels(teacher)
    if not ours or not theirs:
        return None
    of_size = {map_shape(teacher.taps[name])[1:]: name for name in theirs}
    paired = [(name, of_size[size]) for name in ours if (size := map_shape(student.taps[name])[1:]) in of_size]
    if not paired:
        raise UserError(
            f"no level of the student's pyramid ({_sizes(student, ours)}) has the size of one of the teacher's ({_sizes(teacher, theirs)})"
        )
    return tuple(ours for ours, _ in paired), tuple(theirs for _, theirs in paired)


def embeddings(student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
    """What each classifier reads, one vector a sample; the last stage of a network in which that can't be told."""
    ours, theirs = ("pooled" if "pooled" in shapes.taps else "stage:-1" for shapes in (student, teacher))
    return (ours,), (theirs,)


def middle_stages(student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
    """The teacher's middle stage, and the student's whose map is nearest to it in size: of two that are, the deeper one."""
    theirs = stages(teacher)
    hint = theirs[(len(theirs) - 1) // 2]
    wanted = map_shape(teacher.taps[hint])[1]

    def distance(name: str) -> float:
        return abs(math.log(map_shape(student.taps[name])[1] / wanted))

    return (min(reversed(stages(student)), key=distance),), (hint,)


def positions(shape: TapShape) -> int:
    """Over how many places of the image a stage's output is spread."""
    return shape.shape[0] if shape.kind == "tokens" else math.prod(shape.shape[1:])


def before_activation(shapes: Shapes, names: Names) -> Names:
    """For each place, what the last activation of its shape reads; the place itself where no activation there is a module."""
    readings = {shape: name for name, shape in shapes.taps.items() if name.startswith("before:")}
    return tuple(readings.get(shapes.taps[name], name) for name in names)


def _sizes(shapes: Shapes, names: list[str]) -> str:
    """Heights and widths of maps, for an error."""
    return ", ".join("{1}x{2}".format(*map_shape(shapes.taps[name])) for name in names)


def _counted(shapes: Shapes, kind: str) -> list[str]:
    """`stage:0`, `stage:1`, ... as far as they go."""
    names: list[str] = []
    while (name := f"{kind}:{len(names)}") in shapes.taps:
        names.append(name)
    return names


def output_place(shapes: Shapes) -> str:
    """Where a network's features leave its body: behind the norm that follows the last stage, or at that stage where there is none.

    It is the last place, in forward order, of the last stage's shape. Raises UserError where the network has no stage.
    """
    last = shapes.taps[stages(shapes)[-1]]
    return [name for name, shape in shapes.taps.items() if shape == last and not name.startswith("before:")][-1]
