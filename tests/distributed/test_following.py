"""Following a job: every line of its log once, whatever happens to the connection, and the job's own exit code at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from kdbench.distributed import jobs
from kdbench.distributed.jobs import Job
from kdbench.errors import RunFailed

LOG = "first\nsecond\nthird\n"


class Client:
    """Ray's client of a job whose connection breaks: `script` holds, for each connection, the pieces that come through, or an error."""

    def __init__(self, script: list[list[str | Exception]], **ending: Any) -> None:
        self.script, self.asked = list(script), 0
        self.ending = SimpleNamespace(**{"submission_id": "j", "message": None, "driver_exit_code": None, **ending})

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for piece in self.script.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        self.asked += 1
        return self.ending if not self.script else SimpleNamespace(status=JobStatus.RUNNING)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time passes only where the code waits for it."""
    now = [0.0]
    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=lambda seconds: now.append(now[-1] + seconds), monotonic=lambda: now[-1]))
    return now


def followed(client: Client) -> tuple[int, str, list[str]]:
    written: list[str] = []
    said: list[str] = []
    code = Job("http://head:8265", "j", client).follow(written.append, said.append)  # type: ignore[arg-type]
    return code, "".join(written), said


def test_a_log_comes_through_once_although_the_connection_broke_in_the_middle_of_a_line() -> None:
    client = Client([["first\nsec", ConnectionError("reset")], ["first\n", ConnectionError("reset")], [LOG]], status=JobStatus.SUCCEEDED)
    code, log, said = followed(client)
    assert (code, log) == (0, LOG)
    assert said == ["the connection to http://head:8265 is lost; the job goes on, trying again for 5 minutes"] * 2


def test_a_log_that_ends_while_the_job_runs_is_taken_up_again() -> None:
    assert followed(Client([["first\n"], ["first\n", "second\n"], [LOG]], status=JobStatus.SUCCEEDED)) == (0, LOG, [])


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ({"status": JobStatus.SUCCEEDED}, 0),
        ({"status": JobStatus.STOPPED}, 130),
        ({"status": JobStatus.FAILED, "driver_exit_code": 2}, 2),
        ({"status": JobStatus.FAILED, "driver_exit_code": -9}, 137),
    ],
)
def test_the_exit_code_is_the_jobs_own(ending: dict[str, Any], code: int) -> None:
    assert followed(Client([[LOG]], **ending))[0] == code


def test_a_job_that_never_ran_is_an_error_with_rays_reason_in_one_line() -> None:
    client = Client([[]], status=JobStatus.FAILED, message="runtime_env setup failed:\n  no such file")
    with pytest.raises(RunFailed, match=r"^job j failed: runtime_env setup failed: no such file$"):
        followed(client)


def test_a_cluster_that_stays_away_is_given_up_after_five_minutes(no_waiting: list[float]) -> None:
    client = Client([[ConnectionError("refused")]] * 1000, status=JobStatus.SUCCEEDED)
    with pytest.raises(RunFailed, match="does not answer any more: refused; the job may well go on: the same command follows it again"):
        followed(client)
    assert 300 < no_waiting[-1] < 330


def test_a_connection_that_works_again_has_all_the_patience_again(no_waiting: list[float]) -> None:
    broken: list[list[str | Exception]] = [[ConnectionError("refused")]] * 15
    assert followed(Client([*broken, ["first\n", ConnectionError("x")], *broken, [LOG]], status=JobStatus.SUCCEEDED))[:2] == (0, LOG)
    assert no_waiting[-1] > 300


def test_a_cluster_that_was_started_anew_is_told_apart_from_one_that_is_away() -> None:
    client = Client([[]], status=JobStatus.SUCCEEDED)
    client.get_job_info = lambda job_id: (_ for _ in ()).throw(RuntimeError("Request failed with status code 404: no job"))  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match="knows no job j, it is another cluster: the same command goes on"):
        followed(client)
