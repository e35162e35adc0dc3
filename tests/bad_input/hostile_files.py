"""Give kdbench two hundred hostile files, one a command, and measure how each command ends.

    python -m tests.bad_input.hostile_files --seed 20261129

`hostile_kinds` makes the files from the seed. Each command runs in a process of its own, forked from one that has
imported the modules, in a folder of its own, with a new results folder, home and TMPDIR, and nothing to read on its input. It has to end
with exit code 2 and one line that begins as kdbench's errors do (ten lines at most for an experiment with several problems), within 10 s
and 300 MB, and to leave no file behind. A few further cases are of commands that rightly name one bad file, leave it out and go on: each
states the exit code that it expects, and which name has to be in the output.

Seconds and memory are those of the command: from the call of kdbench's `main`, when the modules that the command needs anyway are imported.
Memory is the growth of VmHWM, which the process reads of itself; `ru_maxrss` would be that of the process that started it.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from kdbench.errors import cut, printable
from tests.bad_input.hostile_case import Case, Draws, Maker
from tests.bad_input.hostile_kinds import GROUPS

SEED = 20261129
MOST_SECONDS = 10.0
MOST_MEGABYTES = 300.0
LONGEST_LINE = 1_000  # characters
_TIME_LIMIT = 60.0  # seconds after which a command is ended
_MEMORY_LIMIT = 2_000.0  # megabytes above which a command is ended, for the machine's sake
_AT_ONCE = 2
_MAY_STAY = re.compile(r"home/\.cache(/kdbench(/content.*)?)?$|tmp/torchinductor_[^/]*$")
_FAULT = re.compile(r"\b(Assertion|Attribute|Index|Memory|Name|Recursion)Error\b")
_REPOSITORY = Path(__file__).parents[2]

# Imports once what the commands import anyway. For each line that it reads it forks a process that is the console script, and prints this
# process's number, then its exit code. The variables and folders that modules may have looked at are those of the command.
_COMMANDS = """
import atexit, gc, importlib, json, os, sys, tempfile, time, traceback
def highest():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
for module in sys.argv[1].split(","):
    importlib.import_module(module)
from kdbench.cli.app import main
gc.collect()
gc.freeze()
for line in sys.stdin:
    command = json.loads(line)
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(command["here"])
    os.environ.clear()
    os.environ.update(command["environment"])
    tempfile.tempdir = None
    for opened, name, how in ((0, os.devnull, os.O_RDONLY), (1, command["out"], os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(name, how, 0o600), opened)
    os.dup2(1, 2)
    sys.stdin = open(0, closefd=False)
    sys.argv = ["kdbench", *command["arguments"]]
    before, began, code = highest(), time.perf_counter(), 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    with open(command["report"], "w") as report:
        json.dump([time.perf_counter() - began, (highest() - before) / 1000], report)
    atexit._run_exitfuncs()  # what an exit does, but for taking a million objects apart, which takes a second
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
"""


@dataclass(frozen=True)
class Numbered:
    """A case that can be made. turn: how many of its kind come before it."""

    number: int
    group: str
    maker: Maker
    turn: int

    @property
    def kind(self) -> str:
        return f"{self.group}: {self.maker.__name__.removeprefix('_').replace('_', ' ')}"

    def made(self, folder: Path, seed: int) -> Case:
        """The files in `folder`, which must be empty, and the command."""
        return self.maker(folder, Draws(seed, self.maker.__name__, self.turn))


class Ended(NamedTuple):
    """How a command ended. code: None where it had to be ended. seconds, megabytes: None where it did not say."""

    code: int | None
    lines: tuple[str, ...]
    seconds: float | None
    megabytes: float | None
    left: tuple[str, ...]  # paths that were not there before, below the case's folder
    stopped: str = ""  # why it had to be ended


def all_cases() -> list[Numbered]:
    """Every case, in the order of its number."""
    found = [(group, maker, turn) for group, makers in GROUPS.items() for maker, times in makers for turn in range(times)]
    return [Numbered(number, *case) for number, case in enumerate(found, start=1)]


def tried(numbered: Numbered, base: Path, seed: int, time_limit: float = _TIME_LIMIT) -> tuple[Case, Ended]:
    """Make the files of a case in a folder of its own below `base`, and run its command."""
    folder = base / f"{numbered.number:03d}"
    for name in ("here", "home", "tmp"):
        (folder / name).mkdir(parents=True)
    case = numbered.made(folder / "here", seed)
    return case, _run(case, folder, time_limit)


def problems(case: Case, ended: Ended, most_seconds: float = MOST_SECONDS, most_megabytes: float = MOST_MEGABYTES) -> Iterator[str]:
    """What is wrong with how a command ended, a line each."""
    if ended.stopped:
        yield ended.stopped
        return
    if ended.code != case.code:
        yield f"exit code {ended.code}, expected {case.code}"
    text = "\n".join(ended.lines)
    if "traceback" in text.lower():
        yield "a traceback"
    if case.code == 2 and not 1 <= len(ended.lines) <= case.most_lines:
        yield f"{len(ended.lines)} lines, expected {'one' if case.most_lines == 1 else f'1 to {case.most_lines}'}"
    if case.code == 2 and not text.startswith("kdbench: "):
        yield "it does not begin as errors do"
    if fault := _FAULT.search(text):
        yield f"a fault of the program, {fault[0]}, and not of the file"
    if any(len(line) > LONGEST_LINE for line in ended.lines):
        yield f"a line of {max(map(len, ended.lines)):,} characters"
    if case.said not in text:
        yield f"it does not say {case.said!r}"
    if ended.seconds is None or ended.megabytes is None:
        yield "it was killed before it could say what it took"
    else:
        if ended.seconds > most_seconds:
            yield f"{ended.seconds:.1f} s"
        if ended.megabytes > most_megabytes:
            yield f"{ended.megabytes:.0f} MB"
    if ended.left:
        yield f"left behind: {', '.join(ended.left[:5])}"


class _Commands:
    """A process that has imported what some commands need, and starts them one after the other."""

    def __init__(self, imports: tuple[str, ...]) -> None:
        self._home = tempfile.TemporaryDirectory()
        for name in ("home", "tmp"):
            Path(self._home.name, name).mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMANDS, ",".join(imports)],
            env=_environment(Path(self._home.name)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, case: Case, folder: Path, time_limit: float) -> tuple[int, str]:
        """The exit code of the command, and why it had to be ended, or nothing."""
        here = folder / "here"
        environment = _environment(folder) | {name: value.format(here=here) for name, value in case.environment.items()}
        paths = {"here": str(here), "out": str(folder / "out"), "report": str(folder / "report")}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**paths, "environment": environment, "arguments": case.arguments}) + "\n")
        self._process.stdin.flush()
        stopped = self._watched(int(self._said()), time_limit)
        return int(self._said()), stopped

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()
        self._home.cleanup()

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _watched(self, command: int, time_limit: float) -> str:
        began = time.monotonic()
        while not select.select([self._process.stdout], [], [], 0.05)[0]:
            stopped = ""
            if time.monotonic() - began > time_limit:
                stopped = f"it did not end in {time_limit:.0f} s"
            elif (used := _megabytes(command)) > _MEMORY_LIMIT:
                stopped = f"it took {used:,.0f} MB and was ended"
            if stopped:
                os.kill(command, signal.SIGKILL)
                return stopped
        return ""


@cache
def _commands(imports: tuple[str, ...], _thread: int) -> _Commands:
    """One for each thread, as it starts one command at a time."""
    started = _Commands(imports)
    atexit.register(started.close)
    return started


def _run(case: Case, folder: Path, time_limit: float) -> Ended:
    before = _below(folder)
    code, stopped = _commands(case.imports, threading.get_ident()).run(case, folder, time_limit)
    report = folder / "report"
    seconds, megabytes = json.loads(report.read_text()) if report.exists() else (None, None)
    text = (folder / "out").read_text(errors="backslashreplace")
    lines = tuple(line for line in text.splitlines() if line.strip() and not (case.progress and line.startswith(case.progress)))
    left = sorted(_below(folder) - before - {"out", "report"})
    return Ended(None if stopped else code, lines, seconds, megabytes, tuple(map(printable, left)), stopped)


def _megabytes(process: int) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, IndexError):  # it has just ended
        return 0.0


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KDBENCH_", "MLFLOW_", "RAY_", "XDG_"))}
    ours = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(_REPOSITORY), "KDBENCH_OFFLINE": "1"}
    return {**kept, **ours, "COLUMNS": "160", "PYTHONDONTWRITEBYTECODE": "1"}


def _below(folder: Path) -> set[str]:
    """Paths of everything below a folder, relative to it.

    What is remembered of files' content in the home folder may stay, and so may the folder that torch makes when it is imported.
    """
    # os.walk calls itself for each level, and there may be 1,200.
    listed = subprocess.run(["find", ".", "-mindepth", "1", "-print0"], cwd=folder, stdout=subprocess.PIPE, check=True).stdout
    found = {os.fsdecode(path).removeprefix("./") for path in listed.split(b"\0") if path}
    return {path for path in found if not _MAY_STAY.match(path)}


def _removed(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder)], check=True)


# --- the command -----------------------------------------------------------------------------------------------------


def _line(numbered: Numbered, case: Case, ended: Ended, wrong: Sequence[str]) -> str:
    took = f"{ended.seconds:.1f} s" if ended.seconds is not None else "? s"
    grew = f"{ended.megabytes:.0f} MB" if ended.megabytes is not None else "? MB"
    said = f"WRONG: {'; '.join(wrong)} | " if wrong else ""
    command = cut(printable(" ".join(case.arguments)), 120)
    first = cut(printable(ended.lines[0] if ended.lines else "nothing"), 300)
    return f"{numbered.number:3d}  {numbered.kind}  [{command}]  exit {ended.code}, {took}, {grew}  {said}{first}"


def _tried_and_told(numbered: Numbered, base: Path, seed: int, keep: bool) -> bool:
    case, ended = tried(numbered, base, seed)
    if not keep:
        _removed(base / f"{numbered.number:03d}")
    wrong = list(problems(case, ended))
    print(_line(numbered, case, ended, wrong), flush=True)
    return not wrong


def _chosen(only: Collection[int]) -> list[Numbered]:
    return [case for case in all_cases() if not only or case.number in only]


def main() -> int:
    """Parse the options, try the cases two at a time, print a line for each and a summary; 1 if any failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bad_input.hostile_files",
        description="Give kdbench hostile files made from a seed. Print, for each: number, kind, command, exit code, seconds, megabytes "
        "above the start, and the line that kdbench said or what is wrong with it. Exit with 1 if any case failed.",
        epilog="Example: python -m tests.bad_input.hostile_files --seed 20261129 --only 3,61 --keep /tmp/hostile",
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help="Make other files of the same kinds from another seed. Default: %(default)s."
    )
    parser.add_argument(
        "--only", metavar="N,N", type=lambda text: {int(number) for number in text.split(",")}, default=set(), help="Try only these cases."
    )
    parser.add_argument("--keep", metavar="DIR", type=Path, help="Make the files in this new folder and keep them.")
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.keep is not None:
            options.keep.mkdir(parents=True)
            base = options.keep.resolve()
        else:
            base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostile-")))
        cases = _chosen(options.only)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            passed = list(pool.map(partial(_tried_and_told, base=base, seed=options.seed, keep=options.keep is not None), cases))
    failed = [str(case.number) for case, well in zip(cases, passed, strict=True) if not well]
    print(f"{len(cases)} cases, seed {options.seed}: {len(cases) - len(failed)} as they should be, {len(failed)} not")
    if failed:
        print(f"To try these again: --only {','.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
