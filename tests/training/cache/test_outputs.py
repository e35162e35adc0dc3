"""The teacher's cached outputs: right for every sample, view and tap, whole or not there, and never another teacher's."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.data.batch import Batch
from kdbench.data.loader import Loader
from kdbench.errors import RunFailed, UserError
from kdbench.experiment import CacheOptions, TeacherRef, Unit
from kdbench.methods.base import Method, Paper, Progress
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.models.taps import probe
from kdbench.tasks.base import TaskInfo
from kdbench.tasks.build import build_task
from kdbench.training.cache import streams as cache_streams
from kdbench.training.cache.build import Builder, Plan, build_here, mend
from kdbench.training.cache.outputs import CacheSpec, TeacherCache, cached_test, open_cache
from kdbench.training.cache.streams import Shard, Stream, StreamFiles
from kdbench.training.evaluate import predict
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from kdbench.training.teacher import LiveTeacher, load_teacher, open_teacher
from tests.training.units import STUDENT, layout, saved_teacher, unit, with_cache

CPU = torch.device("cpu")
AUGMENTED = {"augment": {"crop": 2, "flip": True}, "views": 3, "epochs": 4}
TAPS = ("stage:-1", "pooled")


class Hint(Method):
    """For tests: a regression from the student's head to the teacher's last stage and pooled vector, beside the labels."""

    paper = Paper("none")
    student_taps = ("head",)
    teacher_taps = TAPS

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        assert teacher is not None
        stage, pooled = (teacher.taps[name] for name in TAPS)
        assert (stage.kind, pooled.kind) == ("map", "vector")
        self.regressor = nn.Linear(task.num_classes, stage.channels + pooled.channels)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        theirs = torch.cat([t.maps["stage:-1"].float().mean((2, 3)), t.maps["pooled"].float()], dim=1)
        return {"hint": F.mse_loss(self.regressor(s.maps["head"]), theirs)}


HINT = {"name": f"{__name__}:Hint", "label": "hint"}


@pytest.fixture
def augmented(tmp_path: Path) -> Unit:
    return unit("kd", saved_teacher(tmp_path), recipe=AUGMENTED)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_streams, "SHARD_ROWS", 64)


def teacher_of(unit_: Unit) -> TeacherRef:
    assert unit_.teacher is not None
    return unit_.teacher


def spec_of(unit_: Unit, **options: Any) -> CacheSpec:
    chosen = CacheOptions.model_validate(options)
    return CacheSpec(teacher=teacher_of(unit_), task=unit_.task, recipe=unit_.recipe, data_seed=unit_.data_seed, options=chosen)


def begun(spec: CacheSpec, folder: Path, taps: tuple[str, ...] = TAPS) -> tuple[Builder, Plan]:
    builder = Builder(spec, folder, CPU)
    plan = builder.plan([taps])
    builder.begin(plan)
    return builder, plan


def built(unit_: Unit, folder: Path, taps: tuple[str, ...] = (), **options: Any) -> TeacherCache:
    with_cache(teacher_of(unit_), unit_, folder, taps, options)
    cache = open_cache(folder, taps)
    assert cache is not None
    return cache


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shown(unit_: Unit, epochs: int) -> Iterator[Batch]:
    recipe = unit_.recipe
    loader = Loader(build_task(unit_.task).splits().transfer, 60, augment=recipe.augment, views=recipe.views, data_seed=0, order_seed=3)
    for epoch in range(epochs):
        yield from loader.batches(epoch)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_every_sample_view_and_tap_has_its_own_live_output(tmp_path: Path, augmented: Unit, precision: str) -> None:
    cache = built(augmented, tmp_path / "cache", TAPS, precision=precision)
    live = LiveTeacher(load_teacher(teacher_of(augmented), build_task(augmented.task), CPU), build_task(augmented.task), TAPS, "fp32")
    rounded = torch.float16 if precision == "fp16" else torch.float32
    seen = set()
    for batch in shown(augmented, epochs=4):
        ours, theirs = cache(batch), live(batch)
        assert ours.logits.dtype == torch.float32
        assert torch.equal(ours.logits, theirs.logits.to(rounded).float())
        assert ours.maps.keys() == theirs.maps.keys()
        for tap in TAPS:
            assert torch.equal(ours.maps[tap], theirs.maps[tap].to(rounded).float())
        seen.add(batch.view)
    assert seen == {0, 1, 2}
    rows = cache.logits.rows.reshape(3, 300, 10)
    assert not np.array_equal(rows[0], rows[1])


def test_the_cache_knows_the_shapes_that_a_probe_of_the_teacher_finds(tmp_path: Path, augmented: Unit) -> None:
    task = build_task(augmented.task)
    probed = probe(load_teacher(teacher_of(augmented), task, CPU), task.info.example, TAPS)
    assert built(augmented, tmp_path / "cache", TAPS).shapes == probed


class Tokens(nn.Module):
    """A teacher with tokens [49, 8] inside."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, 8, 4, stride=4)
        self.tokens = nn.LayerNorm(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tokens(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


def test_tokens_are_cached_as_tokens(tmp_path: Path) -> None:
    tokens = unit("kd", saved_teacher(tmp_path, model={"name": f"{__name__}:Tokens"}))
    cache = built(tokens, tmp_path / "cache", ("tokens",))
    assert cache.shapes.taps == {"tokens": TapShape("tokens", (49, 8))}
    live = LiveTeacher(load_teacher(teacher_of(tokens), build_task(tokens.task), CPU), build_task(tokens.task), ("tokens",), "fp32")
    batch = next(shown(tokens, 1))
    assert torch.equal(cache(batch).maps["tokens"], live(batch).maps["tokens"].half().float())


def test_the_test_set_is_cached_in_order(tmp_path: Path, augmented: Unit) -> None:
    built(augmented, tmp_path / "cache")
    task = build_task(augmented.task)
    expected = (
        predict(load_teacher(teacher_of(augmented), task, CPU), task.splits().test, LocalSession(device=CPU), "fp32", task, "teacher")
        .half()
        .float()
    )
    cached = cached_test(tmp_path / "cache")
    assert cached is not None
    assert torch.equal(cached, expected)


def test_a_sample_or_view_that_is_not_cached_is_an_error_and_not_a_neighbours_row(tmp_path: Path, augmented: Unit) -> None:
    cache = built(augmented, tmp_path / "cache")
    transfer = build_task(augmented.task).splits().transfer.index
    absent = next(i for i in range(int(transfer.max())) if i not in set(transfer.tolist()))
    for index, view in ((torch.tensor([absent]), 0), (transfer[:2], 3)):
        with pytest.raises(RunFailed, match=f"has no view {view} of some of these samples"):
            cache(Batch(torch.zeros(len(index), 1, 28, 28), index, index, view))


def test_numbers_that_half_precision_has_no_room_for_are_refused(tmp_path: Path, augmented: Unit) -> None:
    stream = Stream(name="logits", kind="prediction", shape=(2,), views=1, images=1, precision="fp16")
    with pytest.raises(UserError, match=r"the teacher's logits reaches 7e\+04, more than fp16 has room for; set cache.precision to fp32"):
        stream.packed(torch.tensor([[7e4, 0.0]]))
    whole = stream.model_copy(update={"precision": "fp32"})
    assert whole.unpacked(whole.packed(torch.tensor([[7e4, 0.0]])), CPU).tolist() == [[7e4, 0.0]]


# --- training with it ------------------------------------------------------------------------------------------------


def weights_of(folder: Path, of: Unit) -> Mapping[str, Tensor]:
    return load_file(layout(folder).student(of.key))


@pytest.mark.parametrize("method", ["kd", HINT], ids=["logits", "taps"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.0), ("fp16", 5e-4)])
def test_cached_and_live_teacher_give_the_same_weights(tmp_path: Path, method: Any, precision: str, tolerance: float) -> None:
    live = unit(method, saved_teacher(tmp_path), recipe={**AUGMENTED, "epochs": 4}, student={**STUDENT, "dropout": 0.1})
    taps = TAPS if method is HINT else ()
    cached = live.model_copy(update={"teacher": with_cache(teacher_of(live), live, tmp_path / "cache", taps, {"precision": precision})})
    assert cached.key == live.key
    for name, variant in (
        ("live", live),
        ("cached", cached),
        ("without", unit("none", recipe=live.recipe.model_dump(), student=live.student)),
    ):
        fit(variant, LocalSession(), layout(tmp_path / name))
    a, b = weights_of(tmp_path / "live", live), weights_of(tmp_path / "cached", live)
    without = weights_of(tmp_path / "without", unit("none", recipe=live.recipe.model_dump(), student=live.student))
    assert max((a[name] - without[name]).abs().max().item() for name in a) > 20 * max(tolerance, 1e-4)
    difference = max((a[name] - b[name]).abs().max().item() for name in a)
    assert difference <= tolerance
    assert (difference > 0) == (precision == "fp16")


def test_a_training_whose_outputs_are_cached_never_loads_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught = unit(HINT, saved_teacher(tmp_path))
    cached = taught.model_copy(update={"teacher": with_cache(teacher_of(taught), taught, tmp_path / "cache", TAPS)})
    monkeypatch.setattr("kdbench.training.teacher.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    assert fit(cached, LocalSession(), layout(tmp_path)).agreement is not None
    teacher_of(cached).weights.unlink()
    fit(cached, LocalSession(), layout(tmp_path))


@pytest.mark.parametrize(
    ("changes", "cached"),
    [
        ({}, True),
        ({"views": 2}, True),
        ({"lr": 9.0}, True),
        ({"views": 4}, False),
        ({"views": None}, False),
        ({"augment": {"crop": 1, "flip": True}}, False),
        ({"augment": {}}, False),
    ],
)
def test_a_training_that_sees_other_views_than_the_cache_holds_has_the_live_teacher(
    tmp_path: Path, augmented: Unit, changes: dict[str, Any], cached: bool
) -> None:
    """A search may vary the recipe."""
    ref = with_cache(teacher_of(augmented), augmented, tmp_path / "cache")
    recipe = type(augmented.recipe).model_validate({**augmented.recipe.model_dump(), **changes})
    task = build_task(augmented.task)
    assert isinstance(open_teacher(ref, task, (), CPU, recipe, 0), TeacherCache) == cached
    assert isinstance(open_teacher(ref, task, (), CPU, recipe, 1), LiveTeacher)
    assert isinstance(open_teacher(ref, task, ("stage:0",), CPU, augmented.recipe, 0), LiveTeacher)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_the_key_follows_all_that_decides_the_outputs(augmented: Unit) -> None:
    def other(teacher: dict[str, Any] | None = None, recipe: dict[str, Any] | None = None, **changes: Any) -> str:
        return (
            spec_of(augmented)
            .model_copy(
                update={
                    "teacher": teacher_of(augmented).model_copy(update=teacher or {}),
                    "recipe": type(augmented.recipe).model_validate({**augmented.recipe.model_dump(), **(recipe or {})}),
                    **changes,
                }
            )
            .key
        )

    base = spec_of(augmented).key
    others = [
        other({"sha": "other"}),
        other({"precision": "bf16"}),
        other({"memory_format": "channels_last"}),
        other({"model": ModelSpec.model_validate({"name": "tiny_cnn", "width": 8, "stride": 2})}),  # the same tensors, other outputs
        other(recipe={"views": 4}),
        other(recipe={"augment": {"crop": 1, "flip": True}}),
        other(data_seed=1),
        other(task=augmented.task.model_copy(update={"transfer_size": 200})),
        other(options=CacheOptions(precision="fp32")),
        other(options=CacheOptions(top_k=3)),
        other(options=CacheOptions(top_k="auto")),
    ]
    assert len({base, *others}) == 1 + len(others)
    same = [
        other(
            {"weights": Path("elsewhere"), "metric": 1.0, "model": ModelSpec.model_validate({"name": "tiny_cnn", "width": 8, "label": "t"})}
        ),
        other(recipe={"lr": 9.0, "epochs": 70}),
        other(options=CacheOptions(budget_gb=1.0)),
    ]
    assert set(same) == {base}


# --- the building ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("batches", [1, 4, 9, 20])
def test_a_build_that_breaks_off_goes_on_at_the_first_missing_shard(
    tmp_path: Path, augmented: Unit, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    spec, folder = spec_of(augmented), tmp_path / "cache"
    builder, plan = begun(spec, folder)
    writing = build_here(builder, plan)
    done = [next(writing) for _ in range(batches)]
    writing.close()
    assert open_cache(folder) is None
    assert mend(folder) == []
    again, rest = begun(spec, folder)
    assert rest.images == plan.images - sum(done[:-1])  # a batch fills a shard here, and the last one was not finished
    assert sum(build_here(again, rest)) == rest.images
    again.finish(rest)
    built(augmented, tmp_path / "whole", TAPS)
    assert content(folder) == content(tmp_path / "whole")


def build_and_die(spec: CacheSpec, folder: Path, call: int) -> None:
    """In a process of its own: killed after half of the `call`-th write."""
    calls, write = 0, os.pwrite

    def dying(file: int, data: memoryview, position: int) -> int:
        nonlocal calls
        calls += 1
        if calls == call:
            write(file, data[: len(data) // 2], position)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data, position)

    os.pwrite = dying  # type: ignore[assignment]
    builder, plan = begun(spec, folder)
    for _ in build_here(builder, plan):
        pass


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("call", [1, 20, 60])
def test_a_build_killed_in_the_middle_of_a_write_goes_on_to_the_same_bytes(tmp_path: Path, augmented: Unit, call: int) -> None:
    spec, folder = spec_of(augmented), tmp_path / "cache"
    build_task(spec.task)  # before the fork, or the child would read the data anew
    child = os.fork()
    if child == 0:
        try:
            build_and_die(spec, folder, call)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert open_cache(folder) is None
    assert mend(folder) == []
    builder, plan = begun(spec, folder)
    assert plan.images < 900 + 2000 or call == 1
    for _ in build_here(builder, plan):
        pass
    builder.finish(plan)
    built(augmented, tmp_path / "whole", TAPS)
    assert content(folder) == content(tmp_path / "whole")


def test_a_tap_that_is_added_later_leaves_the_other_streams_alone(tmp_path: Path, augmented: Unit) -> None:
    folder = tmp_path / "cache"
    built(augmented, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert open_cache(folder, TAPS) is None
    _, plan = begun(spec_of(augmented), folder, TAPS)
    assert {name for piece in plan.pieces for name in piece.streams} == {"tap stage:-1", "tap pooled"}
    assert plan.images == 900
    assert open_cache(folder, TAPS) is None  # begun, not written
    built(augmented, folder, TAPS)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    built(augmented, tmp_path / "at once", TAPS)
    assert content(folder) == content(tmp_path / "at once")


@pytest.mark.usefixtures("small_shards")
def test_pieces_written_in_any_order_by_several_builders_are_the_bytes_of_one(tmp_path: Path, augmented: Unit) -> None:
    spec, folder = spec_of(augmented), tmp_path / "cache"
    one, plan = begun(spec, folder)
    other = Builder(CacheSpec.model_validate_json(spec.model_dump_json()), folder, CPU)
    for number, piece in enumerate(reversed(plan.pieces)):
        assert sum((one, other)[number % 2].write(piece)) == piece.images
    one.finish(plan)
    built(augmented, tmp_path / "serial", TAPS)
    assert content(folder) == content(tmp_path / "serial")


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [("logits.npy", 500), ("logits.npy", 10), ("logits.json", 5), ("entry.json", 0), ("index.npy", 200)]
)
def test_a_damaged_cache_is_named(tmp_path: Path, augmented: Unit, name: str, size: int) -> None:
    folder = tmp_path / "cache"
    built(augmented, folder)
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RunFailed, match=f"teacher cache {folder} is damaged .*the next run mends it"):
        open_cache(folder)
    assert mend(folder) == ["entry.json" if name in ("entry.json", "index.npy") else "logits"]
    assert open_cache(folder) is None
    assert mend(folder) == []
    built(augmented, folder)


@pytest.mark.usefixtures("small_shards")
def test_of_a_shard_with_other_bytes_that_one_alone_is_written_again(tmp_path: Path, augmented: Unit) -> None:
    folder = tmp_path / "cache"
    built(augmented, folder, TAPS)
    whole = content(folder)
    files = StreamFiles(folder, "tap pooled")
    data = bytearray(files.data.read_bytes())
    data[-1] ^= 1
    files.data.write_bytes(data)
    assert StreamFiles(folder, "logits").broken_shards() == []
    broken = files.broken_shards()
    assert broken == [Shard(14, 2, 256, 300)]
    files.discard(broken)
    assert open_cache(folder, TAPS) is None
    assert open_cache(folder) is not None
    _, plan = begun(spec_of(augmented), folder)
    assert [(piece.shard, piece.streams) for piece in plan.pieces] == [(broken[0], ("tap pooled",))]
    built(augmented, folder, TAPS)
    assert content(folder) == whole


# --- budget ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_the_budget_stays_live_the_largest_first(tmp_path: Path, augmented: Unit) -> None:
    sets = [("stage:0",), ("stage:-1", "pooled"), ("pooled",), ()]
    rows, test = 3 * 300, 2000
    task = build_task(augmented.task)
    shapes = probe(load_teacher(teacher_of(augmented), task, CPU), task.info.example, ("stage:0", "stage:-1", "pooled"))
    size = {tap: 2 * rows * int(np.prod(shape.shape)) for tap, shape in shapes.taps.items()}
    base = 2 * 10 * (rows + test)

    def plan(budget: int) -> Plan:
        return Builder(spec_of(augmented, budget_gb=budget / 1e9), tmp_path / "cache", CPU).plan(sets)

    assert size["pooled"] < size["stage:-1"] < size["stage:0"]
    everything = base + sum(size.values())
    assert plan(everything).too_big == {}
    assert plan(everything).nbytes == everything
    less = plan(everything - 1)
    assert less.too_big == {("stage:0",): everything}
    assert less.nbytes == everything - size["stage:0"]
    assert {stream.name for stream in less.streams} == {"logits", "test", "tap pooled", "tap stage:-1"}
    assert plan(base + size["pooled"]).too_big.keys() == {("stage:-1", "pooled"), ("stage:0",)}
    nothing = plan(base - 1)
    assert (nothing.too_big, nothing.streams, nothing.pieces) == ({(): base}, (), ())


def test_what_is_there_already_is_used_though_the_budget_became_smaller(tmp_path: Path, augmented: Unit) -> None:
    folder = tmp_path / "cache"
    built(augmented, folder, TAPS)
    plan = Builder(spec_of(augmented, budget_gb=0), folder, CPU).plan([TAPS])
    assert (plan.pieces, plan.too_big) == ((), {})


@pytest.mark.parametrize("parts", [{"a": (3,)}, {"a": (-5,), "b": (10,)}, {"a": (10**18,)}, {}, {"a": (0,), "b": (5,)}])
def test_parts_that_do_not_fill_a_row_are_no_stream(parts: dict[str, tuple[int, ...]]) -> None:
    facts = {"name": "logits", "kind": "prediction", "shape": (5,), "views": 1, "images": 1, "precision": "fp16"}
    with pytest.raises(ValidationError, match=r"the parts do not fill a row of the shape \[5\]"):
        Stream(**facts, parts=parts)
    assert Stream(**facts, parts={"a": (2, 2), "b": ()}).shape == (5,)
