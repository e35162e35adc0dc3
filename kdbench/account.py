"""The user's name and home: libraries ask for both, and a container that runs as any number (`docker run --user 12345`) has neither."""

from __future__ import annotations

import logging
import os
import pwd
from pathlib import Path

_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where `getpass.getuser` looks first

NO_HOME = Path("/nonexistent")  # Debian's name for the home of those that have none: whoever would write there is told that it can't


def home() -> Path:
    """The user's home, which need not exist; NO_HOME where neither HOME nor the system says one."""
    try:
        return Path.home()
    except RuntimeError:
        return NO_HOME


def cache_home() -> Path:
    """Where this user's programs keep what can be made again: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache")


def home_is_writable() -> bool:
    """Whether files can be made in the home."""
    return os.access(home(), os.W_OK | os.X_OK)


def complete_environment() -> None:
    """Give this process, and those that it starts, a name and a home in the environment where the system knows none.

    torch's compiler, MLflow and Ray raise an error where the name or the home can't be found out, even if they write nothing there.
    """
    if not any(os.environ.get(name) for name in _NAMES) and not _has_entry():
        os.environ["USER"] = f"uid{os.getuid()}"
    os.environ.setdefault("HOME", str(home()))
    if not home_is_writable():
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it makes do with a temporary folder, and explains that at length


def _has_entry() -> bool:
    """Whether the system knows a name of this user."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True
