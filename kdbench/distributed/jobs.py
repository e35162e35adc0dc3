"""Jobs: an experiment sent to a Ray cluster that runs, followed until it ends, and stopped so that the same command goes on."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdbench.distributed.cluster import quiet
from kdbench.distributed.package import Package, pack
from kdbench.errors import RunFailed, UserError
from kdbench.own_code import trust_environment
from kdbench.records.environment import COMMIT_VARIABLE, commit_of
from kdbench.storage.folder import local_path

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOPPED = 130  # the exit code of a job that was stopped, as of `kdbench run` after Ctrl-C
STOP_SECONDS = 30  # from SIGTERM to SIGKILL: enough to close studies, MLflow runs and Ray; Ray's own 3 s are not, on a busy head
PATIENCE_SECONDS = 300.0  # how long a cluster that does not answer is asked again
_PAUSE_SECONDS = 1.0
_ENTRYPOINT_TAG = "kdbench.experiment"


@dataclass(frozen=True)
class Request:
    """What a job is to run: an experiment file below the working directory, and where its results go.

    results: an absolute folder or an address that all nodes of the cluster see.
    """

    experiment: str
    file: Path
    results: str
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def entrypoint(self) -> str:
        """`kdbench run` by the module's name: kdbench may be a checkout that travels along, or be installed on the cluster."""
        sets = [part for override in ("runtime.address=auto", *self.overrides) for part in ("--set", override)]
        command = ["python", "-m", "kdbench.cli", "run", self.file.as_posix(), "--results", self.results]
        return shlex.join([*command, *sets, *self.options])


def submit(address: str, request: Request, say: Callable[[str], None]) -> Job:
    """Send the working directory and start the job, or find it: one that runs the very same command is not started twice.

    Raises UserError for an address or a working directory that can't be used, RunFailed for a cluster that can't be reached or refuses.
    """
    address = _checked(address)
    with tempfile.TemporaryDirectory(prefix="kdbench-job-") as scratch:
        package = pack(Path.cwd(), Path(scratch) / "working_dir.zip", [Path(request.results)])
        if request.file.as_posix() not in package.files:
            raise UserError(f"{request.file}: does not go to the cluster, as .gitignore, .rayignore or the name of its folder leave it out")
        client = _client(address)
        with _reached(address):
            for job in client.list_jobs():
                if job.entrypoint == request.entrypoint and job.submission_id and not job.status.is_terminal():
                    say(f"job {job.submission_id} runs this already, with the working directory as it was then: following it")
                    return Job(address, job.submission_id, client)
            say(_described(package))
            job_id = client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=f"kdbench-{request.experiment}-{uuid.uuid4().hex[:8]}",
                runtime_env={"working_dir": str(package.archive), "env_vars": _environment()},
                metadata={_ENTRYPOINT_TAG: request.experiment},
            )
    return Job(address, job_id, client)


class Job:
    """A job on a cluster, by its id."""

    def __init__(self, address: str, job_id: str, client: JobSubmissionClient) -> None:
        self.address, self.id = address, job_id
        self._client = client
        self._printed = 0  # characters of the log

    @property
    def commands(self) -> str:
        """How to look after the job with Ray's own command line."""
        return "\n".join(
            f"  {what:<7} RAY_AUTH_MODE={os.environ.get('RAY_AUTH_MODE', 'token')} ray job {command} {self.id} --address {self.address}"
            for what, command in (("follow", "logs --follow"), ("look", "status"), ("stop", "stop"))
        )

    def follow(self, write: Callable[[str], None], say: Callable[[str], None]) -> int:
        """Pass the job's log on until it has ended; its exit code. A lost connection is taken up again where it broke.

        Raises RunFailed where the cluster stays away, or the job could not be run at all.
        """
        patience = _Patience(self.address, say)
        while True:
            details = asyncio.run(self._tail(write, patience.answered)) or self._details()
            if isinstance(details, Exception):
                patience.wait(details)
                continue
            patience.answered()
            if details.status.is_terminal():
                return _exit_code(details)
            time.sleep(_PAUSE_SECONDS)

    def stop(self) -> None:
        """Ask the job to end: SIGTERM, and SIGKILL for what is left after STOP_SECONDS. `follow` tells when it has."""
        with _reached(self.address):
            self._client.stop_job(self.id)

    async def _tail(self, write: Callable[[str], None], answered: Callable[[], None]) -> Exception | None:
        """Pass on the log from the beginning, without what was passed on before. What broke it, None where it came to its end."""
        seen = 0
        log = aiter(self._client.tail_job_logs(self.id))
        while True:
            try:
                text = await anext(log)
            except StopAsyncIteration:
                return None
            except Exception as error:  # whatever aiohttp raises, and Ray's RuntimeError
                return error
            answered()
            new = text[max(0, self._printed - seen) :]
            seen += len(text)
            if new:
                write(new)
                self._printed = seen

    def _details(self) -> JobDetails | Exception:
        """How the job is, or why the cluster does not tell. Raises RunFailed where it knows no such job."""
        try:
            return self._client.get_job_info(self.id)
        except Exception as error:  # whatever requests raises, and Ray's RuntimeError
            if "status code 404" in str(error):
                raise RunFailed(f"{self.address} knows no job {self.id}, it is another cluster: the same command goes on") from error
            return error


def followed(job: Job, write: Callable[[str], None], say: Callable[[str], None], again: str) -> int:
    """Follow a job to its end; its exit code, STOPPED where it is left running. `again` is the command that follows it or goes on.

    Ctrl-C asks whether the job is to be stopped, and stops it where nobody can be asked. A second one no longer waits for that.
    """
    stopping = False
    while True:
        try:
            code = job.follow(write, say)
        except KeyboardInterrupt:
            if stopping or not _to_be_stopped(say):
                say(f"\nThe job {'is being stopped' if stopping else 'goes on'}. To follow it again: {again}\n{job.commands}")
                return STOPPED
            stopping = True
            job.stop()
            continue
        if code == STOPPED:
            say(f"\nStopped. What is finished is kept; to go on: {again}")
        return code


def _to_be_stopped(say: Callable[[str], None]) -> bool:
    if not sys.stdin.isatty():
        return True
    say("\nStop the job? The same command then goes on with it. With n it runs on. [Y/n]")
    try:
        return sys.stdin.readline().strip().lower() not in ("n", "no")
    except KeyboardInterrupt:
        return True


class _Patience:
    """Waits for a cluster that does not answer, longer each time, and gives up after PATIENCE_SECONDS."""

    def __init__(self, address: str, say: Callable[[str], None]) -> None:
        self.address, self.say = address, say
        self.answered()

    def answered(self) -> None:
        self._since: float | None = None
        self._pause = _PAUSE_SECONDS

    def wait(self, error: Exception) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
            self.say(f"the connection to {self.address} is lost; the job goes on, trying again for {PATIENCE_SECONDS / 60:g} minutes")
        if now - self._since > PATIENCE_SECONDS:
            raise RunFailed(
                f"{self.address} does not answer any more: {_first_line(error)}; the job may well go on: the same command follows it again"
            ) from error
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, 15.0)


def check_lasting(results: Path) -> None:
    """Raises UserError for a results folder inside the copy of the working directory that Ray unpacked for a job: Ray deletes it."""
    config = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    travelled = config is not None and "working_dir" in (json.loads(config).get("runtime_env") or {})
    if travelled and results.is_relative_to(Path.cwd()):
        raise UserError(
            f"results folder {results.relative_to(Path.cwd())!s}: inside the job's copy of the working directory, which Ray deletes; "
            "name a folder that all nodes see by its absolute path: --results /shared/results, or the variable KDBENCH_RESULTS"
        )


def relative_file(path: Path) -> Path:
    """The experiment as the job finds it. Raises UserError where it is not below the working directory, which is what travels."""
    folder = Path.cwd()
    whole = local_path(path, "experiment").resolve()
    if not whole.is_relative_to(folder):
        raise UserError(f"{path}: not below {folder}, and only the working directory goes to the cluster; run the command in its folder")
    return whole.relative_to(folder)


def _checked(address: str) -> str:
    whole = address if "://" in address else f"http://{address}"
    if "@" in whole:
        raise UserError("--address: expected the address of the cluster's dashboard alone, got user:password@ in it; set RAY_AUTH_TOKEN")
    if not re.fullmatch(r"https?://[^/\s]+/?", whole) or whole.rstrip("/").endswith((":6379", ":10001")):
        raise UserError(f"--address {address}: expected the address of the cluster's dashboard, such as {DEFAULT_ADDRESS}")
    return whole.rstrip("/")


def _client(address: str) -> JobSubmissionClient:
    quiet()
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers this variable, and RAY_ADDRESS, to what it is told
    from ray.job_submission import JobSubmissionClient

    for part in ("dashboard_sdk", "job.sdk"):  # they write what they do on standard error
        logging.getLogger(f"ray.dashboard.modules.{part}").setLevel(logging.WARNING)
    with _reached(address):
        return JobSubmissionClient(address)


@contextmanager
def _reached(address: str) -> Iterator[None]:
    """What goes wrong on the way to the cluster in one line."""
    from ray.exceptions import AuthenticationError
    from requests.exceptions import RequestException

    try:
        yield
    except AuthenticationError as error:
        raise RunFailed(
            f"{address} refuses the token: RAY_AUTH_MODE is {os.environ.get('RAY_AUTH_MODE')} here, and the token is that of "
            "RAY_AUTH_TOKEN, of the file RAY_AUTH_TOKEN_PATH or of ~/.ray/auth_token; it has to be the cluster's"
        ) from error
    except (ConnectionError, RequestException) as error:
        raise RunFailed(f"no Ray cluster answers at {address}: start one, as clusters/README.md says, or name another --address") from error
    except RuntimeError as error:
        raise RunFailed(f"{address} refuses: {_first_line(error)}") from error


def _environment() -> dict[str, str]:
    """For the job and all its processes. The working directory travels without .git, so the commit goes along by itself."""
    commit = commit_of(Path.cwd())
    named = {COMMIT_VARIABLE: commit} if commit else {}
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **named, **trust_environment()}


def _described(package: Package) -> str:
    left_out = f", without {', '.join(package.left_out)}" if package.left_out else ""
    return f"working directory: {len(package.files)} files, {package.nbytes / 2**20:.1f} MiB{left_out}"


def _exit_code(details: JobDetails) -> int:
    """The job's own. Raises RunFailed where it never came to have one: no environment, a lost node."""
    status = details.status.value
    if status in ("SUCCEEDED", "STOPPED"):
        return 0 if status == "SUCCEEDED" else STOPPED
    if details.driver_exit_code is None:
        raise RunFailed(f"job {details.submission_id} failed: {_first_line(details.message or 'Ray does not say why')}")
    return details.driver_exit_code if details.driver_exit_code > 0 else 128 - details.driver_exit_code


def _first_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
