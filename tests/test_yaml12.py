"""An experiment's file, `--set` and a record's config are read as YAML 1.2, and what is written is the same in both versions."""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kdbench import yaml12
from kdbench.experiment import Experiment, load_experiment, parse_yaml, to_yaml, validated
from kdbench.search.space import Choice, Range
from tests.bad_input.tiny_experiment import TINIER, TINY, assert_mistake, run, write
from tests.console import Kdbench

SCALARS = {
    "1e-3": 0.001,
    "1E3": 1000.0,
    "-.5e+3": -500.0,
    "1.": 1.0,
    "1.0e-05": 1e-05,
    "010": 10,
    "08": 8,
    "+5": 5,
    "0o17": 15,
    "0x1F": 31,
    "1_000": "1_000",
    "0b11": "0b11",
    "1:30": "1:30",
    "no": "no",
    "Yes": "Yes",
    "on": "on",
    "OFF": "OFF",
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "-.inf": -math.inf,
    "2026-01-13": "2026-01-13",
    "2026-13-45": "2026-13-45",
    "=": "=",
    "e3": "e3",
    "1e": "1e",
    ".": ".",
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_a_plain_scalar_is_what_version_1_2_says(text: str, value: object) -> None:
    read = yaml12.load(f"key: {text}")["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "value", [*SCALARS, "y", "0o7", "1e5", "<<", "caf\u00e9", "a: b", 1e-05, 1e22, 0.1, -3, True, None, [1, "1"], {"no": "no"}]
)
def test_what_is_written_reads_back_the_same_in_both_versions(value: Any) -> None:
    text = yaml12.dump({"key": value})
    for read in (yaml12.load(text), yaml.safe_load(text)):
        assert read == {"key": value}
        assert type(read["key"]) is type(value)


@pytest.mark.parametrize(
    "value", ["no", "on", "1:30", "1_000", "010", "2026-01-13", "true", "null", "1.5", "", 1e-05, 5e-4, 1e22, 10, True, None]
)
def test_what_pyyaml_wrote_into_old_records_reads_back_the_same(value: Any) -> None:
    assert yaml12.load(yaml.safe_dump({"key": value}, sort_keys=False)) == {"key": value}


def test_a_config_of_a_record_reads_back_as_the_same_experiment() -> None:
    options = {"name": "a_file:Net", "label": "1e-3", "rate": 1e-05, "flag": "no", "clock": "1:30", "code": "010", "day": "2026-01-13"}
    experiment = validated(Experiment, {**TINY, "students": [options], "recipe": {"lr": 1e-05}}, "test")
    assert validated(Experiment, parse_yaml(to_yaml(experiment), "record"), "record") == experiment


def test_a_number_with_an_exponent_is_a_number_wherever_a_number_may_stand(tmp_path: Path) -> None:
    file = tmp_path / "exponent.yaml"
    file.write_text(
        "name: exponent\n"
        "task: {name: classification, data: {name: shapes, train: 1e2, test: 20, target: class}, val_size: 1e-1}\n"
        "students: [{name: resnet10t, drop_rate: 1e-1}]\n"
        "methods: [{name: kd, temperature: 4e0}]\n"
        "recipe: {epochs: 1e0, lr: 1e-2}\n"
        "search: {trials: 2, also: {recipe.lr: {low: 1e-3, high: 1e-1, log: true}, recipe.weight_decay: [1e-4, 5e-4]}}\n"
    )
    read = load_experiment(file, ["recipe.momentum=5e-1", "students.0.drop_path_rate=2e-1"])
    assert read.students[0].options == {"drop_rate": 0.1, "drop_path_rate": 0.2}
    assert (read.recipe.epochs, read.recipe.lr, read.recipe.momentum) == (1, 0.01, 0.5)
    assert read.search is not None
    assert list(read.search.also.values()) == [Range(0.001, 0.1, log=True), Choice(options=(0.0001, 0.0005))]


NET = """from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes: int, in_channels: int, drop: float = 0.0):
        super().__init__(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Dropout(drop), nn.Linear(in_channels * 64, num_classes))
"""


@pytest.mark.parametrize(
    "line",
    [
        "students: [{name: 'exponent_net:Net', drop: 1e-1}]",
        "search: {trials: 2, also: {recipe.lr: [1e-3, 1e-2]}}",
        "task: {name: classification, data: {name: shapes, train: 120, test: 20, target: class}, val_size: 1e-1}",
    ],
)
def test_a_dry_run_accepts_a_number_with_an_exponent(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    Path("exponent_net.py").write_text(NET)
    monkeypatch.syspath_prepend(".")
    key = line.partition(":")[0]
    alone = {"students": ["exponent_net:Net"], "teacher": None, "methods": ["none"], "recipe.lr": 0.01}
    file = Path(write({**TINIER, **alone, key: "REPLACED"}))
    file.write_text(file.read_text().replace(f"{key}: REPLACED", line))
    ended = kdbench("run", file, "--dry-run", "--results", "results")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("recipe.lr=1:30", "recipe.lr: expected a number, got '1:30'"),
        ("recipe.epochs=yes", "recipe.epochs: expected a whole number, got 'yes'"),
        ("recipe.lr=2026-13-45", "recipe.lr: expected a number, got '2026-13-45'"),
        ("students.0.width=1_0", "model 'tiny_cnn': width = '1_0', expected a whole number from 1 to 1024"),
        ("students.0.width=no", "model 'tiny_cnn': width = 'no', expected a whole number from 1 to 1024"),
    ],
)
def test_text_where_a_number_is_expected_is_named(kdbench: Kdbench, assignment: str, said: str) -> None:
    assert_mistake(run(kdbench, {}, "--set", assignment), said)


def test_yes_and_no_switch_a_key_that_is_a_switch(tmp_path: Path) -> None:
    file = tmp_path / "switches.yaml"
    file.write_text("name: no\ntask: shapes_task\n")  # a name may be `no`
    assert yaml12.load(file.read_text())["name"] == "no"
    file.write_text(yaml.safe_dump(TINY))
    read = load_experiment(file, ["recipe.nesterov=yes", "recipe.compile=no", "recipe.epochs=010"])
    assert (read.recipe.nesterov, read.recipe.compile, read.recipe.epochs) == (True, False, 10)


# --- bounds ----------------------------------------------------------------------------------------------------------


PLAIN = st.none() | st.booleans() | st.integers(-(10**300), 10**300) | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))


@given(st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)))
def test_what_is_dumped_is_loaded(value: Any) -> None:
    assert yaml12.load(yaml12.dump(value)) == value


def nested(levels: int, bottom: Any = 1) -> Any:
    return reduce(lambda inner, _: [inner], range(levels), bottom)


def bomb(levels: int, line: str = "[{}]") -> str:
    """Each level has nine aliases of the one before."""
    names = [f"n{level}" for level in range(levels)]
    lines = [f"{name}: &{name} {line.format(', '.join([f'*{before}'] * 9))}" for before, name in pairwise(names)]
    return "\n".join([f"{names[0]}: &{names[0]} {{x: 1}}", *lines])


BEYOND = {
    "300 levels": ("[" * 300, "line 1, column 52: not valid YAML: it is nested more than 50 levels deep"),
    "300 levels that are closed": ("[" * 300 + "]" * 300, "nested more than 50 levels deep"),
    "100,000 levels": ("[" * 100_000, "nested more than 50 levels deep"),
    "a megabyte of levels": ("[" * 1_000_000, "nested more than 50 levels deep"),
    "block levels": ("- " * 300, "nested more than 50 levels deep"),
    "keys in keys": ("? " * 300, "nested more than 50 levels deep"),
    "levels by aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}]\n" for n in range(60)),
        "nested more than 50 levels deep",
    ),
    "length": ("#" * 1_000_001, "the text has 1,000,001 characters, expected at most 1,000,000"),
    "nodes": ("[" + "1," * 50_000 + "]", "line 1, column 100000: not valid YAML: it has more than 50,000 keys and values"),
    "aliases of aliases": (bomb(10), "it has more than 50,000 keys and values, counting each alias as a copy"),
    "merged aliases": (bomb(10, "{{<<: [{}]}}"), "it has more than 50,000 keys and values, counting each alias as a copy"),
    "an alias inside itself": ("a: &a [*a]", "line 1, column 8: not valid YAML: the alias 'a' is inside of what it stands for"),
    "an alias deep inside itself": ("&a {x: {y: [*a]}}", "the alias 'a' is inside of what it stands for"),
    "merging itself": ("&a {<<: *a}", "the alias 'a' is inside of what it stands for"),
    "digits": ("x: " + "1" * 5_000, "line 1, column 4: not valid YAML: a whole number of 5,000 digits, expected at most 1,000"),
    "hexadecimal digits": ("x: 0x" + "f" * 5_000, "a whole number of 5,002 digits"),
    "an escape out of range": ('"\\UFFFFFFFF"', "an escape such as \\UFFFFFFFF or of a directive is out of range"),
    "half a character": ('"\\ud800"', "holds half of a character, which can't be written as UTF-8"),
    "a key of a thousand characters": (f"{'k' * 1_000}: 1\n{'k' * 1_000}: 2", f"the key '{'k' * 99}... is listed twice"),
    "an unknown alias of many characters": ("*" + "a" * 10_000, "..."),
    "no integer": ("!!int x", "line 1, column 1: not valid YAML: 'x' is no int"),
    "no switch": ("!!bool x", "'x' is no bool"),
    "no number": ("!!float x", "'x' is no float"),
    "no mapping": ("!!map x", "line 1, column 1: not valid YAML: a text is no map"),
    "a date": ("!!timestamp 2026-01-01", "could not determine a constructor for the tag 'tag:yaml.org,2002:timestamp'"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_is_beyond_the_bounds_is_refused_in_one_line(case: str) -> None:
    text, said = BEYOND[case]
    with pytest.raises(yaml12.InvalidYAML) as problem:
        yaml12.load(text)
    message = str(problem.value)
    assert said in message
    assert len(message.splitlines()) == 1
    assert len(message) < 300


def test_the_bounds_are_the_last_values_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml12, "MOST_NODES", 1_000)  # for time's sake
    assert yaml12.load(yaml12.dump(nested(yaml12.DEEPEST))) == nested(yaml12.DEEPEST)
    items = yaml12.MOST_NODES - 1
    assert yaml12.load("[" + "1," * items + "]") == [1] * items
    assert yaml12.load("9" * yaml12.MOST_DIGITS) == int("9" * yaml12.MOST_DIGITS)
    assert yaml12.load("#" * yaml12.LONGEST) is None


def test_aliases_are_counted_as_copies_and_no_more() -> None:
    """3, 28, 253, 2,278, 20,503 and 184,528 nodes in the levels of a bomb: five stay below the bound together, six don't."""
    yaml12.load(bomb(5))
    with pytest.raises(yaml12.InvalidYAML, match="more than 50,000"):
        yaml12.load(bomb(6))


def test_a_number_beyond_floating_point_is_infinite_and_refused_where_it_is_used(kdbench: Kdbench) -> None:
    assert yaml12.load("1e999") == math.inf
    assert_mistake(run(kdbench, {}, "--set", "recipe.lr=1e999"), "recipe.lr: expected a finite number, got inf")


@pytest.mark.parametrize(
    "text", ["1e-3", "010", "no", "1:30", "1_000", "2026-01-13", "{a: 1, a: 2}", "name: x\nlr: 1.0e-05\nlist: [1, null, 'no']"]
)
def test_what_was_written_before_is_read_as_pyyaml_reads_it(text: str) -> None:
    assert yaml12.load_as_1_1(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(10), "counting each alias as a copy"),
        ("&a [*a]", "is inside of what it stands for"),
        ("[" * 300 + "]" * 300, "nested more than 50 levels"),
        ("1" + ":1" * 300_000, "a number of 600,001 characters"),
        ("!!int " + "1" * 5_000, "a number of 5,000 characters"),
        ("2026-13-01", "not valid YAML"),
        ("#" * 1_000_001, "the text has 1,000,001 characters"),
    ],
)
def test_what_was_written_before_is_bounded_too(text: str, said: str) -> None:
    with pytest.raises(yaml12.InvalidYAML, match=said) as problem:
        yaml12.load_as_1_1(text)
    assert "\n" not in str(problem.value)
