"""Several processes do what one does."""

import json
import pathlib

import numpy as np

from kdjax import train
from tests import helpers
from tests.multiprocess import launch


def losses(workdir: pathlib.Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_two_processes_of_four_devices_are_one_of_eight(tmp_path):
    runs = {}
    config = helpers.small_config(
        mesh={"data": 2, "fsdp": 4},
        train={"steps": 3, "save_every": 2, "num_microbatches": 1},
    )
    for num_processes in (1, 2):
        workdir = tmp_path / f"run{num_processes}"
        launch.run(
            "train",
            config,
            workdir,
            num_processes=num_processes,
            num_devices=8 // num_processes,
        )
        summary = json.loads((workdir / "summary.json").read_text())
        assert summary["processes"] == num_processes
        runs[num_processes] = losses(workdir), summary["student"]
    np.testing.assert_allclose(runs[1][0], runs[2][0], rtol=1e-5)
    for name in ("nll", "kl", "accuracy"):
        np.testing.assert_allclose(
            runs[1][1][name], runs[2][1][name], rtol=1e-4, atol=1e-6
        )


def test_two_and_four_processes_label_what_one_labels(tmp_path):
    first = helpers.small_config(train={"steps": 1}, evaluation={"num_generations": 0})
    train.run(first, tmp_path / "first")
    config = helpers.small_config(
        teacher={"path": str(tmp_path / "first" / "teacher")},
        cache={"shard_size": 5, "batch_size": 2},
    )
    found = {}
    for num_processes in (1, 2, 4):
        workdir = tmp_path / f"label{num_processes}"
        launch.run("label", config, workdir, num_processes=num_processes, num_devices=1)
        files = sorted((workdir / "cache").rglob("*.*"))
        found[num_processes] = {
            str(f.relative_to(workdir)): f.read_bytes() for f in files
        }
    assert len(found[1]) > 10
    assert found[1] == found[2] == found[4]
