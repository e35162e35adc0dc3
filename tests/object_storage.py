"""An S3 server in the test's own process, behind a gate that can refuse writes for a while, as a storage does that is overloaded."""

from __future__ import annotations

import http.client
import logging
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

KEY, SECRET = "AKIAKDBENCHTESTKEY00", "kdbench-test-secret-that-nobody-may-see"


class ObjectStorage:
    """`gate.refuses` is asked of every request's method and path; what it refuses is answered 503 and never reaches the server."""

    def __enter__(self) -> ObjectStorage:
        from moto.server import ThreadedMotoServer  # half a second, for the tests that need it

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.gate = _Gate(("127.0.0.1", 0), self._server.get_host_and_port())
        threading.Thread(target=self.gate.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.gate.server_address[1]}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.gate.shutdown()
        self.gate.server_close()
        self._server.stop()

    @property
    def client(self):  # boto3 makes its classes when it is asked for them
        import boto3

        return boto3.client("s3", endpoint_url=self.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1")

    def environment(self, copies: Path) -> dict[str, str]:
        """What a user sets; `copies`: this machine's place for working copies."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "KDBENCH_WORKING_COPIES": str(copies),
        }

    def new_bucket(self) -> str:
        name = f"b{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}/results"

    def objects(self, address: str, under: str = "") -> dict[str, bytes]:
        """Every object below the address, by its path there; only those `under` a folder of it where that is given."""
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        client, found = self.client, {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/{under}"):
            for item in page.get("Contents", []):
                body = client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
                found[item["Key"].removeprefix(f"{prefix}/")] = body
        return found

    def journals(self, address: str) -> bytes:
        """What the studies have on record."""
        return b"".join(self.objects(address, "studies/").values())

    def put(self, address: str, path: str, data: bytes) -> None:
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        self.client.put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=data)


class _Gate(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], server: tuple[str, int]) -> None:
        super().__init__(address, _Passing)
        self.server = server
        self.refuses: Callable[[str, str], bool] = lambda method, path: False
        self.passed: list[tuple[str, str]] = []  # method and path of what reached the server


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Gate

    def _pass(self) -> None:
        body = self._body()
        if self.server.refuses(self.command, self.path):
            self._answer(503, {}, b"<Error><Code>ServiceUnavailable</Code><Message>Please try again later</Message></Error>")
            return
        self.server.passed.append((self.command, self.path))
        connection = http.client.HTTPConnection(*self.server.server)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("transfer-encoding", "expect")}
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        self._answer(answer.status, dict(answer.getheaders()), answer.read())
        connection.close()

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass
