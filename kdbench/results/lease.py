"""A lock in an object store, for drivers on different machines: a lease that its owner keeps renewing.

A lease is an object `NAME.lease/00000007`, made by a conditional PUT, so that of all that want number 7 one gets it. The highest number
holds. Its owner rewrites it ten times in `expiry()`; one that was not rewritten for so long, by the storage's own clock, is given up, and
the next number takes over. A number is never used twice: who wakes up after it was taken over finds a higher one and stops.

What is guaranteed, where the storage honours If-None-Match: of drivers that start, one goes on; a dead one is replaced. What is not: a
driver that is cut off from the storage for longer than that may go on, beside the one that took over, until it reaches the storage again
and for a tenth of `expiry()` after that. Both then write records of the same units, of which readers take the later; none is lost.
"""

from __future__ import annotations

import json
import logging
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kdbench.errors import KDBenchError, RunFailed
from kdbench.results.locks import Held
from kdbench.results.object_store import ObjectStore, seconds_from

EXPIRY = "KDBENCH_LEASE_SECONDS"
EXPIRY_SECONDS = 60.0
_RENEWALS = 10  # in the time in which a lease expires
_LOOKS = 5  # between two renewals, by who waits

log = logging.getLogger(__name__)


@contextmanager
def leased(store: ObjectStore, name: str, holder: str, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the lease. `holder` names a working copy; whoever calls this holds a file lock in it, so its earlier leases are dead.

    `waiting` is told when it has to be seen whether a lease is still renewed, which takes up to `expiry()`.

    Raises Held where another machine renews it; RunFailed in the main thread once another one took it over.
    """
    folder = f"locks/{name}.lease"
    owner = secrets.token_hex(8)
    number = _take_over(store, folder, owner, holder, waiting)
    lost, ended = threading.Event(), threading.Event()
    renewing = threading.Thread(target=_renew, args=(store, folder, number, owner, holder, lost, ended), daemon=True)
    renewing.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise RunFailed(f"{name}: another machine took this experiment over, as this one was cut off from {store.name}") from None
        raise
    finally:
        ended.set()
        renewing.join(expiry())
        if not lost.is_set():
            with suppress(KDBenchError):  # it then expires
                store.replace(f"{folder}/{number:08d}", _text(owner, holder, released=True), patient=False)


def held_now(store: ObjectStore) -> set[str]:
    """The names of all leases that somebody holds: neither given back nor expired."""
    numbers: dict[str, int] = {}
    for path in store.find("locks"):
        name, _, number = path.removeprefix("locks/").rpartition(".lease/")
        if name and number.isdigit():
            numbers[name] = max(int(number), numbers.get(name, 0))
    return {name for name, number in numbers.items() if _is_held(store, f"locks/{name}.lease/{number:08d}")}


def _is_held(store: ObjectStore, path: str) -> bool:
    try:
        return not json.loads(store.read(path)).get("released") and _age(store, path) <= expiry()
    except (FileNotFoundError, ValueError):
        return False


def _age(store: ObjectStore, path: str) -> float:
    """Seconds since an object was written, by the storage's own clock. Raises FileNotFoundError."""
    written = store.modified(path)
    probe = f"{path}.{secrets.token_hex(4)}"
    store.replace(probe, b"")
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
            found = json.loads(store.read(path))
            renewed = store.modified(path)
        except (FileNotFoundError, ValueError):
            return
        if found.get("released") or found.get("holder") == holder:
            return
        if first is not None and renewed != first:
            raise Held("a process on another machine")
        probe = f"{path}.{secrets.token_hex(4)}"
        store.replace(probe, b"")
        age = (store.modified(probe) - renewed).total_seconds()
        store.remove(probe)
        if age > expiry():
            return
        if not told:
            waiting(f"another machine had this experiment {age:.0f} s ago; it is given up after {expiry():.0f} s without a sign")
            told = True
        first = renewed
        time.sleep(expiry() / _RENEWALS / _LOOKS)


def _renew(store: ObjectStore, folder: str, number: int, owner: str, holder: str, lost: threading.Event, ended: threading.Event) -> None:
    """Runs in a thread of its own. A storage that refuses for a while is left to whoever writes results to complain of."""
    while not ended.wait(expiry() / _RENEWALS):
        try:
            if _numbers(store, folder)[-1:] != [number]:
                lost.set()
                signal.pthread_kill(threading.main_thread().ident or 0, _interrupt())  # which also ends a wait of the main thread
                return
            store.replace(f"{folder}/{number:08d}", _text(owner, holder), patient=False)
        except KDBenchError as error:
            log.debug("the lease could not be renewed: %s", error)


def _interrupt() -> signal.Signals:
    """SIGINT, or SIGTERM where SIGINT is ignored: a shell without job control starts what it puts into the background so."""
    return signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT


def _numbers(store: ObjectStore, folder: str) -> list[int]:
    names = (path.rpartition("/")[2] for path in store.find(folder))
    return sorted(int(name) for name in names if name.isdigit())


def _text(owner: str, holder: str, **facts: Any) -> bytes:
    return json.dumps({"owner": owner, "holder": holder, **facts}).encode()
