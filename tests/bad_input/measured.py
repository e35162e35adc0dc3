"""Many commands in one process of their own, each with the memory that it took: what a test's own process holds is not measured."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
SECONDS = 250  # for all commands of a call: what hangs is ended


class Measured(NamedTuple):
    """How a command ended. megabytes: of memory at its peak, above what the process had when it began."""

    code: int
    err: str
    megabytes: float


def measured(folders: Sequence[Path], commands: Sequence[Sequence[str]]) -> list[list[Measured]]:
    """Each command in each of the folders, one after the other. A folder `sets` in one of them is where data sets are looked for.

    Args:
        folders: where to start the commands.
        commands: arguments of kdbench.

    Returns:
        For each folder, how each command ended.
    """
    process = [sys.executable, "-m", __spec__.name, json.dumps([list(map(str, folders)), commands])]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "KDBENCH_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(process, cwd=folders[0], env=environment, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=True)
    lines = iter(ended.stdout.splitlines())
    return [[Measured(*json.loads(next(lines))) for _ in commands] for _ in folders]


def main(folders: Sequence[str], commands: Sequence[Sequence[str]]) -> None:
    from kdbench.benchmark import checks, dry_run
    from kdbench.cli import app as cli
    from kdbench.data import sources
    from kdbench.tasks import build

    del dry_run  # imported now, so that no command takes the memory for it
    answers = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    for folder, command in product(folders, commands):
        os.chdir(folder)
        os.environ["KDBENCH_DATA"] = str(Path(folder, "sets"))
        for remembered in (sources._opened, build._built, checks.check_images):
            remembered.cache_clear()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, proc(5)
        before = _megabytes("VmRSS")
        code, said = _ended(cli.main, ["kdbench", *command])
        answers.write(json.dumps([code, said, _megabytes("VmHWM") - before]) + "\n")
    answers.close()


def _ended(main: Callable[[], None], command: list[str]) -> tuple[int, str]:
    """The exit code of a command, and what it and the C libraries below it wrote on the standard error."""
    sys.argv, kept = command, os.dup(2)
    with tempfile.TemporaryFile("w+b") as said:
        os.dup2(said.fileno(), 2)
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        said.seek(0)
        return code, said.read().decode(errors="replace")


def _megabytes(key: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 1000


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
