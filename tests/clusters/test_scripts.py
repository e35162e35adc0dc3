"""local.sh and slurm.sbatch: what shellcheck says, what a wrong option leads to, and Slurm's header."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clusters.files import CLUSTERS

LOCAL = CLUSTERS / "local.sh"
TOOLS = Path(sys.executable).parent
# Of sbatch's long options, those that stand in the file or may well in a copy of it.
RESOURCES = {"nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "gres", "mem", "time", "exclusive", "constraint", "nodelist"}
JOB = {"job-name", "account", "partition", "qos", "reservation", "output", "error", "open-mode", "requeue", "signal", "mail-type", "export"}


@pytest.mark.parametrize("script", [LOCAL, CLUSTERS / "slurm.sbatch"], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    done = subprocess.run([TOOLS / "shellcheck", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def local(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"KDBENCH_CLUSTER": str(folder), "PYTHON": sys.executable}
    return subprocess.run([str(LOCAL), *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--wrokers", "2"], "unknown option --wrokers; there is: --workers, --cpus, --gpus, --ports"),
        (["--workers", "two"], "--workers: expected a whole number, got 'two'"),
        (["--workers"], "--workers: expected a whole number, got ''"),
        (["--workers", "0"], "--workers: expected one at least, as the head trains nothing"),
    ],
)
def test_a_wrong_option_of_local_sh_is_one_line_and_starts_nothing(tmp_path: Path, arguments: list[str], says: str) -> None:
    ended = local(tmp_path, "start", *arguments)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"local.sh: {says}")
    assert len(ended.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_local_sh_without_a_cluster_says_so_and_stops_nothing(tmp_path: Path) -> None:
    assert local(tmp_path, "status").stderr == "local.sh: no cluster was started here\n"
    assert local(tmp_path, "stop").returncode == 0
    assert local(tmp_path).returncode == 2


def test_local_sh_leaves_a_process_alone_that_has_the_number_of_one_of_its_own(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "head.pid").write_text(f"{stranger.pid} 12345")  # the head was born at another time
        assert "head has ended" in local(tmp_path, "status").stdout
        assert local(tmp_path, "stop").returncode == 0
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_the_header_of_the_slurm_script_is_read_whole_and_lets_the_job_go_on() -> None:
    lines = (CLUSTERS / "slurm.sbatch").read_text().splitlines()
    header = [re.fullmatch(r"#SBATCH --([\w-]+)(?:=(\S+))?", line) for line in lines if line.startswith("#SBATCH")]
    options = {found[1]: found[2] for found in header if found}
    assert len(options) == len(header)  # each is whole, and none stands twice
    assert set(options) <= RESOURCES | JOB
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command  # sbatch stops reading there
    assert options["ntasks-per-node"] == "1"
    assert {"requeue", "open-mode"} <= set(options)
    signal = re.fullmatch(r"B:(\w+)@\d+", str(options["signal"]))
    assert signal is not None
    assert f"trap time_is_up {signal[1]}" in lines


def test_the_slurm_script_asks_for_what_it_needs() -> None:
    if shutil.which("sbatch"):
        pytest.skip("Slurm is here, and the script would talk to it")
    for given, says in (
        ({}, "name the experiment"),
        ({"EXPERIMENT": "x.yaml"}, "name the results folder"),
        ({"EXPERIMENT": "x.yaml", "RESULTS": "results"}, "RESULTS=results: expected an absolute path"),
    ):
        done = subprocess.run(
            ["bash", str(CLUSTERS / "slurm.sbatch")], env={"PATH": os.environ["PATH"], **given}, capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert says in done.stderr


def test_the_slurm_script_keeps_the_dashboard_on_loopback_and_the_token_to_its_owner() -> None:
    text = (CLUSTERS / "slurm.sbatch").read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "--dashboard-host=127.0.0.1" in text
    assert re.search(r'\(umask 077 && .*>"\$RAY_AUTH_TOKEN_PATH"\)', text)
