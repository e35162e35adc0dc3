"""What kdbench says when something is wrong: one readable message and an exit code, never a traceback for a user's mistake."""

from __future__ import annotations


class KDBenchError(Exception):
    """Base of every error that ends a command with one line. `exit_code` is what the shell sees."""

    exit_code = 1


class UserError(KDBenchError):
    """The input is wrong: a file, a key, a name, a value. The message says which, what was expected and what is near."""

    exit_code = 2


class RunFailed(KDBenchError):
    """The input was fine but the work could not be finished: a full disk, a dead worker, a diverged teacher."""


class Diverged(RunFailed):
    """A loss or a metric became nan or infinite. The message says where."""
