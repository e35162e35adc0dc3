"""How much memory a piece of kdbench takes, measured in a process of its own.

`ru_maxrss` would tell nothing: a child inherits the maximum of the process that started it, over fork and exec, and pytest's own is large.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

_CHILD = """
import json, sys
from kdbench.errors import UserError

def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":"))

def begin():
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the maximum is now what is in memory
    return kilobytes("VmRSS")

{imports}
before = begin()
try:
    {call}
    said = ""
except UserError as error:
    said = str(error)
print(json.dumps([kilobytes("VmHWM") - before, said]))
"""


class Measured(NamedTuple):
    """kilobytes: above what the process had when the call began. said: the UserError that ended it, or nothing."""

    kilobytes: int
    said: str


def measured(imports: str, call: str, *arguments: object) -> Measured:
    """Run `call` after `imports`, both Python source on one line, which finds `arguments` as text in `sys.argv[1:]`."""
    code = _CHILD.format(imports=imports, call=call)
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True)
    return Measured(*json.loads(done.stdout.splitlines()[-1]))
