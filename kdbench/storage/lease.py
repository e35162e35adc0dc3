"""A lock in an object store, for drivers on different machines: a lease that its owner keeps renewing.

A lease is an object `NAME.lease/00000007`, made by a conditional PUT, so that of all that want number 7 one gets it. The highest number
holds. Its owner rewrites it ten times in `expiry()`; one that was not rewritten for so long, by the storage's own clock, is given up, and
the next number takes over. A number is never used twice: who wakes up after it was taken over finds a higher one and stops.

What is guaranteed, where the storage honours If-None-Match: of drivers that start, one goes on; a dead one is replaced. A driver that was
stopped, or cut off from the storage, for longer than that may train on beside the one that took over. But it writes no more: before each
record and each write to a study it asks for the highest number, and where that is not its own it stops.

What is not guaranteed: a driver that is stopped between that question and the write, for longer than a lease, still writes this one thing
when it goes on. A record says the number under which it was written, so that of two of one unit readers take that of the higher one. A
part of a study is written under its place in the journal, and only where nothing is there (see `journals`).
"""

from __future__ import annotations

import json
import logging
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from kdbench.bounded import parse_json
from kdbench.errors import KDBenchError, RunFailed
from kdbench.storage.locks import Held
from kdbench.storage.object_store import ObjectStore, seconds_from

EXPIRY = "KDBENCH_LEASE_SECONDS"
EXPIRY_SECONDS = 60.0
_RENEWALS = 10  # in the time in which a lease expires
_LOOKS = 5  # between two renewals, by who waits

log = logging.getLogger(__name__)


class Lease:
    """One that is held. Its number is higher than that of every earlier holder."""

    def __init__(self, store: ObjectStore, name: str, number: int) -> None:
        self.number = number
        self._store, self._name = store, name
        self._lost = False

    @property
    def path(self) -> str:
        return f"{_folder(self._name)}/{self.number:08d}"

    @property
    def lost(self) -> bool:
        """Whether it is known that another machine took over."""
        return self._lost

    def is_ours(self) -> bool:
        """Whether nobody took over; asks the storage."""
        self._lost = self._lost or _numbers(self._store, _folder(self._name))[-1:] != [self.number]
        return not self._lost

    def check(self) -> None:
        """Raise RunFailed where another machine took over: whoever calls this is about to write what that one writes too."""
        if not self.is_ours():
            raise self.taken_over()

    def taken_over(self) -> RunFailed:
        reason = f"as this one was stopped, or cut off from {self._store.name}, for longer than a lease"
        return RunFailed(f"{self._name}: another machine took this experiment over, {reason}; nothing more is written from here")


@contextmanager
def leased(store: ObjectStore, name: str, holder: str, waiting: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the lease. `holder` names a working copy; whoever calls this holds a file lock in it, so its earlier leases are dead.

    `waiting` is told when it has to be seen whether a lease is still renewed, which takes up to `expiry()`.

    Raises Held where another machine renews it; RunFailed in the main thread once another one took it over.
    """
    folder = _folder(name)
    owner = secrets.token_hex(8)
    lease = Lease(store, name, _take_over(store, folder, owner, holder, waiting))
    ended = threading.Event()
    ending = threading.Lock()  # so that nobody is interrupted who has ended
    renewing = threading.Thread(target=_renew, args=(store, lease, _text(owner, holder), ended, ending), daemon=True)
    renewing.start()
    try:
        yield lease
    except KeyboardInterrupt:
        if lease.lost:
            raise lease.taken_over() from None
        raise
    except (OSError, RuntimeError) as error:  # such as a library's of its lock on a journal, which the other machine took away
        if _is_surely_lost(lease):
            raise lease.taken_over() from error
        raise
    finally:
        try:
            with ending:
                ended.set()
            renewing.join(expiry())
        except KeyboardInterrupt:
            if not lease.lost:
                raise
        if not lease.lost:
            with suppress(KDBenchError):  # it then expires
                store.replace(lease.path, _text(owner, holder, released=True), patient=False)


def _is_surely_lost(lease: Lease) -> bool:
    try:
        return not lease.is_ours()
    except KDBenchError:  # the storage does not answer
        return False


def _folder(name: str) -> str:
    return f"locks/{name}.lease"


def held_now(store: ObjectStore) -> set[str]:
    """The names of all leases that somebody holds: neither given back nor expired."""
    numbers: dict[str, int] = {}
    for path in store.find("locks"):
        name, _, number = path.removeprefix("locks/").rpartition(".lease/")
        if name and number.isdigit():
            numbers[name] = max(int(number), numbers.get(name, 0))
    return {name for name, number in numbers.items() if _is_held(store, f"{_folder(name)}/{number:08d}")}


def _is_held(store: ObjectStore, path: str) -> bool:
    """Where nobody may write, the storage's clock can't be asked, and a lease that was not given back counts as held."""
    try:
        return not _content(store, path).get("released") and _age(store, path, patient=False) <= expiry()
    except (FileNotFoundError, ValueError):
        return False
    except KDBenchError:
        return True


def _content(store: ObjectStore, path: str) -> Mapping[str, Any]:
    """What a lease says. Raises FileNotFoundError, and ValueError where no lease of ours is there."""
    found = parse_json(store.read(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a lease")
    return found


def _age(store: ObjectStore, path: str, patient: bool = True) -> float:
    """Seconds since an object was written, by the storage's own clock. Raises FileNotFoundError."""
    written = store.modified(path)
    probe = f"{path}.{secrets.token_hex(4)}"
    store.replace(probe, b"", patient)
    try:
        return (store.modified(probe) - written).total_seconds()
    finally:
        store.remove(probe)


def expiry() -> float:
    """After how many seconds without a sign of its owner a lease is given up. Raises UserError where the variable holds no such number."""
    return seconds_from(EXPIRY, EXPIRY_SECONDS, least=1.0)


def _take_over(store: ObjectStore, folder: str, owner: str, holder: str, waiting: Callable[[str], None]) -> int:
    """The number of the new lease. Raises Held."""
    while True:
        numbers = _numbers(store, folder)
        latest = numbers[-1] if numbers else 0
        if numbers:
            _wait_until_given_up(store, f"{folder}/{latest:08d}", holder, waiting)
        mine = f"{folder}/{latest + 1:08d}"
        try:
            store.create(mine, _text(owner, holder))
        except FileExistsError:
            continue  # another one was quicker: see whether it renews
        _check_conditional(store, mine, holder)
        for number in numbers[:-1]:  # the last but one stays, for its owner to find this one after it
            store.remove(f"{folder}/{number:08d}")
        return latest + 1


def _check_conditional(store: ObjectStore, path: str, holder: str) -> None:
    """Say so where the storage ignores If-None-Match: a second object of this name must be refused."""
    try:
        store.create(path, _text("probe", holder))
    except FileExistsError:
        return
    log.warning("%s takes no conditional writes: see to it yourself that an experiment is run by one driver at a time", store.name)


def _wait_until_given_up(store: ObjectStore, path: str, holder: str, waiting: Callable[[str], None]) -> None:
    """Return once the lease is released, expired, or known to be dead. Raises Held where it is renewed meanwhile."""
    first, told = None, False
    while True:
        try:
            found = _content(store, path)
            renewed = store.modified(path)
        except (FileNotFoundError, ValueError):
            return
        if found.get("released") or found.get("holder") == holder:
            return
        if first is not None and renewed != first:
            raise Held("a process on another machine")
        age = _age(store, path)
        if age > expiry():
            return
        if not told:
            waiting(f"another machine had this experiment {age:.0f} s ago; it is given up after {expiry():.0f} s without a sign")
            told = True
        first = renewed
        time.sleep(expiry() / _RENEWALS / _LOOKS)


def _renew(store: ObjectStore, lease: Lease, text: bytes, ended: threading.Event, ending: threading.Lock) -> None:
    """Runs in a thread of its own. A storage that refuses for a while is left to whoever writes results to complain of."""
    while not ended.wait(expiry() / _RENEWALS):
        try:
            if lease.is_ours():
                store.replace(lease.path, text, patient=False)
                continue
        except KDBenchError as error:
            log.debug("the lease could not be renewed: %s", error)
            continue
        with ending:
            if not ended.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, _interrupt())  # which also ends a wait of the main thread
        return


def _interrupt() -> signal.Signals:
    """SIGINT, or SIGTERM where SIGINT is ignored: a shell without job control starts what it puts into the background so."""
    return signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT


def _numbers(store: ObjectStore, folder: str) -> list[int]:
    names = (path.rpartition("/")[2] for path in store.find(folder))
    return sorted(int(name) for name in names if name.isdigit())


def _text(owner: str, holder: str, **facts: Any) -> bytes:
    return json.dumps({"owner": owner, "holder": holder, **facts}).encode()
