"""Feed golden cases to kdbench's own methods: `ADAPTERS[case.method](case)` gives outputs and gradients under the case's own names."""

from __future__ import annotations

from collections.abc import Callable

from detector_adapters import DETECTORS
from feature_adapters import FEATURES
from logit_adapters import LOGITS
from map_adapters import MAPS
from network_adapters import NETWORK
from online_adapters import ONLINE
from read_golden import Case
from relation_adapters import RELATIONS
from result import Result
from transformer_adapters import TRANSFORMERS

ADAPTERS: dict[str, Callable[[Case], Result]] = {
    **DETECTORS,
    **FEATURES,
    **LOGITS,
    **MAPS,
    **NETWORK,
    **ONLINE,
    **RELATIONS,
    **TRANSFORMERS,
}
