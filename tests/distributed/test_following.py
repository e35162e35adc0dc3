"""Following a job: every line of its log once, whatever happens to the connection, and the job's own exit code at the end."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from kdbench.distributed import jobs
from kdbench.distributed.jobs import Job
from kdbench.errors import RunFailed
from tests.console import Kdbench

LOG = "first\nsecond\nthird\n"


class Client:
    """Ray's client of a job whose connection breaks: `script` holds, for each connection, the pieces that come through, or an error."""

    def __init__(self, script: list[list[str | BaseException]], **ending: Any) -> None:
        self.script, self.asked = list(script), 0
        self.ending = SimpleNamespace(**{"submission_id": "j", "message": None, "driver_exit_code": None, **ending})

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for piece in self.script.pop(0):
            if isinstance(piece, BaseException):
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


def test_standard_output_that_is_closed_is_no_lost_connection() -> None:
    def closed(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Job("http://head:8265", "j", Client([[LOG]], status=JobStatus.SUCCEEDED)).follow(closed, print)  # type: ignore[arg-type]


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
    broken: list[list[str | BaseException]] = [[ConnectionError("refused")]] * 15
    assert followed(Client([*broken, ["first\n", ConnectionError("x")], *broken, [LOG]], status=JobStatus.SUCCEEDED))[:2] == (0, LOG)
    assert no_waiting[-1] > 300


def test_a_cluster_that_was_started_anew_is_told_apart_from_one_that_is_away() -> None:
    client = Client([[]], status=JobStatus.SUCCEEDED)
    client.get_job_info = lambda job_id: (_ for _ in ()).throw(RuntimeError("Request failed with status code 404: no job"))  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match="knows no job j, it is another cluster: the same command goes on"):
        followed(client)


# --- the command -----------------------------------------------------------------------------------------------------


class Cluster(Client):
    """Ray's client of a cluster that runs nothing yet, or `running`; keeps what it is sent."""

    def __init__(self, script: list[list[str | BaseException]], running: list[SimpleNamespace] | None = None, **ending: Any) -> None:
        super().__init__(script, **ending)
        self.running, self.sent, self.stopped = running or [], [], []

    def list_jobs(self) -> list[SimpleNamespace]:
        return self.running

    def submit_job(self, *, runtime_env: dict[str, Any], submission_id: str, **request: Any) -> str:
        with zipfile.ZipFile(runtime_env["working_dir"]) as archive:
            self.sent.append(request | {"env_vars": runtime_env["env_vars"], "files": archive.namelist()})
        return submission_id

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True


EXPERIMENT = "name: study\ntask: {name: classification}\nstudents: [tiny_cnn]\nmethods: [none]\n"
RESULTS = ("--results", "/shared/my results")


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, kdbench: Kdbench) -> Callable[[Cluster], Cluster]:
    """Puts a cluster behind every address, with the experiment study.yaml in the working directory."""
    Path("study.yaml").write_text(EXPERIMENT)
    monkeypatch.delenv("KDBENCH_RESULTS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)

    def put(cluster: Cluster) -> Cluster:
        monkeypatch.setattr(jobs, "_client", lambda address: cluster)
        return cluster

    return put


def done(**more: Any) -> Cluster:
    return Cluster([[LOG]], status=JobStatus.SUCCEEDED, **more)


def test_the_job_runs_the_same_command_with_an_absolute_results_folder(kdbench: Kdbench, at: Callable[[Cluster], Cluster]) -> None:
    cluster = at(done())
    ended = kdbench("submit", "study.yaml", "--set", "recipe.epochs=2", "--no-mlflow")
    assert (ended.code, ended.out) == (0, LOG)
    [sent] = cluster.sent
    assert shlex.split(sent["entrypoint"]) == [
        *("python", "-m", "kdbench.cli", "run", "study.yaml", "--results", str(Path.cwd() / "results")),
        *("--set", "runtime.address=auto", "--set", "recipe.epochs=2", "--no-mlflow"),
    ]
    assert sent["files"] == ["study.yaml"]
    assert sent["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "30"
    assert f"results: {Path.cwd() / 'results'}, on every node of the cluster" in ended.err


def test_a_results_folder_with_a_space_stays_one_word(kdbench: Kdbench, at: Callable[[Cluster], Cluster]) -> None:
    cluster = at(done())
    assert kdbench("submit", "study.yaml", *RESULTS).code == 0
    assert "/shared/my results" in shlex.split(cluster.sent[0]["entrypoint"])


def test_an_address_of_an_object_store_goes_to_the_job_as_it_is(
    kdbench: Kdbench, at: Callable[[Cluster], Cluster], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster = at(done())
    monkeypatch.setenv("KDBENCH_WORKING_COPIES", str(tmp_path / "copies"))
    ended = kdbench("submit", "study.yaml", "--results", "s3://bucket/folder")
    assert ended.code == 0, ended.err
    assert "--results s3://bucket/folder" in cluster.sent[0]["entrypoint"]


def test_without_waiting_the_id_is_all_that_is_printed_and_what_to_do_with_it_said(
    kdbench: Kdbench, at: Callable[[Cluster], Cluster]
) -> None:
    cluster = at(Cluster([], status=JobStatus.RUNNING))
    ended = kdbench("submit", "study.yaml", *RESULTS, "--no-wait")
    assert ended.code == 0
    assert re.fullmatch(r"kdbench-study-[0-9a-f]{8}\n", ended.out)
    for command in ("logs --follow", "status", "stop"):
        assert f"ray job {command} {ended.out.strip()} --address http://127.0.0.1:8265" in ended.err
    assert cluster.asked == 0


def test_a_job_that_runs_the_same_is_followed_and_not_started_twice(kdbench: Kdbench, at: Callable[[Cluster], Cluster]) -> None:
    first = at(done())
    kdbench("submit", "study.yaml", *RESULTS)
    runs = SimpleNamespace(entrypoint=first.sent[0]["entrypoint"], submission_id="kdbench-study-1", status=JobStatus.RUNNING)
    second = at(done(running=[runs]))
    ended = kdbench("submit", "study.yaml", *RESULTS)
    assert (ended.code, ended.out, second.sent) == (0, LOG, [])
    assert "job kdbench-study-1 runs this already" in ended.err
    other = at(done(running=[runs]))
    kdbench("submit", "study.yaml", *RESULTS, "--set", "seeds=5")
    assert len(other.sent) == 1
    runs.status = JobStatus.STOPPED
    again = at(done(running=[runs]))
    kdbench("submit", "study.yaml", *RESULTS)
    assert len(again.sent) == 1


@pytest.mark.parametrize(("answers", "stopped"), [("\n", True), ("y\n", True), ("n\n", False)])
def test_ctrl_c_asks_whether_the_job_is_to_be_stopped(
    kdbench: Kdbench, at: Callable[[Cluster], Cluster], monkeypatch: pytest.MonkeyPatch, answers: str, stopped: bool
) -> None:
    cluster = at(Cluster([["first\n", KeyboardInterrupt()], [LOG]], status=JobStatus.STOPPED))
    monkeypatch.setattr(sys, "stdin", Terminal(answers))
    ended = kdbench("submit", "study.yaml", *RESULTS)
    assert ended.code == 130
    assert "Stop the job?" in ended.err
    assert len(cluster.stopped) == stopped
    assert ended.out == (LOG if stopped else "first\n")  # what it says while it ends is shown too
    again = "kdbench submit study.yaml --results '/shared/my results'"
    assert f"{'to go on' if stopped else 'To follow it again'}: {again}\n" in ended.err


class Terminal(io.StringIO):
    """Standard input of a person who answers."""

    def isatty(self) -> bool:
        return True


def test_where_nobody_can_be_asked_ctrl_c_stops_the_job(kdbench: Kdbench, at: Callable[[Cluster], Cluster]) -> None:
    cluster = at(Cluster([[KeyboardInterrupt()], [LOG]], status=JobStatus.STOPPED))
    ended = kdbench("submit", "study.yaml", *RESULTS)
    assert (ended.code, len(cluster.stopped)) == (130, 1)
    assert "Stop the job?" not in ended.err


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        ({"study.yaml": EXPERIMENT + "recipee: {}\n"}, (), "study.yaml: unknown key 'recipee'; did you mean 'recipe'?"),
        ({"study.yaml": EXPERIMENT.replace("none", "kd")}, (), "method kd learns from a teacher, and study names none"),
        ({"study.yaml": EXPERIMENT.replace("tiny_cnn", "tiny_cn")}, (), "tiny_cn"),
        (
            {"study.yaml": EXPERIMENT.replace("classification}", "classification, data: fashion_mnits}")},
            (),
            "did you mean 'fashion_mnist'?",
        ),
        ({"study.yaml": EXPERIMENT.replace("classification}", "classification, val_sise: 3}")}, (), "did you mean 'val_size'?"),
        ({".gitignore": "study.yaml\n"}, (), "study.yaml: does not go to the cluster"),
        ({}, ("--address", "ray://head:10001"), "--address ray://head:10001: expected the address of the cluster's dashboard"),
        ({}, ("--address", "head:6379"), "such as http://127.0.0.1:8265"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_sent(
    kdbench: Kdbench, at: Callable[[Cluster], Cluster], change: dict[str, str], arguments: tuple[str, ...], says: str
) -> None:
    cluster = at(done())
    for name, text in change.items():
        Path(name).write_text(text)
    ended = kdbench("submit", "study.yaml", *RESULTS, *arguments)
    assert (ended.code, ended.out, cluster.sent) == (2, "", [])
    assert ended.err.startswith("kdbench: ")
    assert says in ended.err
    assert len(ended.err.splitlines()) == 1


def test_an_experiment_outside_of_the_working_directory_is_refused(
    kdbench: Kdbench, at: Callable[[Cluster], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    at(done())
    Path("below").mkdir()
    monkeypatch.chdir("below")
    ended = kdbench("submit", "../study.yaml", *RESULTS)
    assert ended.code == 2
    assert "../study.yaml: not below" in ended.err


def test_a_cluster_that_is_not_there_is_one_line(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("study.yaml").write_text(EXPERIMENT)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # Ray would take it for the address
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:2")
    ended = kdbench("submit", "study.yaml", *RESULTS, "--address", "127.0.0.1:1")
    assert ended.code == 1
    assert ended.err == (
        "kdbench: no Ray cluster answers at http://127.0.0.1:1: start one, as clusters/README.md says, or name another --address\n"
    )


def test_in_a_job_a_results_folder_in_the_copy_of_the_working_directory_is_refused(
    kdbench: Kdbench, at: Callable[[Cluster], Cluster], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"working_dir": "gcs://a.zip"}}))
    ended = kdbench("run", "study.yaml")
    assert ended.code == 2
    assert ended.err.startswith("kdbench: results folder results: inside the job's copy of the working directory, which Ray deletes")
    assert not Path("results").exists()
    jobs.check_lasting(tmp_path.parent / "elsewhere")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    jobs.check_lasting(Path.cwd() / "results")  # without a working directory nothing was copied, and nothing is deleted
