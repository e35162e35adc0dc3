"""The report on a port of this machine, made anew when a record has arrived since the last time."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kdbench.errors import KDBenchError, UserError, in_one_line
from kdbench.records.record import RunRecord

LOOPBACK = "127.0.0.1"


class LivePage:
    """The page and its version. scan: the records there are. render: the page of records, which bears the version it is given."""

    def __init__(self, scan: Callable[[], Sequence[RunRecord]], render: Callable[[Sequence[RunRecord], str], str]) -> None:
        self._scan, self._render = scan, render
        self._lock = threading.Lock()
        self._page: tuple[str, bytes] | None = None

    def version(self) -> str:
        """A hash of what records there are; it changes with the first that is new."""
        with self._lock:
            return _version(self._scan())

    def page(self) -> tuple[str, bytes]:
        """Version and HTML, made again only where the version is another."""
        with self._lock:
            records = self._scan()
            version = _version(records)
            if self._page is None or self._page[0] != version:
                self._page = version, self._render(records, version).encode()
            return self._page


def _version(records: Sequence[RunRecord]) -> str:
    return hashlib.sha256("\n".join(record.run_id for record in records).encode()).hexdigest()[:16]


def report_server(source: LivePage, port: int) -> ThreadingHTTPServer:
    """A server on loopback that gives `/` and `/version` of `source`; port 0 takes a free one. The caller runs and closes it.

    It answers GET and nothing else, and only where the browser was sent to this very address: another site's name that was made to lead
    to 127.0.0.1 (DNS rebinding) gets nothing. Raises UserError where the port can't be had.
    """

    class Handler(_Handler):
        pages = source

    try:
        server = _Server((LOOPBACK, port), Handler)
    except OSError as error:
        reason = "it is taken" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(f"--port {port}: {reason}; name another, or 0 for any that is free") from error
    return server


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away, or sent what is no request, is nobody's business; the base class prints a traceback."""


class _Handler(BaseHTTPRequestHandler):
    pages: LivePage
    server_version, sys_version = "kdbench", ""
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds that an idle connection is kept

    def do_GET(self) -> None:
        assert isinstance(self.server, ThreadingHTTPServer)
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{LOOPBACK}:{port}", f"localhost:{port}"):
            self._send(403, b"this server answers to its own address only\n", "text/plain")
            return
        if self.path not in ("/", "/version"):
            self._send(404, b"there is / and /version\n", "text/plain")
            return
        try:
            version, body = self.pages.page() if self.path == "/" else (self.pages.version(), None)
        except Exception as error:  # whatever a file that somebody changed meanwhile ends in: the next request may find it mended
            reason = str(error) if isinstance(error, KDBenchError) else in_one_line(error)
            self._send(500, f"kdbench: {' '.join(reason.splitlines())}\n".encode(errors="backslashreplace"), "text/plain; charset=utf-8")
            return
        if body is None:
            self._send(200, json.dumps({"version": version}).encode(), "application/json")
            return
        tag = f'"{version}"'
        known = self.headers.get("If-None-Match") == tag
        self._send(304 if known else 200, b"" if known else body, "text/html; charset=utf-8", ETag=tag)

    def _send(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        given = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in (given | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are nobody's business; the terminal has the address and the end."""
