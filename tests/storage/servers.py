"""Local servers that speak as S3 and GCS do, and answer wrongly on demand."""

import contextlib
import logging
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

BUCKET = "bucket"
SECRET = "secret-of-the-tests"
FAULTS = ("500", "503", "slow", "reset", "truncated")
SLOW_SECONDS = 1.0


class S3:
    """An S3 server whose next answers may be faults.

    Args:
      address: http://host:port.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.faults: list[str] = []  # of every second request, while there are some
        self.made: list[str] = []
        self.denied = False
        self._number, self._lock = 0, threading.Lock()

    def next_fault(self) -> str:
        """The fault of this request, or ""."""
        with self._lock:
            if self.denied:
                return "403"
            self._number += 1
            if not self.faults or self._number % 2:
                return ""
            self.made.append(self.faults.pop(0))
            return self.made[-1]

    def between(self, application):
        """The WSGI application with faults."""

        def answer(environ, start_response):
            fault = self.next_fault()
            if fault in ("500", "503", "403"):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                names = {
                    "500": "500 InternalError",
                    "503": "503 SlowDown",
                    "403": "403 AccessDenied",
                }
                code = names[fault].split()[1]
                body = f"<Error><Code>{code}</Code><Message>no</Message></Error>"
                start_response(names[fault], [("Content-Type", "application/xml")])
                return [body.encode()]
            if fault == "slow":
                time.sleep(SLOW_SECONDS)
            if fault == "reset":
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            if fault != "truncated":
                return application(environ, start_response)

            def cut_response(status, headers, exc_info=None):
                length = [h for h in headers if h[0].lower() == "content-length"]
                missing = [] if length else [("Content-Length", "1000")]
                return start_response(status, [*headers, *missing], exc_info)

            body = b"".join(application(environ, cut_response))
            return [body[: len(body) // 2]]

        return answer


@contextlib.contextmanager
def s3() -> Iterator[S3]:
    """Run an S3 server with an empty bucket in a thread."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = S3("")
    application = DomainDispatcherApplication(create_backend_app)
    http = make_server("127.0.0.1", 0, server.between(application), threaded=True)
    http.log = lambda *args: None
    server.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def environment(server: S3, folder: pathlib.Path) -> dict[str, str]:
    """The variables by which a process finds the server, and no other credentials."""
    return {
        "AWS_ENDPOINT_URL": server.address,
        "AWS_ACCESS_KEY_ID": "key-of-the-tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def make_bucket() -> None:
    """Make the bucket, by the variables that are set."""
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)


@contextlib.contextmanager
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a GCS server with an empty bucket, which this process takes for Google's."""
    from gcp_storage_emulator.server import create_server

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        yield
    finally:
        server.stop()
