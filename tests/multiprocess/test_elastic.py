"""A run goes on with another number of processes, or on another mesh."""

import json
import signal
import time

import numpy as np
import pytest

from kdjax import label, train
from kdjax.parallel import distributed
from kdjax.runtime.interrupts import SIGTERM_CODE
from tests import helpers
from tests.helpers import losses, step_rows, summary
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


def check_same_run(one, other, **tolerance):
    """Two runs had the same batches and, to rounding, the same losses."""
    for key in ("step", "tokens"):
        if key in step_rows(one)[0]:
            assert [r[key] for r in step_rows(one)] == [
                r[key] for r in step_rows(other)
            ]
    np.testing.assert_allclose(losses(one), losses(other), **tolerance)
    for name, value in summary(one)["student"].items():
        if name in ("nll", "kl"):
            found = summary(other)["student"][name]
            np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-5)


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
    check_same_run(one, several, rtol=1e-4)
    assert summary(several)["processes"] == 4


@pytest.mark.slow
def test_meshes_of_any_axes_are_one_run(config, tmp_path, monkeypatch):
    """Data 1 and fsdp 8, 8 and 1, 2 and 4, then the tensor axis, as one run."""
    config = helpers.changed(config, train={"steps": 8})
    config.cache.path = str(tmp_path / "cache")
    label.run(config, tmp_path / "label")
    one, several = tmp_path / "one", tmp_path / "several"
    train.run(config, one)
    meshes = [(1, 8, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)]
    for index, (data, fsdp, tensor) in enumerate(meshes):
        mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
        stop = 2 * (index + 1)
        monkeypatch.setattr(
            distributed.Preemption, "requested", lambda self, s, stop=stop: s == stop
        )
        if stop < 8:
            with pytest.raises(SystemExit):
                train.run(helpers.changed(config, mesh=mesh), several)
        else:
            monkeypatch.undo()
            train.run(helpers.changed(config, mesh=mesh), several)
    check_same_run(one, several, rtol=1e-4)
