"""Fields that are added to options later leave the dumps, and so the keys, of those who do not set them as they were."""

from __future__ import annotations

from typing import Annotated

import pytest

from kdbench.data.options import LEFT_OUT_UNSET, LabelledSpec, StrictOptions


class Options(StrictOptions):
    depth: int = 2
    width: Annotated[int | None, LEFT_OUT_UNSET] = None


class Spec(LabelledSpec):
    half: Annotated[bool, LEFT_OUT_UNSET] = False


def test_a_marked_field_is_dumped_only_when_it_is_set():
    assert Options().model_dump() == {"depth": 2}
    assert Options(width=3).model_dump(mode="json") == {"depth": 2, "width": 3}
    assert Options.model_validate_json(Options(width=3).model_dump_json()) == Options(width=3)


@pytest.mark.parametrize("spec", ["net", {"name": "net", "stem": 4}])
def test_a_marked_field_of_a_named_thing_is_left_out_beside_its_options(spec: str | dict[str, object]):
    plain = Spec.model_validate(spec)
    assert "half" not in plain.model_dump(mode="json")
    assert "half" not in plain.options_json
    marked = Spec.model_validate({"name": "net", "half": True})
    assert marked.model_dump(mode="json", exclude={"label"}) == {"name": "net", "half": True}
