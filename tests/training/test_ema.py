"""Averages of parameters: their recursion, and where they are used."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kdjax import train
from kdjax.config import MeshConfig
from kdjax.experiment import validate
from kdjax.experiment.models import student_params
from kdjax.models import hf
from kdjax.parallel import sharding
from kdjax.pipeline import distill
from kdjax.training import state
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.program import Program
from tests import helpers
from tests.helpers import TrainSteps, step_config

DECAY = 0.3  # reached after a few steps: (1 + t) / (10 + t)


def averages(found, number):
    return flatten_dict(found.states[number].ema, sep="/")


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)])
def test_the_recursion(mesh):
    """In float64, over all steps, from the parameters after each."""
    config = step_config(optim={"ema_decay": DECAY, "freeze": ("layers/mlp/.*",)})
    devices = jax.devices()[: 1 if mesh is None else 8]
    found = TrainSteps(config, num=5, mesh=mesh, devices=devices)
    start = found.params(0)
    assert averages(found, 0).keys() == start.keys() - found.made.frozen_paths
    for path, mean in averages(found, 0).items():
        np.testing.assert_array_equal(mean, start[path])
        wanted = np.asarray(mean, np.float64)
        for t in range(5):
            share = min(DECAY, (1 + t) / (10 + t))
            wanted = share * wanted + (1 - share) * found.params(t + 1)[path]
        np.testing.assert_allclose(averages(found, 5)[path], wanted, atol=1e-6)
        assert np.abs(wanted - found.params(5)[path]).max() > 1e-4
    assert min(DECAY, (1 + 3) / (10 + 3)) == DECAY


def test_training_goes_on_with_what_is_not_averaged():
    devices = jax.devices()[:1]
    plain = TrainSteps(step_config(), devices=devices, num=3)
    found = TrainSteps(step_config(optim={"ema_decay": 0.99}), devices=devices, num=3)
    assert plain.states[3].ema is None
    for name in ("params", "opt_state"):
        one, two = (getattr(s.states[3], name) for s in (plain, found))
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_non_finite_update_leaves_the_averages():
    config = step_config(optim={"ema_decay": 0.9})
    found = TrainSteps(config, devices=jax.devices()[:1], num=3, poison=(1,))
    assert [m["finite"] for m in found.metrics] == [1, 0, 1]
    for path, mean in averages(found, 2).items():
        np.testing.assert_array_equal(mean, averages(found, 1)[path])
        assert not np.array_equal(mean, averages(found, 3)[path]), path


def test_the_first_averages_have_memory_of_their_own():
    """Else the step would be given the same memory twice."""
    found = TrainSteps(
        step_config(optim={"ema_decay": 0.9}), devices=jax.devices()[:1], num=0
    )
    params = student_params(step_config(), found.model, "")
    current = found.made.init(params)
    kept, mean = (x["embed"]["embedding"] for x in (current.params, current.ema))
    one, two = (x.addressable_shards[0].data for x in (kept, mean))
    assert one.unsafe_buffer_pointer() != two.unsafe_buffer_pointer()


def test_what_is_in_use():
    params = {"a": {"x": jnp.ones(2), "y": jnp.ones(2)}, "projection": {"kernel": 1}}
    ema = {"a": {"y": jnp.zeros(2)}, "projection": {"kernel": 2}}
    found = state.eval_params(state.TrainState(0, params, (), ema))
    assert found.keys() == {"a"}
    assert found["a"]["x"].all() and not found["a"]["y"].any()
    found = state.eval_params(state.TrainState(0, params, ()))
    assert found["a"]["y"].all()


def paths_in(folder):
    """Names of the parts of the newest checkpoint."""
    file = max(folder.glob("*/state/_METADATA"), key=lambda f: int(f.parts[-3]))
    stored = json.loads(file.read_text())["tree_metadata"].values()
    return {entry["key_metadata"][0]["key"] for entry in stored}


def test_a_run_evaluates_exports_and_returns_the_averages(tmp_path, monkeypatch):
    config, run = helpers.small_config(optim={"ema_decay": 0.5}), tmp_path / "run"
    returned = {}
    train_loop = distill.train_loop

    def keep(run, *arguments, **keywords):
        trained = train_loop(run, *arguments, **keywords)
        returned[run.config.name] = trained.params
        return trained

    monkeypatch.setattr(distill, "train_loop", keep)
    train.run(config, run)
    summary = json.loads((run / "summary.json").read_text())["student"]
    assert paths_in(run / "checkpoints") == {"step", "params", "opt_state", "ema"}
    teacher = paths_in(run / "teacher_run" / "checkpoints")
    assert teacher == {"step", "params", "opt_state"}

    mesh = sharding.make_mesh(config.mesh)
    model, read = helpers.load_student(config, run)
    jax.tree.map(np.testing.assert_array_equal, read, returned.pop("small"))
    checkpoints = Checkpoints(run / "checkpoints")
    stored = checkpoints.restore(Program(config, model, mesh).abstract)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, read, stored.ema)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), read, stored.params)
    assert min(jax.tree.leaves(moved)) > 0

    found = helpers.score(config, run, "student")
    assert found["nll"] == pytest.approx(summary["nll"], abs=1e-6)
    helpers.export(config, run, tmp_path / "out")
    exported = hf.load_params(tmp_path / "out", model.shape)
    jax.tree.map(np.testing.assert_array_equal, exported, read)

    # Stopped after step 4 and started again, it ends where it did.
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    (tmp_path / "again" / "summary.json").unlink()
    train.run(config, tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, returned.pop("small"), read)
    again = json.loads((tmp_path / "again" / "summary.json").read_text())["student"]
    assert again == summary


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_what_is_no_share_is_refused(decay):
    with pytest.raises(ValueError, match=f"optim.ema_decay={decay} is a share"):
        validate.validate(helpers.small_config(optim={"ema_decay": decay}))
