"""Taps: the places inside a model that a method looks at, by names that hold for every model.

`stage:0`, `stage:-1`: the last module at each resolution, from fine to coarse (a transformer of one resolution has one stage);
`block:2`, `block:-2`: residual and transformer blocks, in forward order;
`level:0`, `level:-1`: the maps of a pyramid, from fine to coarse, of a model that names them in `level_modules`;
`pooled`: what the classifier reads, one vector a sample;
`layer3.0.conv1`: any module, by its path;
`before:layer3.0.relu`: what an activation reads, features before their nonlinearity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdbench.catalogue import nearest
from kdbench.data.columns import Columns, mapped
from kdbench.errors import UserError
from kdbench.models.inputs import model_inputs
from kdbench.models.outputs import Outputs, Shapes, TapShape, main_output, reading_of
from kdbench.models.trace import Example, Trace, trace

_BEFORE = "before:"
# What acts on each number by itself, so that what goes in has the shape of what comes out.
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)


@dataclass(frozen=True)
class TapRow:
    """One place to tap: its module, the aliases that lead there, and one sample's shape there.

    side: `input` for `pooled`, which is read in front of its module. stride: input pixels for one position of a map.
    """

    path: str
    aliases: tuple[str, ...]
    kind: Literal["map", "tokens", "vector"]
    shape: tuple[int, ...]
    stride: int | None
    side: Literal["output", "input"] = "output"


class Taps:
    """A model and the taps on it: call it with images to get prediction and maps in one forward pass.

    Hooks exist during a call only, so the model can be copied, wrapped or exported at any time, and costs nothing more without taps.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str] = (),
        example: Example | None = None,
        call: Callable[[Columns], Any] | None = None,
    ) -> None:
        """example: to look the names up with, at once; without it that happens at the first call.

        call: another way to run the same model, such as its compiled form; with names it is left aside, as hooks don't reach into it.
        Raises UserError, now or then, for a name that the model has not.
        """
        self.model = model
        self.names = tuple(names)
        self._call = call if call is not None and not self.names else model
        self._taps: tuple[Tap, ...] | None = None if self.names else ()
        if self.names and example is not None:
            self._taps = self._find(example)

    def __call__(self, inputs: Columns, **truth: Tensor) -> Outputs:
        """Outputs of inputs with images [B, C, H, W] in [0, 1]: `maps` has one entry a name, [B, D, H, W], [B, N, D] or [B, D].

        truth: what the network is handed of the target beside its inputs, see `Task.truth`.
        """
        if self._taps is None:
            self._taps = self._find(mapped(inputs, lambda tensor: tensor[:2].detach()))
        given = model_inputs(self.model, inputs)
        maps: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for tap in self._taps:
                hooks.enter_context(tap.attach(maps))
            prediction = main_output(self.model, self._call(given, **truth))
        for tap in self._taps:
            if tap.name not in maps:
                raise UserError(f"tap {tap.name!r}: module {tap.path!r} did not run in this forward pass")
        return Outputs(prediction, maps, reading=reading_of(self.model))

    def _find(self, example: Example) -> tuple[Tap, ...]:
        seen = trace(self.model, example)
        places = _places(self.model, seen)
        return tuple(_tap(self.model, seen, places, name) for name in self.names)


def probe(model: nn.Module, example: Example, names: Iterable[str] = ()) -> Shapes:
    """Shapes of the prediction and of the named taps for one sample, by one forward pass that leaves the model as it was.

    Raises UserError for a name that the model has not, naming the nearest.
    """
    seen = trace(model, example)
    places = _places(model, seen)
    return Shapes(seen.prediction, {name: _tap(model, seen, places, name).shape for name in names}, reading_of(model))


def tap_shapes(model: nn.Module, example: Example) -> Shapes:
    """Shapes of the prediction and of every place that can be tapped: by alias (`stage:0`, `stage:-1`, `block:2`, `pooled`) and by path.

    Paths, and what activations read, are in forward order.
    """
    seen = trace(model, example)
    aliases = _places(model, seen)
    pooled = ["pooled"] if seen.classifier is not None else []
    names = [*aliases, *pooled, *seen.seen, *(_BEFORE + path for path in seen.seen if _is_activation(model, path))]
    return Shapes(seen.prediction, {name: _tap(model, seen, aliases, name).shape for name in names}, reading_of(model))


def locate(model: nn.Module, example: Example, name: str) -> Tap:
    """Where one tap lies. Raises UserError for a name that the model has not, naming the nearest."""
    seen = trace(model, example)
    return _tap(model, seen, _places(model, seen), name)


def tap_table(model: nn.Module, example: Example) -> list[TapRow]:
    """Every place that can be tapped, in forward order."""
    seen = trace(model, example)
    places = _places(model, seen)
    aliases: dict[str, list[str]] = {}
    for alias, path in places.items():
        aliases.setdefault(path, []).append(alias)
    rows = []
    for path, output in seen.seen.items():
        if seen.classifier is not None and path == seen.classifier[0]:
            rows.append(TapRow(path, ("pooled",), "vector", (seen.classifier[1],), None, side="input"))
        shape = output.shape
        rows.append(TapRow(path, tuple(aliases.get(path, ())), shape.kind, shape.shape, seen.stride(shape)))
    return rows


@dataclass(frozen=True)
class Tap:
    """A name, resolved: where the hook goes and what it finds there."""

    name: str
    path: str
    module: nn.Module
    shape: TapShape
    channels_last: bool = False
    reads_input: bool = False

    def attach(self, maps: dict[str, Tensor]) -> RemovableHandle:
        """Put what passes into `maps` under this tap's name, from now until the handle is removed."""

        def keep(features: Tensor) -> Tensor:
            maps[self.name] = features
            return features

        return self.change(keep)

    def change(self, function: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Let the network go on with `function` of what passes, from now until the handle is removed: [B, D, H, W], [B, N, D] or [B, D]."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            changed = self._stored(function(self._channels_first(args[0])))
            # An activation that works in place would overwrite what was kept.
            return (changed.clone() if getattr(module, "inplace", False) else changed, *args[1:])

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self._stored(function(self._channels_first(output)))

        return self.module.register_forward_pre_hook(before) if self.reads_input else self.module.register_forward_hook(after)

    def _channels_first(self, stored: Tensor) -> Tensor:
        return stored.permute(0, 3, 1, 2) if self.channels_last else stored

    def _stored(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1) if self.channels_last else features


def _tap(model: nn.Module, seen: Trace, places: dict[str, str], name: str) -> Tap:
    """Resolve one name. Raises UserError where it leads nowhere."""
    if name == "pooled" and seen.classifier is not None:
        path, width = seen.classifier
        return Tap(name, path, model.get_submodule(path), TapShape("vector", (width,)), reads_input=True)
    path = name.removeprefix(_BEFORE)
    if path != name and path in seen.seen and _is_activation(model, path):
        output = seen.seen[path]
        return Tap(name, path, model.get_submodule(path), output.shape, output.channels_last, reads_input=True)
    path = places.get(name, name)
    if path in seen.seen:
        output = seen.seen[path]
        return Tap(name, path, model.get_submodule(path), output.shape, output.channels_last)
    if path in seen.odd:
        raise UserError(f"tap {name!r}: module {path!r} {seen.odd[path]}")
    if path and path in dict(model.named_modules()):
        raise UserError(f"tap {name!r}: module {path!r} does not run in a forward pass")
    kind, colon, _ = name.partition(":")
    count = sum(alias.startswith(f"{kind}:") for alias in places) // 2
    if colon and kind in ("stage", "block", "level"):
        there_is = f"{kind}:0 to {kind}:{count - 1}" if count > 1 else f"{kind}:0" if count else f"no {kind}"
        raise UserError(f"unknown tap {name!r}; the model has {there_is}")
    pooled = ["pooled"] if seen.classifier is not None else []
    raise UserError(f"unknown tap {name!r}{nearest(name, [*places, *pooled, *seen.seen])}")


def _is_activation(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), _ACTIVATIONS)


def _places(model: nn.Module, seen: Trace) -> dict[str, str]:
    """Alias -> module path: every stage, block and level, counted from the front and from the back."""
    blocks = _blocks(model, seen)
    places = {}
    levels = [path for path in getattr(model, "level_modules", ()) if path in seen.seen]
    for kind, paths in (("stage", _stages(model, seen, blocks)), ("block", blocks), ("level", levels)):
        for index, path in enumerate(paths):
            places[f"{kind}:{index}"] = path
            places[f"{kind}:{index - len(paths)}"] = path
    return places


def _stages(model: nn.Module, seen: Trace, blocks: Sequence[str]) -> list[str]:
    """The last module at each resolution: of those the model declares, as ours and timm's do, otherwise of all that ran."""
    last: dict[tuple[int, ...], str] = {}
    for path in _declared_stages(model):
        if path in seen.seen:
            last[_resolution(seen.seen[path].shape)] = path
    if last:
        return list(last.values())
    if blocks and seen.seen[blocks[-1]].shape.kind == "tokens":
        candidates = list(blocks)
    else:
        # What lies inside a block that halves the resolution is at the old one for a moment only.
        maps = [path for path, output in seen.seen.items() if output.shape.kind == "map"]
        candidates = [path for path in maps if not any(_inside(path, block) for block in blocks)]
        if not _convolves_single_positions(model, seen):
            candidates = [path for path in candidates if _resolution(seen.seen[path].shape) != (1, 1)]
    for path in candidates:
        last[_resolution(seen.seen[path].shape)] = path
    return [last[resolution] for resolution in sorted(last, reverse=True)]


def _declared_stages(model: nn.Module) -> list[str]:
    """Module paths from our models' `stage_modules` or from timm's `feature_info`."""
    ours: Sequence[str] | None = getattr(model, "stage_modules", None)
    if ours is not None:
        return list(ours)
    timms: Any = getattr(model, "feature_info", None)
    return [str(entry["module"]) for entry in timms] if isinstance(timms, list) else []


def _convolves_single_positions(model: nn.Module, seen: Trace) -> bool:
    """Whether the model's own path reaches 1x1 maps; otherwise those are pooled vectors, of a head or a squeeze-and-excitation layer."""

    def reaches(path: str) -> bool:
        module = model.get_submodule(path)
        return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and _resolution(seen.seen[path].shape) == (1, 1)

    return any(reaches(path) for path in seen.seen)


def _resolution(shape: TapShape) -> tuple[int, ...]:
    """Height and width of a map, number of tokens, nothing for a vector."""
    return {"map": shape.shape[1:], "tokens": shape.shape[:1], "vector": ()}[shape.kind]


def _blocks(model: nn.Module, seen: Trace) -> list[str]:
    """Residual and transformer blocks, in forward order: composite members of a sequence that weigh their input more than once.

    A member that holds several such members is a stage, and one inside a block is a part of it (squeeze-and-excitation).
    """
    members = [path for path in seen.seen if seen.seen[path].shape.kind != "vector" and _is_composite_member(model, path)]
    blocks = [path for path in members if sum(_inside(other, path) for other in members) < 2]
    return [path for path in blocks if not any(_inside(path, other) for other in blocks)]


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def _is_composite_member(model: nn.Module, path: str) -> bool:
    """Whether the module is an element of a Sequential or ModuleList, has parts of its own, and at least two weight matrices."""
    sequence = nn.Sequential | nn.ModuleList
    module = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(parent, sequence) or isinstance(module, sequence) or not any(True for _ in module.children()):
        return False
    return sum(parameter.dim() > 1 for parameter in module.parameters()) > 1
