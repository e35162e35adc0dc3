"""Any model by name: kdbench's own, timm's, or an `nn.Module` by dotted path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from torch import nn


class ModelSpec(BaseModel):
    """Which network: `cifar_resnet8`, or `{name: resnet8x4, stem_stride: 2}`; keys beside `name`, `pretrained` and `weights` go to the builder."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    pretrained: bool = False
    weights: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for the model's own builder."""
        return dict(self.model_extra or {})


def build_model(spec: ModelSpec, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    raise NotImplementedError
