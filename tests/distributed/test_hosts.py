"""Two hosts, each a network namespace with an address of its own, and between them a cable: one training over both."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HOSTS = {"kdbench-a": "10.213.7.1", "kdbench-b": "10.213.7.2"}
EXPERIMENT = {
    "name": "hosts",
    "task": {"name": "classification", "data": "fashion_mnist", "transfer_size": 200, "val_size": 200},
    "students": [{"name": "tiny_cnn", "width": 4}],
    "methods": ["none"],
    "recipe": {"epochs": 1, "batch_size": 50, "precision": "fp32", "memory_format": "contiguous"},
    "seeds": 1,
    "runtime": {"workers": 2, "placement": "spread"},
}


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def on(host: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", host, *command]


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, str]]:
    """Two hosts that reach each other and nothing else; all that runs on them is killed at the end."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip, of the package iproute2")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"network namespaces can't be made here: {getattr(error, 'stderr', error)}")
    first, second = HOSTS
    try:
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield HOSTS
    finally:
        for host in HOSTS:
            for process in ip("netns", "pids", host).split():
                os.kill(int(process), signal.SIGKILL)
            ip("netns", "delete", host)
