"""What a results folder holds of a unit: its record, one of another test part to measure again, or one of an earlier rule of keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from kdbench.benchmark.ledger import Ledger
from kdbench.bounded import check_safetensors
from kdbench.distributed.cluster import device_here
from kdbench.errors import UserError
from kdbench.experiment import TeacherRef, Unit
from kdbench.models.build import ModelSpec
from kdbench.records.record import RunRecord
from kdbench.storage.folder import file_sha256
from kdbench.storage.layout import Layout
from kdbench.storage.working_copy import fetch
from kdbench.training.earlier_keys import Asked
from kdbench.training.outcome import measured_again, of_now
from kdbench.training.session import LocalSession


def weights_of(record: RunRecord, layout: Layout) -> Path:
    """The file of weights that a training left, on this machine where the store has it."""
    assert record.artifacts_uri is not None, "only asked of trainings that leave weights"
    return fetch(layout.root / record.artifacts_uri, sha256=record.teacher_sha if record.role == "teacher" else None)


def _has_sha256(weights: Path, sha256: str | None) -> bool:
    """Whether these are the weights that were kept. What is no file of weights is not waited for, and not read to its end."""
    try:
        check_safetensors(weights)
        return file_sha256(weights) == sha256
    except OSError:
        return False


TellsOfTeacher = Callable[[RunRecord], Mapping[str, Any]]


class Recall:
    """Looks units up for one experiment. It reads the store once, when it is made; what is found in another form is put on record anew."""

    def __init__(self, asked: Asked, ledger: Ledger) -> None:
        self.asked, self.ledger, self.splits = asked, ledger, asked.data.splits
        self._by_unit = ledger.store.by_unit()
        self._told: set[str] = set()

    def find(
        self,
        unit: Unit,
        earlier_key: str,
        *,
        noise: bool,
        teacher_predictions: str | None = None,
        teacher_of: TellsOfTeacher = lambda record: {},
    ) -> RunRecord | None:
        """The record of a training that need not be done, measured on the test part as it is now; None where it has to be done.

        Args:
            unit: the training.
            earlier_key: its key by the earlier rule.
            noise: whether it draws anything for each sample.
            teacher_predictions: where the store has what the teacher predicts for the test part; None where it does not.
            teacher_of: what a record of the earlier rule lacks where the training is a teacher's.
        """
        records = [record for record in self._by_unit(unit.key) if self._whole(record)]
        now = next((record for record in records if record.test_hash in (None, self.splits.test_hash)), None)
        if now is not None:
            return now
        if records:
            return self._measured(unit, records[-1], teacher_predictions)
        for record in reversed(self._by_unit(earlier_key)):
            if self._whole(record) and self.taken(record, unit.student, unit.teacher, unit.title, noise):
                return self.adopt(record, unit, unit.key, **teacher_of(record))
        return None

    def given(self, unit: Unit, key: str, earlier_key: str, **facts: Any) -> RunRecord | None:
        """The record of a teacher from a file, as measured on the test part as it is now."""
        record = next((record for record in self._by_unit(key) if record.test_hash == self.splits.test_hash), None)
        if record is not None:
            return record
        for record in reversed(self._by_unit(earlier_key)):
            if self.taken(record, unit.student, None, unit.title, noise=False):
                return self.adopt(record, unit, key, **facts)
        return None

    def taken(self, record: RunRecord, student: ModelSpec, teacher: TeacherRef | None, title: str, noise: bool) -> bool:
        """Whether a record of the earlier rule is of what is asked for now. A line says why it is not, once for each reason."""
        reason = self.asked.differs(record, student, teacher, self._teachers, noise)
        if reason is not None:
            self.tell(f"{title} is on record under an earlier key, but {reason}: it is done again", reason)
        return reason is None

    def continues(self, study_id: str, student: ModelSpec, teacher: TeacherRef | None, label: str, noise: bool) -> bool:
        """Whether a study of the earlier rule is of what is asked for now, as the records that came of it say."""
        records = self.ledger.store.scan(study_id=study_id)
        if not records:
            self.tell(
                f"the search of {label} was begun under an earlier key, and no record says with which task and teacher: it begins again",
                study_id,
            )
            return False
        return all(self.taken(record, student, teacher, f"the search of {label}", noise) for record in records)

    def tell(self, note: str, once: str) -> None:
        """Say something once for all units that it is true of."""
        if once not in self._told:
            self._told.add(once)
            self.ledger.watch.note(note)

    def adopt(self, record: RunRecord, unit: Unit, key: str, **facts: Any) -> RunRecord:
        """Put a record of the earlier rule on record under its key of now."""
        known = {"unit_key": key, "supersedes": record.run_id, "mlflow_run_id": record.mlflow_run_id}
        if unit.teacher is not None:
            facts = {"teacher_state": unit.teacher.state, "teacher_id": unit.teacher.identity, **facts}
        return self.ledger.keep_again(record, **{**of_now(unit, self.splits), **known, "student_init": unit.student_init, **facts})

    def _measured(self, unit: Unit, record: RunRecord, teacher_predictions: str | None) -> RunRecord | None:
        """A finished network, measured on the test part as it is now. What failed has failed whatever it would be measured on."""
        if record.status == "failed":
            return self.ledger.keep_measured(record.model_copy(update=of_now(unit, self.splits)))
        self.tell("the test part has other content than before: what is finished is measured again, and not trained", "measured")
        store, layout = self.ledger.store, self.ledger.layout
        try:
            has_them = teacher_predictions is not None and store.has(teacher_predictions)
            theirs = store.read_bytes(teacher_predictions) if teacher_predictions is not None and has_them else None
            session = LocalSession(device=device_here(self.asked.experiment.runtime))
            record = measured_again(record, unit, weights_of(record, layout), session, layout, theirs)
        except UserError as error:
            self.tell(f"{unit.title} can't be measured again ({error}): it is trained again", str(error))
            return None
        return self.ledger.keep_measured(record)

    def _whole(self, record: RunRecord) -> bool:
        """Whether the weights that others need of a record are there: a teacher's always, a student's where it is measured again."""
        if record.role == "teacher":
            return record.artifacts_uri is not None and _has_sha256(weights_of(record, self.ledger.layout), record.teacher_sha)
        if record.test_hash in (None, self.splits.test_hash) or record.status == "failed":
            return True
        return record.artifacts_uri is not None and weights_of(record, self.ledger.layout).is_file()

    @cached_property
    def _teachers(self) -> Sequence[RunRecord]:
        return self.ledger.store.scan(role="teacher")
