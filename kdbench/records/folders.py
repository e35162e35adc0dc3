"""Several results folders read as one: of a training that more than one of them has, the latest record counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore


class Folders:
    """Records of all `paths`, which need not exist yet. Like a store, it reads again only what is new."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._stores = [ResultStore(path) for path in paths]

    @property
    def single_files(self) -> int:
        """How many files of one record were read so far."""
        return sum(store.single_files for store in self._stores)

    def scan(self, *, without: Collection[str] = (), **equals: Any) -> list[RunRecord]:
        """As `ResultStore.scan`, UserError included: of a training on one test part the latest record of all folders."""
        latest: dict[tuple[str, str | None], RunRecord] = {}
        superseded: set[str | None] = set()
        for record in sorted(
            (r for store in self._stores for r in store.scan(without=without, **equals)), key=lambda r: (r.created_at, r.run_id)
        ):
            latest[record.unit_key, record.test_hash] = record
            superseded.add(record.supersedes)
        return sorted((r for r in latest.values() if r.run_id not in superseded), key=lambda r: (r.created_at, r.run_id))

    def __str__(self) -> str:
        return ", ".join(store.location for store in self._stores)
