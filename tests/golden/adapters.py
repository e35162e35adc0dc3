"""Feed golden cases to kdbench's own methods: `ADAPTERS[case.method](case)` gives outputs and gradients under the case's own names."""

from __future__ import annotations

from collections.abc import Callable

from feature_adapters import FEATURES
from logit_adapters import LOGITS
from network_adapters import NETWORK
from read_golden import Case
from result import Result

ADAPTERS: dict[str, Callable[[Case], Result]] = {**LOGITS, **FEATURES, **NETWORK}
