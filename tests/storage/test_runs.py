"""Whole runs on a store, killed and gone on with on another machine."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from kdjax.storage import index as index_lib
from kdjax.storage.store import Store
from tests import helpers, xla_flags
from tests.storage import servers

URL = f"s3://{servers.BUCKET}/runs/smoke"
CONFIG = [
    "--config=quickstart:smoke",
    "--config.train.save_every=20",
    "--config.train.steps=200",
    "--config.train.log_every=1",
    "--config.storage.sync_seconds=0.3",
]
pytestmark = pytest.mark.slow


def command(variables, *arguments, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env={**helpers.ENVIRONMENT, "XLA_FLAGS": xla_flags.FAST_COMPILE, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    assert servers.SECRET not in output
    return output


def newest(store: Store) -> int:
    """The step of the newest checkpoint in the store; 0 if there is none."""
    paths = (path.split("/") for path in index_lib.read(store).files)
    return max((int(p[1]) for p in paths if p[0] == "checkpoints"), default=0)


def losses(file: pathlib.Path) -> list[float]:
    rows = map(json.loads, file.read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_killed_on_one_machine_gone_on_with_on_another(tmp_path, monkeypatch):
    for module in ("s3fs", "moto.server"):
        pytest.importorskip(module)
    with servers.s3() as server:
        variables = servers.environment(server, tmp_path)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        servers.make_bucket()
        store = Store(URL)

        def machine(name: str) -> dict[str, str]:
            return {**variables, "KDJAX_LOCAL_DIR": str(tmp_path / name)}

        # Of the machines that are lost, one is killed while the student trains, one is
        # told to end.
        for number, ending, code in ((1, signal.SIGKILL, -9), (2, signal.SIGTERM, 143)):
            before = newest(store)
            process = command(
                machine(f"m{number}"), "kdjax.train", *CONFIG, f"--workdir={URL}"
            )
            while newest(store) == before and process.poll() is None:
                time.sleep(0.1)
            process.send_signal(ending)
            finish(process, code)
        assert 0 < newest(store) < 200
        server.faults = ["500", "reset", "503", "truncated"] * 5
        finish(command(machine("m3"), "kdjax.train", *CONFIG, f"--workdir={URL}"))
        assert len(server.made) == 20
        undisturbed = tmp_path / "undisturbed"
        finish(command({}, "kdjax.train", *CONFIG, f"--workdir={undisturbed}"))
        out = f"s3://{servers.BUCKET}/models/student"
        finish(
            command(machine("m4"), "kdjax.export", f"--workdir={URL}", f"--out={out}")
        )
        finish(command({}, "kdjax.export", f"--workdir={undisturbed}"))
        finish(command(machine("m5"), "kdjax.cache", "verify", f"{URL}/cache/train"))
        model = Store(out).read("model.safetensors")
        assert model == (undisturbed / "export" / "model.safetensors").read_bytes()
        third = next((tmp_path / "m3").glob("smoke-*"))
        assert losses(third / "metrics.jsonl") == losses(undisturbed / "metrics.jsonl")
        assert len(losses(third / "metrics.jsonl")) == 200
        assert "summary.json" in index_lib.read(store).files
        assert store.read(".kdjax/lease.json") is None
    assert not os.path.exists("s3:")
