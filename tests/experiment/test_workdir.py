"""Whose directory it is, and who may write to it."""

import json

import pytest

from kdjax import config as config_lib
from kdjax.experiment import workdir
from kdjax.runtime import locks
from tests import helpers


def test_a_run_that_failed_early_does_not_own_its_directory(tmp_path):
    config = helpers.small_config()
    other = helpers.changed(config, optim={"learning_rate": 0.5})
    workdir.claim(tmp_path, config)
    (tmp_path / "init.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    workdir.claim(tmp_path, other)  # nothing of the first is used again
    assert workdir.read_config(tmp_path) == other


@pytest.mark.parametrize(
    "name", ["checkpoints/5", "teacher", "teacher_run/checkpoints/5", "summary.json"]
)
def test_one_that_left_something_does(tmp_path, name):
    config = helpers.small_config()
    other = helpers.changed(config, optim={"learning_rate": 0.5})
    workdir.claim(tmp_path, config)
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"optim.learning_rate: 0.01 -> 0.5"):
        workdir.claim(tmp_path, other)
    workdir.claim(tmp_path, config)


@pytest.mark.parametrize("content", ["", '{"seed": ', "[]"])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / workdir.CONFIG).write_text(content)
    with pytest.raises(ValueError, match=r"config.json is .*: remove it"):
        workdir.read_config(tmp_path)


def test_the_lock_is_there_while_it_is_held(tmp_path):
    with workdir.hold(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / locks.LOCK).read_text())
        assert owner["command"]
        with (
            pytest.raises(ValueError, match=r"workdir='.*run' is being written by"),
            workdir.hold(tmp_path / "run"),
        ):
            pass
    assert not (tmp_path / "run").exists()  # nothing was written


def test_a_new_folder_is_locked_beside_it(tmp_path):
    with workdir.hold_output(tmp_path / "out"):
        assert not (tmp_path / "out").exists()
        with (
            pytest.raises(ValueError, match=r"use another --out"),
            workdir.hold_output(tmp_path / "out"),
        ):
            pass
        with workdir.hold_output(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_configs_read_back(tmp_path):
    config = helpers.small_config()
    workdir.write_config(tmp_path, config)
    assert workdir.read_config(tmp_path) == config
    assert config_lib.to_json(config) == (tmp_path / workdir.CONFIG).read_text()
