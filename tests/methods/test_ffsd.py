"""FFSD: networks that learn together. What each of them learns from, what it does not move, and that a training of all can be continued."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Progress
from kdbench.methods.build import MethodSpec, build_method, fitted, params_of
from kdbench.methods.ffsd import FFSD, Mixing, Upsampler, direction_loss, diversity_loss, other_places, redirected
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.models.taps import Taps, tap_shapes
from kdbench.tasks.base import TaskInfo
from kdbench.training.assembly import assemble
from kdbench.training.loop import fit, train_epoch
from kdbench.training.session import LocalSession
from tests.tolerances import rounding
from tests.training.units import killed_and_continued, layout, unit

IMAGE, CLASSES = (1, 16, 16), 4
AT = Progress(epoch=1.0, step=5, total_steps=10)
STUDENT = {"name": "tiny_cnn", "width": 4}


class Net(nn.Module):
    """Three resolutions, each half of the one before, and a head."""

    stage_modules = ("first", "second", "third")

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(d, 2 * d, 3, 2, padding=1) for d in (1, 2, 4))
        self.head = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.gelu(self.third(F.gelu(self.second(F.gelu(self.first(images)))))).mean((2, 3)))


class AtWork:
    """The method, its leader and its students, all in float64, and a batch."""

    def __init__(self, samples: int = 3, classes: int = CLASSES, **params: Any) -> None:
        torch.manual_seed(0)
        self.leader = Net(classes).double()
        seen = tap_shapes(self.leader, IMAGE)
        method = fitted(MethodSpec.model_validate({"name": "ffsd", "diversity_weight": 1.0, **params}), seen, None)
        method.build(seen, None, TaskInfo("classification", classes, IMAGE))
        assert isinstance(method, FFSD)
        self.method = method.double()
        self.students = [Net(classes).double() for _ in range(method.peer_count)]
        self.batch = Batch(torch.rand(samples, *IMAGE).double(), torch.arange(samples) % classes, torch.arange(samples))

    @property
    def outputs(self) -> Outputs:
        leader, *peers = (Taps(network, self.method.student_taps)(self.batch.inputs) for network in (self.leader, *self.students))
        leader.peers = tuple(peers)
        return leader

    @property
    def terms(self) -> dict[str, Tensor]:
        return self.method(self.outputs, None, self.batch, AT)

    def networks(self) -> dict[str, nn.Module]:
        """Whose losses are called how, and what they train."""
        method = self.method
        return {
            **{f"student{k}_": student for k, student in enumerate(self.students)},
            **{f"upsampler{k + 1}_": upsampler for k, upsampler in enumerate(method.upsamplers)},
            "fusion_": nn.ModuleList([method.fusion, method.fusion_head]),
            "leader_upsampler_": method.leader_upsampler,
            "leader_": nn.ModuleList([self.leader, method.trans_fusion]),
        }


def narrowed(outputs: Outputs, dtype: torch.dtype, scale: float = 1.0) -> Outputs:
    """As another precision would have given it: leaves that take gradients."""
    maps = {name: value.detach().to(dtype).requires_grad_() for name, value in outputs.maps.items()}
    logits = (scale * outputs.logits.detach()).to(dtype).requires_grad_()
    return Outputs(logits, maps, tuple(narrowed(peer, dtype, scale) for peer in outputs.peers))


def leaves(outputs: Outputs) -> list[Tensor]:
    return [outputs.logits, *outputs.maps.values(), *(leaf for peer in outputs.peers for leaf in leaves(peer))]


# --- the losses ------------------------------------------------------------------------------------------------------


def test_other_places_are_those_that_one_student_attends_to_least() -> None:
    features = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64).sqrt().reshape(1, 1, 2, 2)
    length = math.sqrt(14)
    wanted = [length / 2, *(length - value / length for value in (1, 2, 3))]
    torch.testing.assert_close(other_places(features), torch.tensor([wanted], dtype=torch.float64))


def test_what_is_redirected_has_moved_by_what_attention_lacks() -> None:
    features = torch.rand(2, 3, 4, 4).double()
    seen = features.square().mean(1).flatten(1)
    lacking = other_places(features) - F.normalize(seen, dim=1)
    moved = (redirected(features) - features).flatten(2)
    for channel in moved.unbind(1):
        torch.testing.assert_close(channel, lacking * seen.norm(dim=1, keepdim=True) / 3)


def test_the_direction_of_equal_maps_differs_by_nothing_and_of_opposite_ones_by_four() -> None:
    features = torch.randn(2, 3, 4, 4).double()
    # A length is a root of 48 squares. Each number of either direction is off by as much, relatively; their squares add up to 1.
    assert direction_loss(features, 5 * features) < (2 * rounding(torch.float64, 48 + 4)) ** 2 / 48
    torch.testing.assert_close(direction_loss(features, -features), torch.tensor(4 / 48).double())


def test_gradients_of_the_losses_are_right() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(2, 3, 3, 3).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: diversity_loss(x, second), first)
    assert torch.autograd.gradcheck(direction_loss, (first, second))


def test_the_other_student_gets_no_gradient_from_diversity() -> None:
    student, other = (torch.rand(2, 3, 3, 3).requires_grad_() for _ in range(2))
    diversity_loss(student, other).backward()
    assert student.grad is not None
    assert other.grad is None


# --- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[16, 8, 4], [14, 7, 4], [9, 9, 3], [7, 4]])
def test_an_upsampler_gives_the_shallower_stages_shapes(sizes: list[int]) -> None:
    shapes = [(2 + position, size, size) for position, size in enumerate(sizes)]
    guesses = Upsampler(shapes)(torch.rand(2, *shapes[-1]))
    assert [guess.shape for guess in guesses] == [(2, *shape) for shape in shapes[:-1]]


def test_a_target_of_an_upsampler_reads_running_statistics_and_leaves_them() -> None:
    upsampler = Upsampler([(2, 8, 8), (4, 4, 4)])
    last = torch.rand(3, 4, 4, 4)
    before = {name: value.clone() for name, value in upsampler.state_dict().items()}
    (settled,) = upsampler.settled(last)
    assert upsampler.training
    assert upsampler.norms[0].training
    assert not settled.requires_grad
    assert all(torch.equal(before[name], value) for name, value in upsampler.state_dict().items())
    torch.testing.assert_close(settled, upsampler.eval()(last)[0].detach())
    assert (settled - upsampler.train()(last)[0]).abs().max() > 0.1


@pytest.mark.parametrize("students", [2, 3])
def test_no_gradient_passes_from_one_networks_losses_into_another(students: int) -> None:
    work = AtWork(students=students)
    terms, networks = work.terms, work.networks()
    losses: dict[str, Tensor] = {}
    for name, term in terms.items():
        owner = next(begin for begin in sorted(networks, key=len, reverse=True) if name.startswith(begin))
        losses[owner] = losses.get(owner, torch.zeros(())) + term
    assert losses.keys() == networks.keys()
    for owner, loss in losses.items():
        for name, network in networks.items():
            grads = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
            if name == owner:
                assert all(grad is not None and grad.isfinite().all() for grad in grads), owner
                assert any(grad is not None and grad.count_nonzero() for grad in grads), owner
            else:
                assert all(grad is None for grad in grads), f"{owner} moves {name}"


def test_students_that_agree_have_no_mutual_loss() -> None:
    work = AtWork()
    work.students[1].load_state_dict(work.students[0].state_dict())
    terms = work.terms
    logits = work.outputs.peers[0].logits
    off = rounding(torch.float64, CLASSES + 6, work.method.params.temperature**2 * logits.log_softmax(1).abs().max().item())
    assert abs(terms["student0_mutual"].item()) < off
    assert terms["student1_diversity"] > 0


def test_task_weight_is_of_the_labels_of_every_network() -> None:
    ones, zeros = AtWork().terms, AtWork(task_weight=0.0).terms
    labels = {name for name in ones if name.endswith("_labels")}
    assert labels == {"student0_labels", "student1_labels", "fusion_labels"}
    assert all(zeros[name] == 0 if name in labels else torch.equal(zeros[name], ones[name]) for name in ones)


def test_soft_labels_that_name_one_class_are_that_label() -> None:
    hard = AtWork().terms
    work = AtWork()
    work.batch = replace(work.batch, target=F.one_hot(work.batch.target, CLASSES).float())
    soft = work.terms
    for name, value in hard.items():
        torch.testing.assert_close(soft[name], value)


def test_its_weights_rise_over_the_warm_up() -> None:
    method = build_method(MethodSpec.model_validate({"name": "ffsd", "warmup_share": 0.5}), None)
    assert isinstance(method, FFSD)
    strengths = [method.strength(Progress(step / 10, step, 10)) for step in (0, 2, 5, 9)]
    assert strengths == pytest.approx([math.exp(-5), math.exp(-1.8), 1, 1])
    assert method.warmup_epochs(300) == 150


@pytest.mark.parametrize(("samples", "classes"), [(1, CLASSES), (3, 2), (1, 2)])
def test_one_sample_and_two_classes_are_enough(samples: int, classes: int) -> None:
    work = AtWork(samples, classes)
    total = torch.stack(list(work.terms.values())).sum()
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for network in work.networks().values() for p in network.parameters())


@pytest.mark.parametrize("temperature", [0.05, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_large_logits_stay_finite(dtype: torch.dtype, temperature: float) -> None:
    work = AtWork(temperature=temperature)
    outputs = narrowed(work.outputs, dtype, scale=1e3)
    terms = work.method.float()(outputs, None, work.batch, AT)
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(outputs) if leaf.grad is not None)


def test_maps_without_any_activity_stay_finite() -> None:
    work = AtWork()
    outputs = narrowed(work.outputs, torch.float32)
    for seen in (outputs, *outputs.peers):
        seen.maps = {name: torch.zeros_like(value, requires_grad=True) for name, value in seen.maps.items()}
    terms = work.method.float()(outputs, None, work.batch, AT)
    torch.stack(list(terms.values())).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(outputs) if leaf.grad is not None)


# --- what is refused -------------------------------------------------------------------------------------------------


def shapes(*taps: TapShape, prediction: tuple[int, ...] = (CLASSES,)) -> Shapes:
    return Shapes(prediction, {f"stage:{position}": tap for position, tap in enumerate(taps)})


def test_one_student_is_refused() -> None:
    with pytest.raises(UserError, match=r"students.*greater than or equal to 2") as error:
        params_of(MethodSpec.model_validate({"name": "ffsd", "students": 1}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (shapes(TapShape("map", (2, 4, 4)), TapShape("map", (4, 1, 2))), r"'stage:1' into thirds.*\[4, 1, 2\].*nearer to the image"),
        (shapes(TapShape("map", (2, 9, 9)), TapShape("map", (4, 4, 4))), r"map \[2, 9, 9\] is no whole number of times.*\[4, 4, 4\]"),
        (shapes(TapShape("map", (2, 4, 4))), "two stages or more"),
        (shapes(TapShape("map", (2, 4, 4)), TapShape("vector", (4,))), "can't read the student's 'stage:1': a vector"),
        (shapes(TapShape("map", (2, 8, 8)), TapShape("map", (2, 4, 4)), prediction=(1,)), "at least two classes"),
    ],
    ids=["two-positions", "sizes", "one-stage", "vector", "one-class"],
)
def test_a_student_that_it_can_not_work_on_is_refused(student: Shapes, message: str) -> None:
    method = fitted(MethodSpec(name="ffsd"), student, None)
    with pytest.raises(UserError, match=f"method ffsd.*{message}") as error:
        method.build(student, None, TaskInfo("classification", CLASSES, IMAGE))
    assert "\n" not in str(error.value)


def test_a_tap_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no tap 'stage:8'; did you mean 'stage:2'"):
        fitted(MethodSpec.model_validate({"name": "ffsd", "student_taps": ["stage:0", "stage:8"]}), tap_shapes(Net(), IMAGE), None)


# --- a training ------------------------------------------------------------------------------------------------------


def a_training(method: str | dict[str, Any] = "ffsd", **changes: Any) -> Any:
    return unit(method, student=STUDENT, **changes)


def test_students_begin_differently_and_the_leader_as_without_a_method() -> None:
    alone, run = (assemble(a_training(method), LocalSession()) for method in ("none", {"name": "ffsd", "students": 3}))
    leader, *peers = (network.state_dict()["layer1.0.weight"] for network in (run.distiller.student, *run.distiller.peers))
    assert torch.equal(leader, alone.distiller.student.state_dict()["layer1.0.weight"])
    assert len(peers) == 3
    assert not any(torch.equal(one, other) for one in (leader, *peers) for other in peers if one is not other)


def test_each_part_learns_with_its_own_optimizer_at_the_schedules_share_of_its_rate() -> None:
    run = assemble(a_training({"name": "ffsd", "upsampler_lr": 0.004}, recipe={"epochs": 1, "schedule": "linear"}), LocalSession())
    train_epoch(run, 0)
    rest, fusion, upsamplers = run.optimizers
    factor = 1 / run.loader.steps_per_epoch  # of the last step
    assert isinstance(rest, torch.optim.SGD)
    assert isinstance(fusion, torch.optim.SGD)
    assert isinstance(upsamplers, torch.optim.Adam)
    groups = [optimizer.param_groups[0] for optimizer in run.optimizers]
    assert [group["weight_decay"] for group in groups] == [5e-4, 1e-5, 0.0]
    assert [group["lr"] for group in groups] == pytest.approx([0.1 * factor, 0.1 * factor, 0.004 * factor])
    ours = [parameter for group in groups for parameter in group["params"]]
    assert len(ours) == len({id(p) for p in ours}) == len(list(run.distiller.parameters()))
    method = run.distiller.method
    assert isinstance(method, FFSD)
    assert {*groups[1]["params"]} == {*method.fusion.parameters(), *method.fusion_head.parameters()}
    assert isinstance(method.trans_fusion, Mixing)
    assert {*method.trans_fusion.parameters()} <= {*groups[0]["params"]}


@pytest.mark.parametrize("recipe", [{"precision": "bf16"}, {"precision": "fp16", "clip_grad": 1.0}, {"precision": "fp64", "accumulate": 2}])
def test_it_trains_in_every_precision(tmp_path: Path, recipe: dict[str, Any]) -> None:
    record = fit(a_training(recipe={"epochs": 1, **recipe}), LocalSession(), layout(tmp_path))
    assert all(math.isfinite(value) for value in record.curve[0].values())


def test_a_killed_training_with_an_average_and_micro_batches_continues_to_the_same_bits(tmp_path: Path) -> None:
    whole = a_training(recipe={"epochs": 2, "ema": 0.9, "clip_grad": 1.0, "accumulate": 2}, checkpoint_seconds=0)
    fit(whole, LocalSession(), layout(tmp_path / "whole"))
    killed_and_continued(whole, tmp_path / "continued", 7)
    one, other = (load_file(layout(tmp_path / folder).student(whole.key)) for folder in ("whole", "continued"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_what_is_kept_of_a_training_holds_every_network_and_optimizer() -> None:
    run, fresh = (assemble(a_training(recipe={"epochs": 1}, seed=seed), LocalSession()) for seed in (0, 1))
    train_epoch(run, 0)
    fresh.restore(run.state())
    assert all(torch.equal(value, fresh.distiller.state_dict()[name]) for name, value in run.distiller.state_dict().items())
    for one, other in zip(run.optimizers, fresh.optimizers, strict=True):
        ours, theirs = one.state_dict()["state"], other.state_dict()["state"]
        assert ours
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(theirs[k][key])) for k, kept in ours.items() for key, x in kept.items())


def test_in_a_combination_every_part_has_its_own_students(tmp_path: Path) -> None:
    run = assemble(a_training({"name": "ffsd+label_smoothing", "ffsd": {"students": 3}}, recipe={"epochs": 1}), LocalSession())
    assert len(run.distiller.peers) == 3
    assert len(run.optimizers) == 3
    train_epoch(run, 0)
    assert "student2_diversity" in run.terms
    assert run.sums is not None
    assert run.sums.isfinite().all()
