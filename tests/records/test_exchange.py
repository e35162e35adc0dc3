"""Records go from one results folder into another whole, once, and never against what is there."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from kdbench.errors import UserError
from kdbench.records.exchange import MANIFEST, Imported, export_results, import_results
from kdbench.records.integrity import checked_records
from kdbench.records.record import RunRecord
from kdbench.records.seals import is_seal
from kdbench.records.store import ResultStore

Change = Callable[[dict[str, bytes]], None]


@pytest.fixture
def ours(make_record, tmp_path: Path) -> ResultStore:
    """A teacher and two finals with predictions and weights, and a candidate without any."""
    store = ResultStore(tmp_path / "ours")
    weights = store.write_bytes("teachers/t/model.safetensors", save({"w": np.ones(3)}))
    store.append(make_record(role="teacher", label="teacher", teacher_sha=weights, artifacts_uri="teachers/t/model.safetensors"))
    for seed in (0, 1):
        predictions = f"predictions/kd-{seed}.safetensors"
        sha = store.write_bytes(predictions, save({"prediction": np.full(4, seed, dtype=np.float16)}))
        store.write_bytes(f"students/kd-{seed}/student.safetensors", save({"w": np.full(2, seed)}))
        files = {"predictions_uri": predictions, "artifacts_uri": f"students/kd-{seed}/student.safetensors", "predictions_sha256": sha}
        store.append(make_record(seed=seed, **files))
    store.append(make_record(role="candidate", seed=2_000_000))
    return store


@pytest.fixture
def theirs(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "theirs")


@pytest.fixture
def archive(ours, tmp_path: Path) -> Path:
    export_results(ours, ours.scan(), tmp_path / "all.zip", weights=True)
    return tmp_path / "all.zip"


def content(folder: ResultStore) -> dict[str, bytes]:
    """All files but the seals, which say what became of a folder."""
    root = Path(folder.location)
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not is_seal(name)}


def changed(archive: Path, change: Change, manifest: bool = True) -> Path:
    """The archive with other members; its manifest tells their true hashes, unless it is to stay as it was."""
    with zipfile.ZipFile(archive) as read:
        members = {name: read.read(name) for name in read.namelist()}
    change(members)
    if manifest:
        told = json.loads(members.pop(MANIFEST))
        told["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
        members[MANIFEST] = json.dumps(told).encode()
    path = archive.with_name("changed.zip")
    with zipfile.ZipFile(path, "w") as write:
        for name, data in members.items():
            write.writestr(name, data)
    return path


def test_what_is_imported_is_what_was_exported_byte_for_byte(ours, theirs, archive) -> None:
    done = import_results(theirs, archive)

    assert done == Imported(records=4, files=5, known=0, kept=())
    assert content(theirs) == content(ours)
    assert theirs.scan() == ours.scan()
    assert [problem for *_, problem in checked_records(theirs)] == [None] * 4


def test_a_second_import_changes_nothing(theirs, archive) -> None:
    import_results(theirs, archive)
    before = content(theirs)

    assert import_results(theirs, archive) == Imported(records=0, files=0, known=4, kept=())
    assert content(theirs) == before


def journal(folder: ResultStore, study: str, *lines: str) -> str:
    name = f"studies/{study}.journal"
    folder.write_bytes(name, "".join(f"{line}\n" for line in lines).encode())
    return name


def test_a_search_goes_along_with_the_records_that_it_chose_parameters_for_and_one_that_is_here_stays(
    ours, theirs, make_record, tmp_path
) -> None:
    for seed in (5, 6):
        ours.append(make_record(seed=seed, study_id="kd-1", predictions_uri=None, artifacts_uri=None))
    ours.append(make_record(seed=7, study_id="begun", predictions_uri=None, artifacts_uri=None))
    ours.write_bytes("studies/begun.journal", b'{"op":')
    name = journal(ours, "kd-1", '{"op": 0}', '{"op": 1}')
    with (tmp_path / "ours" / name).open("a") as file:
        file.write('{"op":')  # whoever searches writes at this moment
    done = export_results(ours, ours.scan(), tmp_path / "x.zip")
    assert (done.records, done.searches, done.weights) == (7, 1, 0)

    import_results(theirs, done.path)
    assert theirs.read_bytes(name) == b'{"op": 0}\n{"op": 1}\n'
    journal(theirs, "kd-1", '{"op": 9}')
    import_results(theirs, done.path)
    assert theirs.read_bytes(name) == b'{"op": 9}\n'

    for content_, words in ((b"cos\nsystem\n", "is not the journal of a search"), (b'{"op": 0}\n[1', "is not the journal of a search")):
        with pytest.raises(UserError, match=words):
            import_results(theirs, changed(done.path, lambda members, content_=content_: members.update({name: content_})))


def test_an_import_that_was_killed_is_completed_by_the_same_command(ours, theirs, archive, monkeypatch) -> None:
    append, calls = ResultStore.append, []

    def killed(store: ResultStore, record: RunRecord) -> str:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(record)
        return append(store, record)

    monkeypatch.setattr(ResultStore, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        import_results(theirs, archive)
    for record in theirs.scan():  # whatever is there is whole
        assert all(theirs.has(uri) for uri in (record.predictions_uri, record.artifacts_uri) if uri)
    monkeypatch.undo()
    import_results(theirs, archive)

    assert content(theirs) == content(ours)


def test_records_alone_and_predictions_without_weights(ours, theirs, tmp_path) -> None:
    alone = export_results(ours, ours.scan(), tmp_path / "alone.zip", predictions=False)
    usual = export_results(ours, ours.scan(role="final"), tmp_path / "usual.zip")

    assert (alone.records, alone.predictions, alone.weights) == (4, 0, 0)
    assert (usual.records, usual.predictions, usual.weights) == (2, 2, 0)
    assert import_results(theirs, alone.path).files == 0
    assert import_results(theirs, usual.path) == Imported(records=0, files=2, known=2, kept=())  # what was left behind comes after


def test_a_file_that_a_record_names_and_that_is_gone_is_told(ours, tmp_path) -> None:
    (tmp_path / "ours/predictions/kd-1.safetensors").unlink()

    done = export_results(ours, ours.scan(), tmp_path / "x.zip")
    assert (done.predictions, done.missing) == (1, ("predictions/kd-1.safetensors",))


def test_superseded_records_are_not_exported_and_are_known_to_an_import(ours, theirs, archive, make_record) -> None:
    import_results(theirs, archive)
    old = theirs.scan(seed=0, role="final")[0]
    theirs.append(make_record(seed=0, unit_key=old.unit_key, test_metric=91.0))

    assert import_results(theirs, archive).known == 4


def test_a_training_that_was_measured_on_another_test_part_here_is_no_conflict(theirs, archive, make_record) -> None:
    theirs.append(make_record(seed=0, unit_key="unit-2", test_hash="repaired", test_metric=91.0))
    assert import_results(theirs, archive).records == 4
    assert {record.test_hash for record in theirs.by_unit()("unit-2")} == {"repaired", None}


def test_a_unit_that_was_trained_on_both_sides_is_a_conflict_and_ours_is_kept_when_asked(theirs, archive, make_record) -> None:
    here = make_record(seed=0, unit_key="unit-2", test_metric=91.0, predictions_uri="predictions/kd-0.safetensors")
    theirs.append(here)
    theirs.write_bytes("predictions/kd-0.safetensors", b"ours")
    before = content(theirs)

    with pytest.raises(
        UserError, match=rf"1 of its records conflict(?s:.*)same training as {here.run_id} here: test metric 91.0 here, 90.0"
    ):
        import_results(theirs, archive)
    assert content(theirs) == before
    done = import_results(theirs, archive, keep_ours=True)
    assert (done.records, len(done.kept)) == (3, 1)
    assert theirs.read_bytes("predictions/kd-0.safetensors") == b"ours"
    assert not theirs.has("students/kd-0/student.safetensors")
    assert import_results(theirs, archive, keep_ours=True).records == 0


def test_a_run_with_another_content_is_a_conflict(ours, theirs, archive) -> None:
    theirs.append(ours.scan(seed=1)[0].model_copy(update={"test_metric": 99.0}))

    with pytest.raises(UserError, match="is here with another content"):
        import_results(theirs, archive)


def test_a_nan_is_equal_to_itself(ours, theirs, make_record, tmp_path) -> None:
    ours.append(make_record(test_metric=float("nan")))
    export_results(ours, ours.scan(), tmp_path / "x.zip")
    import_results(theirs, tmp_path / "x.zip")

    assert import_results(theirs, tmp_path / "x.zip").known == 5


def test_records_of_an_older_schema_are_migrated_on_the_way_in(ours, theirs, tmp_path, monkeypatch) -> None:
    export_results(ours, ours.scan(), tmp_path / "old.zip")
    monkeypatch.setattr("kdbench.records.record.SCHEMA_VERSION", 2)
    monkeypatch.setattr("kdbench.records.record.MIGRATIONS", {1: lambda row: {**row, "schema_version": 2, "precision": "fp32"}})
    import_results(theirs, tmp_path / "old.zip")

    assert {(record.schema_version, record.precision) for record in theirs.scan()} == {(2, "fp32")}
    assert [problem for *_, problem in checked_records(theirs)] == [None] * 4
    assert import_results(theirs, tmp_path / "old.zip").known == 4


def test_export_refuses_what_was_edited_and_writes_no_file(ours, tmp_path) -> None:
    path = tmp_path / "ours" / ours.record_paths()[0]
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("test_metric"), "test_metric", pa.array([99.9])), path)
    store = ResultStore(tmp_path / "ours")

    with pytest.raises(UserError, match=r"was changed after it was written \(its checksum differs\); nothing was exported"):
        export_results(store, store.scan(), tmp_path / "x.zip")
    assert list(tmp_path.glob("*x.zip*")) == []


@pytest.mark.parametrize("uri", ["predictions/kd-0.safetensors", "students/kd-1/student.safetensors", "teachers/t/model.safetensors"])
def test_export_refuses_a_damaged_attachment_which_import_would_refuse(ours, tmp_path, uri) -> None:
    path = Path(ours.location) / uri
    path.write_bytes(path.read_bytes()[:-1] + b"x" if uri.startswith(("predictions", "teachers")) else b"torn")
    with pytest.raises(UserError, match=f"{uri} is damaged: .* nothing was exported"):
        export_results(ours, ours.scan(), tmp_path / "all.zip", weights=True)
    assert not (tmp_path / "all.zip").exists()


def test_nothing_to_export_and_a_file_that_is_there_are_refused(ours, archive) -> None:
    with pytest.raises(UserError, match="nothing to export"):
        export_results(ours, [], archive)
    with pytest.raises(UserError, match=r"all\.zip exists"):
        export_results(ours, ours.scan(), archive)


# --- archives that are not what they should be -----------------------------------------------------------------------


def _record(members: dict[str, bytes]) -> str:
    return next(name for name in members if name.endswith(".parquet") and "/kd/" in name)


def _moved_record(members: dict[str, bytes]) -> None:
    members["v1/../../evil.parquet"] = members.pop(_record(members))


def _climbing(members: dict[str, bytes]) -> None:
    members["predictions/../../evil.safetensors"] = save({"x": np.ones(1)})


def _pickled(members: dict[str, bytes]) -> None:
    members["students/kd-0/student.safetensors"] = pickle.dumps({"weights": [1.0] * 100})


def _other_predictions(members: dict[str, bytes]) -> None:
    members["predictions/kd-0.safetensors"] = save({"prediction": np.zeros(9, dtype=np.float16)})


def _other_teacher(members: dict[str, bytes]) -> None:
    members["teachers/t/model.safetensors"] = save({"w": np.zeros(3)})


def _edited_record(members: dict[str, bytes]) -> None:
    table = pq.read_table(BytesIO(members[_record(members)]))
    edited = BytesIO()
    pq.write_table(table.set_column(table.column_names.index("test_metric"), "test_metric", pa.array([99.9])), edited, compression="none")
    members[_record(members)] = edited.getvalue()


def _truncated_record(members: dict[str, bytes]) -> None:
    members[_record(members)] = members[_record(members)][:-20]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_moved_record, "is not where its record belongs"),
        (_climbing, "belongs to none of its records"),
        (_pickled, "is not a safetensors file"),
        (_other_predictions, "is not the file that its record was made with"),
        (_other_teacher, "is not the file that its record was made with"),
        (_edited_record, "was changed after it was written"),
        (_truncated_record, "is not a readable Parquet file"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_an_archive_that_was_tampered_with_brings_nothing_in(theirs, archive, tmp_path, change, words) -> None:
    with pytest.raises(UserError, match=words):
        import_results(theirs, changed(archive, change))
    assert not Path(theirs.location).exists()
    assert not list(tmp_path.rglob("evil*"))


def test_a_record_may_not_lead_out_of_the_folder_either(ours, theirs, make_record, tmp_path) -> None:
    """Checksums and manifest are right: whoever made it knew how."""
    names = (
        "../evil.safetensors",
        "predictions/../../evil.safetensors",
        "/evil.safetensors",
        r"predictions\\..\\evil",
        "locks/x.safetensors",
        "predictions/a\x1b[2J",
        "predictions/a\nb",
    )
    for number, name in enumerate(names):
        record = make_record(predictions_uri=name)
        ours.append(record)
        export_results(ours, [record], tmp_path / f"{number}.zip")
        evil = changed(tmp_path / f"{number}.zip", lambda members, name=name: members.update({name: save({"x": np.ones(1)})}))
        with pytest.raises(UserError, match="is not a place inside a results folder"):
            import_results(theirs, evil)


def test_a_manifest_that_does_not_fit_the_content_is_named(theirs, archive) -> None:
    def flipped(members: dict[str, bytes]) -> None:
        members["students/kd-0/student.safetensors"] += b" "

    for change, words in (
        (flipped, "was changed after it was exported"),
        (lambda members: members.update(extra=b"x"), "'extra' is not what its manifest"),
        (lambda members: members.pop(MANIFEST), "it has no manifest"),
        (lambda members: members.update({MANIFEST: b"[]"}), "can't be read"),
        (lambda members: members.update({MANIFEST: b'{"format": 9, "files": {}}'}), "has archive format 9.*update kdbench"),
    ):
        with pytest.raises(UserError, match=words):
            import_results(theirs, changed(archive, change, manifest=False))
    assert not Path(theirs.location).exists()


def test_files_that_are_no_archive_or_are_cut_off_are_named(theirs, archive, tmp_path) -> None:
    text = tmp_path / "notes.zip"
    text.write_text("hello")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(archive.read_bytes()[:-300])
    damaged = bytearray(archive.read_bytes())
    damaged[len(damaged) // 3 : len(damaged) // 3 + 400] = b"\xff" * 400
    (tmp_path / "damaged.zip").write_bytes(bytes(damaged))

    for path in (text, cut, tmp_path / "damaged.zip"):
        with pytest.raises(UserError, match=r"is not an archive that kdbench results export wrote, or it is damaged|was changed"):
            import_results(theirs, path)
    with pytest.raises(UserError, match="there is no such file"):
        import_results(theirs, tmp_path / "nowhere.zip")
    with pytest.raises(UserError, match="can't be read"):
        import_results(theirs, tmp_path)


def test_an_archive_larger_than_the_disk_is_refused_before_anything_is_written(theirs, archive, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))

    with pytest.raises(UserError, match=r"needs 0\.00 GB"):
        import_results(theirs, archive)
    assert not Path(theirs.location).exists()
