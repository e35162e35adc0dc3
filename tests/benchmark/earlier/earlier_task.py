"""A user's own task, with which a search was made at version 1."""

from __future__ import annotations

from kdbench.tasks.classification import Classification


class Versioned(Classification):
    """Classification, of which a test may raise the version."""

    version = 1
