"""The command at a size that takes seconds, and the loop by hand that kdbench's is measured against."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import loop
from benchmarks.images import random_images
from benchmarks.minimal_loop import MinimalLoop, Settings, augmented, from_arrays
from benchmarks.part import Bench
from benchmarks.report import Row
from benchmarks.timing import Sample


@pytest.mark.slow
def test_a_part_is_measured_and_written_at_a_size_of_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "METHODS", {"kd": "kd"})
    assert command.main(["--quick", "--only", "a", "--seconds", "0.1", "--output", str(tmp_path)]) == 0
    (part,) = json.loads((tmp_path / "bench.json").read_text())
    assert [row["what"].split(":")[0] for row in part["rows"]] == ["loop with kd", "data path alone"]
    assert all(len(row["value"]["values"]) >= 3 and row["median"] > 0 for row in part["rows"])
    assert part["command"] == f"python -m benchmarks --quick --only a --seconds 0.1 --output {tmp_path}"


def test_a_part_that_breaks_keeps_what_it_had_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(bench: Bench) -> Iterator[Row]:
        yield Row("before", Sample((1.0,)))
        raise ValueError("boom")

    def sound(bench: Bench) -> Iterator[Row]:
        yield Row("seconds", Sample((bench.seconds,)))

    modules = {"benchmarks.loop": breaking, "benchmarks.memory": sound}
    monkeypatch.setattr(command.importlib, "import_module", lambda name: type("Module", (), {"measure": staticmethod(modules[name])}))
    assert command.main(["--only", "a,f", "--seconds", "17", "--output", str(tmp_path)]) == 1
    broken, whole = json.loads((tmp_path / "bench.json").read_text())
    assert [row["what"] for row in broken["rows"]] == ["before", "the rest of this part"]
    assert "ValueError: boom" in broken["rows"][1]["note"]
    parts = command.PARTS
    assert whole["rows"][0]["median"] == pytest.approx(17 * parts["f"].usual / (parts["a"].usual + parts["f"].usual))


def test_an_unknown_part_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", "a,z"])
    assert "there is no part 'z'; there is: a, b, c, d" in capsys.readouterr().err


def test_what_is_measured_only_when_asked_for_is_no_part_of_a_whole_run() -> None:
    assert "methods" not in command._parser().parse_args([]).only
    assert command._parser().parse_args(["--only", "methods"]).only == ["methods"]


def test_the_parts_fit_their_time() -> None:
    parts = [part for part in command.PARTS.values() if not part.asked_for]
    assert sum(part.usual for part in parts) < 20 * 60
    assert sum(part.quick for part in parts) <= 3 * 60


def test_the_loop_by_hand_knows_nothing_of_kdbench() -> None:
    for name in ("minimal_loop", "pil_images", "hand_written"):
        text = (Path(loop.__file__).parent / f"{name}.py").read_text()
        assert "import kdbench" not in text
        assert "from kdbench" not in text


def test_the_loop_by_hand_learns() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
    labels = (images.float().mean((1, 2, 3)) > 127).long()
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    run = MinimalLoop(student, images, labels, Settings((0.5,), (0.25,), batch_size=16, epochs=20, crop=0, flip=False))
    losses = [run.train_epoch() for _ in range(20)]
    assert losses[-1] < losses[0] / 2


def test_the_loop_by_hand_adds_kd_and_a_hint_as_their_formulas_say() -> None:
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    trunk, head = nn.Conv2d(1, 5, 3), nn.Linear(5, 3)

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = trunk, head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.trunk(x).mean((2, 3)))

    logits, maps = np.random.default_rng(0).normal(size=(2, 4, 3)), np.random.default_rng(1).normal(size=(2, 4, 7, 6, 6))
    regressor = nn.Conv2d(5, 7, 1)
    settings = Settings(
        (0.5,), (0.25,), batch_size=4, lr=1e-9, crop=0, flip=False, task_weight=0.2, kd_weight=0.7, temperature=3.0, hint_weight=2.0
    )
    found = MinimalLoop(Student(), images, labels, settings, from_arrays(logits, maps), (trunk, regressor)).train_epoch(view=1)

    x = (images.float() / 255 - 0.5) / 0.25
    z = head(trunk(x).mean((2, 3)))
    p, q = (torch.softmax(s / 3, 1) for s in (torch.tensor(logits[1], dtype=torch.float32), z))
    kl = 9 * (p * (p / q).log()).sum(1).mean()
    hint = (regressor(trunk(x)) - torch.tensor(maps[1], dtype=torch.float32)).square().mean()
    expected = 0.2 * nn.functional.cross_entropy(z, labels) + 0.7 * kl + 2 * hint
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_augmenting_by_hand_shifts_and_mirrors_whole_images() -> None:
    image = torch.arange(1, 17, dtype=torch.uint8).reshape(1, 1, 4, 4).expand(200, 1, 4, 4)
    seen = {tuple(one.flatten().tolist()) for one in augmented(image, crop=1, flip=True)}
    padded = nn.functional.pad(image[:1], (1,) * 4)
    windows = [padded[:, :, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    assert seen == {tuple(view.flatten().tolist()) for window in windows for view in (window, window.flip(3))}


def test_random_images_have_their_size_and_every_class() -> None:
    source = random_images(train=50, test=10, size=12, channels=2, classes=7)
    assert source.image_shape == (2, 12, 12)
    assert sorted(source.train.target.unique().tolist()) == list(range(7))
    assert set(source.train.index.tolist()).isdisjoint(source.test.index.tolist())
