"""Backbones by name: any classification network of torchvision's or timm's, cut where it halves the picture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import ResNet

from kdbench.catalogue import nearest
from kdbench.errors import UserError, in_one_line, shown
from kdbench.models.bounds import cut_down

Norm = Callable[[int], nn.Module]
_DILATED = 8  # stride of the last map of a network for segmentation
_LOOK = 64  # pixels a side of the black picture that shows where a network halves it


class Body(nn.Module):
    """Part of a network that gives its maps at some strides, the finest first, by the names "0", "1", ....

    channels, strides: of the maps. taps: paths inside this module of the modules that give the maps.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    taps: tuple[str, ...]


def body(name: str, strides: Sequence[int], *, in_channels: int, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """The network `name` up to the coarsest of `strides`, as a `Body`.

    A name that both libraries have is torchvision's. Torchvision's ResNets keep the names of their layers, so that its weights fit.

    Args:
        name: Of a classification network of torchvision's, such as `resnet18`, or of timm's, such as `convnext_atto`.
        strides: At which it gives maps, in input pixels, the finest first.
        in_channels: Of the images.
        norm: What a ResNet of torchvision's normalises with.

    Raises:
        UserError: neither library has the name, or the network gives no map at one of the strides.
    """
    with cut_down() as kept:
        found = _body(name, strides, in_channels, norm)
        kept(found)
    return found


def _body(name: str, strides: Sequence[int], in_channels: int, norm: Norm) -> nn.Module:
    if name not in torchvision_models.list_models(module=torchvision_models):
        return _timms(name, strides, in_channels)
    if name.startswith(("resnet", "resnext", "wide_resnet")):
        network = torchvision_models.get_model(name, weights=None, norm_layer=norm)
        assert isinstance(network, ResNet)
        see_channels(network, in_channels)
        return _resnets(name, network, strides)
    network = torchvision_models.get_model(name, weights=None)
    see_channels(network, in_channels)
    features = getattr(network, "features", None)
    if not isinstance(features, nn.Sequential):
        raise UserError(f"backbone {shown(name)}: torchvision's network is not one sequence of layers; use one of timm's of its kind")
    return _Sequence(name, features, strides, in_channels)


def see_channels(network: nn.Module, in_channels: int) -> None:
    """Let the first convolution of a network take images of `in_channels`, newly drawn where that changes its shape."""
    path, first = next((path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    if first.in_channels == in_channels:
        return
    changed = nn.Conv2d(
        in_channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
        device=first.weight.device,
    )
    nn.init.kaiming_normal_(changed.weight, mode="fan_out", nonlinearity="relu")
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, changed)


def dilated_body(name: str, in_channels: int) -> Any:
    """The network `name` with dilated convolutions in the place of its last strides, as a `Body` whose map "out" has stride 8.

    Torchvision dilates ResNets with bottlenecks and MobileNetV3, the latter to stride 16, and these keep the names of their layers. All
    others are timm's, which dilates the small ResNets too.

    Raises:
        UserError: timm does not have the network or can't dilate it.
    """
    with cut_down() as kept:
        found = _dilated(name, in_channels)
        kept(found)
    return found


def _dilated(name: str, in_channels: int) -> Any:
    if name in ("mobilenet_v3_large", "mobilenet_v3_small"):
        features, marks = _mobile(name, in_channels)
        return _cut(features, {"out": marks[-1]})
    is_bottleneck = name in torchvision_models.list_models(module=torchvision_models) and name not in ("resnet18", "resnet34")
    if is_bottleneck and name.startswith(("resnet", "resnext", "wide_resnet")):
        network: Any = torchvision_models.get_model(name, weights=None, replace_stride_with_dilation=[False, True, True])
        see_channels(network, in_channels)
        found = _Getter(network, {"layer4": "out"})
        found.taps, found.channels = tuple(f"layer{number}" for number in range(1, 5)), (network.inplanes,)
        return found
    return _timms(name, (_DILATED,), in_channels, ("out",), output_stride=_DILATED)


def low_and_high_body(name: str, in_channels: int) -> Any:
    """The network `name` as a `Body` with the maps "low", at stride 8, and "high", at stride 16.

    MobileNetV3 is torchvision's, dilated in the place of its last stride, and keeps the names of its layers.

    Raises:
        UserError: see `body`.
    """
    if name in ("mobilenet_v3_large", "mobilenet_v3_small"):
        with cut_down() as kept:
            features, marks = _mobile(name, in_channels)
            mobile = _cut(features, {"low": marks[-4], "high": marks[-1]})
            kept(mobile)
        return mobile
    found: Any = body(name, (8, 16), in_channels=in_channels)
    return _Renamed(found, ("low", "high"))


def _mobile(name: str, in_channels: int) -> tuple[nn.Sequential, list[int]]:
    """The layers of a dilated MobileNetV3, and where those stand that end a resolution: the first, those with a stride and the last."""
    network: Any = torchvision_models.get_model(name, weights=None, dilated=True)
    see_channels(network, in_channels)
    strided = [position for position, layer in enumerate(network.features) if getattr(layer, "_is_cn", False)]
    return network.features, [0, *strided, len(network.features) - 1]


def _cut(features: nn.Sequential, names: dict[str, int]) -> _Getter:
    found = _Getter(features, {str(position): name for name, position in names.items()})
    found.taps = tuple(str(position) for position in names.values())
    found.channels = tuple(features[position].out_channels for position in names.values())  # type: ignore[misc]
    return found


class _Renamed(Body):
    """A body whose maps have other names."""

    def __init__(self, inner: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self._names = inner, names
        self.channels, self.strides, self.taps = inner.channels, inner.strides, tuple(f"inner.{path}" for path in inner.taps)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return OrderedDict(zip(self._names, self.inner(images).values(), strict=True))


class _Getter(IntermediateLayerGetter):  # type: ignore[misc]
    """Torchvision's own, with the facts of a `Body`."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    taps: tuple[str, ...]


def _resnets(name: str, network: ResNet, strides: Sequence[int]) -> nn.Module:
    layers = {4 << position: f"layer{position + 1}" for position in range(4)}
    _check(name, strides, list(layers))
    found = _Getter(network, {layers[stride]: str(position) for position, stride in enumerate(strides)})
    found.taps = tuple(layers[stride] for stride in strides)
    found.strides = tuple(strides)
    found.channels = tuple(network.inplanes * stride // 32 for stride in strides)
    return found


class _Sequence(Body):
    """A sequence of layers, cut after the last one at each stride. Swin's maps come with channels last, and leave with channels first."""

    def __init__(self, name: str, layers: nn.Sequential, strides: Sequence[int], in_channels: int) -> None:
        super().__init__()
        last: dict[int, tuple[int, int, bool]] = {}  # stride -> position, channels, whether these come last
        parameter = next(layers.parameters())
        seen = torch.zeros(1, in_channels, _LOOK, _LOOK, device=parameter.device, dtype=parameter.dtype)
        training = layers.training
        layers.eval()
        with torch.no_grad():
            for position, layer in enumerate(layers):
                seen = layer(seen)
                channels_last = seen.shape[1] == seen.shape[2] != seen.shape[3]
                height, channels = (seen.shape[1], seen.shape[3]) if channels_last else (seen.shape[2], seen.shape[1])
                last[_LOOK // height] = (position, channels, channels_last)
        layers.train(training)
        _check(name, strides, sorted(last))
        self.layers = layers[: last[strides[-1]][0] + 1]
        self.given = nn.ModuleList(nn.Identity() for _ in strides)  # so that what leaves has a name
        self._cuts = {last[stride][0]: number for number, stride in enumerate(strides)}
        self._channels_last = {last[stride][0] for stride in strides if last[stride][2]}
        self.channels = tuple(last[stride][1] for stride in strides)
        self.strides, self.taps = tuple(strides), tuple(f"given.{number}" for number in range(len(strides)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = OrderedDict()
        x = images
        for position, layer in enumerate(self.layers):
            x = layer(x)
            if position in self._cuts:
                number = self._cuts[position]
                found[str(number)] = self.given[number](x.permute(0, 3, 1, 2) if position in self._channels_last else x)
        return found


def _timms(name: str, strides: Sequence[int], in_channels: int, names: tuple[str, ...] = (), **options: Any) -> nn.Module:
    """names: of the maps. options: of timm's builder."""
    import timm  # five seconds, which only those pay who name one of its models

    if not timm.is_model(name):
        known = [*torchvision_models.list_models(module=torchvision_models), *timm.list_models()]
        raise UserError(f"backbone {shown(name)} is neither one of torchvision's nor of timm's{nearest(name, known)}")
    try:
        with torch.device("meta"):
            outline: Any = timm.create_model(name, features_only=True, **options)
        reductions = outline.feature_info.reduction()
        _check(name, strides, reductions)
        indices = tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in strides)
        network = timm.create_model(name, features_only=True, out_indices=indices, in_chans=in_channels, **options)
    except TypeError as error:
        if "output_stride" not in str(error):
            raise UserError(f"backbone {shown(name)}: timm can't give its maps: {in_one_line(error)}") from error
        raise UserError(
            f"backbone {shown(name)} has no form that is dilated to a stride of {options['output_stride']}; "
            "name a convolutional network, such as resnet50 or mobilenetv3_large_100"
        ) from error
    except (RuntimeError, AttributeError, NotImplementedError) as error:  # what timm raises of networks that give no maps
        raise UserError(f"backbone {shown(name)}: timm can't give its maps: {in_one_line(error)}") from error
    return _TimmBody(network, strides, names or tuple(str(number) for number in range(len(strides))))


class _TimmBody(Body):
    def __init__(self, network: nn.Module, strides: Sequence[int], names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self._names = network, names
        self.given = nn.ModuleList(nn.Identity() for _ in strides)
        self._channels_last = str(getattr(network, "output_fmt", "")).endswith("NHWC")
        self.channels = tuple(network.feature_info.channels())  # type: ignore[operator, union-attr]
        self.strides, self.taps = tuple(strides), tuple(f"given.{number}" for number in range(len(strides)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.network(images)
        moved = (x.permute(0, 3, 1, 2) if self._channels_last else x for x in maps)
        return OrderedDict((name, given(x)) for name, given, x in zip(self._names, self.given, moved, strict=True))


def _check(name: str, wanted: Sequence[int], there: Sequence[int]) -> None:
    missing = [stride for stride in wanted if stride not in there]
    if missing:
        at = ", ".join(str(stride) for stride in sorted(set(there)))
        raise UserError(
            f"backbone {shown(name)} gives no map at stride {missing[0]}, only at {at}; a pyramid needs one at each of "
            f"{', '.join(map(str, wanted))}: name a network that has them, such as resnet18"
        )
