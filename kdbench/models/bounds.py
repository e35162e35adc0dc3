"""Networks that somebody else described are bounded while they are built: a line of YAML may ask for a million blocks.

PyTorch makes a parameter's memory known to the operating system only when it is written, which happens after the parameter is registered.
So the hooks here see each one before it takes memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from kdbench.errors import TooMuch

MOST_MODULES = 10_000  # timm's largest networks have some 3,000
_BYTES_EACH = 8  # of a parameter that is used at all: its value, and its gradient or a copy of it
_MOST_PARAMETERS: ContextVar[int | None] = ContextVar("most_parameters", default=None)


@contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """Inside, `bounded` allows so many parameters, where it would allow more."""
    token = _MOST_PARAMETERS.set(parameters)
    try:
        yield
    finally:
        _MOST_PARAMETERS.reset(token)


@contextmanager
def bounded(name: str) -> Iterator[None]:
    """Building a network called `name` ends inside where it has too many parts. Parameters on the device `meta` take no memory.

    Raises:
        TooMuch: more than `MOST_MODULES` modules, or more parameters than this machine's memory, or than `at_most` allows.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = min(memory // _BYTES_EACH, _MOST_PARAMETERS.get() or memory)
    modules = parameters = 0

    def module_added(*_: object) -> None:
        nonlocal modules
        modules += 1
        if modules > MOST_MODULES:
            raise TooMuch(f"model {name!r} has more than {MOST_MODULES:,} modules with these options")

    def parameter_added(_: nn.Module, __: str, parameter: Tensor | None) -> None:
        nonlocal parameters
        if parameter is None or parameter.device.type == "meta" or is_lazy(parameter):  # a lazy one has no size yet
            return
        parameters += parameter.numel()
        if parameters > most:
            raise TooMuch(f"model {name!r} has more than {most:,} parameters with these options, which take more memory than it may have")

    hooks = register_module_module_registration_hook(module_added), register_module_parameter_registration_hook(parameter_added)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
