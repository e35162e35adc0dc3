"""Where Ray Tune and Ray Train keep what they note down about a run. All nodes see it, and it is thrown away when the run ends."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdbench.experiment import Runtime
from kdbench.storage.address import is_address
from kdbench.storage.folder import Folder
from kdbench.storage.layout import Layout
from kdbench.storage.object_store import Files, ObjectStore
from kdbench.storage.scratch import SCRATCH


@contextmanager
def scratch(layout: Layout, runtime: Runtime, experiment: str) -> Iterator[str]:
    """A folder of this machine for a private Ray; for a cluster one beside the results, in their folder or at their address.

    Its name tells the experiment, so that the next command knows whether whoever made it is gone.
    """
    location = layout.location
    if runtime.address is not None and is_address(location):
        store = ObjectStore(f"{location}/{SCRATCH}{experiment}-{secrets.token_hex(4)}")
        try:
            yield store.name
        finally:
            for path in store.find(""):
                store.remove(path, patient=False)
        return
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{experiment}-", dir=location if runtime.address is not None else None) as folder:
        yield str(Path(folder).resolve())


def ray_storage(place: str) -> dict[str, Any]:
    """The arguments of a RunConfig that name this place. An address goes through the driver that writes results, and its credentials."""
    if not is_address(place):
        return {"storage_path": place}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    store = ObjectStore(place)
    return {"storage_path": store.root, "storage_filesystem": PyFileSystem(FSSpecHandler(store.driver))}


def files_in(place: str) -> Files:
    return ObjectStore(place) if is_address(place) else Folder(Path(place))
