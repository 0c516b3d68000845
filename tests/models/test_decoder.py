"""The decoder against itself: packing, padding, caching, remat, sharding, dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import DecoderConfig
from kdjax.models import decoder

CONFIG = DecoderConfig(
    vocab_size=61,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_length=64,
    init_std=0.2,
)


@pytest.fixture(scope="module")
def model():
    graphdef, _ = decoder.create(CONFIG)
    return graphdef, decoder.init_params(CONFIG, jax.random.key(0))


def tokens_of(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, CONFIG.vocab_size, shape, dtype=np.int32)


def positions_of(rows, length):
    return np.tile(np.arange(length, dtype=np.int32), (rows, 1))


def run(graphdef, params, tokens_BT, positions_BT=None, segments_BT=None):
    """Hidden states, by default of whole rows that hold one example each."""
    if positions_BT is None:
        positions_BT = positions_of(*tokens_BT.shape)
    if segments_BT is None:
        segments_BT = np.ones_like(tokens_BT)
    call = jax.jit(lambda *arrays: decoder.hidden_states(graphdef, *arrays))
    return call(params, tokens_BT, positions_BT, segments_BT)


@pytest.mark.parametrize("tied", [True, False])
def test_create_describes_what_init_params_makes(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    graphdef, shapes = decoder.create(config, dtype="bfloat16", remat="dots")
    params = decoder.init_params(config, jax.random.key(1))
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)
    assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    leaves = jax.tree.leaves(shapes)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert ("head" in params) == (not tied)
    assert decoder.head_weight(params).shape == (config.vocab_size, config.width)
    hash(graphdef)  # usable as a static argument


def test_init_params_scale_and_independent_layers():
    params = decoder.init_params(CONFIG, jax.random.key(0))
    gate_LDF = np.asarray(params["layers"]["mlp"]["gate"]["kernel"])
    np.testing.assert_allclose(gate_LDF.std(axis=(1, 2)), CONFIG.init_std, rtol=0.1)
    assert not np.array_equal(gate_LDF[0], gate_LDF[1])
    assert not np.array_equal(gate_LDF, params["layers"]["mlp"]["up"]["kernel"])
    assert (params["norm"]["scale"] == 1).all()


def test_packed_examples_equal_separate_ones(model):
    first, second = tokens_of(1, 7), tokens_of(1, 5, seed=1)
    packed = np.concatenate([first, second, tokens_of(1, 4, seed=2)], axis=1)
    positions = np.array([[*range(7), *range(5), 0, 1, 2, 3]], np.int32)
    segments = np.array([[1] * 7 + [2] * 5 + [0] * 4], np.int32)
    together = run(*model, packed, positions, segments)
    np.testing.assert_allclose(together[:, :7], run(*model, first), atol=2e-5)
    np.testing.assert_allclose(together[:, 7:12], run(*model, second), atol=2e-5)


def test_a_token_depends_on_the_past_only(model):
    tokens = tokens_of(1, 10)
    changed = tokens.copy()
    changed[0, 6] = (changed[0, 6] + 1) % CONFIG.vocab_size
    before, after = run(*model, tokens), run(*model, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before[:, 6:] - after[:, 6:]).max(axis=-1) > 1e-3).all()


def test_padding_changes_nothing_and_stays_finite(model):
    graphdef, params = model
    tokens = tokens_of(2, 6)
    tokens_padded = np.pad(tokens, ((0, 1), (0, 3)))  # padded columns and a whole row
    segments = (np.pad(np.ones((2, 6)), ((0, 1), (0, 3)))).astype(np.int32)

    def loss(params, tokens, segments):
        hidden = decoder.hidden_states(
            graphdef, params, tokens, positions_of(*tokens.shape), segments
        )
        valid = (segments > 0).astype(jnp.float32)[:, :, None]
        return jnp.sum(jnp.sin(hidden) * valid), hidden

    step = jax.jit(jax.grad(loss, has_aux=True))
    gradient, hidden = step(params, tokens, np.ones_like(tokens))
    gradient_padded, hidden_padded = step(params, tokens_padded, segments)
    assert np.isfinite(hidden_padded).all()
    np.testing.assert_allclose(hidden_padded[:2, :6], hidden, atol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient_padded,
        gradient,
    )


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_gives_the_same_gradients(model, remat):
    _, params = model
    tokens = tokens_of(2, 8)

    def gradient(remat):
        graphdef, _ = decoder.create(CONFIG, remat=remat)
        loss = lambda params: jnp.sum(jnp.sin(run(graphdef, params, tokens)))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(remat),
        gradient("none"),
    )


def test_layers_run_in_one_scan():
    """The compiled program does not grow with the number of layers."""

    def num_equations(num_layers):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        graphdef, shapes = decoder.create(config)
        trace = jax.make_jaxpr(lambda params: run(graphdef, params, tokens_of(1, 4)))
        return str(trace(shapes)).count("dot_general")

    assert num_equations(2) == num_equations(9)


def test_bfloat16_is_close_and_keeps_float32_gradients(model):
    _, params = model
    graphdef, _ = decoder.create(CONFIG, dtype="bfloat16")
    tokens = tokens_of(2, 8)
    hidden = run(graphdef, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    exact = run(*model, tokens)
    error = np.abs(hidden.astype(jnp.float32) - exact).mean()
    assert error < 0.02 * np.abs(exact).mean()
    assert decoder.logits(params, hidden).dtype == jnp.float32

    def loss(params):
        return jnp.mean(decoder.logits(params, run(graphdef, params, tokens)) ** 2)

    # Lowering the gradient of `jax.nn.dot_product_attention` promotes implicitly.
    with jax.numpy_dtype_promotion("standard"):
        gradient = jax.jit(jax.grad(loss))(params)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def test_decoding_with_a_cache_equals_one_pass(model):
    """Rows at different positions: prompts of 4 and 6, then one token at a time."""
    graphdef, params = model
    tokens, lengths = tokens_of(2, 10), np.array([4, 6], np.int32)
    whole = run(graphdef, params, tokens)
    decode = jax.jit(lambda *arrays: decoder.decode(graphdef, *arrays))
    prompts = np.where(np.arange(6)[None] < lengths[:, None], tokens[:, :6], 0)
    cache = decoder.init_cache(CONFIG, 2, 10, "float32")
    hidden, cache = decode(params, prompts, positions_of(2, 6), cache)
    np.testing.assert_allclose(hidden[0, :4], whole[0, :4], atol=2e-5)
    np.testing.assert_allclose(hidden[1, :6], whole[1, :6], atol=2e-5)
    for step in range(4):
        at = lengths + step
        new = tokens[np.arange(2), at][:, None]
        hidden, cache = decode(params, new, at[:, None], cache)
        np.testing.assert_allclose(hidden[:, 0], whole[np.arange(2), at], atol=2e-5)


def test_sharded_over_eight_devices_gives_the_same(model):
    graphdef, params = model
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)  # automatic axes

    def place(leaf):
        axes = [None] * (leaf.ndim - 2) + ["fsdp", "tensor"]
        spec = jax.sharding.PartitionSpec(*axes[-leaf.ndim :])
        if any(leaf.shape[i] % 2 for i in range(leaf.ndim) if spec[i]):
            spec = jax.sharding.PartitionSpec()
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    sharded = jax.tree.map(place, params)
    tokens = tokens_of(4, 8)
    rows = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
    hidden = run(graphdef, sharded, jax.device_put(tokens, rows))
    np.testing.assert_allclose(hidden, run(graphdef, params, tokens), atol=2e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size=0"),
        ("num_kv_heads", 3, "num_kv_heads=3 does not divide num_heads=4"),
        ("head_dim", 7, "head_dim=7 is odd"),
    ],
)
def test_impossible_shapes_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        decoder.create(dataclasses.replace(CONFIG, **{field: value}))


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="dtype='float8'"):
        decoder.create(CONFIG, dtype="float8")
    with pytest.raises(ValueError, match="remat='some'"):
        decoder.create(CONFIG, remat="some")
