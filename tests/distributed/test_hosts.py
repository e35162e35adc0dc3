"""Two hosts, each a network namespace with an address of its own, and a cable between them: one training over both."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kdbench.records.store import ResultStore

REPOSITORY = Path(__file__).parents[2]
HOSTS = {"kdbench-a": "10.213.7.1", "kdbench-b": "10.213.7.2"}
PORT = 6379
EXPERIMENT = {
    "name": "hosts",
    "task": {"name": "classification", "data": "fashion_mnist", "transfer_size": 100, "val_size": 100},
    "students": [{"name": "tiny_cnn", "width": 2}],
    "methods": ["none"],
    "recipe": {"epochs": 1, "batch_size": 50, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "seeds": 1,
    "runtime": {"workers": 2, "placement": "spread", "address": f"{HOSTS['kdbench-a']}:{PORT}"},
}


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def on(host: str, *command: str) -> None:
    """Run a Python module on a host."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["ip", "netns", "exec", host, sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two hosts that reach each other and nothing else; all that runs on them is killed at the end."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip, of the package iproute2")
    first, second = HOSTS
    made: list[str] = []
    try:
        try:
            for host in HOSTS:
                ip("netns", "add", host)
                made.append(host)
            ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces can't be made here: {error.stderr.strip()}")
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield list(HOSTS)
    finally:
        for host in made:
            for process in ip("netns", "pids", host).split():
                os.kill(int(process), signal.SIGKILL)
            ip("netns", "delete", host)


@pytest.mark.nodes
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("cluster_token")
def test_two_hosts_train_together(hosts: list[str], tmp_path: Path) -> None:
    ray = ("ray.scripts.scripts", "start", "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats")
    first, second = hosts
    on(first, *ray, "--head", f"--node-ip-address={HOSTS[first]}", f"--port={PORT}", "--include-dashboard=false")
    on(second, *ray, f"--node-ip-address={HOSTS[second]}", f"--address={HOSTS[first]}:{PORT}")
    (tmp_path / "hosts.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    on(first, "kdbench.cli", "run", str(tmp_path / "hosts.yaml"), "--results", str(tmp_path / "results"), "--no-mlflow")
    (record,) = ResultStore(tmp_path / "results").scan()
    assert (record.status, record.world_size, record.worker_counts) == ("ok", 2, [2])
