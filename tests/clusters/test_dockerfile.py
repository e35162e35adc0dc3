"""The Dockerfile, as far as it can be checked without an engine: hadolint, and what the cluster files count on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.clusters.files import ROOT

TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [
    (found[1], " ".join(found[2].split()))
    for found in re.finditer(r"^([A-Z]+) (.*)$", re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)), re.MULTILINE)
]


def of(name: str) -> list[str]:
    return [arguments for instruction, arguments in INSTRUCTIONS if instruction == name]


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_a_python_of_a_tag_that_the_project_is_tested_with() -> None:
    tag = next(argument.partition("=")[2] for argument in of("ARG") if argument.startswith("PYTHON="))
    assert re.fullmatch(r"3\.11-slim-[a-z]+", tag)
    assert {line.split()[0] for line in of("FROM")} == {"python:${PYTHON}", "runtime"}


def test_there_is_a_target_for_each_image_that_the_cluster_files_name() -> None:
    assert [line.split(" AS ")[1] for line in of("FROM")] == ["build", "runtime", "cpu", "gpu"]


def test_the_images_run_as_a_user_who_owns_the_shared_folder_and_never_as_root() -> None:
    assert of("USER") == ["1000"]
    assert "useradd --uid 1000" in TEXT
    assert INSTRUCTIONS.index(("USER", "1000")) < INSTRUCTIONS.index(("FROM", "runtime AS cpu"))
    assert not re.search(r"\bsudo\b", TEXT)


def test_a_login_shell_finds_the_packages_too() -> None:
    assert [line for line in of("RUN") if re.search(r"PATH=/opt/venv/bin:\$PATH' > /etc/profile\.d/\w+\.sh", line)]


def test_everything_is_installed_as_constraints_txt_says() -> None:
    installs = [part for line in of("RUN") for part in re.split(r"&&|;", line) if "pip install" in part]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in part for part in installs)


def test_what_is_copied_is_there_and_passes_the_ignore_file() -> None:
    copied = {source for line in of("COPY") if "--from" not in line for source in line.split()[:-1]}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert {line[1:] for line in ignore if line.startswith("!")} == copied


def test_what_the_nodes_have_to_agree_on_is_set_in_the_image() -> None:
    environment = " ".join(of("ENV"))
    for setting in ("RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0", "KDBENCH_RESULTS=/shared/results", "MLFLOW_DISABLE_TELEMETRY=true"):
        assert setting in environment
