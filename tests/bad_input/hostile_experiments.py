"""Hostile experiments: YAML that calls code, takes the machine, or says what nobody can train."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import yaml

from tests.bad_input.hostile_case import ODD, RUN_IMPORTS, SENTINEL, Case, Draws, Makers, experiment, odd_file, run
from tests.bad_input.tiny_experiment import TINIER, TINY
from tests.test_yaml12 import bomb

TIMM = (*RUN_IMPORTS, "timm")
MANY_LINES = 11  # ten problems, and how many more there are

CALLS: tuple[dict[str, Any], ...] = (
    {"name": "os:system", "command": f"touch {SENTINEL}"},
    {"name": "posix:system", "command": f"touch {SENTINEL}"},
    {"name": "os:mkdir", "path": SENTINEL},
    {"name": "subprocess:Popen", "args": ["touch", SENTINEL]},
    {"name": "subprocess:getoutput", "cmd": f"touch {SENTINEL}"},
    {"name": "builtins:exec", "source": f"open('{SENTINEL}', 'w')"},
    {"name": "runpy:run_path", "path_name": "own.py"},
    {"name": "pickle:loads", "data": "cos\nsystem\n(S'touch called'\ntR."},
    {"name": "torch:load", "f": "own.pt", "weights_only": False},
    {"name": "torch.hub:load", "repo_or_dir": ".", "source": "local", "model": "own"},
    {"name": "torch.fx.graph_module:reduce_graph_module", "body": {"_code": f"open('{SENTINEL}', 'w')"}, "import_block": ""},
    {"name": "torch.utils.cpp_extension:load", "sources": "own.cpp"},
    {"name": "own:unannotated"},
)
OWN = f"open('{SENTINEL}', 'w')"


def calls(folder: Path, draws: Draws) -> Case:
    """A name that calls a function of a library's, or one of the user's that does not say what it makes."""
    call = draws.pick(CALLS)
    (folder / "own.py").write_text(f"def unannotated(**options):\n    {OWN}\n")
    (folder / "hubconf.py").write_text(f"{OWN}\n")
    (folder / "own.pt").write_bytes(pickle.dumps(_Call(), protocol=2))
    place = draws.choice(["students", "teacher.model", "task", "task.data", "methods"])
    return run(experiment(folder, {place: [call] if place in ("students", "methods") else call}), draws, said=call["name"])


class _Call:
    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (SENTINEL, "w")


def reading_options(folder: Path, draws: Draws) -> Case:
    """Options by which timm reads or fetches files."""
    (folder / "own.pt").write_bytes(pickle.dumps(_Call(), protocol=2))
    option = draws.pick([{"checkpoint_path": "own.pt"}, {"pretrained_cfg": {"file": "own.pt"}}, {"cache_dir": "."}])
    return run(experiment(folder, {"students": [{"name": "resnet18", **option}]}), draws, imports=TIMM, said="is not an option")


def tags(folder: Path, draws: Draws) -> Case:
    """Tags by which other readers of YAML make Python objects."""
    tag = draws.pick(
        [
            f"!!python/object/apply:os.system ['touch {SENTINEL}']",
            f"!!python/object/new:os.mkdir [{SENTINEL}]",
            "!!python/name:os.system",
            "!!python/module:os",
            f"!!python/object/apply:subprocess.check_output [[touch, {SENTINEL}]]",
            "!!timestamp 2026-01-01",
            "!!binary aGVsbG8=",
            "!!set {a, b}",
            "!<tag:yaml.org,2002:python/tuple> [1]",
        ]
    )
    return run(experiment(folder, {draws.choice(["name", "seeds", "recipe.lr", "students"]): "RAW"}, tag), draws, said="not valid YAML")


def aliases(folder: Path, draws: Draws) -> Case:
    """Aliases of lists of aliases, and aliases inside of what they stand for."""
    levels = draws.randint(7, 30)
    text = draws.pick(
        [
            bomb(levels),
            bomb(levels, "[[{}]]"),
            "".join(f"k{n}: &k{n} {{a: *k{n - 1}, b: *k{n - 1}, c: *k{n - 1}}}\n" if n else "k0: &k0 {a: 1}\n" for n in range(levels + 10)),
            "".join(f"k{n}: &k{n} {{<<: [{', '.join([f'*k{n - 1}'] * 9)}]}}\n" if n else "k0: &k0 {a: 1}\n" for n in range(levels)),
            "name: &a [*a]",
            "name: &a {x: {y: [*a]}}",
            "name: &a {<<: *a}",
            "&a name: *a\nrecipe: &b [1, {c: *b}]",
            "&a [&b [*a, *b], *b]",
        ]
    )
    (folder / "hostile.yaml").write_text(text)
    return run("hostile.yaml", draws, most_lines=MANY_LINES)


def nests(folder: Path, draws: Draws) -> Case:
    """Hundreds of levels, of each kind of nesting."""
    levels = draws.choice([300, 3_000, draws.randint(60, 100_000)])
    value = draws.pick(["[" * levels + "]" * levels, "[" * levels, "{a: " * levels + "1" + "}" * levels, "- " * levels, "? " * levels])
    if draws.random() < 0.5:
        (folder / "hostile.yaml").write_text(value)
        return run("hostile.yaml", draws, said="levels deep")
    return run(
        experiment(folder, {draws.choice(["name", "recipe.augment", "search"]): "RAW"}, f"\n  {value}"), draws, said="not valid YAML"
    )


def long_scalars(folder: Path, draws: Draws) -> Case:
    """A text of hundreds of kilobytes as a value, a key, an anchor or a tag."""
    long = draws.choice("xé漢-") * draws.randint(100_000, 300_000)
    key, value = draws.pick(
        [
            ("name", long),
            ("name", f'"{long}"'),
            ("seeds", long),
            ("recipe.precision", f"|\n    {long}"),
            ("methods", f"[{long}]"),
            ("task", f"{{name: {long}}}"),
            ("results", f"s3://{long}"),
            ("name", f"&{'a' * len(long)} x\n? {long}\n: 1"),
            ("name", f"!{'a' * len(long)} x"),
        ]
    )
    return run(experiment(folder, {key: "RAW"}, value), draws, most_lines=2)


def long_files(folder: Path, draws: Draws) -> Case:
    """Megabytes of what takes a reader long."""
    piece = draws.pick(["#", "\n", " ", "a: 1\n", "- \n", "[", '"\\x41', "&a ", "\N{GREEK SMALL LETTER ALPHA}"])
    (folder / "hostile.yaml").write_text(f"name: x\n{piece * (draws.randint(1_100_000, 20_000_000) // len(piece))}")
    return run("hostile.yaml", draws, said="it has more than 1 MB")


def wide_files(folder: Path, draws: Draws) -> Case:
    """Tens of thousands of keys, entries or problems in less than a megabyte."""
    many = range(draws.randint(20_000, 45_000))
    changes: dict[str, Any] = draws.pick(
        [
            {f"key{number}": 1 for number in many},
            {"recipe": {f"key{number}": 1 for number in many}},
            {"methods": [f"m{number}" for number in many]},
            {"students": ["tiny_cnn"] * len(many)},
            {"recipe.milestones": [-number for number in many]},
            {"search": {"trials": 1, "also": {"recipe.lr": list(many)}}},
        ]
    )
    (folder / "hostile.yaml").write_text(_flow({**TINY, **TINIER, **changes}))
    return run("hostile.yaml", draws, most_lines=MANY_LINES)


def _flow(value: dict[str, Any]) -> str:
    return yaml.dump(value, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), default_flow_style=True, width=10**9)


# Where an experiment has a number, beside seeds. A value stands for `RAW`.
NUMBERS: tuple[dict[str, Any], ...] = (
    {"seeds": "RAW"},
    *(
        {f"recipe.{key}": "RAW"}
        for key in ("epochs", "batch_size", "lr", "momentum", "weight_decay", "warmup_epochs", "clip_grad", "views")
    ),
    *({f"recipe.{key}": "RAW"} for key in ("accumulate", "ema", "milestones")),
    *({f"recipe.augment.{key}": "RAW"} for key in ("crop", "operations", "magnitude", "color", "erase", "mixup", "cutmix", "resized_crop")),
    *({"search": {"trials": 1, key: "RAW"}} for key in ("trials", "top_k", "confirm_seeds", "grace_epochs", "reduction")),
    *({f"cache.{key}": "RAW"} for key in ("budget_gb", "top_k")),
    *({f"runtime.{key}": "RAW"} for key in ("workers", "cpus_per_worker", "gpus_per_worker", "concurrent", "checkpoint_seconds")),
    {"runtime.workers": {"min": 1, "max": "RAW"}},
    {"task.val_size": "RAW"},
    {"task.transfer_size": "RAW"},
    *({"task.data": {"name": "shapes", "target": "class", key: "RAW"}} for key in ("train", "test", "size")),
    {"students": [{"name": "tiny_cnn", "width": "RAW"}]},
    {"teacher.recipe.epochs": "RAW"},
    {"methods": [{"name": "kd", "temperature": "RAW"}]},
    {"methods": [{"name": "kd", "kd_weight": "RAW"}]},
)
# No number of an experiment may be any of these.
WRONG = (".nan", ".inf", "-.inf", "1e400", "-1", "-1e-300", "9" * 401, "-" + "9" * 401, "9" * 5_000, "1" + "0" * 31, "true", '"12 "', "[1]")
SEEDS: tuple[dict[str, Any], ...] = (
    {"data_seed": "RAW"},
    {"teacher.seed": "RAW"},
    {"search": {"trials": 1, "seed": "RAW"}},
    {"task.data": {"name": "shapes", "target": "class", "seed": "RAW"}},
)


def numbers(folder: Path, draws: Draws) -> Case:
    """A number that makes no sense, in each place that has one."""
    return run(experiment(folder, draws.pick(NUMBERS), draws.choice(WRONG)), draws, most_lines=2)


def seeds(folder: Path, draws: Draws) -> Case:
    """Seeds that no generator takes."""
    value = draws.choice(["9223372036854775808", "-1", str(-(2**63)), "1" + "0" * 30, "0x" + "f" * 300, "1.5", "-0x1"])
    return run(experiment(folder, draws.pick(SEEDS), value), draws)


def ranges(folder: Path, draws: Draws) -> Case:
    """Places to search that hold nothing, or more than anybody can try."""
    value: Any = draws.pick(
        [
            {"low": 0.1, "high": 1, "step": 0},
            {"low": 0.1, "high": 1, "step": -0.1},
            {"low": 0.1, "high": 1, "step": 1e-300},
            {"low": 1, "high": 0.1},
            {"low": -1e308, "high": 1e308},
            {"low": float("nan"), "high": 1},
            {"low": 0, "high": 1, "log": True},
            {"low": 10**400, "high": 10**401},
            {"low": [[1]], "high": 1},
            {"options": []},
            {"options": list(range(2_000))},
            {"options": "text", "low": 1},
        ]
    )
    return run(experiment(folder, {"search": {"trials": 2, "also": {"recipe.lr": value}}}), draws)


def names(folder: Path, draws: Draws) -> Case:
    """Names and labels that no path, terminal or database takes."""
    name = draws.pick(
        [
            "x" * 300,
            "a/../../../b",
            "..",
            "",
            '"a\\nb"',
            '"a\\0b"',
            '"\\uD83D"',
            '"a\\uDCFF"',
            '"\\x1b[2Jgone"',
            "~root",
            "*",
            "a\u202eb" * 60,
        ]
    )
    label: Any = {"name": "tiny_cnn", "width": 4, "label": "RAW"}
    safe_as_label = name in ("a/../../../b", "..", "~root", "*")  # a label is no path
    place: dict[str, Any] = {"name": "RAW"}
    if not safe_as_label:
        place = draws.choice([place, {"students": [label]}, {"teacher.model": label}, {"methods": [{"name": "kd", "label": "RAW"}]}])
    return run(experiment(folder, place, name), draws)


def encodings(folder: Path, draws: Draws) -> Case:
    """Bytes that are no text, or no YAML."""
    text = (folder / experiment(folder, {})).read_text()
    content: bytes = draws.pick(
        [
            text.encode("utf-16"),
            text.encode("utf-16-be"),
            text.encode("utf-32"),
            text.encode() + b"\xff\xfe\x00",
            b"\xef\xbb\xbf" + text.encode() + b"\xc3\x28",
            text.encode() + "# é".encode("latin-1"),
            text.encode().replace(b": ", b":\0 "),
            text.encode().replace(b"\n  ", b"\n\t"),
            text.encode() + b"\x1b\x07",
            "seeds\ufeff: 1\n".encode() + text.encode(),
            text.encode() + b"\xed\xa0\xbd",
            gzip.compress(text.encode()),
            draws.randbytes(5_000),
            bytes(500_000),
        ]
    )
    (folder / "hostile.yaml").write_bytes(content)
    return run("hostile.yaml", draws)


def structures(folder: Path, draws: Draws) -> Case:
    """YAML that is something else than keys with values."""
    text = (folder / experiment(folder, {})).read_text()
    changed = draws.pick(
        [
            text + "name: again\n",
            text + "---\n" + text,
            text + "...\n%YAML 9.9\n---\nname: x\n",
            "%TAG ! tag:evil,2026:\n---\n!name x",
            text + "recipe: *nowhere\n",
            text + "? {a: [1]}\n: 1\n",
            text + "<<: [1, 2]\n",
            text + "<<: text\n",
            text + 'x: "never ends',
            text + "x: |99\n  y",
            '"\\UFFFFFFFF"',
            "- " + text.replace("\n", "\n  "),
            "null",
            "12",
            "true: false\n1: 2\nnull: 3",
        ]
    )
    (folder / "hostile.yaml").write_text(changed)
    return run("hostile.yaml", draws, most_lines=MANY_LINES)


def no_files(folder: Path, draws: Draws) -> Case:
    """A pipe, a device, a link round in a circle or a hole of 50 GB as the experiment."""
    odd_file(folder / "hostile.yaml", draws)
    return run("hostile.yaml", draws, said="hostile.yaml: ")


def paths(folder: Path, draws: Draws) -> Case:
    """Paths that lead nowhere, round in a circle, or to what is no file."""
    ODD["circular link"](folder / "round")
    ODD["pipe"](folder / "pipe")
    path = draws.pick(
        ["~nosuchuser/x", "x" * 300, "round", "round/x", "pipe", '"a\\0b"', "/dev/zero", "/proc/kmsg", "a/" * 3_000, '"a\\nb"']
    )
    place = draws.choice(
        [
            {"teacher.weights": "RAW"},
            {"students": [{"name": "tiny_cnn", "weights": "RAW"}]},
            {"task.data": {"name": "image_folder", "path": "RAW"}},
            {"task.data": {"name": "parquet", "train": "RAW", "test": "RAW"}},
        ]
    )
    return run(experiment(folder, place, path), draws)


def places(folder: Path, draws: Draws) -> Case:
    """Results in a place that can't be one."""
    ODD["circular link"](folder / "round")
    ODD["pipe"](folder / "pipe")
    place = draws.pick(
        [
            "~nosuchuser",
            "round/x",
            "pipe",
            "/dev/null",
            "x" * 300,
            '"a\\0b"',
            "s3://",
            "s3://key:secret@bucket/x",
            "s3://a b/../?c",
            "gopher://x/y",
        ]
    )
    return Case(("run", experiment(folder, {"results": "RAW"}, place), "--no-mlflow"))


def overrides(folder: Path, draws: Draws) -> Case:
    """`--set` with what a file may not hold either."""
    call = draws.choice(["os:system", "subprocess:Popen"])
    override = draws.pick(
        [
            f"students.0.name={call}",
            f"task={{name: '{call}', command: touch {SENTINEL}}}",
            "recipe.lr=" + "[" * draws.randint(300, 50_000),
            "seeds=" + "9" * draws.randint(1_001, 90_000),
            "recipe.lr=&a [*a]",
            "recipe=" + bomb(8).replace("\n", ", ").join("{}"),
            "x." * draws.randint(60, 9_000) + "y=1",
            f"name=!!python/object/apply:os.system ['touch {SENTINEL}']",
            'methods.kd.label="\\uD83D"',
            "name=\udcff\udcfe",
            "\udcff=1",
            "=",
            "recipe.epochs=1e400",
            "method.temperature=.nan",
            "students.999999999999999999999.width=1",
            "name=" + "x" * 90_000,
            "teacher.weights=~nosuchuser/x",
        ]
    )
    return run(experiment(folder, {}), None, "--set", override)


EXPERIMENTS: Makers = (
    (calls, 9),
    (reading_options, 1),
    (tags, 4),
    (aliases, 5),
    (nests, 3),
    (long_scalars, 3),
    (long_files, 1),
    (wide_files, 2),
    (numbers, 10),
    (seeds, 2),
    (ranges, 3),
    (names, 3),
    (encodings, 3),
    (structures, 3),
    (no_files, 2),
    (paths, 2),
    (places, 1),
    (overrides, 3),
)
