"""One driver holds an experiment, whatever machine it is on; a dead one is replaced, and one that was cut off stops."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from kdbench.errors import RunFailed
from kdbench.storage import lease as leases
from kdbench.storage.lease import held_now, leased
from kdbench.storage.locks import Held
from kdbench.storage.object_store import ObjectStore
from tests.object_storage import ObjectStorage


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDBENCH_LEASE_SECONDS", "1")


@pytest.fixture
def store(bucket: str) -> ObjectStore:
    return ObjectStore(bucket)


def held_by(store: ObjectStore, holder: str) -> None:
    with leased(store, "study", holder, print):
        pass


def leave_behind(store: ObjectStore, holder: str, name: str = "study") -> None:
    """What a killed driver leaves."""
    store.create(f"locks/{name}.lease/00000001", f'{{"owner": "x", "holder": "{holder}"}}'.encode())


class StorageClock:
    """The storage's own clock, which a lease expires by. It moves on with the owner's renewals alone, a tenth of a lease at each.

    With `passes_while_waiting` it moves on with the pauses of who waits, too, which then take no time.
    """

    def __init__(self, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.renewals = datetime(2026, 1, 1, tzinfo=UTC), 0
        self.written: dict[str, datetime] = {}
        self.enough = threading.Event()
        self._create, self._replace = store.create, store.replace
        monkeypatch.setattr(store, "create", self.create)
        monkeypatch.setattr(store, "replace", self.replace)
        monkeypatch.setattr(store, "modified", lambda path: self.written[path])

    def create(self, path: str, data: bytes) -> None:
        self._create(path, data)
        self.written[path] = self.now

    def replace(self, path: str, data: bytes, patient: bool = True) -> None:
        self._replace(path, data, patient)
        if data:  # a probe is empty
            self.now += timedelta(seconds=0.1)
            self.renewals += 1
        self.written[path] = self.now
        if self.renewals > 15:
            self.enough.set()

    def passes_while_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leases, "time", SimpleNamespace(**vars(time) | {"sleep": self._sleep}))

    def _sleep(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def test_another_machine_is_refused_while_the_first_renews(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StorageClock(store, monkeypatch)
    with leased(store, "study", "here", print):
        assert clock.enough.wait(60)
        assert clock.now - datetime(2026, 1, 1, tzinfo=UTC) > timedelta(seconds=1.5)  # longer than a lease that nobody renews
        with pytest.raises(Held, match="another machine"):
            held_by(store, "there")


def test_a_lease_that_was_given_back_is_taken_at_once(store: ObjectStore) -> None:
    held_by(store, "here")
    with leased(store, "study", "there", lambda text: pytest.fail(f"waited: {text}")):
        pass


def test_a_killed_drivers_lease_is_taken_over_by_another_machine_once_it_expired(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = StorageClock(store, monkeypatch)
    clock.passes_while_waiting(monkeypatch)
    begun = clock.now
    leave_behind(store, "there")
    said: list[str] = []
    with leased(store, "study", "here", said.append):
        assert said == ["another machine had this experiment 0 s ago; it is given up after 1 s without a sign"]
        assert clock.written["locks/study.lease/00000002"] - begun > timedelta(seconds=1)


def test_a_killed_drivers_lease_is_no_obstacle_on_its_own_machine(store: ObjectStore) -> None:
    leave_behind(store, "here")
    with leased(store, "study", "here", lambda text: pytest.fail(f"waited: {text}")):
        pass


def test_of_two_that_take_over_at_once_one_holds(store: ObjectStore, monkeypatch) -> None:
    """The other one was quicker by a moment, and then died: it is found, waited for, and followed."""
    StorageClock(store, monkeypatch).passes_while_waiting(monkeypatch)
    create = store.create

    def after_another_one(path: str, data: bytes) -> None:
        if path.endswith("00000001"):
            create(path, b'{"holder": "quicker"}')
        create(path, data)

    monkeypatch.setattr(store, "create", after_another_one)
    said: list[str] = []
    with leased(store, "study", "here", said.append):
        assert said
        assert sorted(store.find("locks")) == ["locks/study.lease/00000001", "locks/study.lease/00000002"]


@pytest.fixture(params=["in the foreground", "in the background"])
def started(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the background of a shell without job control SIGINT is ignored; the command ends by SIGTERM as it does by SIGINT."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler if request.param == "in the foreground" else signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


@pytest.mark.usefixtures("started")
def test_a_driver_that_was_taken_over_stops(store: ObjectStore) -> None:
    def go_on() -> None:
        with leased(store, "study", "here", print):
            store.create("locks/study.lease/00000002", b"{}")
            time.sleep(60)

    with pytest.raises(RunFailed, match="another machine took this experiment over"):
        go_on()


def test_whoever_was_taken_over_is_told_so_before_it_writes(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDBENCH_LEASE_SECONDS", "3600")  # it does not look by itself, as if it had just been continued
    with leased(store, "study", "here", print) as lease:
        lease.check()
        store.create("locks/study.lease/00000002", b"{}")
        for _ in range(2):
            with pytest.raises(RunFailed, match=r"^study: another machine took this experiment over, .*; nothing more is"):
                lease.check()
    assert store.read("locks/study.lease/00000002") == b"{}"


@pytest.mark.parametrize("broken", [FileNotFoundError("journal.lock"), RuntimeError("Error: did not possess lock")])
@pytest.mark.parametrize("taken", [True, False])
def test_what_breaks_because_another_machine_took_over_is_told_as_such(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, broken: Exception, taken: bool
) -> None:
    monkeypatch.setenv("KDBENCH_LEASE_SECONDS", "3600")

    def go_on() -> None:
        with leased(store, "study", "here", print):
            if taken:
                store.create("locks/study.lease/00000002", b"{}")
            raise broken

    with pytest.raises(RunFailed if taken else type(broken), match="took this experiment over" if taken else "lock"):
        go_on()


def test_the_number_of_a_lease_is_higher_than_that_of_every_holder_before(store: ObjectStore) -> None:
    numbers = []
    for holder in ("here", "there", "there", "here"):
        with leased(store, "study", holder, print) as lease:
            numbers.append(lease.number)
    assert numbers == [1, 2, 3, 4]


def test_a_lease_is_held_until_it_is_given_back_or_expires(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StorageClock(store, monkeypatch)
    assert held_now(store) == set()
    with leased(store, "study", "here", print), leased(store, "other", "here", print):
        assert held_now(store) == {"study", "other"}
    leave_behind(store, "there", "third")
    assert held_now(store) == {"third"}
    clock.now += timedelta(seconds=1.5)
    assert held_now(store) == set()


def test_a_lease_is_taken_for_held_by_who_may_not_write(store: ObjectStore, object_storage: ObjectStorage, monkeypatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    leave_behind(store, "there")
    monkeypatch.setattr(object_storage.gate, "refuses", lambda method, path: method == "PUT")
    assert held_now(store) == {"study"}


def test_a_storage_without_conditional_writes_is_told_of(store: ObjectStore, monkeypatch, caplog) -> None:
    monkeypatch.setattr(store, "create", store.replace)
    held_by(store, "here")

    assert "takes no conditional writes" in caplog.text
