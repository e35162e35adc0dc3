"""The Ray that `kdbench run` starts for itself: nobody outside of the machine can reach any of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os
from kdbench.distributed.cluster import started
from kdbench.experiment import Runtime
from tests.listening import descendants, listening

with started(Runtime(workers=2)):
    import ray

    assert ray.get(ray.remote(lambda: 1).remote()) == 1  # there is a worker process now, which listens too
    print(json.dumps([[*place, name] for place, name in listening(descendants(os.getpid())).items()]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_of_ones_own_listens_on_loopback_alone() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    parts = ("gcs_server", "raylet", "dashboard", "ray::DashboardAgent")
    assert [part for part in parts if not any(part in name for _, _, name in found)] == []
    assert [(address, name) for address, _, name in found if address != "127.0.0.1"] == []
