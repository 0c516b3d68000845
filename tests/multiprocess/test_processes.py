"""Several processes do what one does."""

import numpy as np
import pytest

from kdjax import train
from tests import helpers
from tests.helpers import losses, summary
from tests.multiprocess import launch


def test_two_processes_of_four_devices_are_one_of_eight(tmp_path):
    config = helpers.small_config(
        mesh={"data": 2, "fsdp": 4},
        train={"steps": 3, "save_every": 2, "num_microbatches": 1},
        evaluation={"cache_dtype": "float32"},  # continuous batching
    )
    one, two = tmp_path / "one", tmp_path / "two"
    train.run(config, one)
    launch.run("train", config, two, num_processes=2, num_devices=4)
    assert (summary(one)["processes"], summary(two)["processes"]) == (1, 2)
    np.testing.assert_allclose(losses(one), losses(two), rtol=1e-5)
    for name in ("nll", "kl", "accuracy"):
        np.testing.assert_allclose(
            summary(one)["student"][name],
            summary(two)["student"][name],
            rtol=1e-4,
            atol=1e-6,
        )
    first, second = (
        (workdir / "generations.jsonl").read_text() for workdir in (one, two)
    )
    assert first == second


@pytest.mark.slow
def test_four_processes_label_what_one_labels(decoder_run, shared_folder, tmp_path):
    config = helpers.changed(
        helpers.taught(shared_folder, cache_of=""),
        cache={"shard_size": 5, "batch_size": 2},
    )
    caches = {}
    for num_processes in (1, 4):
        workdir = tmp_path / f"label{num_processes}"
        launch.run("label", config, workdir, num_processes=num_processes, num_devices=1)
        files = sorted((workdir / "cache").rglob("*.*"))
        caches[num_processes] = {
            str(f.relative_to(workdir)): f.read_bytes() for f in files
        }
    assert len(caches[1]) > 10
    assert caches[1] == caches[4]
