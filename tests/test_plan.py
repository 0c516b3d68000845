"""The plan command; what it reports is in tests/aot/test_report.py."""

import json
import os
import subprocess
import sys

import pytest

from tests import xla_flags


def command(*arguments):
    environment = os.environ | {"XLA_FLAGS": xla_flags.FAST_COMPILE}
    return subprocess.run(
        [sys.executable, "-m", "kdjax.plan", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_the_command(tmp_path):
    file = tmp_path / "plan.json"
    arguments = "--config=configs/plan_llama_1b.py:smoke", f"--json={file}"
    done = command(*arguments, "--topology=cpu:8")
    assert done.returncode == 0, done.stderr
    assert "collectives of a step" in done.stdout and "data=2 fsdp=4" in done.stdout
    report = json.loads(file.read_text())
    assert report["num_devices"] == 8 and report["warnings"] == []
    assert report["attention"] == "xla" and report["fits"] is None
    refused = command(*arguments, "--topology=v9:16x16")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "chip 'v9' is unknown" in refused.stderr
