"""Any model by name: kdbench's own, timm's, or an `nn.Module` by dotted path."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kdbench.catalogue import known, nearest, resolve
from kdbench.data.options import LabelledSpec
from kdbench.errors import RunFailed, TooMuch, UserError, in_one_line, shown
from kdbench.models import MODELS
from kdbench.models.bounds import bounded
from kdbench.models.inputs import InputSpec
from kdbench.models.weights import load_weights
from kdbench.own_code import check_maker
from kdbench.storage.folder import local_path


class ModelSpec(LabelledSpec):
    """Which network: `cifar_resnet8`, or `{name: resnet8x4, stem_stride: 2}`.

    Keys beside `name`, `label`, `pretrained` and `weights` go to the builder. weights: a file; or `teacher`, for a student that begins with
    the teacher's tensors. These are not here when a network is built: see `models.weights.inherited`.
    """

    pretrained: bool = False
    weights: Literal["teacher"] | Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for the model's own builder."""
        return dict(self.model_extra or {})


class OptionNeeded(UserError):
    """A model can't be built without an option that is not given."""


# Options by which timm's and torchvision's builders read or fetch files.
_READING_OPTIONS = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "weights_backbone", "pretrained_backbone"}

LARGEST_SIZE = 1024  # of an option of kdbench's own networks: widths and strides

_LEVELS = 3  # of lists in lists that are searched for layers
_WEIGHTLESS: ContextVar[bool] = ContextVar("weightless", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, `build_model` fetches no pretrained weights and reads no file of weights: the architecture alone counts."""
    token = _WEIGHTLESS.set(True)
    try:
        yield
    finally:
        _WEIGHTLESS.reset(token)


def build_model(
    spec: ModelSpec,
    *,
    num_classes: int,
    in_channels: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    image: str | None = None,
    class_ids: Sequence[int] = (),
    **facts: int,
) -> nn.Module:
    """The network of `spec` for images [B, in_channels, image_size, image_size], with its `input_spec` set: see `models.inputs`.

    The name is looked up in `MODELS`, then as `package.module:Class`, then in timm. mean, std: the data's, one number a channel;
    a pretrained timm model takes its own. image: the name of the input that is an image, where there are several; in_channels and
    image_size are None where there is no image. class_ids: the data's own numbers of the classes, where it has some: by them columns of
    weights for COCO are chosen. facts: what else the data say, such as the number of words.

    Raises UserError for a wrong name, option or weights file, RunFailed where pretrained weights can't be fetched.
    """
    reserved = {"num_classes", "in_channels", "in_chans"} & set(spec.options)
    if reserved:
        raise UserError(f"model {shown(spec.name)}: {shown(reserved.pop())} is not an option, the data says it")
    if reading := sorted(_READING_OPTIONS & set(spec.options)):
        raise UserError(
            f"model {shown(spec.name)}: {shown(reading[0])} is not an option, since it makes a library read or fetch files; "
            "give a file of weights as 'weights', or use pretrained: true"
        )
    if known("model", spec.name, MODELS):
        of_images = {"in_channels": in_channels, "image_size": image_size} if in_channels is not None and image_size is not None else {}
        model = _build_ours(spec, {"num_classes": num_classes, **of_images, **facts})
        inputs = InputSpec(tuple(mean), tuple(std)) if of_images else None
    elif in_channels is None or image_size is None:
        raise UserError(f"model {shown(spec.name)} is a network of timm's for images, and these data have none")
    else:
        model = _build_timm(spec, num_classes, in_channels, image_size)
        inputs = _timm_inputs(model, spec, image_size, mean, std)
    if class_ids and hasattr(model, "class_ids"):
        model.class_ids = tuple(class_ids)  # type: ignore[assignment]
    if isinstance(spec.weights, Path) and not _WEIGHTLESS.get():
        load_weights(model, local_path(spec.weights, f"model {spec.name!r}: weights"), name=spec.name, num_classes=num_classes)
    # A user's class may come with an input_spec of its own, which is then right.
    if not isinstance(getattr(model, "input_spec", None), InputSpec | dict):
        model.input_spec = {image: inputs} if image is not None else inputs  # type: ignore[assignment]
    return model


def check_model_name(name: str) -> None:
    """Raise UserError where `build_model` would not know `name`. Builds nothing, and imports timm only for a name that isn't ours."""
    if name in MODELS:
        return
    if known("model", name, MODELS):
        _builder(name)
    else:
        _check_timm_name(name)


def _builder(name: str) -> Callable[..., Any]:
    """What builds the model `name`; it is not called. Raises UserError where it does not say that it makes an nn.Module."""
    builder: Callable[..., Any] = resolve("model", name, MODELS)
    if name not in MODELS:
        check_maker("model", name, builder, nn.Module, "nn.Module")
    return builder


def model_code(spec: ModelSpec) -> list[Any]:
    """The class or function that builds the model, where it is none of timm's."""
    return [resolve("model", spec.name, MODELS)] if known("model", spec.name, MODELS) else []


def _build_ours(spec: ModelSpec, facts: Mapping[str, int]) -> nn.Module:
    """Call the builder behind a name of ours or a dotted path with those of `facts` that it takes, and the options."""
    builder = _builder(spec.name)
    if spec.pretrained:
        raise UserError(f"model {shown(spec.name)}: 'pretrained' is for timm's models; give a file of weights as 'weights'")
    arguments = _arguments(spec.name, builder, facts, spec.options)
    try:
        with bounded(spec.name):
            model = builder(**arguments)
    except TooMuch:
        raise
    except UserError as error:
        if spec.name not in MODELS:
            raise
        raise UserError(f"model {spec.name!r}: {error}") from error
    except Exception as error:  # whatever a user's own class may raise
        raise UserError(f"model {spec.name!r} can't be built with {arguments}: {in_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model {spec.name!r}: expected it to build an nn.Module, it built a {type(model).__name__}")
    if hidden := next(_unregistered(model), None):
        raise UserError(
            f"model {spec.name!r}: {hidden} is no part of the network for PyTorch, so it is neither trained nor saved; "
            "keep layers in an nn.ModuleList or nn.ModuleDict, and parameters in an nn.ParameterList"
        )
    return model


def _unregistered(model: nn.Module) -> Iterator[str]:
    """Where layers and parameters lie in plain lists, tuples and dictionaries of a network, without being registered elsewhere in it."""
    registered = {id(part) for part in (*model.modules(), *model.parameters())}
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in ("_modules", "_parameters", "_buffers")}
        for name, value in own.items():
            for hidden in _held(value, _LEVELS):
                if id(hidden) not in registered:
                    yield f"{'.'.join(filter(None, (path, name)))}, which holds a {type(hidden).__name__},"


def _held(value: Any, levels: int) -> Iterator[nn.Module | nn.Parameter]:
    if isinstance(value, nn.Module | nn.Parameter):
        yield value
    elif levels and isinstance(value, list | tuple | set | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _held(inner, levels - 1)


def _arguments(name: str, builder: Callable[..., Any], facts: Mapping[str, int], options: Mapping[str, Any]) -> dict[str, Any]:
    """What to call `builder` with. Raises UserError for an option that it does not take, one that it needs, or a wrong size."""
    parameters = inspect.signature(builder).parameters
    if "image_size" in parameters and parameters["image_size"].default is not inspect.Parameter.empty:
        facts = {key: value for key, value in facts.items() if key != "image_size"}  # then it is an option of the model's own
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    choices = [key for key in named if key not in facts]
    for key, value in options.items():
        if key not in choices and not takes_all:
            raise _wrong_option(name, key, choices)
        if name in MODELS:
            _check_option(name, key, value, parameters[key].default)
    for key in choices:
        if parameters[key].default is inspect.Parameter.empty and key not in options:
            raise OptionNeeded(f"model {shown(name)} needs the option {shown(key)}")
    # Through **kwargs goes num_classes alone: torchvision's builders take it there, and would refuse in_channels.
    told: dict[str, Any] = {key: value for key, value in facts.items() if key in named or (takes_all and key == "num_classes")}
    if "weights_backbone" in named:  # torchvision's builders would fetch a backbone's weights by default
        told["weights_backbone"] = None
    return told | dict(options)


def _check_option(name: str, key: str, value: Any, default: Any) -> None:
    """Raise UserError unless an option of one of our own networks is of its default's kind: a text, or a number that may be a size."""
    if isinstance(default, str):
        if not isinstance(value, str):
            raise UserError(f"model {shown(name)}: {key} = {shown(value)}, expected a text such as {shown(default or 'coco_v1')}")
    elif isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_SIZE:
        raise UserError(f"model {shown(name)}: {key} = {shown(value)}, expected a whole number from 1 to {LARGEST_SIZE}")


def _build_timm(spec: ModelSpec, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    import timm  # five seconds, which only those pay who name one of its models

    _check_timm_name(spec.name)
    options, fetched = dict(spec.options), spec.pretrained and not _WEIGHTLESS.get()
    if not spec.pretrained and _has_fixed_size(spec.name):
        options.setdefault("img_size", image_size)
    try:
        with bounded(spec.name):
            return timm.create_model(spec.name, pretrained=fetched, num_classes=num_classes, in_chans=in_channels, **options)
    except TooMuch:
        raise
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in spec.options:
            raise _not_built(spec, error) from error
        with torch.device("meta"):
            model_class = type(timm.create_model(spec.name))
        hidden = {"self", "num_classes", "in_chans", "kwargs"}
        choices = [key for key in inspect.signature(model_class).parameters if key not in hidden]
        raise _wrong_option(spec.name, unknown[1], choices) from error
    except Exception as error:  # what timm and torch make of an option depends on the option
        if not fetched or not isinstance(error, OSError | RuntimeError):
            raise _not_built(spec, error) from error
        reason = str(error).strip().partition("\n")[0]
        raise RunFailed(f"model {spec.name!r}: timm could not load its pretrained weights: {reason}") from error


def _not_built(spec: ModelSpec, error: Exception) -> Exception:
    """What to raise where timm fails: without options of the user's that is a fault of timm's or of kdbench's, and stays what it is."""
    if not spec.options:
        return error
    return UserError(f"model {spec.name!r} can't be built with {spec.options!r:.200}: {in_one_line(error)}")


def _timm_inputs(model: nn.Module, spec: ModelSpec, image_size: int, mean: Sequence[float], std: Sequence[float]) -> InputSpec:
    """What a timm model wants to see: as it was pretrained; else as the data are, at their size where the model has a fixed one."""
    size: int | None = spec.options.get("img_size", image_size if _has_fixed_size(spec.name) else None)
    if spec.pretrained:
        trained: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        size = spec.options.get("img_size", trained["input_size"][-1])
        mean, std = (_for_channels(trained[key], len(mean)) for key in ("mean", "std"))
    return InputSpec(tuple(mean), tuple(std), size)


def _for_channels(numbers: Sequence[float], channels: int) -> tuple[float, ...]:
    """Normalisation of RGB for another number of channels, as timm adapts its first layer: summed for one, repeated for more."""
    if channels == 1:
        return (sum(numbers) / len(numbers),)
    return tuple(numbers[i % len(numbers)] for i in range(channels))


def _has_fixed_size(name: str) -> bool:
    """Whether timm builds this model for one image size and takes it as `img_size`."""
    from timm.models import get_pretrained_cfg

    configuration = get_pretrained_cfg(name)
    return configuration is not None and configuration.fixed_input_size


def _check_timm_name(name: str) -> None:
    import timm

    if not timm.is_model(name):
        raise UserError(f"unknown model {shown(name)}{nearest(name, [*MODELS, *timm.list_models()])}")
    architecture, _, tag = name.partition(".")
    tags = [found.partition(".")[2] for found in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(f"timm model {shown(architecture)} has no weights called {shown(tag)}{nearest(tag, tags)}")


def _wrong_option(name: str, key: str, choices: Iterable[str]) -> UserError:
    choices = list(choices)
    hint = nearest(key, choices) if choices else "; it has none"
    return UserError(f"model {shown(name)} has no option {shown(key)}{hint}")
