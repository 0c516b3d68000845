"""A run goes on with another number of processes."""

import json
import signal
import time

import pytest

from kdjax import train
from kdjax.runtime.interrupts import SIGTERM_CODE
from tests import helpers
from tests.helpers import summary
from tests.multiprocess.launch import Gang

STEPS = 60


def wait_for(condition, gang):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        assert all(p.poll() in (None, 0) for p in gang.processes.values())
        time.sleep(0.02)


def content(folder):
    files = sorted(f for f in folder.rglob("*.*") if not f.name.startswith("."))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.fixture
def config(tmp_path):
    """A small run with a teacher of its own, which is trained."""
    config = helpers.small_config(
        train={"steps": STEPS, "save_every": 0, "num_microbatches": 1},
        teacher={"steps": 2},
        cache={"shard_size": 3, "batch_size": 2},
        optim={"learning_rate": 1e-3},
    )
    train.run(config, tmp_path / "teacher", until="teacher")
    config.teacher.path = str(tmp_path / "teacher" / "teacher")
    return config


@pytest.mark.slow
def test_labelling_goes_on_with_fewer_processes(config, tmp_path):
    """Killed in the middle; the cache is byte for byte that of one process."""
    one, several = tmp_path / "one", tmp_path / "several"
    gang = Gang("label", [config] * 4, [several] * 4)
    wait_for(lambda: len(list(several.rglob("shard-*"))) >= 2, gang)
    gang.kill()
    for num, folder in ((2, several), (1, one)):
        ends = Gang("label", [config] * num, [folder] * num).ends()
        assert {code for code, _ in ends.values()} == {0}, ends
    assert content(one / "cache") == content(several / "cache")


@pytest.mark.slow
def test_four_two_one_and_four_processes_are_one_run(tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    config = helpers.small_config(
        train={"steps": STEPS, "save_every": 0, "num_microbatches": 1},
        method={"name": "finetune", "soft_weight": 0.0},
        optim={"learning_rate": 1e-3},
    )
    train.run(config, one)
    metrics, seen = several / "metrics.jsonl", []
    for num in (4, 2, 1, 4):
        gang = Gang("train", [config] * num, [several] * num)
        if len(seen) < 3:
            before = seen[-1] if seen else 0
            wait_for(
                lambda before=before: (
                    metrics.exists()
                    and len(metrics.read_text().splitlines()) > before + 1
                ),
                gang,
            )
            gang.processes[num - 1].send_signal(signal.SIGTERM)
        ends = gang.ends()
        codes = {code for code, _ in ends.values()}
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        seen.append(max(steps))
        assert codes == {0 if len(seen) == 4 else SIGTERM_CODE}, ends
    assert 0 < seen[0] < seen[1] < seen[2] < seen[3] == STEPS
    helpers.check_same_run(one, several, rtol=1e-4)
    assert summary(several)["processes"] == 4
