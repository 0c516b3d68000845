"""Averages of parameters: their recursion, and where they are used."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kdjax.config import MeshConfig
from kdjax.experiment import validate
from kdjax.experiment.models import student_params
from kdjax.models import lora
from kdjax.parallel import sharding
from kdjax.training import state
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.program import Program
from tests import helpers
from tests.helpers import TrainSteps, step_config

DECAY = 0.3  # reached after a few steps: (1 + t) / (10 + t)


def averages(found, number):
    return flatten_dict(found.states[number].ema, sep="/")


def test_the_recursion():
    """In float64, over all steps, from the parameters after each."""
    config = step_config(optim={"ema_decay": DECAY, "freeze": ("layers/mlp/.*",)})
    found = TrainSteps(config, num=5, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
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


@pytest.fixture(scope="module")
def averaged():
    """Three steps, of which the second has no finite update."""
    config = step_config(optim={"ema_decay": 0.9})
    return TrainSteps(config, devices=jax.devices()[:1], num=3, poison=(1,))


def test_training_goes_on_with_what_is_not_averaged(averaged):
    plain = TrainSteps(step_config(), devices=jax.devices()[:1], num=3, poison=(1,))
    assert plain.states[3].ema is None
    for name in ("params", "opt_state"):
        one, two = (getattr(s.states[3], name) for s in (plain, averaged))
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_non_finite_update_leaves_the_averages(averaged):
    assert [m["finite"] for m in averaged.metrics] == [1, 0, 1]
    for path, mean in averages(averaged, 2).items():
        np.testing.assert_array_equal(mean, averages(averaged, 1)[path])
        assert not np.array_equal(mean, averages(averaged, 3)[path]), path


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


def test_averages_are_stored_and_read(lora_run):
    config, run = lora_run
    assert paths_in(run / "checkpoints") == {"step", "params", "opt_state", "ema"}
    model, params = helpers.load_student(config, run)
    checkpoints = Checkpoints(run / "checkpoints")
    mesh = sharding.make_mesh(config.mesh)
    stored = checkpoints.restore(Program(config, model, mesh).abstract)
    params, means, last = (
        flatten_dict(tree, sep="/") for tree in (params, stored.ema, stored.params)
    )
    assert means.keys() == {path for path in params if lora.is_adapter(path)}
    for path, array in params.items():
        np.testing.assert_array_equal(array, means.get(path, last[path]))
    assert all(np.abs(means[path] - last[path]).max() > 0 for path in means)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_what_is_no_share_is_refused(decay):
    with pytest.raises(ValueError, match=f"optim.ema_decay={decay} is a share"):
        validate.validate(helpers.small_config(optim={"ema_decay": decay}))
