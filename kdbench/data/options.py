"""What an experiment writes: keys with strictly read values, and things named with options of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what a generator of torch takes and a column of whole numbers holds
ImageSide = Annotated[int, Field(ge=8, le=4096)]  # pixels
LONGEST_NAME: Final = 100  # characters; a file's name is made of two names and a run id, and may have 255 bytes

LEFT_OUT_UNSET: Final = "left out of dumps while unset"


class SparseDump(BaseModel):
    """A model whose dumps leave out each field marked `Annotated[..., LEFT_OUT_UNSET]` that has its default value.

    Keys are hashes of dumps: a field that is added later with this mark changes the key of no experiment that does not set it.
    """

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dump: dict[str, Any] = handler(self)
        for name, field in type(self).model_fields.items():
            if LEFT_OUT_UNSET in field.metadata and getattr(self, name) == field.default:
                dump.pop(name, None)
        return dump


class StrictOptions(SparseDump):
    """Keys with values: no unknown key, and no `true`, which Python counts as 1, where a number is expected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            types = set(_types_in(cls.model_fields[str(info.field_name)].annotation))
            if types & {int, float} and bool not in types:
                raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _types_in(argument)


class NamedSpec(SparseDump):
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


class LabelledSpec(NamedSpec):
    """A named thing of which an experiment may have several.

    label: what a leaderboard calls it; the name unless the user says otherwise.
    """

    label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping) and "name" in value:
            return {"label": str(value["name"]), **value}
        return value
