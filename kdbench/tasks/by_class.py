"""What metrics of single classes are called: `ap/ring`, `iou/sky`. They are measured with the rest and kept out of learning curves."""

from __future__ import annotations

import re

_SEPARATOR = "/"
_NOT_IN_NAMES = re.compile(r"[^\w\-. ]")  # MLflow takes these and the separator in a metric's name


def of_class(metric: str, class_name: str) -> str:
    """The name of a metric of one class."""
    return f"{metric}{_SEPARATOR}{_NOT_IN_NAMES.sub('_', class_name)}"


def is_of_class(name: str) -> bool:
    """Whether a metric is that of one class."""
    return _SEPARATOR in name
