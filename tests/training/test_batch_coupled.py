"""Every method whose loss looks across samples: two workers give what one gives on the joined batch, gradients and memories included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.data.batch import Batch, Part
from kdbench.methods import METHODS
from kdbench.methods.base import Progress
from kdbench.methods.build import MethodSpec, fitted, method_class
from kdbench.models.outputs import Outputs
from kdbench.models.taps import Taps, probe, tap_shapes
from kdbench.tasks.base import TaskInfo
from kdbench.training.distiller import Distiller, Weights
from kdbench.training.session import LocalSession, Session
from tests.training.gloo import free_port, joined

COUPLED = sorted(name for name in METHODS if method_class(MethodSpec(name=name)).batch_coupled)
CHECKED = [*COUPLED, "ctkd"]  # which is not coupled, but has a weight of its own, with a gradient that is turned round
SMALLER = {"crd": {"negatives": 24, "dimensions": 5}, "cc": {"dimensions": 5}}
IMAGE, CLASSES, BATCH, STEPS = (1, 8, 8), 4, 6, 3
SHARES = ((3, 3), (4, 2))
CPU = torch.device("cpu")
OFF = torch.autocast("cpu", enabled=False)


class Net(nn.Module):
    """Two resolutions and a head, without batch statistics, which two workers do not share."""

    stage_modules = ("first", "second")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(IMAGE[0], width, 3, stride=2)
        self.second = nn.Conv2d(width, width + 1, 3, stride=2)
        self.head = nn.Linear(width + 1, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.gelu(self.second(F.gelu(self.first(images)))).mean((2, 3)))


class Labels:
    """The part of a task that a distiller asks for."""

    name = "labels"
    batch_coupled = False

    def inputs_for(self, role: str, inputs: Tensor) -> Tensor:
        return inputs

    def truth(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def learned_by(self, network: nn.Module) -> Any:
        return self

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"cross_entropy": F.cross_entropy(outputs.logits, batch.labels)}


def distiller(name: str, samples: Part) -> tuple[Distiller, Taps]:
    """What `training.assembly.assemble` makes of a method and a pair: the same in every process."""
    torch.manual_seed(0)
    student, teacher = Net(3).double(), Net(5).double().requires_grad_(False)
    spec = MethodSpec.model_validate({"name": name, **SMALLER.get(name, {})})
    method = fitted(spec, tap_shapes(student, IMAGE), tap_shapes(teacher, IMAGE), torch.Generator().manual_seed(1))
    shapes = probe(student, IMAGE, method.student_taps), probe(teacher, IMAGE, method.teacher_taps)
    method.build(*shapes, TaskInfo("classification", CLASSES, IMAGE))
    if method.needs_teacher_network:
        method.use_teacher(teacher, IMAGE)
    method.use_samples(samples)
    adapted = method.adapt_student(student).double()
    task: Any = Labels()
    return Distiller(adapted, method.double(), task), Taps(teacher, method.teacher_taps)


def trained(name: str, session: Session, shares: tuple[int, ...] = (BATCH,)) -> list[dict[str, Tensor]]:
    """A few steps of one method: at each, the loss terms, the gradients that the optimizer sees, and all weights and buffers after it.

    shares: how many samples of a batch each worker has.
    """
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(STEPS * BATCH, *IMAGE, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (STEPS * BATCH,), generator=generator)
    index = 10 + 7 * torch.randperm(STEPS * BATCH, generator=generator)  # positions in a source of which these are a few
    module, teacher = distiller(name, Part(images, labels, index))
    wrapped = session.prepare(module)
    known = shares if torch.distributed.is_initialized() else ()
    weights = Weights(shares[session.rank] * len(shares) / sum(shares)) if known else Weights()
    found = []
    for step in range(STEPS):
        first = step % 2 * BATCH + sum(shares[: session.rank])  # the third step sees the samples of the first again
        rows = slice(first, first + shares[session.rank])
        batch = Batch(images[rows], labels[rows], index[rows])
        terms = wrapped(batch, teacher(batch.inputs), Progress(step / STEPS, step + 1, STEPS), OFF, known, weights)
        module.zero_grad()
        terms["total"].backward()
        seen = {f"term {term}": value.detach().clone() for term, value in terms.items()}
        seen |= {f"gradient {key}": weight.grad.clone() for key, weight in module.named_parameters() if weight.grad is not None}
        with torch.no_grad():
            for weight in module.parameters():
                weight -= 0.01 * weight.grad if weight.grad is not None else 0
        found.append(seen | {f"state {key}": value.clone() for key, value in module.state_dict().items()})
    return found


def worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    with joined(rank, world, port) as session:
        found = {f"{name} {shares}": trained(name, session, shares) for name in CHECKED for shares in SHARES}
        torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Tensor]]]]:
    """What each of two processes found, for all methods at once: starting them takes longer than all that they do."""
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(worker, (2, free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_the_methods_that_compare_samples_say_so() -> None:
    assert {"dist", "sp", "rkd", "pkt", "cc", "crd", "uskd", "tf_nkd"} <= set(COUPLED)
    assert not {"none", "kd", "dkd", "nkd", "wsld", "ctkd", "logit_std"} & set(COUPLED)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("name", CHECKED)
def test_two_workers_give_what_one_gives_on_the_joined_batch(
    name: str, shares: tuple[int, ...], workers: list[dict[str, list[dict[str, Tensor]]]]
) -> None:
    for alone, *both in zip(trained(name, LocalSession(device=CPU)), *(found[f"{name} {shares}"] for found in workers), strict=True):
        assert any(key.startswith("gradient student") and value.abs().max() > 1e-6 for key, value in alone.items())
        for key, value in alone.items():
            shared = key.removeprefix("term ") in ("cross_entropy", "total") or (name not in COUPLED and key.startswith("term "))
            seen = torch.stack([found[key] for found in both])
            torch.testing.assert_close(
                seen.mean(0), value, rtol=1e-9, atol=1e-12, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}"
            )
            if not shared:
                assert torch.equal(seen[0], seen[1]), f"{key} differs between the workers"


@pytest.mark.parametrize("name", COUPLED)
def test_half_a_batch_alone_would_give_something_else(name: str) -> None:
    """Otherwise the test above would not notice a loss that forgets to join."""
    session = LocalSession(device=CPU)
    whole = trained(name, session)[0]
    session.world_size = 2
    halves = []
    for session.rank in range(2):
        halves.append(trained(name, session, (3, 3))[0])
    gradients = [key for key in whole if key.startswith("gradient student")]
    assert any(not torch.allclose((halves[0][key] + halves[1][key]) / 2, whole[key], rtol=1e-4) for key in gradients)


def test_crds_memory_moves_by_the_samples_of_all_workers(workers: list[dict[str, list[dict[str, Tensor]]]]) -> None:
    first, second, _ = (step["state method.contrasts.0.memory_student"] for step in workers[0]["crd (3, 3)"])
    assert ((first != second).any(1)).sum() == BATCH
