"""Parameters that are not trained: no gradient, no optimizer state, no copy."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kdjax import losses, train
from kdjax.aot import hlo
from kdjax.config import MeshConfig, T5Config
from kdjax.experiment import validate
from kdjax.experiment.teacher import teacher_config
from kdjax.models import decoder, t5
from kdjax.parallel import sharding
from kdjax.training import state, trainable
from tests.helpers import UNTIED, TrainSteps, pointers, step_config

HALF = ("embed/embedding", "layers/mlp/.*")
LAST = r"(norm/scale|layers/mlp/down/.*)"


def moments(found):
    """Gradients of the first step: Adam's first moment over 1 - b1."""
    return flatten_dict(found.states[1].opt_state[0].mu, sep="/")


@pytest.fixture(scope="module")
def whole():
    return TrainSteps(step_config(), devices=jax.devices()[:1], num=1)


@pytest.fixture(scope="module")
def half():
    return TrainSteps(step_config(optim={"freeze": HALF}), devices=jax.devices()[:1])


def test_what_is_frozen_stays_and_the_rest_learns(half):
    before, after = half.params(0), half.params(2)
    assert before.keys() == after.keys()
    frozen = {p for p in before if p == HALF[0] or p.startswith("layers/mlp/")}
    assert half.made.frozen_paths == frozen and len(frozen) == 4
    for path in before:
        assert np.array_equal(before[path], after[path]) == (path in frozen), path


def test_gradients_are_those_of_the_rest(whole, half):
    """The same numbers as with all parameters, and their norm."""
    full, some = moments(whole), moments(half)
    assert some.keys() == full.keys() - half.made.frozen_paths
    for path, found in some.items():
        np.testing.assert_allclose(found, full[path], rtol=1e-5, atol=1e-8)
    norm = np.sqrt(
        sum(np.square(10 * x, dtype=np.float64).sum() for x in some.values())
    )
    np.testing.assert_allclose(half.metrics[0]["grad_norm"], norm, rtol=1e-5)
    assert half.metrics[0]["grad_norm"] < whole.metrics[0]["grad_norm"]
    assert half.metrics[0]["loss"] == whole.metrics[0]["loss"]


def test_clipping_is_by_the_norm_of_the_rest(half):
    config = step_config(optim={"freeze": HALF, "clip_norm": 1e-3})
    clipped = TrainSteps(config, devices=jax.devices()[:1], num=1)
    mu = flatten_dict(clipped.states[1].opt_state[1][0].mu, sep="/")
    norm = np.sqrt(sum(np.square(10 * x, dtype=np.float64).sum() for x in mu.values()))
    np.testing.assert_allclose(norm, 1e-3, rtol=1e-4)


def test_frozen_memory_is_reused_and_never_copied(half):
    """The donated buffers are those of the result."""
    after = pointers(half.last.params)
    assert all(half.pointers[path] == after[path] for path in half.made.frozen_paths)
    abstract = half.made.abstract
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        half.batch,
    )
    found = half.made.step.lower(abstract, batch).compile()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    assert found.memory_analysis().alias_size_in_bytes == held
    names = ["____".join(path.split("/")) for path in half.made.frozen_paths]
    copies = re.findall(r" copy\(%old_params__(\w+?)__[.\d]*\)", found.as_text())
    assert not set(copies) & set(names)


def test_nothing_depends_on_how_it_is_cut(half):
    config = step_config(optim={"freeze": HALF}, num_microbatches=2)
    other = TrainSteps(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    for one, two in zip(half.metrics, other.metrics, strict=True):
        for name in ("loss", "grad_norm", "nll", "kl"):
            np.testing.assert_allclose(one[name], two[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_frozen_head_costs_no_gradient(shape):
    """The compiler drops its product, and what reduces it over the devices."""
    data, fsdp, tensor = shape
    mesh = sharding.make_mesh(
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
        devices=jax.devices()[: int(np.prod(shape))],
    )
    hidden, weight = jnp.zeros((64, 32)), jnp.zeros((256, 32))
    targets, ones = jnp.zeros(64, jnp.int32), jnp.ones(64)

    def loss(hidden, weight):
        return losses.fused_loss(
            hidden,
            weight,
            targets,
            ones,
            ones,
            None,
            losses.LossOptions(chunk_size=64),
            placement=losses.Placement(mesh, sharding.HEAD_SPEC, "tensor"),
        )[0]

    found = {}
    for argnums in (0, (0, 1)):
        made = jax.jit(jax.grad(loss, argnums=argnums)).lower(hidden, weight)
        compiled = made.compile()
        module = hlo.parse(compiled.as_text())
        kinds = [c.kind for c in hlo.collectives(module)]
        found[argnums] = compiled.cost_analysis()["flops"], "reduce-scatter" in kinds
    # One device exchanges nothing, with a gradient of the head or without.
    alone = shape == (1, 1, 1)
    assert found[0, 1][1] == (not alone) and not found[0][1]
    if alone:
        assert found[0, 1][0] - found[0][0] > 0.9 * 2 * 64 * 256 * 32


@pytest.mark.parametrize("name", ["decoder", "t5"])
def test_both_kinds_of_models_are_taken_apart_and_put_together(name):
    if name == "decoder":
        _, params = decoder.create(dataclasses.replace(UNTIED, vocab_size=64))
        patterns = ("layers/attention/(query|key)/kernel", "norm/scale")
    else:
        _, params = t5.create(T5Config(vocab_size=64))
        patterns = ("encoder/.*", "decoder/position_bias/table")
    frozen = trainable.frozen_paths(params, patterns)
    trained, kept = trainable.partition(params, frozen)
    assert flatten_dict(kept, sep="/").keys() == frozen
    assert trainable.merge(kept, trained) == trainable.merge(trained, kept) == params
    assert trainable.partition(params, ())[0] == params
    assert not any(part == {} for part in trained.values())


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("layers",), "optim.freeze='layers' matches no parameter"),
        (("embed/embeddings",), "the nearest are ['embed/embedding'"),
        ((".*",), "leaves nothing to train"),
        (("(",), "optim.freeze='(' is no regular expression"),
    ],
)
def test_a_pattern_for_nothing_or_all_is_refused_before_anything_runs(
    freeze, message, tmp_path
):
    config = step_config(optim={"freeze": freeze})
    with pytest.raises(ValueError) as refused:
        validate.validate(config)
        train.run(config, tmp_path)
    assert message in str(refused.value)
    assert not (tmp_path / "teacher_run").exists()


def test_the_built_in_teacher_trains_all_of_itself():
    config = step_config(optim={"freeze": HALF, "ema_decay": 0.9})
    optim = teacher_config(config).optim
    assert optim.freeze == () and optim.ema_decay == 0.0


def test_without_a_pattern_the_state_is_what_it_was(whole):
    assert whole.made.frozen_paths == frozenset()
    found = whole.made.abstract
    assert isinstance(found, state.TrainState) and found.ema is None
    shapes = jax.tree.map(lambda x: x.shape, found.params)
    assert jax.tree.map(lambda x: x.shape, found.opt_state[0].mu) == shapes
