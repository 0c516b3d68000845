"""Processes that differ, or are lost: all end with one line and a code that says it."""

import os
import signal
import time

import pytest

from kdjax.config import Config, leaves, replace
from kdjax.runtime.interrupts import PEER_LOST_CODE, RANKS_DIFFER_CODE
from tests import helpers
from tests.multiprocess.launch import Gang
from tests.parallel.test_agreement import LEAVES, another


def small_config() -> Config:
    return helpers.small_config(
        teacher={"steps": 1},
        train={"num_microbatches": 1},
        distributed={"heartbeat_seconds": 20},
    )


def check_refused(tmp_path, configs, name):
    folders = [tmp_path / "run"] * len(configs)
    ends = Gang("train", configs, folders).ends()
    for code, text in ends.values():
        assert code == RANKS_DIFFER_CODE, text[-2000:]
        line = text.strip().splitlines()[-1]
        assert f"ranks of this run differ in {name}: " in line
        assert "on rank 0 (host " in line and "on rank 1 (host " in line
    assert not (tmp_path / "run").exists()


def test_ranks_of_two_configs_are_refused(tmp_path):
    """Nothing is compiled or written; both say field, values and ranks."""
    config = small_config()
    other = helpers.changed(config, optim={"learning_rate": 0.5})
    check_refused(tmp_path, [config, other], "optim.learning_rate")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # All of them take an hour: KDJAX_ALL_FIELDS=1.
    ["train.steps", "distributed.heartbeat_seconds"]
    if "KDJAX_ALL_FIELDS" not in os.environ
    else list(LEAVES),
)
def test_every_field_is_refused_in_two_processes(name, tmp_path):
    config = small_config()
    value = {leaf.path: leaf.value for leaf in leaves(config)}[name]
    check_refused(tmp_path, [config, replace(config, name, another(value))], name)


@pytest.mark.slow
def test_another_data_file_is_refused(tmp_path):
    """The same name on two hosts, with another content: folders stand for hosts."""
    folders = []
    for host, answer in enumerate("ab"):
        folders.append(tmp_path / f"host{host}")
        folders[-1].mkdir()
        row = f'{{"id": "1", "question": "q", "answer": "{answer}"}}\n'
        (folders[-1] / "rows.jsonl").write_text(row)
    config = helpers.changed(small_config(), data={"path": "rows.jsonl"})
    ends = Gang("train", [config] * 2, [folder / "run" for folder in folders]).ends()
    for code, text in ends.values():
        assert code == RANKS_DIFFER_CODE
        assert "content of data.path=rows.jsonl: 1 files" in text
        assert "--workdir: " in text


@pytest.mark.slow
def test_a_missing_rank_is_named(tmp_path):
    config = helpers.changed(small_config(), distributed={"initialization_seconds": 60})
    ends = Gang("label", [config, None, config], [tmp_path / "run"] * 3).ends()
    for index, (code, text) in ends.items():
        assert code == PEER_LOST_CODE
        assert "rank 1 of 3 did not come within " in text
        assert ("waiting for rank 1 of 3 (" in text) == (index == 0)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def trained_gang(tmp_path):
    """Two processes in the middle of a training, and their directory."""
    config = helpers.changed(
        small_config(),
        train={"steps": 10_000, "save_every": 0},
        method={"name": "finetune", "soft_weight": 0.0},
    )
    gang = Gang("train", [config] * 2, [tmp_path / "run"] * 2)
    deadline = time.monotonic() + 600
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert time.monotonic() < deadline and gang.processes[0].poll() is None
        time.sleep(0.1)
    yield gang, tmp_path / "run"
    for process in gang.processes.values():
        process.send_signal(signal.SIGCONT)
    gang.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost, number, reason",
    [(0, signal.SIGKILL, "its process is gone"), (1, signal.SIGSTOP, "silent for")],
)
def test_a_lost_rank_is_named(trained_gang, lost, number, reason):
    gang, _ = trained_gang
    gang.processes[lost].send_signal(number)
    ((code, text),) = gang.ends(but=lost).values()
    assert code == PEER_LOST_CODE, text[-2000:]
    line = text.strip().splitlines()[-1]
    assert f"rank {lost} of 2 (host " in line and f"was lost: {reason}" in line
