"""Jobs on a real head that clusters/local.sh started: submit, read the log, stop in mid-search, submit again; and who is let in."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import requests
import yaml
from optuna.trial import TrialState

from tests.clusters.files import ROOT
from tests.drivers import board, records, trials
from tests.listening import descendants, listening

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE = 400  # seconds for what takes a few on an idle machine
PORTS_OF_RAY = 6  # dashboard, GCS, client, an agent for each node, one to spare
EXPERIMENT = {
    "name": "jobs",
    "task": {"name": "classification", "data": "fashion_mnist", "transfer_size": 400, "val_size": 200},
    "students": [{"name": "tiny_cnn", "width": 8}],
    "methods": ["none", {"name": "mine:Mine", "label": "mine"}],
    "recipe": {"epochs": 6, "batch_size": 20, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "search": {
        "trials": 3,
        "sampler": "random",
        "scheduler": "none",
        "top_k": 1,
        "also": {"recipe.lr": {"low": 0.01, "high": 0.5, "log": True}},
    },
    "seeds": 1,
    "runtime": {"checkpoint_seconds": 0, "concurrent": 1},
}
METHOD = '''"""A method of one's own, which travels with the job."""

from kdbench.methods.label_smoothing import LabelSmoothing


class Mine(LabelSmoothing):
    """Label smoothing under another name."""
'''


@dataclass(frozen=True)
class Cluster:
    """A running head with one worker. environment: what a command needs to submit to it; project: a folder to submit from."""

    folder: Path
    project: Path
    port: int
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.project,
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        return self.start(sys.executable, "-m", "kdbench.cli", "submit", "jobs.yaml", "--address", self.address, "--no-mlflow", *arguments)

    def ray_job(self, *arguments: str) -> subprocess.Popen[str]:
        script = ("--working-dir", ".", "--", "python", "experiments/run.py", "jobs.yaml", "--no-mlflow")
        command = (sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", self.address)
        return self.start(*command, *script, *arguments)

    def jobs(self) -> dict[str, dict[str, object]]:
        found = requests.get(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"}, timeout=30).json()
        return {job["submission_id"]: job for job in found}


def free_ports() -> int:
    """The first of some ports in a row that nobody listens on, below those that the system hands out."""
    for first in range(20000 + os.getpid() % 5000, 32000, PORTS_OF_RAY):
        try:
            for port in range(first, first + PORTS_OF_RAY):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="kc", dir="/tmp"))  # Ray makes sockets in it, whose paths have to be short
    project = tmp_path_factory.mktemp("project")
    (project / "jobs.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (project / "mine.py").write_text(METHOD)
    shutil.copytree(ROOT / "experiments", project / "experiments", ignore=shutil.ignore_patterns("*.yaml"))
    paths = {
        "KDBENCH_CLUSTER": str(folder),
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }
    port = free_ports()
    script, environment = str(ROOT / "clusters" / "local.sh"), os.environ | paths
    started = subprocess.run(
        [script, "start", "--workers", "1", "--cpus", "2", "--ports", str(port)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert started.returncode == 0, started.stderr
    try:
        yield Cluster(folder, project, port, environment)
    finally:
        nodes = processes(folder)
        subprocess.run([script, "stop"], env=environment, capture_output=True, check=True)
        wait_until(
            lambda: not [pid for pid in nodes if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]
        )
        shutil.rmtree(folder)


def processes(folder: Path) -> set[int]:
    """All that belong to the cluster of this folder."""
    return descendants(*(int(path.read_text().split()[0]) for path in folder.glob("*.pid")))


def wait_until(moment: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not moment():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.1)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def test_a_job_stopped_in_mid_search_goes_on_with_the_same_command_to_the_undisturbed_board(cluster: Cluster, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    undisturbed = cluster.ray_job("--results", str(whole))

    first = cluster.submit("--results", str(stopped))
    wait_until(lambda: any(trial.state.is_finished() for trial in trials(stopped)), first)
    first.send_signal(signal.SIGINT)
    code, out, err = finished(first)
    assert code == 130
    assert "search trials 1/6: " in out
    assert "Stopped. What is finished is kept; to go on: kdbench submit jobs.yaml" in err.splitlines()[-1]
    [job] = [job for name, job in cluster.jobs().items() if name.startswith("kdbench-jobs-")]
    assert job["status"] == "STOPPED"
    assert sum(trial.state == TrialState.COMPLETE for trial in trials(stopped)) < 6
    assert [record["role"] for record in records(stopped)] == []

    code, out, err = finished(cluster.submit("--results", str(stopped)))
    assert code == 0, err
    assert f"results: {stopped}" in err
    assert "mine" in out.split("classification on fashion_mnist")[1]
    code, out, err = finished(undisturbed)
    assert code == 0, err
    assert "mine" in out.split("classification on fashion_mnist")[1]

    assert board(stopped) == board(whole)
    assert [(trial.number, trial.params, trial.value) for trial in trials(stopped)] == [
        (trial.number, trial.params, trial.value) for trial in trials(whole)
    ]
    assert [trial.state for trial in trials(stopped)] == [TrialState.COMPLETE] * 6
    keys = [record["unit_key"] for record in records(stopped)]
    assert len(keys) == len(set(keys)) == 2


def test_the_exit_code_of_the_job_is_that_of_the_command_and_lost_results_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    results = ("--results", str(tmp_path / "results"))
    wrong = cluster.submit(*results, "--set", "task.data={name: image_folder, path: /no/such/folder}")
    relative = cluster.ray_job()
    code, out, err = finished(wrong)
    assert code == 2  # Ray's own command line makes 1 of it
    assert "kdbench: data image_folder: there is no folder /no/such/folder" in out
    assert re.search(r"^working directory: 3 files, 0\.0 MiB(, without __pycache__)?$", err, re.MULTILINE), (
        err
    )  # bytecode, where it is kept
    code, out, _ = finished(relative)
    assert code == 1
    assert "kdbench: results folder results: inside the job's copy of the working directory, which Ray deletes" in out
    assert "--results /shared/results" in out


# --- who is let in ---------------------------------------------------------------------------------------------------

# Ray binds these to all interfaces and can't be told otherwise: each asks for the token.
ON_ALL_INTERFACES = ("gcs_server", "raylet", "ray::")  # the last: agents, workers and supervisors of jobs
METHODS = {
    "gcs_server": ("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",),
    "raylet": ("/ray.rpc.NodeManagerService/GetNodeStats", "/ray.rpc.ObjectManagerService/Push"),  # a port for each
    "ray::": ("/ray.rpc.ReporterService/GetTraceback", "/ray.rpc.CoreWorkerService/GetCoreWorkerStats"),
}


def test_what_people_talk_to_listens_on_loopback_alone(cluster: Cluster) -> None:
    found = listening(processes(cluster.folder))
    assert {address for address, port in found if cluster.port <= port < cluster.port + PORTS_OF_RAY and port != cluster.port + 1} == {
        "127.0.0.1",
        "127.0.0.2",
        "127.0.0.3",
    }
    for (address, _), name in found.items():
        assert address.startswith("127.") or any(part in name.split()[0] for part in ON_ALL_INTERFACES), (address, name)


def test_what_ray_binds_to_all_interfaces_refuses_who_has_no_token(cluster: Cluster) -> None:
    open_to_all = {port: name for (address, port), name in listening(processes(cluster.folder)).items() if not address.startswith("127.")}
    assert len(open_to_all) >= 3
    for port, name in open_to_all.items():
        [kind] = [part for part in ON_ALL_INTERFACES if part in name.split()[0]]
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        for metadata in (None, (("authorization", "Bearer wrong"),)):
            assert grpc.StatusCode.UNAUTHENTICATED in [answer(channel, method, metadata) for method in METHODS[kind]], name
        right = (("authorization", f"Bearer {cluster.token}"),)
        assert grpc.StatusCode.OK in [answer(channel, method, right) for method in METHODS[kind]], name


def answer(channel: grpc.Channel, method: str, metadata: tuple[tuple[str, str], ...] | None) -> grpc.StatusCode:
    try:
        channel.unary_unary(method)(b"", metadata=metadata, timeout=30)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"Authorization": "Bearer wrong"}, 403)])
def test_the_dashboard_and_the_agents_refuse_who_has_no_token(cluster: Cluster, headers: dict[str, str], status: int) -> None:
    for path in ("/api/jobs/", "/api/cluster_status", "/nodes?view=summary"):
        assert requests.get(cluster.address + path, headers=headers, timeout=30).status_code == status
    agents = [cluster.port + 3, cluster.port + 4]  # of the head and of the worker
    for port in agents:
        assert requests.get(f"http://127.0.0.1:{port}/api/job_agent/jobs/", headers=headers, timeout=30).status_code == status


def test_the_token_is_its_owners_alone(cluster: Cluster) -> None:
    assert (cluster.folder / "token").stat().st_mode & 0o777 == 0o600
    assert cluster.folder.stat().st_mode & 0o777 == 0o700


def test_a_submission_without_the_clusters_token_is_refused_in_one_line(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    other = Cluster(cluster.folder, cluster.project, cluster.port, cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})
    code, out, err = finished(other.submit("--results", str(tmp_path)))
    assert (code, out) == (1, "")
    assert err.startswith(f"kdbench: {cluster.address} refuses the token")
    assert len(err.splitlines()) == 1
