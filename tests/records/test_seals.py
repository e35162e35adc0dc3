"""What a finished command sealed can't go or change unnoticed, and nothing that kdbench itself does is taken for an edit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdbench.errors import UserError
from kdbench.records import seals as sealing
from kdbench.records.compaction import compact
from kdbench.records.exchange import export_results, import_results
from kdbench.records.integrity import checked_rows
from kdbench.records.record import CHECKSUM, RunRecord, row_checksum
from kdbench.records.seals import Comparison, compared_with_seals, read_seals, seal
from kdbench.records.store import ResultStore

MakeRecord = Callable[..., RunRecord]


@pytest.fixture(params=["folder", "bucket"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "results") if request.param == "folder" else str(request.getfixturevalue("bucket"))


@pytest.fixture
def sealed(make_record: MakeRecord, tmp_path: Path) -> Path:
    """Three seeds each of two methods, as `kdbench run` leaves them."""
    store = ResultStore(tmp_path / "results")
    for label in ("none", "kd"):
        for seed in range(3):
            store.append(make_record(label=label, seed=seed, unit_key=f"{label}-{seed}", params_count=1000, latency_ms_p50=2.0))
    assert seal(store, "run") == 6
    return tmp_path / "results"


def checked(location: str | Path) -> Comparison:
    store = ResultStore(location)
    return compared_with_seals(read_seals(store), list(checked_rows(store)), store.location)


def assert_clean(location: str | Path, rows: int) -> None:
    assert checked(location) == Comparison(rows, (), ())


def only_problem(location: str | Path) -> str:
    [problem] = checked(location).problems
    return problem


def file_of(results: Path, label: str, seed: int) -> Path:
    rows = [(path, pq.read_table(path, columns=["label", "seed"]).to_pylist()) for path in results.glob("v1/**/*.parquet")]
    [found] = [path for path, [row] in rows if (row["label"], row["seed"]) == (label, seed)]
    return found


def forge(path: Path, **values: Any) -> None:
    """Edit a row, and make its checksum again."""
    table = pq.read_table(path)
    [row] = table.to_pylist()
    row |= values
    row[CHECKSUM] = row_checksum(row)
    pq.write_table(pa.Table.from_pylist([row], schema=table.schema), path)


# --- what is named ---------------------------------------------------------------------------------------------------


def test_a_final_that_was_deleted_is_named_with_the_command_that_sealed_it(sealed: Path) -> None:
    assert_clean(sealed, 6)
    path = file_of(sealed, "kd", 2)
    path.unlink()

    problem = only_problem(sealed)
    assert problem.startswith(f"run {path.stem} (kd, seed 2, student cifar_resnet8) is missing: kdbench run sealed it, 20")


@pytest.mark.parametrize(
    "values", [{"label": "ours", "method": "ours"}, {"latency_ms_p50": 0.1}, {"source": "published"}, {"params_count": 10}, {"seed": 7}]
)
def test_a_row_edited_with_a_new_checksum_is_named(sealed: Path, values: dict[str, Any]) -> None:
    path = file_of(sealed, "kd", 2)
    forge(path, **values)

    problem = only_problem(sealed)
    assert problem.startswith(f"v1/classification/fashion_mnist/cifar_resnet56~cifar_resnet8/kd/{path.name}: run {path.stem} (kd, seed 2, ")
    assert "was changed after kdbench run had sealed it, 20" in problem


def test_a_row_that_got_another_run_id_is_missing_under_its_own(sealed: Path) -> None:
    forge(file_of(sealed, "kd", 2), run_id="01OTHER")

    found = checked(sealed)
    assert [" is missing: " in problem for problem in found.problems] == [True]
    assert found.notes == ("1 record has no seal yet; the next kdbench run, tune, results import or results compact seals them",)


def test_a_record_that_became_a_folder_is_named(sealed: Path) -> None:
    path = file_of(sealed, "none", 0)
    path.unlink()
    path.mkdir()

    (problem,) = [row.problem for row in checked_rows(ResultStore(sealed)) if row.problem is not None]
    assert path.name in problem
    assert "folder" in problem


def test_records_that_became_a_file_are_an_error_for_every_reader(sealed: Path) -> None:
    (sealed / "v1").rename(sealed / "kept")
    (sealed / "v1").write_bytes(b"")

    with pytest.raises(UserError, match=r"results/v1 is a file, expected a folder; restore the folder from a copy"):
        ResultStore(sealed).scan()
    with pytest.raises(UserError, match="is a file, expected a folder"):
        checked(sealed)


def test_an_unreadable_record_is_named_once(sealed: Path) -> None:
    path = file_of(sealed, "none", 0)
    path.write_bytes(b"torn")

    assert checked(sealed).problems == ()
    assert [row.problem is not None for row in checked_rows(ResultStore(sealed)) if row.record is None] == [True]


def test_of_very_many_missing_records_the_first_are_named_and_the_others_counted(tmp_path: Path, make_record: MakeRecord) -> None:
    store = ResultStore(tmp_path)
    paths = [store.append(make_record(seed=seed)) for seed in range(23)]
    seal(store, "run")
    for path in paths:
        (tmp_path / path).unlink()

    problems = checked(tmp_path).problems
    assert len(problems) == 21
    assert problems[-1] == "3 more sealed records are missing"


def test_compaction_does_not_launder_what_was_edited_or_deleted_before_it(sealed: Path) -> None:
    forge(file_of(sealed, "kd", 0), latency_ms_p50=0.1)
    file_of(sealed, "kd", 1).unlink()
    compact(ResultStore(sealed))

    changed, missing = checked(sealed).problems
    assert "(kd, seed 0, student cifar_resnet8) was changed after kdbench run had sealed it" in changed
    assert "(kd, seed 1, student cifar_resnet8) is missing" in missing
    assert len(list((sealed / "seals").iterdir())) == 1


def test_an_edit_in_a_compacted_file_stays_named_when_rows_beside_it_are_sealed(sealed: Path, make_record: MakeRecord) -> None:
    forge(file_of(sealed, "kd", 0), latency_ms_p50=0.1)
    ResultStore(sealed).append(make_record(label="late"))
    compact(ResultStore(sealed))

    assert "(kd, seed 0, student cifar_resnet8) was changed after kdbench run had sealed it" in only_problem(sealed)
    assert checked(sealed).sealed == 6


def with_seal(results: Path, stamp: str, **changes: Any) -> str:
    """Add a seal like the one that is there; its path."""
    [made] = read_seals(ResultStore(results)).by_path.values()
    added = made.model_copy(update=changes)
    (results / added.path(stamp)).write_bytes(added.content)
    return added.path(stamp)


@pytest.mark.parametrize("earlier", [True, False])
def test_two_seals_that_give_a_row_two_contents_are_named(sealed: Path, earlier: bool) -> None:
    path = file_of(sealed, "kd", 2)
    forge(path, latency_ms_p50=0.1)
    [(there, made)] = read_seals(ResultStore(sealed)).by_path.items()
    [row] = pq.read_table(path).to_pylist()
    rows = {path.stem: made.rows[path.stem].model_copy(update={"sha256": row[CHECKSUM]})}
    added = with_seal(sealed, "0" * 26 if earlier else sealing.new_run_id(), rows=rows)

    first, *others = checked(sealed).problems
    assert first == (
        f"run {path.stem} (kd, seed 2, student cifar_resnet8) is sealed with two contents, "
        f"in {min(there, added)} and {max(there, added)}: one of these seals is forged"
    )
    assert ["was changed after kdbench run had sealed it" in problem for problem in others] == ([] if earlier else [True])


@pytest.mark.parametrize("again", ["01NOTTHERE", "none"])
def test_a_missing_row_is_not_excused_by_a_run_that_is_none_or_another_training(sealed: Path, again: str) -> None:
    gone, other = file_of(sealed, "kd", 2), file_of(sealed, "none", 0)
    gone.unlink()
    with_seal(sealed, sealing.new_run_id(), rows={}, replaced={gone.stem: other.stem if again == "none" else again})
    assert f"run {gone.stem} (kd, seed 2, student cifar_resnet8) is missing" in only_problem(sealed)


def test_a_folder_in_place_of_a_seal_is_named(sealed: Path) -> None:
    [seal_file] = (sealed / "seals").iterdir()
    seal_file.unlink()
    seal_file.mkdir()
    assert "it is a folder, expected a regular file" in only_problem(sealed)


def test_seals_that_were_edited_or_taken_out_are_named(sealed: Path, make_record: MakeRecord) -> None:
    store = ResultStore(sealed)
    store.append(make_record(label="late"))
    seal(store, "tune")
    first, second = sorted((sealed / "seals").iterdir())
    assert json.loads(second.read_bytes())["after"] == [first.name]

    content = first.read_bytes()
    first.write_bytes(content.replace(b'"seed":2', b'"seed":3'))
    assert only_problem(sealed) == f"seals/{first.name}: this seal was changed after it was written (its checksum differs)"
    first.unlink()
    assert only_problem(sealed) == f"seals/{first.name} is missing: seals/{second.name} was made after it"
    first.write_bytes(content)
    assert_clean(sealed, 7)


def test_a_file_that_is_no_seal_is_a_line(sealed: Path) -> None:
    for text in (b"", b"{}", b"[" * 100_000, b'{"format":2,"made_at":"","command":""}', b"\xff"):
        (sealed / "seals" / f"x-{sealing._digest(text)}.json").write_bytes(text)
    (sealed / "seals" / "x-link.json").symlink_to("nowhere")
    (sealed / "seals" / "x-loop.json").symlink_to("x-loop.json")
    problems = checked(sealed).problems

    assert len(problems) == 7
    assert all("seals/x-" in problem for problem in problems)
    assert any("has seal format 2, this kdbench reads 1" in problem for problem in problems)


# --- what is none of that --------------------------------------------------------------------------------------------


def test_a_folder_without_seals_is_said_to_have_none(tmp_path: Path, make_record: MakeRecord) -> None:
    assert checked(tmp_path) == Comparison(0, (), ())
    ResultStore(tmp_path).append(make_record())
    [note] = checked(tmp_path).notes
    assert note.startswith(f"{tmp_path} has no seals yet")


def test_the_next_command_seals_what_a_killed_one_left_and_nothing_twice(location: str, make_record: MakeRecord) -> None:
    store = ResultStore(location)
    store.append(make_record())
    seal(store, "run")
    store.append(make_record())
    assert checked(location).problems == ()
    assert checked(location).sealed == 1

    assert seal(ResultStore(location), "run") == 1
    assert_clean(location, 2)
    assert seal(ResultStore(location), "run") == 0
    assert len(ResultStore(location).files.find("seals")) == 2


def test_added_seeds_and_compaction_leave_every_seal_true(location: str, make_record: MakeRecord) -> None:
    store = ResultStore(location)
    for seed in range(4):
        store.append(make_record(seed=seed, metrics={"top1": float("nan")}, curve=[{"epoch": 1.0}]))
    seal(store, "run")
    compact(ResultStore(location))
    assert_clean(location, 4)
    store = ResultStore(location)
    store.append(make_record(seed=4))
    compact(store)

    assert_clean(location, 5)
    assert [made.command for made in read_seals(ResultStore(location)).by_path.values()] == ["run", "results compact"]


def test_two_commands_at_once_lose_no_seal(location: str, make_record: MakeRecord) -> None:
    first, second = ResultStore(location), ResultStore(location)
    seals = read_seals(first)
    first.append(make_record(label="a"))
    sealing._seal(first, "run", seals)
    second.append(make_record(label="b"))
    sealing._seal(second, "run", seals)  # which has not seen the first one's
    assert_clean(location, 2)
    first.append(make_record(label="c"))
    seal(first, "run")

    assert len(list(read_seals(first).by_path.values())[-1].after) == 2
    assert_clean(location, 3)


def test_a_large_folder_is_sealed_in_parts(tmp_path: Path, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_ROWS", 2)
    store = ResultStore(tmp_path)
    for _ in range(5):
        store.append(make_record())
    assert seal(store, "run") == 5

    assert [len(made.rows) for made in read_seals(store).by_path.values()] == [2, 2, 1]
    assert_clean(tmp_path, 5)


def test_a_training_done_again_in_place_of_a_deleted_record_is_a_note(sealed: Path, make_record: MakeRecord) -> None:
    """As a message tells people who have a damaged record: delete it, and the training runs again."""
    path = file_of(sealed, "kd", 2)
    path.unlink()
    store = ResultStore(sealed)
    again = make_record(label="kd", seed=2, unit_key="kd-2")
    store.append(again)
    assert "is missing" in only_problem(sealed)  # it could have been copied there
    seal(store, "run")

    found = checked(sealed)
    assert (found.sealed, found.problems) == (6, ())
    assert found.notes == (
        f"run {path.stem} (kd, seed 2, student cifar_resnet8) is missing, and run {again.run_id} is the same training, done again",
    )


def test_a_row_that_does_not_fit_its_own_checksum_is_not_sealed(tmp_path: Path, make_record: MakeRecord) -> None:
    store = ResultStore(tmp_path)
    path = tmp_path / store.append(make_record())
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("seed"), "seed", pa.array([5])), path)

    assert seal(ResultStore(tmp_path), "run") == 0
    assert not (tmp_path / "seals").exists()


# --- archives --------------------------------------------------------------------------------------------------------


def test_an_archive_carries_the_seals_of_its_rows_and_of_no_others(sealed: Path, tmp_path: Path) -> None:
    ours, theirs = ResultStore(sealed), ResultStore(tmp_path / "theirs")
    export_results(ours, ours.scan(label="kd"), tmp_path / "kd.zip")
    import_results(theirs, tmp_path / "kd.zip")

    assert_clean(tmp_path / "theirs", 3)
    [made] = read_seals(theirs).by_path.values()
    [original] = read_seals(ours).by_path.values()
    assert (made.command, made.made_at, len(made.rows)) == ("run", original.made_at, 3)

    before = theirs.files.find("seals")
    import_results(theirs, tmp_path / "kd.zip")
    assert theirs.files.find("seals") == before
    export_results(ours, ours.scan(), tmp_path / "all.zip")
    import_results(theirs, tmp_path / "all.zip")
    assert_clean(tmp_path / "theirs", 6)


def test_import_seals_what_an_archive_without_seals_brought(tmp_path: Path, make_record: MakeRecord) -> None:
    ours, theirs = ResultStore(tmp_path / "ours"), ResultStore(tmp_path / "theirs")
    ours.append(make_record())
    export_results(ours, ours.scan(), tmp_path / "all.zip")
    import_results(theirs, tmp_path / "all.zip")

    assert_clean(tmp_path / "theirs", 1)
    assert [made.command for made in read_seals(theirs).by_path.values()] == ["results import"]


def test_with_keep_ours_the_seals_of_what_is_left_out_stay_out_too(sealed: Path, tmp_path: Path, make_record: MakeRecord) -> None:
    ours, theirs = ResultStore(sealed), ResultStore(tmp_path / "theirs")
    theirs.append(make_record(label="kd", seed=2, unit_key="kd-2", test_metric=99.0))
    export_results(ours, ours.scan(), tmp_path / "all.zip")
    import_results(theirs, tmp_path / "all.zip", keep_ours=True)

    assert_clean(tmp_path / "theirs", 6)


def test_a_row_edited_after_it_was_sealed_is_not_exported(sealed: Path, tmp_path: Path) -> None:
    forge(file_of(sealed, "kd", 2), latency_ms_p50=0.1)
    store = ResultStore(sealed)

    with pytest.raises(UserError, match=r"\(kd, seed 2, .*\) was changed after kdbench run had sealed it, .*; nothing was exported"):
        export_results(store, store.scan(), tmp_path / "all.zip")


def test_an_archive_whose_rows_are_not_those_of_its_seals_is_refused(sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forge(file_of(sealed, "kd", 2), latency_ms_p50=0.1)
    store = ResultStore(sealed)
    with monkeypatch.context() as trusting:
        trusting.setattr(sealing.Seals, "contradicts", lambda *_: None)
        export_results(store, store.scan(), tmp_path / "all.zip")

    with pytest.raises(UserError, match=r"was changed after kdbench run had sealed it, .*; nothing was imported"):
        import_results(ResultStore(tmp_path / "theirs"), tmp_path / "all.zip")
    assert not (tmp_path / "theirs").exists()
