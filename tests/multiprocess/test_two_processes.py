"""Two processes of four devices do what one process of eight does."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from kdjax import config as config_lib
from tests import small

ROOT = pathlib.Path(__file__).parent.parent.parent


def losses(workdir: pathlib.Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_two_processes_are_one(tmp_path):
    runs = {}
    for num_processes in (1, 2):
        workdir = tmp_path / f"run{num_processes}"
        config = small.config(
            mesh={"data": 2, "fsdp": 4},
            train={"steps": 3, "save_every": 2, "num_microbatches": 1},
        )
        file = tmp_path / "config_file.py"
        file.write_text(
            "from kdjax import config\n"
            "def get_config(argument=''):\n"
            f"    return config.from_json({config_lib.to_json(config)!r})\n"
        )
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            "XLA_FLAGS": "",
            "KDJAX_DEVICES": str(8 // num_processes),
        }
        done = subprocess.run(
            [
                ROOT / "launch" / "local.sh",
                *(str(num_processes), "-m", "kdjax.train"),
                *(f"--config={file}", f"--workdir={workdir}"),
            ],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        summary = json.loads((workdir / "summary.json").read_text())
        assert summary["processes"] == num_processes
        runs[num_processes] = losses(workdir), summary["student"]
    np.testing.assert_allclose(runs[1][0], runs[2][0], rtol=1e-5)
    for name in ("nll", "kl", "accuracy"):
        np.testing.assert_allclose(
            runs[1][1][name], runs[2][1][name], rtol=1e-4, atol=1e-6
        )
