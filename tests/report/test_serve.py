"""The served report: on this machine only, only to be read, and never older than the records."""

from __future__ import annotations

import html
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdbench.errors import UserError
from kdbench.records.folders import Folders
from kdbench.records.store import ResultStore
from kdbench.report.files import Report
from kdbench.report.serve import report_server
from tests.report.conftest import final, write_board


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_board(tmp_path / "results", ("none", "kd"), seeds=2, searched=False)
    return tmp_path / "results"


@pytest.fixture
def port(folder: Path) -> Iterator[int]:
    with report_server(Report(Folders([folder])).source, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, dict(answer.headers), answer.read().decode()
    connection.close()
    return found


def test_a_new_record_changes_the_version_and_the_page(port: int, folder: Path) -> None:
    status, headers, page = ask(port)
    version = json.loads(ask(port, "/version")[2])["version"]
    assert status == 200
    assert headers["ETag"] == f'"{version}"'
    assert f'<body data-live="{version}">' in page
    assert "connect-src 'self'" in html.unescape(page)
    assert ask(port, If_None_Match=f'"{version}"')[::2] == (304, "")
    ResultStore(folder).append(final("dkd", 0, 90.0))
    later = json.loads(ask(port, "/version")[2])["version"]
    assert later != version
    status, _, page = ask(port, If_None_Match=f'"{version}"')
    assert status == 200
    assert 'data-method="dkd"' in page


def test_only_its_own_address_and_only_reading(port: int) -> None:
    assert ask(port, Host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
        status, _, page = ask(port, Host=host)
        assert (status, "data-live" in page) == (403, False)
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert ask(port, method=method)[0] == 501
    for path in ("/../kdbench", "/v1", "/?x"):
        assert ask(port, path)[0] == 404


def test_it_listens_on_loopback_alone(folder: Path) -> None:
    with report_server(Report(Folders([folder])).source, 0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_a_record_that_can_not_be_read_is_left_out_of_the_report(port: int, folder: Path) -> None:
    (folder / "v1" / "broken.parquet").write_bytes(b"no parquet")
    assert ask(port)[0] == 200


@pytest.mark.parametrize("error", [UserError("results/v1 is a file,\nexpected a folder"), RuntimeError("no kdbench error\n at all")])
def test_whatever_reading_ends_in_is_an_answer_of_one_line_and_not_the_end(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Folders, "scan", _raising(error))
        status, _, text = ask(port)
    assert status == 500
    assert text.startswith("kdbench: ")
    assert text.count("\n") == 1
    assert capfd.readouterr() == ("", "")
    assert ask(port)[0] == 200


def _raising(error: Exception) -> Callable[..., Any]:
    def scan(*_: Any, **__: Any) -> Any:
        raise error

    return scan


def test_a_folder_without_results_is_served_until_they_come(tmp_path: Path) -> None:
    source = Report(Folders([tmp_path / "none yet"])).source
    assert b"No board yet" in source.page()[1]
    write_board(tmp_path / "none yet", ("none", "kd"), seeds=1, searched=False)
    assert b'data-method="kd"' in source.page()[1]


def test_a_taken_port_is_said_in_one_line(folder: Path) -> None:
    source = Report(Folders([folder])).source
    with report_server(source, 0) as server, pytest.raises(UserError, match=r"--port \d+: it is taken; name another"):
        report_server(source, server.server_address[1])


def test_the_command_tells_its_address_and_ctrl_c_ends_it_in_one_line(folder: Path) -> None:
    command = [sys.executable, "-m", "kdbench.cli", "leaderboard", "--serve", "--port", "0", "--results", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)$", line)
        assert found is not None, line
        assert ask(int(found[1]))[0] == 200
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=120)
    finally:
        server.kill()
    assert (server.returncode, out, err) == (0, "stopped\n", "")
