"""A pipe, a device, a sparse file or a bomb where a file is expected: every command ends in one line, soon and in little memory."""

from __future__ import annotations

import json
import os
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kdbench.bounded import DEEPEST, ImplausibleFile, check_safetensors, open_regular, parse_json, read_file
from kdbench.data.content import files_content
from kdbench.data.image_folder import Files
from kdbench.errors import LONGEST_LINE, RunFailed, UserError
from kdbench.experiment import load_experiment, parse_yaml
from kdbench.storage.journals import LONGEST_LINE as LONGEST_JOURNAL_LINE
from kdbench.storage.journals import read_journal_file
from kdbench.storage.layout import Layout
from kdbench.storage.locks import is_held, locked
from kdbench.training import precision
from kdbench.training.cache.outputs import read_entry, row_of
from kdbench.training.cache.streams import StreamFiles
from tests.bad_input.tiny_experiment import assert_mistake, assert_one_line, run, write
from tests.console import Kdbench
from tests.peak_memory import Measured, measured
from tests.test_yaml12 import bomb

SPARSE = 50_000_000_000  # bytes
MOST_MEMORY_KB = 300_000  # above what a process has that imported the same modules


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SPARSE)


# What may lie where a file is expected, and what is said of it.
ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "it is a pipe, expected a regular file"),
    "folder": (Path.mkdir, "it is a folder, expected a regular file"),
    "socket": (_socket, "it is a socket, expected a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, expected a regular file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "circular link": (lambda path: path.symlink_to(path.name), "it is a circle of symbolic links"),
    "sparse file": (_sparse, "it has more than"),
}
NO_FILE = {kind: odd for kind, odd in ODD.items() if "link" not in kind}


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ODD)
def test_only_a_regular_file_of_plausible_size_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make, said = ODD[kind]
    make(Path("odd"))
    with pytest.raises(OSError, match=said):
        read_file(Path("odd"), 1_000)


def test_as_many_bytes_are_read_as_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 200_000)
    assert read_file(path, 200_000) == b"x" * 200_000
    with pytest.raises(ImplausibleFile, match=r"it has more than 199\.999 kB"):
        read_file(path, 199_999)


def test_a_file_that_says_it_is_empty_is_read_by_what_arrives() -> None:
    assert Path("/proc/self/status").stat().st_size == 0
    assert read_file(Path("/proc/self/status"), 100_000).startswith(b"Name:")
    with pytest.raises(ImplausibleFile, match="it has more than"):
        read_file(Path("/proc/self/status"), 10)


def test_a_file_without_an_end_is_read_no_further_than_it_says_and_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_file(Path("/proc/self/status"), 10**12).startswith(b"Name:")
    monkeypatch.setattr("kdbench.bounded._MOST_UNDECLARED", 100)
    with pytest.raises(ImplausibleFile, match=r"it has more than 0\.1 kB"):
        read_file(Path("/proc/self/status"), 10**12)


def test_a_regular_file_is_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"


@pytest.mark.parametrize("bracket", ["[]", ('{"a":', "}")])
def test_json_is_read_to_its_bound_of_depth(bracket: tuple[str, str]) -> None:
    left, right = bracket
    parse_json(left * DEEPEST + "1" + right * DEEPEST)
    for levels in (DEEPEST + 1, 100_000):
        with pytest.raises(ValueError, match="nested more than 50 levels"):
            parse_json(left * levels + "1" + right * levels)
    assert parse_json("[" + ",".join(["[1]"] * 100) + "]") == [[1]] * 100  # many brackets are not many levels


# --- the experiment and --set ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NO_FILE)
def test_an_experiment_is_a_regular_file(kdbench: Kdbench, kind: str) -> None:
    make, said = NO_FILE[kind]
    make(Path("odd.yaml"))
    assert_mistake(kdbench("run", "odd.yaml", "--results", "results"), "odd.yaml: can't be read: ", said)


def test_an_experiment_of_100_megabytes_is_refused(kdbench: Kdbench) -> None:
    Path("large.yaml").write_bytes(b"#" * 100_000_000)
    assert_mistake(kdbench("run", "large.yaml", "--results", "results"), "large.yaml: can't be read: it has more than 1 MB")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(10), "it has more than 50,000 keys and values, counting each alias as a copy"),
        ("&a {name: x, methods: [*a]}", "the alias 'a' is inside of what it stands for"),
        ("name: " + "[" * 300 + "]" * 300, "it is nested more than 50 levels deep"),
        ("name: x\nseeds: " + "1" * 5_000, "a whole number of 5,000 digits"),
    ],
)
def test_an_experiment_and_a_record_of_bombs_end_in_one_line(kdbench: Kdbench, text: str, said: str) -> None:
    Path("bomb.yaml").write_text(text)
    assert_mistake(kdbench("run", "bomb.yaml", "--dry-run"), "bomb.yaml: ", said)
    with pytest.raises(UserError) as problem:
        parse_yaml(text, "the config of a record")
    assert said in str(problem.value)


def test_an_override_is_bounded_as_a_file_is(kdbench: Kdbench) -> None:
    assert_mistake(run(kdbench, {}, "--set", "recipe.lr=" + "[" * 300), "--set recipe.lr=[[[", "...: the value, line 1, column 52: ")
    assert_mistake(run(kdbench, {}, "--set", "recipe.lr=" + "9" * 5_000), "a whole number of 5,000 digits")
    assert_mistake(run(kdbench, {}, "--set", "x." * 5_000 + "y=1"), "the key has 5001 parts, expected at most 50")


def test_a_bomb_of_aliases_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(bomb(10))
    assert (tmp_path / "bomb.yaml").stat().st_size < 1_000
    memory, said = loaded_alone(tmp_path / "bomb.yaml")
    assert "counting each alias as a copy" in said
    assert memory < 20_000


@pytest.mark.slow
def test_a_megabyte_of_nodes_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text("[" + "1," * 499_990 + "]")
    memory, said = loaded_alone(tmp_path / "wide.yaml")
    assert "more than 50,000 keys and values" in said
    assert memory < MOST_MEMORY_KB


def loaded_alone(file: Path) -> Measured:
    """Reading an experiment, in a process of its own."""
    imports = "from pathlib import Path; from kdbench.experiment import load_experiment"
    return measured(imports, "load_experiment(Path(sys.argv[1]))", file)


@pytest.mark.parametrize("file", sorted(Path("experiments").resolve().glob("*.yaml")), ids=lambda path: path.name)
def test_every_experiment_of_the_repository_is_within_the_bounds(file: Path) -> None:
    load_experiment(file)


# --- messages --------------------------------------------------------------------------------------------------------


def test_of_10_000_problems_ten_are_named(kdbench: Kdbench) -> None:
    ended = kdbench("run", write({"recipe": {f"key{number}": 1 for number in range(10_000)}}), "--dry-run")
    lines = ended.err.splitlines()
    assert ended.code == 2
    assert len(lines) == 11
    assert all("unknown key 'recipe.key" in line for line in lines[:10])
    assert lines[10] == "tiny.yaml: and 9,990 more"


def test_ten_problems_are_all_named(kdbench: Kdbench) -> None:
    ended = kdbench("run", write({"recipe": {f"key{number}": 1 for number in range(10)}}), "--dry-run")
    assert len(ended.err.splitlines()) == 10
    assert "more" not in ended.err


LONG = "v" * 100_000


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe.lr": LONG},
        {"recipe.precision": LONG},
        {"recipe.epochs": [1] * 10_000},
        {"recipe.milestones": list(range(10_000, 0, -1))},
        {f"recipe.{LONG}": 1},
        {"runtime.workers": LONG},
        {"cache.top_k": {LONG: 1}},
        {"search": {"trials": 1, "objectives": [LONG]}},
        {"search": {"trials": 1, "also": {LONG: [1]}}},
        {"name": LONG + "/"},
        {"results": "s3://" + LONG + "?x"},
    ],
    ids=lambda changes: next(iter(changes))[:20],
)
def test_a_value_in_a_message_is_cut(kdbench: Kdbench, changes: dict[str, Any]) -> None:
    ended = kdbench("run", write(changes), "--dry-run")
    assert_one_line(ended, 2, "tiny.yaml: ")
    assert len(ended.err) < 700, ended.err


@pytest.mark.parametrize(
    "changes",
    [{"methods": [LONG]}, {"students": [LONG]}, {"task.name": LONG}, {"task.data": LONG}, {"students": [{"name": "tiny_cnn", LONG: 1}]}],
    ids=["methods", "students", "task", "data", "option"],
)
def test_a_name_of_any_length_ends_in_a_line_that_can_be_read(kdbench: Kdbench, changes: dict[str, Any]) -> None:
    ended = kdbench("run", write(changes), "--dry-run")
    assert_one_line(ended, 2)
    assert len(ended.err) < LONGEST_LINE + 100, len(ended.err)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "sparse file"])
def test_weights_are_a_regular_file(kdbench: Kdbench, kind: str, suffix: str) -> None:
    make, said = ODD[kind]
    name = f"w.{suffix}"
    make(Path(name))
    told = {"dangling link": "teacher.weights: there is no file", "circular link": "a circle of symbolic links"}.get(kind, said)
    assert_mistake(run(kdbench, {"teacher.weights": name}), told)


def _declaring_a_header(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(SPARSE)


def _safetensors(header: dict[str, Any], size: int) -> bytes:
    described = json.dumps(header).encode()
    return struct.pack("<Q", len(described)) + described + bytes(size)


def _hollow(path: Path) -> None:
    path.write_bytes(_safetensors({"w": {"dtype": "F32", "shape": [SPARSE // 4], "data_offsets": [0, SPARSE]}}, 0))
    os.truncate(path, path.stat().st_size + SPARSE)


def _compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("w.pt", _sparse, "nor a torch file of plain tensors"),
        ("w.safetensors", _sparse, "not a safetensors file"),
        ("w.safetensors", _declaring_a_header, "a header of 90000000 bytes, expected at most 4 MB"),
        ("w.safetensors", _hollow, "it has 50.00 GB, most of which is a hole in the file"),
        ("w.pt", _compressed, "its content is compressed"),
        ("w.pt", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "nor a torch file of plain tensors"),
    ],
)
def test_weights_that_claim_more_than_they_hold_are_refused(kdbench: Kdbench, name: str, make: Callable[[Path], object], said: str) -> None:
    make(Path(name))
    assert_mistake(run(kdbench, {"teacher.weights": name}), name, said)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"w": {**ENTRY, "shape": [3]}}, "it is not a safetensors file"),
        ({"w": {**ENTRY, "shape": [-2]}}, "it is not a safetensors file"),
        ({"w": {**ENTRY, "shape": [1] * 65, "data_offsets": [0, 4]}}, "it is not a safetensors file"),
        ({"w": {**ENTRY, "data_offsets": [0, 8, 8]}}, "it is not a safetensors file"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "it is not a safetensors file"),
        ({"w": 1}, "it is not a safetensors file"),
        ({"n" * 1_001: ENTRY}, "a tensor's name has 1,001 characters, expected at most 1,000"),
        ({"w": ENTRY, "again": ENTRY}, "it does not have the length that its header declares"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "it does not have the length that its header declares"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "it does not have the length that its header declares"),
        ({}, "it does not have the length that its header declares"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, header: dict[str, Any], said: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(_safetensors(header, 8))
    with pytest.raises(ImplausibleFile, match=said):
        check_safetensors(tmp_path / "w.safetensors")


def test_the_shapes_of_every_type_are_read_from_the_header(tmp_path: Path) -> None:
    types = (torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.uint64, torch.float8_e4m3fn, torch.complex64)
    tensors = {str(dtype): torch.zeros(2, 3, dtype=dtype) for dtype in types} | {"scalar": torch.zeros(()), "empty": torch.zeros(0, 5)}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"a": "b"})
    assert check_safetensors(tmp_path / "w.safetensors") == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# --- what a results folder holds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NO_FILE)
def test_a_journal_is_a_regular_file(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    make, said = NO_FILE[kind]
    make(Path("s.journal"))
    monkeypatch.setattr(Layout, "study", lambda *_: Path("s.journal"))
    ended = run(kdbench, {"search": {"trials": 1}})
    assert_one_line(ended, 2, "the journal of a search, s.journal, can't be read: ", said, "Move it away to have that search run again")


def test_a_journal_has_many_lines_and_none_of_a_megabyte(tmp_path: Path) -> None:
    journal = tmp_path / "s.journal"
    content = (b'{"a": 1}\n' * 200_000) + b"x" * LONGEST_JOURNAL_LINE + b"\n"
    journal.write_bytes(content)
    assert read_journal_file(journal) == content
    for long in (b"x" * (LONGEST_JOURNAL_LINE + 1), b"x" * (LONGEST_JOURNAL_LINE + 1) + b"\nend\n"):
        journal.write_bytes(b"first\n" + long)
        with pytest.raises(ImplausibleFile, match="it has a line of more than 1 MB"):
            read_journal_file(journal)


def test_a_journal_of_deep_json_is_named(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("s.journal").write_bytes(b"[" * 100_000 + b"\n\n")
    monkeypatch.setattr(Layout, "study", lambda *_: Path("s.journal"))
    assert_one_line(run(kdbench, {"search": {"trials": 1}}), 2, "the journal of a search, s.journal, is damaged")


@pytest.mark.parametrize("kind", [kind for kind in NO_FILE if kind != "folder"])
def test_a_measured_choice_that_is_no_file_is_measured_again(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(precision, "_fastest", lambda *_: ("fp32", "contiguous"))
    changes = {"recipe.precision": "auto", "recipe.memory_format": "auto", "methods": ["none"], "teacher": None}
    assert run(kdbench, changes).code == 0
    choice = next(Path("results/choices").iterdir())
    whole = choice.read_text()
    choice.unlink()
    monkeypatch.chdir(choice.parent)
    NO_FILE[kind][0](Path(choice.name))
    monkeypatch.chdir("../..")
    assert run(kdbench, changes).code == 0
    assert choice.read_text() == whole


@pytest.mark.parametrize("kind", NO_FILE)
@pytest.mark.parametrize("name", ["logits.json", "entry.json"])
def test_a_manifest_of_the_cache_is_a_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, said = NO_FILE[kind]
    make(Path(name))
    with pytest.raises(Exception, match=said) as problem:
        StreamFiles(Path(), "logits").read() if name == "logits.json" else read_entry(Path())
    assert "is damaged (" in str(problem.value)


@pytest.mark.parametrize("kind", [kind for kind in NO_FILE if kind != "sparse file"])
def test_an_array_of_the_cache_is_a_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, said = NO_FILE[kind]
    make(Path("index.npy"))
    with pytest.raises(RunFailed, match=said):
        row_of(Path(), None)
    make(StreamFiles(Path(), "logits").data)
    with pytest.raises(RunFailed, match=said):
        StreamFiles(Path(), "logits")._mapped(None)


@pytest.mark.parametrize("kind", [kind for kind in NO_FILE if kind != "sparse file"])
def test_a_lock_is_a_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, said = NO_FILE[kind]
    make(Path("x.lock"))
    with pytest.raises(UserError, match=said), locked(Path("x.lock")):
        pass
    assert not is_held(Path("x.lock"))


def test_a_lock_names_its_holder_and_is_given_back(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    with locked(lock):
        assert is_held(lock)
        assert lock.read_text() == str(os.getpid())
    assert not is_held(lock)


def test_a_pipe_that_took_the_place_of_an_image_is_named(tmp_path: Path) -> None:
    """One that lies there from the start is left out with a note, as links to nowhere are."""
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"1\.png can't be read: it is a pipe, expected a regular file"):
        Files(tmp_path, ("1.png",), (1,)).read(0)
    with pytest.raises(UserError, match=r"1\.png can't be read: it is a pipe, expected a regular file"):
        files_content(tmp_path, ["1.png"], "images")
