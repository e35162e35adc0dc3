"""Addresses of object stores (s3://bucket/folder, gs://bucket/folder): told from folders, and checked before anything uses them."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kdbench.catalogue import nearest
from kdbench.errors import UserError, printable

EXTRAS = {"s3": "s3", "gs": "gs"}  # scheme -> what `pip install kdbench[...]` needs for it
SCHEMES = (*EXTRAS, "memory")  # memory:// lives as long as its process: for tests
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL | re.IGNORECASE)
# Results are named in records, logs and URIs, all of which are lines of text.
_UNNAMEABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_address(location: str) -> bool:
    """Whether this names an object store and not a folder; file:///x names a folder."""
    found = _ADDRESS.fullmatch(location)
    return found is not None and found[1].lower() != "file"


def folder_at(location: str) -> Path:
    """The folder that a path or a URI such as file:///data/my%20results names. Nothing is looked up or made.

    Raises UserError for a URI of another machine, and for a name with control characters or bytes that are not UTF-8.
    """
    path = location
    if re.match(r"file:/", location, re.IGNORECASE):
        parts = urlsplit(location)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise UserError(f"results: '{printable(location)}' names no folder of this machine; expected file:///folder, or the path alone")
        path = unquote(parts.path, errors="surrogateescape")
    elif "://" in location:  # fsspec's chains, such as simplecache::s3://bucket; what they hold may be credentials
        raise UserError(
            "results: the path holds '://' and begins with no scheme; expected s3://bucket/folder, gs://bucket/folder or a path"
        )
    if _UNNAMEABLE.search(path):
        raise UserError(
            f"results: the path '{printable(path)}' holds control characters or bytes that are not UTF-8. Rename the folder, "
            "or choose another with --results DIR"
        )
    return Path(path)


def problem_with(address: str) -> str | None:
    """Why it can't be used: an unknown scheme, no bucket, or credentials, which are not repeated. None where it can."""
    scheme, rest = _parts(address)
    if "@" in rest or "?" in rest:
        return (
            f"the {scheme}:// address holds credentials or options, got user:password@ or something behind ? in it; "
            f"write {scheme}://bucket/folder, and set credentials in the environment"
        )
    if "::" in rest or _UNNAMEABLE.search(rest):  # fsspec would take what is behind :: for a storage of its own
        return f"'{printable(address)}': an address may not hold '::', control characters or bytes that are not UTF-8"
    if scheme not in SCHEMES:
        return f"{address!r}: no storage is called {scheme!r}{nearest(scheme, EXTRAS)}"
    if not rest:
        return f"{address!r}: expected {scheme}://bucket/folder, got no bucket"
    return None


def checked_address(address: str) -> str:
    """The address in its one spelling, without a slash at the end. Raises UserError where it can't be used."""
    problem = problem_with(address)
    if problem is not None:
        raise UserError(f"results: {problem}")
    scheme, rest = _parts(address)
    return f"{scheme}://{rest}"


def _parts(address: str) -> tuple[str, str]:
    found = _ADDRESS.fullmatch(address)
    assert found is not None, "only asked of what is_address"
    return found[1].lower(), found[2].strip("/")
