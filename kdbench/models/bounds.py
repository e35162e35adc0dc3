"""Networks that somebody else described are bounded while they are built: a line of YAML may ask for a million blocks.

PyTorch makes a parameter's memory known to the operating system only when it is written, which happens after the parameter is registered.
So the hooks here see each one before it takes memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from kdbench.errors import TooMuch

MOST_MODULES = 10_000  # timm's largest networks have some 3,000
MOST_PASSING = 400_000_000  # parameters of a backbone that is built whole before it is cut; the largest ResNets have 130 million
_BYTES_EACH = 8  # of a parameter that is used at all: its value, and its gradient or a copy of it
_MOST_PARAMETERS: ContextVar[int | None] = ContextVar("most_parameters", default=None)


@dataclass
class _Count:
    """What was registered so far; in `passing`, parameters that may be thrown away again."""

    name: str
    most: int
    most_passing: int
    parameters: int = 0
    passing: int | None = None

    def add(self, parameters: int) -> None:
        if self.passing is None:
            self.parameters += parameters
        else:
            self.passing += parameters
        for count, most in ((self.parameters, self.most), (self.passing or 0, self.most_passing)):
            if count > most:
                raise TooMuch(
                    f"model {self.name!r} has more than {most:,} parameters with these options, which take more memory than it may have"
                )


_COUNT: ContextVar[_Count | None] = ContextVar("count", default=None)


@contextmanager
def cut_down() -> Iterator[Callable[[nn.Module], None]]:
    """Inside, a library builds a network of which a part is kept: `bounded` allows `MOST_PASSING` parameters for it.

    Yields a function that is called with what is kept, which counts as all else does.
    """
    count = _COUNT.get()
    if count is None:
        yield lambda _: None
        return
    before, count.passing = count.passing, count.passing or 0

    def kept(part: nn.Module) -> None:
        count.passing = before
        count.add(sum(parameter.numel() for parameter in part.parameters() if _takes_memory(parameter)))

    try:
        yield kept
    finally:
        count.passing = before


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
    modules, count = 0, _Count(name, most, min(memory // _BYTES_EACH, MOST_PASSING))

    def module_added(*_: object) -> None:
        nonlocal modules
        modules += 1
        if modules > MOST_MODULES:
            raise TooMuch(f"model {name!r} has more than {MOST_MODULES:,} modules with these options")

    def parameter_added(_: nn.Module, __: str, parameter: Tensor | None) -> None:
        if parameter is not None and _takes_memory(parameter):
            count.add(parameter.numel())

    token = _COUNT.set(count)
    hooks = register_module_module_registration_hook(module_added), register_module_parameter_registration_hook(parameter_added)
    try:
        yield
    finally:
        _COUNT.reset(token)
        for hook in hooks:
            hook.remove()


def _takes_memory(parameter: Tensor) -> bool:
    return parameter.device.type != "meta" and not is_lazy(parameter)  # a lazy one has no size yet
