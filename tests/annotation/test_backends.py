"""A server that fails in every way, and what is written all the same."""

import collections
import contextlib
import gzip
import http.server
import json
import logging
import re
import resource
import threading
import time
import zlib

import pytest

from kdjax.annotation import annotate, backends, requests, store
from kdjax.config import AnnotateConfig
from kdjax.data import kinship
from kdjax.experiment import validate
from kdjax.runtime import processes
from tests import helpers

KEY = "sk-very-secret"
NUM = 24


class Answers(http.server.ThreadingHTTPServer):
    """Answers "echo <last question's id>" after the faults of that question."""

    daemon_threads = False  # closing waits for what is being answered

    def __init__(self, faults=lambda number: ()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.lock = faults, threading.Lock()
        self.tries = collections.Counter()  # by prompt
        self.numbers = {}  # prompt -> in order of arrival
        self.bodies, self.headers = [], []
        self.under_way = self.most_under_way = self.served = 0
        self.release, self.meeting = threading.Event(), threading.Barrier(6)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


def answer(prompt, number):
    found = re.findall(r"How is (\w+) related to (\w+)", prompt)[-1]
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "length" if number % 5 == 4 else "stop",
                "message": {
                    "role": "assistant",
                    "content": f" {found} \u00e9\ud83d\ude00",
                },
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
    }


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, prompt = self.server, json.dumps(body["messages"])
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            server.bodies.append(body)
            server.headers.append(self.headers)
            number = server.numbers.setdefault(prompt, len(server.numbers))
            faults = server.faults(number)
            tried, server.tries[prompt] = server.tries[prompt], server.tries[prompt] + 1
        try:
            fault = faults[tried] if tried < len(faults) else None
            self.reply(fault, body["messages"][-1]["content"], number)
        finally:
            with server.lock:
                server.under_way -= 1

    def reply(self, fault, prompt, number):
        found = json.dumps(answer(prompt, number))
        if fault == "meet":
            self.server.meeting.wait(20)
            fault = None
        if fault == "trickle":
            return self.trickle(found)
        if fault == "bomb":
            bomb = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
            zeros = (bomb.compress(bytes(1 << 20)) for _ in range(128))
            content = b"".join(zeros) + bomb.flush()  # 128 MiB in 128 KiB
            return self.send(200, content, encoding="gzip")
        if fault == "gzip":
            return self.send(200, gzip.compress(found.encode()), encoding="gzip")
        if fault == "zstd":
            return self.send(200, b"\x28\xb5\x2f\xfd", encoding="zstd")
        if fault == "echo":
            found = found.replace("echo", self.headers["Authorization"])
            fault = None
        if fault is None:
            with self.server.lock:
                self.server.served += 1
            return self.send(200, found)
        if fault == "timeout":
            self.server.release.wait(20)  # until the test is over
            self.close_connection = True
            return None
        if fault == "lost":
            self.close_connection = True
            return None
        if fault == "short":
            return self.send(200, found, length=len(found) + 50)
        if isinstance(fault, int):
            said = {"error": {"message": f"no: {self.headers['Authorization']}"}}
            return self.send(fault, json.dumps(said), retry="0.01")
        return self.send(200, fault)

    def trickle(self, text):
        """A byte now and then: each comes within the timeout, all of them do not."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        with contextlib.suppress(OSError):
            for byte in text.encode():
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.server.release.wait(0.2):
                    break
        self.close_connection = True

    def send(self, status, text, *, length=None, retry=None, encoding=None):
        content = text.encode() if isinstance(text, str) else text
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(content)))
        if retry:
            self.send_header("Retry-After", retry)
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has had enough
            self.wfile.write(content)
        if length:
            self.close_connection = True


FAULTS = (
    (),
    (429,),
    (500, 503),
    ("timeout",),
    ("lost", 429),
    ("{", "", "null", "[]", '{"choices": []}'),
    ('{"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}',),
    ("short",),
    (408, 409, 502),
)


@contextlib.contextmanager
def serving(faults=lambda number: ()):
    server = Answers(faults)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setattr(backends, "_FIRST_DELAY", 0.01)


def config(server, **fields):
    fields = {
        "backend": "server",
        "url": server.url,
        "model": "m",
        "key_variable": "TEACHER_KEY",
        "num_demonstrations": 1,
        "max_new_tokens": 5,
        "timeout": 2.0,
        "concurrency": 6,
        **fields,
    }
    return helpers.small_config(
        data={"num_train": NUM}, annotate=AnnotateConfig(**fields)
    )


def examples(made):
    return kinship.generate(made.data.kinship, num_examples=NUM, seed=0, split="train")


def rows_of(folder, name="rationales.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("method", ["few_shot", "critique_revision"])
def test_nothing_is_lost_or_doubled(tmp_path, method):
    with serving(lambda number: FAULTS[number % len(FAULTS)]) as server:
        made = config(server, method=method)
        report = annotate.annotate(made, tmp_path)
        folder = annotate.output_folder(made, tmp_path)
        rows = rows_of(folder)
        assert [row["id"] for row in rows] == [e.id for e in examples(made)]
        parts = list(store.read(folder))
        assert sorted(row["id"] for row in parts) == sorted(row["id"] for row in rows)
        steps = 3 if method == "critique_revision" else 1
        for row, example in zip(rows, examples(made), strict=True):
            names = re.findall(r"How is (\w+) related to (\w+)", example.question)[-1]
            assert row["text"] == f"{names} é\U0001f600"
            assert len(row["calls"]) == steps
            assert row["prompt_tokens"] == 10 * steps
            assert row["new_tokens"] == 3 * steps
        assert len(server.numbers) == steps * NUM  # prompts
        reasons = [row["calls"][-1]["finish_reason"] for row in parts]
        calls = [call["finish_reason"] for row in parts for call in row["calls"]]
        assert set(calls) == {"length", "stop"}
        assert report["rows"] == NUM
        assert report["gates"]["cut_off"] == reasons.count("length")
        assert report["finish_reasons"] == collections.Counter(reasons)
        seen = len(server.bodies)
        before = (folder / "rationales.jsonl").stat()
        assert annotate.annotate(made, tmp_path) == report
        assert len(server.bodies) == seen
        assert (folder / "rationales.jsonl").stat().st_mtime_ns == before.st_mtime_ns


def test_what_is_sent(tmp_path):
    with serving(lambda number: ("meet",) if number < 6 else ()) as server:
        fields = {"temperature": 0.7, "top_p": 0.9, "stop": ("\nQ:",), "timeout": 30.0}
        made = config(server, **fields)
        annotate.annotate(made, tmp_path)
        body = server.bodies[0]
        assert body["model"] == "m" and body["max_tokens"] == 5
        assert (body["temperature"], body["top_p"]) == (0.7, 0.9)
        assert body["stop"] == ["\nQ:"]
        assert len({body["seed"] for body in server.bodies}) == NUM
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        first = requests.Work(
            requests.make_items(examples(made), made.annotate)[0],
            annotate.prompts.load(),
            made.annotate,
        )
        assert first.request.messages in [body["messages"] for body in server.bodies]
        assert server.most_under_way == made.annotate.concurrency == 6


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            401,
            r"annotate\.key_variable='TEACHER_KEY': the server at .* refuses its key",
        ),
        (403, "status 403"),
        (404, r"annotate\.model='m': unknown to the server"),
        (400, r"refuses the rationale prompt of .* \(status 400: .*no: Bearer \[key\]"),
    ],
)
def test_a_refusal_is_one_error_without_the_key(tmp_path, status, message, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(lambda number: (status,) * 9) as server:
        made = config(server)
        with pytest.raises(ValueError, match=message) as caught:
            annotate.annotate(made, tmp_path)
        assert KEY not in str(caught.value) and "\n" not in str(caught.value)
        assert len(server.bodies) <= made.annotate.concurrency  # none tried again
    assert KEY not in caplog.text
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY not in file.read_text()


def test_a_refusal_in_a_form_of_its_own_is_repeated(tmp_path, monkeypatch):
    def refuse(self, fault, prompt, number):
        self.send(422, json.dumps({"detail": "pinned to another model"}))

    monkeypatch.setattr(Handler, "reply", refuse)
    with (
        serving() as server,
        pytest.raises(ValueError, match=r"model='m'.*status 422: .*pinned to another"),
    ):
        annotate.annotate(config(server), tmp_path)


def test_a_server_that_stays_ill_ends_the_run_and_the_next_one_goes_on(tmp_path):
    with serving(lambda number: (500,) * 3 if number == 7 else ()) as server:
        made = config(server, num_retries=2, concurrency=1)
        with pytest.raises(ValueError, match=r"failed 3 times .*status 500"):
            annotate.annotate(made, tmp_path)
        folder = annotate.output_folder(made, tmp_path)
        assert len(list(store.read(folder))) == 7
        assert not (folder / "rationales.jsonl").exists()
        report = annotate.annotate(made, tmp_path)
        assert report["rows"] == NUM and server.served == NUM


def test_the_budget_ends_the_run_before_it_is_exceeded(tmp_path):
    with serving() as server:
        made = config(server, token_budget=13 * 10 + 5, concurrency=1)
        for _ in range(2):  # a second start may not spend it again
            with pytest.raises(ValueError, match=r"token_budget=135 is spent \(1[34]"):
                annotate.annotate(made, tmp_path)
        done = len(list(store.read(annotate.output_folder(made, tmp_path))))
        assert done == server.served == 11  # the eleventh was asked for with 5 left
        made.annotate.token_budget = 0
        annotate.annotate(made, tmp_path)
        assert server.served == NUM


def test_a_stop_string_that_a_server_leaves_in_is_cut_off(tmp_path):
    with serving() as server:
        made = config(server, stop=("\u00e9",))
        annotate.annotate(made, tmp_path)
        for row in rows_of(annotate.output_folder(made, tmp_path)):
            assert row["text"].startswith("(") and "\u00e9" not in row["text"]


def test_a_missing_key_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("TEACHER_KEY")
    with serving() as server:
        with pytest.raises(
            ValueError, match="key_variable='TEACHER_KEY': this variable"
        ):
            annotate.annotate(config(server), tmp_path)
        annotate.annotate(config(server, key_variable=""), tmp_path)
        assert server.served == NUM


def test_a_server_that_is_not_there(tmp_path):
    with serving() as server:
        made = config(server, num_retries=1, concurrency=1)
    with pytest.raises(ValueError, match=r"failed 2 times .*no connection"):
        annotate.annotate(made, tmp_path)


@pytest.mark.parametrize("fault", ["trickle", "bomb", "zstd"])
def test_an_answer_without_end_ends(tmp_path, fault):
    """By the timeout, or by its size; it is tried again like any other failure."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving(lambda number: (fault,) if number == 3 else ()) as server:
        made = config(server, timeout=1.0)
        start = time.monotonic()
        report = annotate.annotate(made, tmp_path)
        assert time.monotonic() - start < 15
    assert report["rows"] == NUM
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_a_compressed_answer_is_read(tmp_path):
    with serving(lambda number: ("gzip",) * 9) as server:
        assert annotate.annotate(config(server), tmp_path)["rows"] == NUM
        assert server.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("counts", [(-5, 3), (10, -3), (True, 3), ("10", 3)])
def test_a_number_of_tokens_that_cannot_be_is_none(tmp_path, counts):
    text = json.dumps(
        answer("How is A related to B", 0)
        | {
            "usage": dict(
                zip(("prompt_tokens", "completion_tokens"), counts, strict=True)
            )
        }
    )
    with serving(lambda number: (text,)) as server:
        made = config(server, token_budget=10**6)
        with pytest.raises(ValueError, match="token_budget=1000000: the server does"):
            annotate.annotate(made, tmp_path)
        made.annotate.token_budget = 0
        report = annotate.annotate(made, tmp_path)
    assert report["prompt_tokens"] >= 0 and report["new_tokens"] >= 0


@pytest.mark.parametrize(
    "key", ["sk-one\nsk-two", "sk-\x07bell", "sk-\u00e9t\u00e9-secret"]
)
def test_a_key_that_is_none_is_refused_and_not_shown(tmp_path, monkeypatch, key):
    monkeypatch.setenv("TEACHER_KEY", key)
    with serving() as server, pytest.raises(ValueError, match="TEACHER_KEY") as raised:
        annotate.annotate(config(server), tmp_path)
    assert key not in str(raised.value) and "sk-" not in str(raised.value)


def test_a_key_that_the_server_writes_is_not_kept(tmp_path):
    with serving(lambda number: ("echo",)) as server:
        annotate.annotate(config(server), tmp_path)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY not in file.read_text()


@pytest.mark.parametrize(
    "url",
    [
        "http://me:pass-word@localhost/v1",
        "ftp://me:pass-word@localhost",
        "me:pass-word@localhost",
        "https://localhost/v1?key=pass-word",
        "https://localhost/v1#pass-word",
    ],
)
@pytest.mark.parametrize("backend", ["local", "server"])
def test_an_address_with_a_secret_is_refused_and_not_shown(url, backend):
    made = helpers.small_config(
        annotate=AnnotateConfig(backend=backend, url=url, model="m")
    )
    with pytest.raises(ValueError, match=r"annotate\.url has a user") as raised:
        validate.validate(made)
    assert "pass-word" not in str(raised.value)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    from jax import numpy as jnp

    with pytest.raises(ValueError, match=r"weights that are infinite or not a number"):
        backends._check_finite({"a": jnp.zeros(3), "b": jnp.array([jnp.nan])}, "folder")
    backends._check_finite({"a": jnp.zeros(3)}, "folder")


def test_reasoning_of_a_server_is_part_of_its_text(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "k")
    made = AnnotateConfig(
        backend="server", url="http://x/v1", model="m", key_variable="TEACHER_KEY"
    )
    server = backends.Server(made)
    try:
        for name in ("reasoning_content", "reasoning"):
            message = {"content": "4", name: "Two and two."}
            body = {"choices": [{"message": message, "finish_reason": "stop"}]}
            text = server._read(json.dumps(body)).text
            assert text == "<think>\nTwo and two.\n</think>\n\n4"
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "flags", "code"),
    [
        ((), [], 0),
        ((401,), [], 1),
        ((500,) * 9, ["--config.annotate.num_retries=1"], 1),
        ((), ["--config.annotate.url=http://me:pass-word@localhost/v1"], 1),
    ],
)
def test_a_command_leaves_no_secret(tmp_path, faults, flags, code):
    """Neither in a file nor on the terminal, whether it succeeds or fails."""
    log = tmp_path / "log.txt"
    with serving(lambda number: faults) as server:
        file = helpers.write_config_file(config(server), tmp_path / "config.py")
        process = processes.start(
            [
                "kdjax.annotate",
                f"--config={file}",
                f"--workdir={tmp_path / 'run'}",
                f"--json={tmp_path / 'report.json'}",
                "--verbosity=1",
                *flags,
            ],
            log=log,
            environment={"TEACHER_KEY": KEY, "JAX_PLATFORMS": "cpu"},
        )
        process.join()
    assert process.exitcode == code, log.read_text()
    assert "Traceback" not in log.read_text()
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert KEY.encode() not in content and b"pass-word" not in content, path
