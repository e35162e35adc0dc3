"""The commands, run as a person runs them: what they print, their exit codes, and what they do not import."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from kdbench.cli import app as cli
from kdbench.cli import doctor
from kdbench.cli.pages import KINDS
from kdbench.data.pixels import unit_range
from kdbench.deploy import export as exporting
from kdbench.deploy.export import find_run
from kdbench.errors import RunFailed, UserError
from kdbench.experiment import Experiment, to_yaml
from kdbench.methods import METHODS
from kdbench.models.inputs import model_inputs
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.storage.layout import Layout
from kdbench.tasks.build import build_task
from kdbench.training.checkpoint import save_weights
from tests.console import Kdbench

COMMANDS = (
    "run",
    "tune",
    "leaderboard",
    "list",
    "show",
    "taps",
    "export",
    "recommend",
    "verify",
    "results",
    "results export",
    "results import",
    "cache",
    "cache ls",
    "cache build",
    "cache verify",
    "cache prune",
    "doctor",
)


# --- help, imports, mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_shows_an_example(kdbench: Kdbench, command: str) -> None:
    ended = kdbench(*command.split(), "--help")
    assert ended.code == 0
    assert f"Example: kdbench {command}" in ended.out


def test_the_examples_of_list_show_and_taps_work(kdbench: Kdbench) -> None:
    for command in ("list", "show"):
        line = next(line for line in kdbench(command, "--help").out.splitlines() if "Example: kdbench" in line)
        assert kdbench(*line.split("kdbench", 1)[1].split()).code == 0


@pytest.mark.parametrize(
    "arguments",
    ["--help", "run --help", "list methods", "list models --format json", "leaderboard", "leaderboard --format json", "recommend --help"],
)
def test_quick_commands_import_neither_torch_nor_ray(arguments: str, tmp_path: Path) -> None:
    script = (
        "import sys, kdbench.cli.app\n"
        f"sys.argv = ['kdbench', *{arguments.split()!r}]\n"
        "try:\n    kdbench.cli.app.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'torch', 'ray', 'timm', 'mlflow', 'optuna'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(Path(cli.__file__).parents[2])}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("kind", ["methods", "models"])
def test_listing_names_waits_for_no_library_of_numbers(kind: str, tmp_path: Path) -> None:
    script = (
        "import sys, kdbench.cli.app\n"
        f"sys.argv = ['kdbench', 'list', '{kind}']\n"
        "try:\n    kdbench.cli.app.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'numpy', 'pyarrow', 'scipy', 'yaml', 'jinja2', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(Path(cli.__file__).parents[2])}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "named", "near"),
    [
        ("list method", "'method'", "did you mean 'methods'?"),
        ("list models --format jsn", "'jsn'", "did you mean 'json'?"),
        ("show dkdd", "'dkdd'", "did you mean 'dkd'?"),
        ("show nowhere.at_all:Thing", "'nowhere'", "no module"),
        ("taps resnte18", "'resnte18'", "did you mean 'resnet18'?"),
        ("taps tiny_cnn --image 32x32", "--image 32x32", "such as 3x32x32"),
        ("taps vgg8 --image 3x4x4", "'vgg8'", "try a larger --image"),
        ("leaderboard --format jsn", "'jsn'", "did you mean 'json'?"),
        ("leaderboard --explain kd", "--explain kd", "no board has this method"),
        ("recommend --latency fast", "--latency fast", "such as 5ms"),
        ("recommend --params many", "--params many", "such as 250k"),
        ("recommend --format csv", "'csv'", "json"),
        ("results import nowhere.zip", "nowhere.zip", "there is no such file"),
        ("results export x.zip", "nothing to export", "results"),
        ("run missing.yaml", "missing.yaml", "there is no such file"),
        ("export 01ABC", "'01ABC'", "kdbench leaderboard --format json"),
        ("export 01ABC --format onx", "'01ABC'", "--results DIR"),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(kdbench: Kdbench, arguments: str, named: str, near: str) -> None:
    ended = kdbench(*arguments.split())
    assert ended.code == 2
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("kdbench: ")
    assert named in ended.err
    assert near in ended.err


@pytest.mark.parametrize("arguments", ["frobnicate", "list", "taps tiny_cnn --classes 0", "export"])
def test_wrong_usage_has_exit_code_2_and_no_traceback(kdbench: Kdbench, arguments: str) -> None:
    ended = kdbench(*arguments.split())
    assert ended.code == 2
    assert "Traceback" not in ended.err


# --- list, show, taps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_list_has_every_name_with_its_sentence(kdbench: Kdbench, kind: str) -> None:
    lines = kdbench("list", kind).out.splitlines()
    for name, entry in KINDS[kind][1].items():
        assert any(line.split()[0] == name and line.endswith(entry.summary) for line in lines if line)


def test_list_says_that_timm_and_dotted_paths_work_too(kdbench: Kdbench) -> None:
    last = kdbench("list", "models").out.splitlines()[-1]
    assert "timm" in last
    assert "package.module:Class" in last


def test_list_as_json_is_the_catalogue(kdbench: Kdbench) -> None:
    listed = json.loads(kdbench("list", "methods", "--format", "json").out)
    assert {row["name"]: row["summary"] for row in listed} == {name: entry.summary for name, entry in METHODS.items()}


@pytest.mark.parametrize("name", [name for _, table in KINDS.values() for name in table])
def test_everything_that_is_listed_can_be_shown(kdbench: Kdbench, name: str) -> None:
    ended = kdbench("show", name)
    assert ended.code == 0
    assert ended.out.splitlines()[0] == name


def test_show_of_a_method_tells_paper_loss_parameters_and_published_figures(kdbench: Kdbench) -> None:
    shown = kdbench("show", "nkd").out
    rows = {words[0]: words[1:] for line in shown.splitlines() if (words := line.split())}
    assert "arXiv 2303.13005" in shown
    assert "L = w_task CE" in shown
    assert ["teacher", "needed"] in [line.split() for line in shown.splitlines()]
    assert ["labels", "needed"] in [line.split() for line in shown.splitlines()]
    assert ["labels", "not", "needed"] in [line.split() for line in kdbench("show", "kd").out.splitlines()]
    assert rows["temperature"] == ["3", "1", "..", "4,", "logarithmic", "float", ">", "0"]
    assert rows["resnet34"][:6] == ["resnet18", "ImageNet-1k", "top1", "69.90", "71.96", "+2.06"]


def test_show_has_what_follows_from_a_published_figure_and_nothing_that_does_not(kdbench: Kdbench) -> None:
    shown = [line.split() for line in kdbench("show", "tf_nkd").out.splitlines()]
    assert ["no", "teacher", "swin_tiny", "ImageNet-1k", "top1", "81.18", "81.48", "+0.30", "arXiv", "2208.10139"] in shown


def test_show_says_what_is_fixed_and_which_values_there_are(kdbench: Kdbench) -> None:
    rows = {words[0]: words[1:] for line in kdbench("show", "kd").out.splitlines() if (words := line.split())}
    assert rows["form"] == ["kl", "no", "kl", "|", "cross_entropy"]


def test_show_of_a_task_and_of_a_data_set_tells_the_options(kdbench: Kdbench) -> None:
    task, data = kdbench("show", "segmentation").out, kdbench("show", "shapes").out
    assert "miou, higher is better" in task
    assert "int >= 1 | none" in next(line for line in task.splitlines() if line.startswith("transfer_size"))
    assert next(line for line in data.splitlines() if line.startswith("target")).split()[:5] == ["target", "mask", "mask", "|", "class"]


def test_show_knows_a_users_method_by_its_dotted_path(kdbench: Kdbench) -> None:
    shown = kdbench("show", "kdbench.methods.dkd:DKD").out
    assert "arXiv 2203.08679" in shown
    assert "published" not in shown


def test_taps_prints_aliases_shapes_and_strides(kdbench: Kdbench) -> None:
    lines = [line.split() for line in kdbench("taps", "tiny_cnn", "--image", "1x28x28", "--classes", "10").out.splitlines()]
    assert ["layer3", "stage:2", "stage:-1", "map", "64x4x4", "7"] in lines
    assert ["fc", "(its", "input)", "pooled", "vector", "64"] in lines
    assert lines[0][-1] == "10"


def test_taps_with_all_has_every_module(kdbench: Kdbench) -> None:
    few, all_ = kdbench("taps", "tiny_cnn"), kdbench("taps", "tiny_cnn", "--all")
    assert "layer1.0" not in few.out.split()
    assert "layer1.0" in all_.out.split()
    assert len(all_.out.splitlines()) == len(few.out.splitlines()) - 2 + int(few.out.splitlines()[-1].split()[0])


# --- export ----------------------------------------------------------------------------------------------------------

EXPERIMENT = {
    "name": "tiny",
    "task": {"name": "classification", "data": {"name": "shapes", "train": 40, "test": 80, "target": "class"}, "val_size": 10},
    "teacher": {"model": {"name": "tiny_cnn", "width": 6}},
    "students": [{"name": "cifar_resnet8", "width": 4}, "tiny_cnn"],
    "methods": ["none", "kd"],
}


def record_of(experiment: Experiment, **changes: object) -> RunRecord:
    facts = {
        "run_id": "01KAMZ3Q00AAAAAAAAAAAAAAAA",
        "unit_key": "unit",
        "created_at": datetime.now(UTC),
        "role": "final",
        "protocol_hash": "p",
        "experiment": experiment.name,
        "task": "classification",
        "task_version": 1,
        "data": "shapes",
        "data_hash": "d",
        "split_hash": "s",
        "recipe": {},
        "global_batch": 8,
        "world_size": 1,
        "precision": "fp32",
        "teacher": "tiny_cnn",
        "student": "cifar_resnet8",
        "method": "kd",
        "label": "kd",
        "method_version": 1,
        "seed": 0,
        "data_seed": 0,
        "primary": "accuracy",
        "test_metric": 51.25,
        "artifacts_uri": "students/unit/student.safetensors",
        "config": to_yaml(experiment),
    }
    return RunRecord.model_validate(facts | changes)


class Trained(NamedTuple):
    """A results folder with one run: the network that was kept, and images of the test split in [0, 1]."""

    folder: Path
    record: RunRecord
    images: torch.Tensor
    prediction: torch.Tensor


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    experiment = Experiment.model_validate(EXPERIMENT)
    record, folder = record_of(experiment), tmp_path / "results"
    task = build_task(experiment.task)
    torch.manual_seed(0)
    model = task.build_model(experiment.students[0])
    images = unit_range(task.splits().test.pixels)
    model(model_inputs(model, images))  # batch norm statistics that are not those of a new model
    save_weights(model.state_dict(), Layout(folder).student(record.unit_key))
    ResultStore(folder).append(record)
    with torch.no_grad():
        prediction = model.eval()(model_inputs(model, images))
    return Trained(folder, record, images, prediction)


def test_exported_safetensors_load_into_the_plain_model(kdbench: Kdbench, trained: Trained) -> None:
    ended = kdbench("export", trained.record.run_id, "--results", trained.folder)
    assert ended.code == 0, ended.err
    path = Path(f"cifar_resnet8-kd-{trained.record.run_id}.safetensors")
    assert ended.out.startswith(f"{path}: cifar_resnet8")
    assert "checked on 64 test samples: largest difference 0.0e+00" in ended.out
    from kdbench.models.cifar_resnet import cifar_resnet8

    model = cifar_resnet8(num_classes=5, in_channels=3, width=4).eval()
    model.load_state_dict(load_file(path), strict=True)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    mean, std = (torch.tensor(json.loads(facts[name])).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(model((trained.images - mean) / std), trained.prediction)
    assert facts["model"] == "cifar_resnet8"
    assert json.loads(facts["model_options"]) == {"width": 4}
    assert facts["data"] == "shapes"
    assert facts["task"] == "classification"
    assert facts["num_classes"] == "5"
    assert facts["run_id"] == trained.record.run_id


def test_exported_onnx_takes_any_number_of_unnormalised_images(kdbench: Kdbench, trained: Trained) -> None:
    ended = kdbench("export", "01kamz3q", "--format", "onnx", "--output", "out/net.onnx", "--results", trained.folder)
    assert ended.code == 0, ended.err
    assert [path.name for path in Path("out").iterdir()] == ["net.onnx"]  # weights inside, nothing left over
    session = onnxruntime.InferenceSession("out/net.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3, 80):
        found = session.run(None, {"images": trained.images[:count].numpy()})[0]
        np.testing.assert_allclose(found, trained.prediction[:count].numpy(), atol=1e-4)
    facts = {prop.key: prop.value for prop in onnx.load("out/net.onnx").metadata_props}
    assert facts["run_id"] == trained.record.run_id


def test_exported_pt2_takes_any_number_of_unnormalised_images(kdbench: Kdbench, trained: Trained) -> None:
    ended = kdbench("export", "01kamz3q", "--format", "pt2", "--output", "out/net.pt2", "--results", trained.folder)
    assert ended.code == 0, ended.err
    assert [path.name for path in Path("out").iterdir()] == ["net.pt2"]
    facts = {"metadata.json": ""}
    network = torch.export.load("out/net.pt2", extra_files=facts).module()
    for count in (1, 3, 80):
        torch.testing.assert_close(network(trained.images[:count]), trained.prediction[:count], rtol=0, atol=1e-4)
    assert json.loads(facts["metadata.json"])["run_id"] == trained.record.run_id


@pytest.mark.parametrize("format_", exporting.FORMATS)
def test_a_file_that_predicts_otherwise_is_not_written(
    kdbench: Kdbench, trained: Trained, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    write = exporting._WRITERS[format_]
    monkeypatch.setitem(exporting._WRITERS, format_, lambda *arguments: write(*arguments) + 0.01 * trained.prediction.abs().max())
    ended = kdbench("export", trained.record.run_id, "--format", format_, "--output", "out/net", "--results", trained.folder)
    assert ended.code == 1
    assert len(ended.err.splitlines()) == 1
    assert "its predictions differ from the original's" in ended.err
    assert list(Path("out").iterdir()) == []


def test_a_prediction_that_is_no_number_does_not_pass_the_check(
    kdbench: Kdbench, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exporting._WRITERS["safetensors"]
    monkeypatch.setitem(exporting._WRITERS, "safetensors", lambda *arguments: write(*arguments) * float("nan"))
    ended = kdbench("export", trained.record.run_id, "--results", trained.folder)
    assert ended.code == 1
    assert "differ from the original's by up to nan" in ended.err


def test_a_missing_onnx_package_is_said_with_what_to_install(kdbench: Kdbench, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_ONNX_PACKAGES", ("onnx", "no_such_runtime"))
    ended = kdbench("export", trained.record.run_id, "--format", "onnx", "--results", trained.folder)
    assert ended.code == 2
    assert ended.err == "kdbench: --format onnx needs no_such_runtime: pip install 'kdbench[onnx]'\n"


class Branching(nn.Module):
    """What it computes depends on the values that it sees, which no graph can hold."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) if images.sum() > 0 else images.amax(dim=(2, 3))


@pytest.mark.parametrize(("format_", "called"), [("onnx", "ONNX"), ("pt2", "pt2")])
def test_a_model_that_no_graph_can_hold_is_said_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], format_: str, called: str
) -> None:
    network = exporting.Deployed(Branching()).eval()
    with pytest.raises(RunFailed, match=f"model 'branching' can't be written as {called}") as failed:
        exporting._write_checked(network, torch.rand(4, 3, 8, 8), tmp_path / "net", format_, {"model": "branching"})
    assert len(str(failed.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": "failed", "failure": "the loss became nan", "artifacts_uri": None}, "the loss became nan"),
        ({"role": "candidate", "artifacts_uri": None}, "it is a candidate"),
        ({"artifacts_uri": "students/gone/student.safetensors"}, "are gone"),
        ({"config": None}, "doesn't hold the experiment"),
        ({"student": "vgg8"}, "describes 0 models called 'vgg8'"),
        ({"student": "tiny_cnn"}, "do not fit model 'tiny_cnn'"),
    ],
)
def test_a_run_that_can_not_be_exported_says_why(kdbench: Kdbench, trained: Trained, changes: dict[str, object], reason: str) -> None:
    other = trained.record.model_copy(update={"run_id": "01OTHER", "unit_key": "other", **changes})
    ResultStore(trained.folder).append(other)
    ended = kdbench("export", "01OTHER", "--results", trained.folder)
    assert ended.code == 2
    assert reason in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_teacher_is_exported_as_the_experiment_describes_the_teacher(kdbench: Kdbench, trained: Trained) -> None:
    experiment = Experiment.model_validate(EXPERIMENT)
    assert experiment.teacher is not None
    teacher = record_of(
        experiment, run_id="01TEACHER", unit_key="t", role="teacher", student="tiny_cnn", artifacts_uri="teachers/t/model.safetensors"
    )
    save_weights(build_task(experiment.task).build_model(experiment.teacher.model).state_dict(), Layout(trained.folder).teacher("t"))
    ResultStore(trained.folder).append(teacher)
    assert kdbench("export", "01TEACHER", "--output", "teacher.safetensors", "--results", trained.folder).code == 0
    assert load_file("teacher.safetensors")["layer1.0.weight"].shape[0] == 6  # the teacher's width, not the student's of the same name


def test_a_prefix_of_two_runs_is_refused_and_a_whole_id_is_not() -> None:
    experiment = Experiment.model_validate(EXPERIMENT)
    records = [record_of(experiment, run_id=name) for name in ("01AB", "01ABC", "01AD")]
    assert find_run(records, "01AB").run_id == "01AB"
    assert find_run(records, "01ad").run_id == "01AD"
    with pytest.raises(UserError, match="3 runs begin so, such as 01AB and 01ABC"):
        find_run(records, "01A")


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_finds_this_machine_fit_and_writes_nothing(kdbench: Kdbench, tmp_path: Path) -> None:
    ended = kdbench("doctor", "--results", tmp_path / "new" / "results")
    subjects = {line.split()[1]: line.split()[0] for line in ended.out.splitlines()}
    assert ended.code == 0
    assert {"python", "torch", "ray", "cpu", "gpu", "precision", "memory", "shared", "results", "mlflow", "fashion_mnist", "git"} <= set(
        subjects
    )
    assert subjects["torch"] == "ok"
    assert torch.__version__.partition("+")[0] in ended.out
    assert list(tmp_path.iterdir()) == []


def test_doctor_ends_with_1_where_the_results_folder_is_a_file(kdbench: Kdbench, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    ended = kdbench("doctor", "--results", tmp_path / "taken" / "results")
    assert ended.code == 1
    line = next(line for line in ended.out.splitlines() if line.startswith("missing"))
    assert "choose another with --results DIR" in line


def test_doctor_names_the_missing_package_and_still_ends_in_a_table(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["no-such-package>=3", "torch>=999", "also-none>=1; extra == 'onnx'", "pytest; extra == 'dev'"]
    )
    ended = kdbench("doctor")
    lines = {line.split()[1]: line for line in ended.out.splitlines()}
    assert ended.code == 1
    assert lines["no-such-package"].startswith("missing")
    assert "pip install 'no-such-package>=3'" in lines["no-such-package"]
    assert lines["torch"].startswith("advice")
    assert "pip install 'torch>=999'" in lines["torch"]
    assert lines["also-none"].startswith("advice")
    assert "pytest" not in lines
    assert "git" in lines


def test_doctor_says_which_commit_records_name_or_that_they_name_none(
    kdbench: Kdbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said that they name one, in a folder that is no repository."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    def said() -> str:
        return next(" ".join(line.split()) for line in kdbench("doctor").out.splitlines() if " git " in line)

    monkeypatch.delenv("KDBENCH_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    nothing = "advice git this folder is in no repository that has a commit: records will not say which commit they were made with"
    assert said() == nothing
    git("init", "--quiet")
    assert said() == nothing
    git("commit", "--quiet", "--allow-empty", "-m", "one")
    commit = git("rev-parse", "HEAD")[:12]
    assert said() == f"ok git records name commit {commit}"
    (tmp_path / "new.py").write_text("")
    assert said() == f"ok git records name commit {commit}, with uncommitted changes"


def test_doctor_says_where_the_full_fashion_mnist_lies(kdbench: Kdbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{part}-ubyte.gz").write_bytes(b"")
    monkeypatch.setenv("KDBENCH_DATA", str(tmp_path))
    assert re.search(rf"fashion_mnist +full set in {re.escape(str(tmp_path))}\n", kdbench("doctor").out)


# --- the entry of a Ray job ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("address", "added"), [("127.0.0.1:6379", ["--set", "runtime.address=auto"]), (None, [])])
def test_a_ray_job_runs_the_experiment_on_its_own_cluster(monkeypatch: pytest.MonkeyPatch, address: str | None, added: list[str]) -> None:
    script = Path(__file__).parents[2] / "experiments" / "run.py"
    called: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda: called.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", [str(script), "x.yaml", "--no-mlflow"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    runpy.run_path(str(script), run_name="__main__")
    assert called == [["kdbench", "run", *added, "x.yaml", "--no-mlflow"]]
