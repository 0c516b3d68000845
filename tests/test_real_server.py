"""Rationales from a real OpenAI-compatible server, through a proxy that fails.

The server is `transformers serve` with SmolLM2; the questions are CommonsenseQA's.
"""

import collections
import contextlib
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from kdjax.annotation import annotate, prompts, requests, store
from kdjax.config import AnnotateConfig
from kdjax.data import sources
from tests import helpers

KEY, NUM, MAX_NEW = "sk-very-secret", 40, 8
# What happens to the n-th request, n counted modulo 16; the others are passed on.
FAULTS = {1: "busy", 4: "ill", 7: "cut", 9: "no json", 11: "empty", 14: "ill"}
HANGS = 5  # one request alone: it takes the whole timeout


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a server, but for those that are to fail."""

    daemon_threads = False  # closing waits for what is being answered

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = f"http://127.0.0.1:{port}"
        self.lock, self.release = threading.Lock(), threading.Event()
        self.num_requests = 0
        self.faults = collections.Counter()
        self.asked = collections.defaultdict(threading.Lock)  # by prompt
        self.said = {}  # prompt -> status and body of the server

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        with server.lock:
            number = server.num_requests
            server.num_requests += 1
            fault = "hang" if number == HANGS else FAULTS.get(number % 16)
            if self.headers["Authorization"] != f"Bearer {KEY}":
                fault = "key"
            server.faults[fault] += 1
        if fault == "key":
            return self.send(401, b'{"error": {"message": "Incorrect API key"}}')
        if fault == "busy":
            return self.send(429, b'{"error": {"message": "slow down"}}', retry="0.2")
        if fault == "ill":
            return self.send(500, b"<html>Internal Server Error</html>")
        if fault == "hang":
            server.release.wait()
            self.close_connection = True
            return None
        if fault == "no json":
            return self.send(200, b"data: [DONE]")
        if fault == "empty":
            return self.send(200, b'{"object": "chat.completion", "choices": []}')
        status, answer = self.ask(content)
        return self.send(status, answer[:50] if fault == "cut" else answer)

    def ask(self, content):
        """What the server says; asked once, also where the client did not wait."""
        prompt, server = json.dumps(json.loads(content)["messages"]), self.server
        with server.lock:
            asked = server.asked[prompt]
        with asked:
            if prompt not in server.said:
                server.said[prompt] = self.passed_on(content)
            return server.said[prompt]

    def passed_on(self, content):
        request = urllib.request.Request(
            self.server.behind + self.path,
            data=content,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def send(self, status, content, *, retry=None):
        with contextlib.suppress(ConnectionError):  # a client that gave up
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if retry:
                self.send_header("Retry-After", retry)
            self.end_headers()
            self.wfile.write(content)


@contextlib.contextmanager
def proxy(port):
    server = Proxy(port)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def port(smollm2, tmp_path_factory):
    """Where `transformers serve` answers."""
    with serve(smollm2, tmp_path_factory.mktemp("serve") / "log") as number:
        yield number


@contextlib.contextmanager
def serve(folder, log):
    """Run `transformers serve` with a model in the block, at the port it yields."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    executable = pathlib.Path(sys.executable).parent / "transformers"
    where = ["--host", "127.0.0.1", "--port", str(number)]
    where += ["--device", "cpu", "--dtype", "float32"]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [str(executable), "serve", str(folder), *where],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 240
        while not alive(number):
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(
                    "transformers serve does not start: pip install "
                    f"'transformers[serving]'\n{log.read_text()[-2000:]}"
                )
            time.sleep(0.5)
        yield number
    finally:
        process.terminate()
        process.wait()


def alive(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return True
    except OSError:
        return False


def config(real_data, smollm2, url, **fields):
    folder = real_data / "commonsense_qa"
    fields = {
        "backend": "server",
        "url": url,
        "model": str(smollm2),
        "key_variable": "TEACHER_KEY",
        "method": "zero_shot",
        "max_new_tokens": MAX_NEW,
        "concurrency": 4,
        "timeout": 15.0,
        "num_retries": 20,
        **fields,
    }
    return helpers.small_config(
        data={
            "source": "jsonl",
            "schema": "commonsense_qa",
            "path": str(folder / "train.jsonl"),
            "eval_path": str(folder / "dev.jsonl"),
            "num_train": NUM,
        },
        annotate=AnnotateConfig(**fields),
    )


@pytest.mark.real_data
def test_a_real_server_that_fails(real_data, smollm2, port, tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with proxy(port) as server:
        made = config(real_data, smollm2, server.url)
        report = annotate.annotate(made, tmp_path)
        assert server.faults.keys() == {*FAULTS.values(), "hang", None}
        folder = annotate.output_folder(made, tmp_path)
        lines = (folder / "rationales.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        examples = sources.load_examples(made.data, "train", seed=0)
        assert [row["id"] for row in rows] == [e.id for e in examples]
        written = [row["id"] for row in store.read(folder)]
        assert sorted(written) == sorted(row["id"] for row in rows)
        items = requests.make_items(examples, made.annotate)
        for row, item in zip(rows, items, strict=True):
            request = requests.Work(item, prompts.load(), made.annotate).request
            _, body = server.said[json.dumps(request.messages)]
            choice = json.loads(body)["choices"][0]
            assert row["text"] == choice["message"]["content"].strip()
            assert row["finish_reason"] == choice["finish_reason"]
            assert 0 < row["new_tokens"] <= MAX_NEW < row["prompt_tokens"]
        assert len({row["text"] for row in rows}) > NUM / 2
        assert report["rows"] == report["kept"] == NUM
        assert report["gates"] == {
            gate: sum(gate in row["gates"] for row in rows) for gate in report["gates"]
        }
        assert report["gates"]["cut_off"] == report["finish_reasons"]["length"] > 0
        seen = server.num_requests
        assert annotate.annotate(made, tmp_path) == report
        assert server.num_requests == seen


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("key", "fields", "message"),
    [
        (KEY, {"model": "another"}, r"annotate.model='another'.*status 400: .*another"),
        ("wrong", {}, r"key_variable='TEACHER_KEY': .* refuses its key .status 401"),
    ],
)
def test_a_real_refusal_is_one_line(
    key, fields, message, real_data, smollm2, port, tmp_path, monkeypatch
):
    monkeypatch.setenv("TEACHER_KEY", key)
    with proxy(port) as server:
        made = config(real_data, smollm2, server.url, concurrency=1, **fields)
        with pytest.raises(ValueError, match=message) as caught:
            annotate.annotate(made, tmp_path)
        assert "\n" not in str(caught.value) and key not in str(caught.value)
        assert server.num_requests == 1  # it was not tried again
