"""MLflow as a view of the results: curves, parameters and artifacts to look at. The store is the truth; without MLflow nothing is lost.

Only explicit `MlflowClient` calls, no active run and no global tracking address: several trackers may live in one process.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from kdbench.credentials import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

Status = Literal["FINISHED", "FAILED", "KILLED"]
Result = TypeVar("Result")

KEY_TAG = "kdbench.key"
RESULTS_TAG = "kdbench.results"  # a hash of where the results are: several folders may share a server
INFINITE_TAG = "kdbench.infinite"  # names of the metrics that were infinite somewhere
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"  # what MLflow shows as a run's description, in Markdown
RUN_TAG, ROLE_TAG, PROTOCOL_TAG = "kdbench.run_id", "kdbench.role", "kdbench.protocol_hash"
FLUSH_SECONDS = 10.0
RETRY_SECONDS = 300.0  # how long a server that did not answer is left alone
METRICS_PER_CALL, PARAMS_PER_CALL = 800, 100  # MLflow takes 1000 things a call, 100 of them parameters and 100 tags
LONGEST_NAME, LONGEST_PARAM, LONGEST_TAG = 250, 6000, 8000  # characters, MLflow's limits
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is for what a command was asked for
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; MLflow's own 120 s and 7 retries would hold up a training for many minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
SQLITE = "sqlite:///"
# The same database by another name, which MLflow passes on to SQLAlchemy. Of what stands behind sqlite:/// it first makes the folder, and
# takes %20 for three characters of its name.
SQLITE_QUOTED = "sqlite+pysqlite:///"
SQLITE_WAIT_SECONDS = 60  # for another writer's lock; four writers made one wait 4.2 s, too near to sqlite's own 5 s

log = logging.getLogger(__name__)


def tracking_uri(results: str | Path) -> str:
    """Where runs are tracked: `MLFLOW_TRACKING_URI` where it is set, else the database `mlflow.db` in the results folder.

    For results at an address that is the working copy's: a view of what was trained from this machine.
    """
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    return _sqlite_uri(Path(results).expanduser().resolve() / "mlflow.db")


def _sqlite_uri(database: str | Path) -> str:
    """SQLAlchemy's URI of an SQLite file. SQLAlchemy decodes % in it, and takes what is behind ? for options."""
    path = str(database)
    quoted = path.replace("%", "%25").replace("?", "%3F")
    return f"{SQLITE if quoted == path else SQLITE_QUOTED}{quoted}"


def database_of(uri: str) -> Path | None:
    """The file of an SQLite database, None for what is no such database."""
    for start in (SQLITE, SQLITE_QUOTED):
        if uri.startswith(start):
            return Path(unquote(uri.removeprefix(start).partition("?")[0])).absolute()
    return None


@dataclass(frozen=True)
class Interface:
    """Where a browser finds MLflow's pages. start: the command that serves them there, None where a server of its own does."""

    address: str
    start: str | None

    def page(self, run_id: str | None) -> str | None:
        """The address of a run's page."""
        return None if run_id is None else f"{self.address}/#/runs/{quote(run_id, safe='')}"


def interface(results: Path) -> Interface:
    """MLflow's pages for the runs of a results folder: the server of `MLFLOW_TRACKING_URI`, else where `mlflow ui` serves by itself.

    A name and a password in the variable stay there: the address is for others to see.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    parts = urlsplit(given)
    if parts.scheme in ("http", "https") and parts.hostname:
        return Interface(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", "")), None)
    database = os.path.relpath(results / "mlflow.db")
    uri = _sqlite_uri(results / "mlflow.db" if database.startswith("..") else database)
    return Interface("http://127.0.0.1:5000", f"mlflow ui --backend-store-uri {shlex.quote(uri)}")


@dataclass(frozen=True)
class Facts:
    """What MLflow shows of a training beside its curve. artifacts: files and folders; texts: small files by name."""

    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    status: Status = "FINISHED"
    artifacts: Sequence[Path] = ()
    texts: Mapping[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """What the benchmark asks of tracking. Ids are None where nothing is tracked; every method takes such a None back."""

    def parent(self, name: str, key: str, tags: Mapping[str, str]) -> str | None:
        """The run that others hang under, made once a `key` and found again after a restart."""
        ...

    def close_parent(self, run_id: str | None, status: Status = "FINISHED") -> None:
        """Mark the parent as done."""
        ...

    def log_run(
        self, parent_id: str | None, name: str, key: str, curve: Sequence[Mapping[str, float]] = (), facts: Facts | None = None
    ) -> str | None:
        """Write one training that is over. Entries of `curve` have an "epoch"."""
        ...

    def live(self, parent_id: str | None, name: str, key: str) -> LiveRun:
        """Open a run to write to while it trains."""
        ...

    def begin(self, parent_id: str | None, name: str, key: str) -> LiveRun:
        """Open a run for a training that is over, so that its record can name it before it is written."""
        ...

    def complete(self, run_id: str, curve: Sequence[Mapping[str, float]], facts: Facts) -> str | None:
        """Write what an open run lacks and close it; its id, or None where MLflow does not have all of it."""
        ...

    def belongs_to(self, results: str) -> None:
        """Say whose runs are made from now on, by the location of the results."""
        ...

    def left_open(self) -> Mapping[str, str]:
        """The open runs of these results: their ids, and the key of each. Where no other command runs, a killed one left them."""
        ...

    def answers(self) -> bool:
        """Whether runs can be written now. It asks, however lately there was no answer."""
        ...

    def publish(self, protocols: Sequence[str], report: Path, pictures: Sequence[Path]) -> str | None:
        """Keep a report of the boards of these protocols, and lead to it from their runs; the id of the run that it is an artifact of."""
        ...


class NoTracker:
    """Tracks nothing."""

    def parent(self, name: str, key: str, tags: Mapping[str, str]) -> str | None:
        return None

    def close_parent(self, run_id: str | None, status: Status = "FINISHED") -> None:
        return None

    def log_run(
        self, parent_id: str | None, name: str, key: str, curve: Sequence[Mapping[str, float]] = (), facts: Facts | None = None
    ) -> str | None:
        return None

    def live(self, parent_id: str | None, name: str, key: str) -> LiveRun:
        return LiveRun(None, None)

    def begin(self, parent_id: str | None, name: str, key: str) -> LiveRun:
        return LiveRun(None, None)

    def complete(self, run_id: str, curve: Sequence[Mapping[str, float]], facts: Facts) -> str | None:
        return None

    def belongs_to(self, results: str) -> None:
        return None

    def left_open(self) -> Mapping[str, str]:
        return {}

    def answers(self) -> bool:
        return False

    def publish(self, protocols: Sequence[str], report: Path, pictures: Sequence[Path]) -> str | None:
        return None


class MlflowTracker:
    """Runs in one MLflow experiment, found again by their key.

    Connects at the first call. A tracking failure never stops a training: it is warned about once, and the calls return None.
    """

    def __init__(self, tracking_uri: str, experiment_name: str) -> None:
        self.tracking_uri = tracking_uri
        self.experiment_name = experiment_name
        self._results: str | None = None
        self._connection: tuple[MlflowClient, str] | None = None
        self._silent_until = 0.0
        self._warned = False
        for name, value in ENVIRONMENT.items():  # before MLflow is imported, which Ray does too
            os.environ.setdefault(name, value)

    def parent(self, name: str, key: str, tags: Mapping[str, str]) -> str | None:
        def find_or_make(client: MlflowClient, experiment: str) -> str:
            for run in self._find(client, experiment, key):
                client.update_run(run.info.run_id, status="RUNNING")
                known: str = run.info.run_id
                return known
            made: str = client.create_run(experiment, run_name=name, tags={KEY_TAG: key, **self._owner, **_tags(tags)}).info.run_id
            return made

        return self.attempt(find_or_make)

    def close_parent(self, run_id: str | None, status: Status = "FINISHED") -> None:
        if run_id is not None:
            self.attempt(lambda client, _: client.set_terminated(run_id, status))

    def log_run(
        self, parent_id: str | None, name: str, key: str, curve: Sequence[Mapping[str, float]] = (), facts: Facts | None = None
    ) -> str | None:
        """A FINISHED run of this key is returned as it is; any other is what a killed process left, and is replaced."""
        run = self.begin(parent_id, name, key)
        run.log_curve(curve)
        return run.finish(facts)

    def begin(self, parent_id: str | None, name: str, key: str) -> LiveRun:
        """A FINISHED run of this key stays as it is; any other is what a killed process left, and is replaced."""
        finished = self.attempt(lambda client, experiment: [r for r in self._find(client, experiment, key) if r.info.status == "FINISHED"])
        return LiveRun(self, finished[0].info.run_id, ended=True) if finished else self.live(parent_id, name, key)

    def complete(self, run_id: str, curve: Sequence[Mapping[str, float]], facts: Facts) -> str | None:
        """MLflow would keep a value that is sent again beside the first one, so only those of steps that it lacks are sent."""
        points = self.attempt(partial(_points, run_id))
        if points is None:
            return None
        run = LiveRun(self, run_id, points)
        run.log_curve(curve)
        return run.finish(facts)

    def belongs_to(self, results: str) -> None:
        self._results = results

    @property
    def _owner(self) -> dict[str, str]:
        """The tag that says whose a run is."""
        return {} if self._results is None else {RESULTS_TAG: _hash_of(self._results)}

    def left_open(self) -> Mapping[str, str]:
        database = database_of(self.tracking_uri)
        if database is not None and not database.exists():
            return {}
        owners = _owners(self.tracking_uri, self._results)
        return self.attempt(lambda client, experiment: _open(client, experiment, owners)) or {}

    def live(self, parent_id: str | None, name: str, key: str) -> LiveRun:
        """Runs of the same key are deleted: whoever trains again writes the whole curve again."""

        def replace(client: MlflowClient, experiment: str) -> str:
            for stale in self._find(client, experiment, key):
                client.delete_run(stale.info.run_id)
            nesting = {} if parent_id is None else {PARENT_TAG: parent_id}
            made: str = client.create_run(experiment, run_name=name, tags={KEY_TAG: key, **self._owner, **nesting}).info.run_id
            return made

        return LiveRun(self, self.attempt(replace))

    def answers(self) -> bool:
        self._silent_until = 0.0
        return bool(self.attempt(lambda client, experiment: client.get_experiment(experiment)))

    @property
    def name(self) -> str:
        """The tracking address without credentials, for messages."""
        return without_secrets(self.tracking_uri)

    @property
    def silent(self) -> bool:
        """Whether MLflow did not answer lately."""
        return time.monotonic() < self._silent_until

    def publish(self, protocols: Sequence[str], report: Path, pictures: Sequence[Path]) -> str | None:
        """One run a tracked experiment, "leaderboard": a later report replaces the one before it."""
        run_id = self.parent("leaderboard", f"leaderboard/{self.experiment_name}", {PROTOCOL_TAG: ", ".join(protocols)})
        if run_id is None:
            return None
        for path in (report, *pictures):
            self.attempt(partial(_send_artifact, run_id, path), essential=False)
        self.attempt(partial(_lead_to, run_id, protocols, report), essential=False)
        self.close_parent(run_id)
        return run_id

    def client(self) -> MlflowClient:
        """A client of the server or database. Raises whatever MLflow, its database driver or the network raise where there is none."""
        return self._connected()[0]

    def _connected(self) -> tuple[MlflowClient, str]:
        if self._connection is None:
            self._connection = _connect(self.tracking_uri, self.experiment_name)
        return self._connection

    def attempt(self, action: Callable[[MlflowClient, str], Result], essential: bool = True) -> Result | None:
        """`action(client, experiment id)`; None where MLflow can't be reached or refuses, with a warning.

        After an `essential` failure MLflow is left alone for a while: each try of a dead server costs its time-outs.
        """
        if self.silent:
            return None
        try:
            return action(*self._connected())
        except Exception as error:  # MLflow passes on whatever its database driver or object store raises
            self._complain(error, essential)
            return None

    def _complain(self, error: Exception, essential: bool) -> None:
        reason = without_secrets(str(error).splitlines()[0])[:300] if str(error) else type(error).__name__
        if self._connection is not None and (not essential or getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"):
            log.warning("MLflow refused a part of a run, the rest is tracked: %s", reason)
            return
        self._silent_until = time.monotonic() + RETRY_SECONDS
        if not self._warned:
            self._warned = True
            log.warning("MLflow at %s can't be written, results are stored all the same: %s", self.name, reason)

    @staticmethod
    def _find(client: MlflowClient, experiment: str, key: str) -> list[Any]:
        quote = '"' if "'" in key else "'"
        return list(client.search_runs([experiment], f"tags.`{KEY_TAG}` = {quote}{key}{quote}"))


class LiveRun:
    """One open run. Metrics are buffered and sent at most every ten seconds; `finish` sends the rest and closes it.

    What could not be sent as MLflow did not answer is kept, and goes with the next sending.
    """

    def __init__(
        self, tracker: MlflowTracker | None, run_id: str | None, points: frozenset[tuple[str, int]] = frozenset(), ended: bool = False
    ) -> None:
        """Without a tracker or an id, and where the run has `ended`, every call does nothing.

        points: the metrics that it has already, by name and step.
        """
        self.run_id = run_id
        self._points = points
        self._ended = ended
        self._tracker = tracker
        self._metrics: list[Metric] = []
        self._infinite: set[str] = set()
        self._flushed = time.monotonic()
        self._last_step = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Note metrics of one step, mostly an epoch. An infinite value is kept as nan, a gap in the curve, and named in a tag."""
        if self.run_id is None or self._ended:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for name, value in metrics.items():
            if (metric_name(name), step) in self._points:
                continue
            if math.isinf(value):
                self._infinite.add(name)
            self._metrics.append(Metric(metric_name(name), math.nan if math.isinf(value) else float(value), now, step))
        self._last_step = max(self._last_step, step)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._send({}, {})

    def log_curve(self, curve: Sequence[Mapping[str, float]]) -> None:
        """Note all epochs of a training."""
        for entry in curve:
            self.log({name: value for name, value in entry.items() if name != "epoch"}, int(entry["epoch"]))

    def finish(self, facts: Facts | None = None) -> str | None:
        """Send what is left and close the run; its id, or None where MLflow does not have all of it."""
        if self.run_id is None or self._tracker is None or self._ended:
            return self.run_id
        run_id, facts = self.run_id, facts or Facts()
        self.log(facts.metrics, self._last_step)
        infinite = {INFINITE_TAG: ", ".join(sorted(self._infinite))} if self._infinite else {}
        if not self._send(facts.params, {**facts.tags, **infinite}):
            return None
        for path in facts.artifacts:
            self._tracker.attempt(partial(_send_artifact, run_id, path), essential=False)
        for name, text in facts.texts.items():
            self._tracker.attempt(partial(_send_text, run_id, name, text), essential=False)
        return self._tracker.attempt(partial(_close, run_id, facts.status))

    def _send(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> bool:
        """All that waits, in as few calls as MLflow's limits allow. False where MLflow does not answer; the metrics then wait on."""
        if self._tracker is None or self.run_id is None:
            return False
        from mlflow.entities import Param, RunTag

        waiting, self._metrics, self._flushed = self._metrics, [], time.monotonic()
        named = {metric_name(name): str(value)[:LONGEST_PARAM] for name, value in params.items()}
        parts = zip_longest(
            _batches(waiting, METRICS_PER_CALL),
            _batches([Param(name, value) for name, value in named.items()], PARAMS_PER_CALL),
            _batches([RunTag(name, value) for name, value in _tags(tags).items()], PARAMS_PER_CALL),
            fillvalue=(),
        )
        for some_metrics, some_params, some_tags in parts:
            self._tracker.attempt(partial(_send_batch, self.run_id, some_metrics, some_params, some_tags))
            if self._tracker.silent:  # else it was sent, or refused for good
                self._metrics += some_metrics
        return not self._tracker.silent


def metric_name(name: str) -> str:
    """The name with what MLflow refuses in metric and parameter names ('=', '@', ...) replaced; slashes still make groups."""
    allowed = re.sub(r"[^/\w.\- :]", "_", name)
    return "/".join(part for part in allowed.split("/") if part not in ("", ".", ".."))[:LONGEST_NAME] or "_"


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {metric_name(name): str(value)[:LONGEST_TAG] for name, value in tags.items()}


def _batches(items: Sequence[Result], size: int) -> list[Sequence[Result]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _send_batch(run_id: str, metrics: Sequence[Any], params: Sequence[Any], tags: Sequence[Any], client: MlflowClient, _: str) -> None:
    client.log_batch(run_id, metrics=metrics, params=params, tags=tags)


def _send_artifact(run_id: str, path: Path, client: MlflowClient, _: str) -> None:
    (client.log_artifacts if path.is_dir() else client.log_artifact)(run_id, str(path))


def _send_text(run_id: str, name: str, text: str, client: MlflowClient, _: str) -> None:
    client.log_text(run_id, text, name)


def _lead_to(board: str, protocols: Sequence[str], report: Path, client: MlflowClient, experiment: str) -> None:
    """A description with a link to the report for the runs that stand behind a board, but for trials, of which there are too many."""
    page = f"#/experiments/{experiment}/runs/{board}/artifacts/{quote(report.name)}"
    client.set_tag(board, NOTE_TAG, f"The leaderboard: [{report.name}]({page}), under Artifacts. Also at `{report}`.")
    for protocol in protocols:
        for run in _all_runs(client, experiment, f"tags.`{PROTOCOL_TAG}` = '{protocol}'"):
            tags = run.data.tags
            if NOTE_TAG in tags or tags.get(ROLE_TAG) == "trial":
                continue
            record = tags.get(RUN_TAG)
            which = f" Record `{record}`: `kdbench export {record}` writes its student to a file." if record else ""
            client.set_tag(run.info.run_id, NOTE_TAG, f"On the [leaderboard]({page}) of protocol `{protocol}`.{which}")


def _all_runs(client: MlflowClient, experiment: str, found_by: str) -> Iterator[Any]:
    token = None
    while True:
        some = client.search_runs([experiment], found_by, page_token=token)
        yield from some
        token = some.token
        if not token:
            return


def _points(run_id: str, client: MlflowClient, _: str) -> frozenset[tuple[str, int]]:
    """Name and step of every value that a run has."""
    names = client.get_run(run_id).data.metrics
    return frozenset((name, point.step) for name in names for point in client.get_metric_history(run_id, name))


def _close(run_id: str, status: Status, client: MlflowClient, _: str) -> str:
    client.set_terminated(run_id, status)
    return run_id


def _connect(uri: str, experiment_name: str) -> tuple[MlflowClient, str]:
    """A client and the id of the experiment, both made where they are missing."""
    from mlflow import MlflowClient

    database = database_of(uri)
    if database is None:
        _check_opens(uri)
        client = MlflowClient(tracking_uri=uri)
        return client, _experiment(client, experiment_name, None)
    database.parent.mkdir(parents=True, exist_ok=True)
    with _locked(database.with_name(f".{database.name}.lock")):
        if not database.exists():
            _make_database(database)
        uri = _with_timeout(uri, database)
        _check_opens(uri)
        client = MlflowClient(tracking_uri=uri)
        return client, _experiment(client, experiment_name, (database.parent / "mlartifacts").as_uri())


def _with_timeout(uri: str, database: Path) -> str:
    """The URI of an SQLite file as MLflow is given it, with the options that it has."""
    return f"{_sqlite_uri(database)}?{uri.partition('?')[2] or f'timeout={SQLITE_WAIT_SECONDS}'}"


def _check_opens(uri: str) -> None:
    """Raise what SQLAlchemy raises where a database can't be opened: MLflow would try it ten times, in 200 seconds, and log each try."""
    from mlflow.store.db.db_types import DATABASE_ENGINES

    if re.split(r"[+:]", uri, maxsplit=1)[0] not in DATABASE_ENGINES:
        return
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        sqlalchemy.inspect(engine)
    finally:
        engine.dispose()


def _make_database(database: Path) -> None:
    """MLflow makes its tables step by step and can't go on with a database that was left half made: so under another name first."""
    from mlflow import MlflowClient

    scratch = database.with_name(f".{database.name}.new")  # one name is enough: the caller holds the lock
    for left in (scratch, scratch.with_name(f"{scratch.name}-journal")):
        left.unlink(missing_ok=True)
    MlflowClient(tracking_uri=_sqlite_uri(scratch)).search_experiments(max_results=1)
    scratch.replace(database)


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process on the same server was quicker
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def open_runs(uri: str, results: str) -> dict[str, int]:
    """How many runs of these results are open, by MLflow experiment; nothing where MLflow can't be asked. Nothing is made or changed."""
    database = database_of(uri)
    if database is not None and not database.exists():
        return {}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    try:
        _check_opens(uri)
        client = MlflowClient(tracking_uri=uri if database is None else _with_timeout(uri, database))
        experiments = client.search_experiments()
        ours = _owners(uri, results)
        counts = {found.name: len(_open(client, found.experiment_id, ours)) for found in experiments}
    except Exception as error:  # MLflow passes on whatever its database driver or the network raises
        log.debug("MLflow at %s can't be asked: %s", without_secrets(uri), without_secrets(str(error)))
        return {}
    return {name: count for name, count in counts.items() if count}


def _owners(uri: str, results: str | None) -> set[str | None]:
    """The values of RESULTS_TAG by which runs are those of `results`.

    A run without one was made by an older kdbench: it is taken for ours in a database file, and not on a server.
    """
    ours: set[str | None] = set() if results is None else {_hash_of(results)}
    return ours if database_of(uri) is None else ours | {None}


def _hash_of(results: str) -> str:
    return hashlib.sha256(results.encode()).hexdigest()[:16]


def _open(client: MlflowClient, experiment: str, owners: set[str | None]) -> dict[str, str]:
    """The open runs of an experiment, by id: the key of each."""
    runs = {run.info.run_id: run.data.tags for run in _all_runs(client, experiment, "attributes.status = 'RUNNING'")}
    return {run_id: tags.get(KEY_TAG, "") for run_id, tags in runs.items() if tags.get(RESULTS_TAG) in owners}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: two that make the tables of a new database at once break it (measured: duplicate column)."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
