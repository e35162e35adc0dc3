"""A thing named with options of its own, as an experiment writes it."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class NamedSpec(BaseModel):
    """A name, or a mapping with `name` and any options: whoever resolves the name checks them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options_json(self) -> str:
        """The options as JSON with sorted keys: a key to cache by."""
        return json.dumps(self.model_dump(mode="json", exclude={"name"}), sort_keys=True)
