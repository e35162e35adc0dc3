"""Addresses of object stores (s3://bucket/folder, gs://bucket/folder): told from folders, and checked before anything uses them."""

from __future__ import annotations

import os
import re

from kdbench.catalogue import nearest
from kdbench.errors import UserError

EXTRAS = {"s3": "s3", "gs": "gs"}  # scheme -> what `pip install kdbench[...]` needs for it
SCHEMES = (*EXTRAS, "memory")  # memory:// lives as long as its process: for tests
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_SHORTEST_SECRET = 8  # characters; a shorter one would be found in innocent words


def is_address(location: str) -> bool:
    """Whether this names an object store and not a folder; file:///x names a folder."""
    found = _ADDRESS.fullmatch(location)
    return found is not None and found[1] != "file"


def problem_with(address: str) -> str | None:
    """Why it can't be used: an unknown scheme, no bucket, or credentials, which are not repeated. None where it can."""
    scheme, rest = _parts(address)
    if "@" in rest or "?" in rest:
        return (
            f"the {scheme}:// address holds credentials or options, got user:password@ or ?key=value in it; "
            f"write {scheme}://bucket/folder, and set credentials in the environment"
        )
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
    return found[1], found[2].strip("/")


def without_secrets(text: str) -> str:
    """Text of foreign code with whatever could be a credential taken out: user:password@ of addresses, and what the environment holds."""
    text = re.sub(r"://[^/@\s]*@", "://", text)
    for name in _SECRETS:
        secret = os.environ.get(name, "")
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return text
