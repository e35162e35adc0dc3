"""What a dry run says of costs, and that it does nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.benchmark import outlines, step_times
from kdbench.benchmark.dry_run import DryRun, MethodEstimate, dry_run
from kdbench.cli.pages import dry_run_page
from kdbench.errors import UserError
from kdbench.experiment import Experiment
from kdbench.models.build import ModelSpec, build_model, without_weights
from kdbench.training.checkpoint import save_weights

CIFAR: dict[str, Any] = {
    "name": "pair",
    "task": {"name": "classification", "data": "cifar100", "val_size": 5000},
    "teacher": {"model": "resnet8x4", "recipe": {"epochs": 2}},
    "students": ["cifar_resnet8"],
    "methods": ["none", "kd", "fitnet"],
    "recipe": {"epochs": 10, "batch_size": 64, "precision": "fp32"},
    "seeds": 3,
    "control_seeds": 3,
}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without data, on which each network is timed, and no method."""
    monkeypatch.setattr(step_times, "TIMED_FLOPS", 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KDBENCH_DATA", raising=False)
    monkeypatch.delenv("KDBENCH_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)


def of(**changes: Any) -> DryRun:
    return dry_run(Experiment.model_validate(CIFAR | changes))


def by_label(found: DryRun) -> dict[str, MethodEstimate]:
    return {method.label: method for method in found.methods}


def test_data_that_are_not_here_are_named_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    found = of()
    assert (found.data, found.teacher_images, found.student_images) == ("cifar100", 45_000, 45_000)
    (note,) = found.notes
    assert "a dry run downloads nothing; put cifar-100-binary.tar.gz" in note
    assert [network.params for network in found.networks] == [1_233_540, 83_892]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ({"transfer": "noise"}, (45_000, 45_000)),
        ({"transfer": "noise", "transfer_size": 60_000}, (45_000, 60_000)),
        ({"labelled": 400}, (45_000, 45_000)),
        ({"teacher_share": 0.5}, (22_500, 45_000)),
        ({"teacher_classes": ["apple", "wolf"]}, (900, 45_000)),
    ],
)
def test_what_is_learned_from_is_counted_and_checked_without_the_data(options: dict[str, Any], images: tuple[int, int]) -> None:
    task = {**CIFAR["task"], **options}
    found = of(task=task, methods=["none", "kd"])
    assert (found.teacher_images, found.student_images) == images
    if "teacher_share" in options or "teacher_classes" in options:
        assert of(task=task, methods=["dkd"]).student_images == images[1]
        with pytest.raises(UserError, match=r"^task: teacher_share and teacher_classes say what the teacher learns from, and pair has no"):
            of(task=task, methods=["none"], teacher=None)
        return
    with pytest.raises(UserError, match=r"^method dkd reads the labels of the"):
        of(task=task, methods=["dkd"])


def test_a_teacher_of_another_task_is_counted_on_its_own_images_and_runs_at_its_own_size() -> None:
    data = {"name": "shapes", "target": "class", "train": 300, "test": 30}
    task = {"name": "classification", "data": {**data, "size": 16}, "val_size": 100}
    own = {"name": "classification", "data": {**data, "train": 150, "size": 32}, "val_size": 30}
    asked: dict[str, Any] = {"task": task, "teacher": {"model": {"name": "tiny_cnn", "width": 6}, "recipe": {"epochs": 2}, "task": own}}
    found = of(**asked, students=[{"name": "tiny_cnn", "width": 4}], methods=["kd"], cache={"budget_gb": 0.0})
    assert (found.teacher_images, found.student_images) == (120, 200)
    teacher, student = found.networks
    assert found.teacher_flops == 3 * teacher.flops * 2 * 120
    (kd,) = found.methods
    assert kd.own_flops is not None
    assert kd.flops == 64 * (3 * student.flops + teacher.flops) + kd.own_flops
    assert found.not_rehearsed == ()


def test_flops_count_the_students_pass_three_times_the_teachers_where_it_runs_and_the_methods_own() -> None:
    found = of(cache={"budget_gb": 0.1})
    teacher, student = (network.flops for network in found.networks)
    methods = by_label(found)
    assert methods["none"].flops == pytest.approx(64 * 3 * student)
    assert methods["none"].own_flops == 0
    assert methods["kd"].flops == methods["none"].flops, "100 logits of four views fit the cache"
    regressor = 2 * methods["fitnet"].extra_params * 16 * 16
    assert methods["fitnet"].own_flops is not None
    assert methods["fitnet"].own_flops == pytest.approx(64 * 3 * regressor, rel=0.15)
    assert methods["fitnet"].flops == pytest.approx(64 * (3 * student + teacher) + methods["fitnet"].own_flops)


def test_a_fresh_view_each_epoch_lets_the_teacher_run_at_every_step() -> None:
    recipe = CIFAR["recipe"] | {"augment": {"flip": True}, "views": None}
    methods, teacher = by_label(of(recipe=recipe)), of().networks[0].flops
    assert methods["kd"].flops - methods["none"].flops == pytest.approx(64 * teacher)


def test_networks_that_learn_beside_the_student_cost_what_it_costs() -> None:
    found = of(methods=["none", "ffsd", {"name": "ffsd", "label": "more", "students": 4}], teacher=None)
    (student,) = found.networks
    none, two, four = found.methods
    for method, networks in ((two, 3), (four, 5)):
        assert method.own_flops is not None
        assert method.flops == pytest.approx(64 * 3 * networks * student.flops + method.own_flops)
        assert (networks - 1) * student.params < method.extra_params < (networks + 1) * student.params
    assert none.memory < two.memory < four.memory


def test_steps_and_trainings_are_those_of_the_run() -> None:
    found = of(search={"trials": 8, "top_k": 2, "confirm_seeds": 2, "also": {"recipe.lr": {"low": 0.01, "high": 1.0, "log": True}}})
    methods = by_label(found)
    assert methods["none"].steps == 10 * (45_000 // 64)
    assert {method.trainings for method in found.methods} == {8 + 2 * 2 + 3}
    assert methods["none"].searched == ("recipe.lr",)
    assert methods["fitnet"].searched == ("recipe.lr", "task_weight", "weight")
    assert by_label(of())["kd"].trainings == 3
    assert found.teacher_flops == pytest.approx(3 * found.networks[0].flops * 2 * 45_000)


def test_memory_grows_with_the_batch_the_optimizer_and_the_average_and_shrinks_with_workers() -> None:
    def gigabytes(**changes: Any) -> float:
        return by_label(of(recipe=CIFAR["recipe"] | changes, methods=["none"], runtime={"workers": workers, "address": "auto"}))[
            "none"
        ].memory

    workers = 1
    plain = gigabytes()
    activations = gigabytes(batch_size=128) - plain
    assert gigabytes(optimizer="adamw") - plain == pytest.approx(4 * 83_892, rel=0.01)
    assert gigabytes(ema=0.9) - plain == pytest.approx(4 * 83_892)
    assert gigabytes(precision="bf16") == pytest.approx(plain - activations / 2)
    workers = 2
    assert gigabytes() == pytest.approx(plain - activations / 2)
    # Of one image: what the three stages of 16x32x32, 32x16x16 and 64x8x8 numbers keep for their backward passes, a few times each.
    assert 5 < activations / 64 / 4 / (16 * 32 * 32 + 32 * 16 * 16 + 64 * 8 * 8) < 30


def test_small_networks_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "TIMED_FLOPS", 1e9)
    found = of(methods=["none", "fitnet"])
    assert all(method.step_seconds is not None and method.step_seconds > 0 for method in found.methods)
    assert "timed here on noise" in dry_run_page(found)


def test_what_can_not_work_anywhere_is_an_error() -> None:
    with pytest.raises(UserError, match="can't be cut into 3 equal parts"):
        of(runtime={"workers": 3, "address": "auto"})
    with pytest.raises(UserError, match="val_size 50000 is 50000 of the 50000 training images of data 'cifar100'"):
        of(task=CIFAR["task"] | {"val_size": 50_000})
    with pytest.raises(UserError, match="there is no tap"):
        of(methods=[{"name": "fitnet", "student_taps": ["stage:9"]}])


LACKING: list[tuple[dict[str, Any], str]] = [
    ({"teacher": {"model": "resnet8x4", "weights": "gone.safetensors"}}, "teacher.weights: there is no file gone.safetensors"),
    ({"teacher": {"model": {"name": "resnet8x4", "weights": "gone.safetensors"}}}, "teacher.model.weights: there is no file"),
    ({"students": [{"name": "cifar_resnet8", "weights": "gone.safetensors"}]}, "students: weights: there is no file gone.safetensors"),
    ({"runtime": {"gpus_per_worker": 1000}}, "runtime.gpus_per_worker: 1 workers need 1000 GPUs"),
    ({"task": {"name": "classification", "data": "imagenet"}}, "data imagenet: no train and val below data"),
]


@pytest.mark.parametrize(("changes", "said"), LACKING, ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "")
def test_what_this_machine_lacks_is_an_error_and_with_a_cluster_a_note(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        of(**changes)
    found = of(**changes | {"runtime": {"address": "auto", **changes.get("runtime", {})}}, methods=["none"])
    assert any(note.startswith(said) for note in found.notes) or "runtime" in changes


def test_weights_of_another_network_are_an_error_with_and_without_a_cluster() -> None:
    save_weights(
        build_model(ModelSpec(name="tiny_cnn"), num_classes=100, in_channels=3, image_size=32, mean=(0.5,), std=(0.5,)).state_dict(),
        Path("w.safetensors"),
    )
    for runtime in ({}, {"address": "auto"}):
        with pytest.raises(UserError, match=r"weights w\.safetensors do not fit model 'resnet8x4': .* is missing"):
            of(teacher={"model": "resnet8x4", "weights": "w.safetensors"}, runtime=runtime)


def test_data_that_may_not_be_downloaded_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDBENCH_OFFLINE", "1")
    with pytest.raises(UserError, match="data cifar100: it is in none of"):
        of()
    assert of(runtime={"address": "auto"}, methods=["none"]).seconds is None


def test_hours_are_those_of_all_steps_and_validations_shared_by_the_slots_after_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "_image_seconds", lambda network, recipe, trained, device: 1e-3 if trained else 1e-4)
    monkeypatch.setattr(step_times, "needs_ray", lambda *_: True)
    monkeypatch.setattr(step_times, "nodes_of", lambda _: [{"CPU": 2, "GPU": 0}])
    found = of(methods=["none", "kd"], recipe=CIFAR["recipe"] | {"augment": {"flip": True}, "views": None})
    none, kd = found.methods
    assert found.slots == 2
    validation = 10 * 5000 * 1e-3 / 3
    assert none.total_seconds == pytest.approx(3 * (10 * (45_000 // 64) * 64 * 1e-3 + validation))
    assert kd.step_seconds == pytest.approx(64 * (1e-3 + 1e-4) + 64 * 1e-3 * kd.own_flops / 64 / (3 * found.networks[1].flops))
    assert found.teacher_seconds == pytest.approx(2 * (45_000 // 64) * 64 * 1e-3 + 2 * 5000 * 1e-3 / 3)
    assert found.seconds == pytest.approx(found.teacher_seconds + (none.total_seconds + kd.total_seconds) / 2)
    assert of(methods=["none"], runtime={"address": "auto"}).seconds is None


def test_a_network_of_more_than_thirty_million_parameters_is_neither_rehearsed_nor_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlines, "REAL_PARAMETERS", 1_000_000)
    found = of(task={"name": "classification", "data": "fashion_mnist"})
    assert found.not_rehearsed == ("teacher 'resnet8x4' (more than 1,000,000 parameters)",)
    assert found.seconds is None
    page = dry_run_page(found)
    assert "not rehearsed: teacher 'resnet8x4' (more than 1,000,000 parameters)" in page
    assert "No hours" in page


def test_pretrained_weights_are_not_fetched_but_their_input_size_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    made: list[bool] = []
    create = timm.create_model

    def noting(*args: Any, **keys: Any) -> Any:
        made.append(keys["pretrained"])
        return create(*args, **keys)

    monkeypatch.setattr(timm, "create_model", noting)
    with without_weights(), torch.device("meta"):
        spec = ModelSpec(name="vit_tiny_patch16_224", pretrained=True)
        model: Any = build_model(spec, num_classes=10, in_channels=3, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert made == [False]
    assert model.input_spec.size == 224


def test_a_teacher_with_pretrained_weights_needs_a_pretrained_model() -> None:
    with pytest.raises(ValueError, match="weights: pretrained needs a pretrained model"):
        Experiment.model_validate(CIFAR | {"teacher": {"model": "resnet8x4", "weights": "pretrained"}})
    teacher = {"model": {"name": "resnet18", "pretrained": True}, "weights": "pretrained"}
    found = of(teacher=teacher, methods=["none"])
    assert found.networks[0].fact == "timm's weights, fetched when they are needed"
    assert found.teacher_flops == 0


def test_the_page_has_a_line_for_every_method_and_what_is_missing() -> None:
    lines = dry_run_page(of()).splitlines()
    rows = {words[0]: words for line in lines if (words := line.split())}
    assert rows["fitnet"][2:4] == ["stage:1", "4,480"]
    assert rows["9"][1] == "trainings,"
    assert any(line.startswith("data cifar100: it is in none of") for line in lines)
    assert any(" hours on this machine, 1 at once after " in line for line in lines)
    assert "not rehearsed: student 'cifar_resnet8' (data cifar100 is not here)" in lines


@pytest.mark.parametrize(
    ("task", "model", "images"),
    [
        ({"name": "detection", "data": {"name": "coco", "path": "nowhere", "size": 64}}, "tiny_fcos", 98_573),
        ({"name": "detection", "data": {"name": "coco", "path": "nowhere", "size": [64, 96], "target": "masks"}}, "tiny_fcos", 98_573),
        ({"name": "detection", "data": {"name": "voc", "path": "nowhere", "size": 64}}, "tiny_fcos", 4_764),
        ({"name": "segmentation", "data": {"name": "voc", "path": "nowhere", "size": 32, "target": "segmentation"}}, "tiny_fcn", 1_220),
    ],
)
def test_detection_and_segmentation_are_looked_at_without_their_data(task: dict[str, Any], model: str, images: int) -> None:
    student = {"name": model, "width": 4, "label": "small"}
    found = of(task=task, teacher={"model": model}, students=[student], methods=["none", "kd", "fitnet"], runtime={"address": "auto"})
    assert found.student_images == images
    assert "there is no folder nowhere" in found.notes[0]
    assert {method.label for method in found.methods} == {"none", "kd", "fitnet"}
    with pytest.raises(UserError, match="there is no folder nowhere; get "):
        of(task=task, teacher={"model": model}, students=[student], methods=["none"])
