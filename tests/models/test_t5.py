"""T5 against transformers' own, and against itself: packing, caching, dropout."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from kdjax.config import MeshConfig, T5Config
from kdjax.models import decoder, hf, lm, t5, t5_layers
from kdjax.models.hf import t5 as hf_t5
from kdjax.models.t5 import Rows
from kdjax.parallel import sharding

V1_1 = T5Config(
    vocab_size=67,
    width=32,
    num_encoder_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    head_dim=16,  # not width / num_heads
    mlp_width=56,
    num_buckets=8,
    max_distance=16,
)
V1_0 = dataclasses.replace(V1_1, gated=False, tie_embeddings=True, scale_outputs=True)
CONFIGS = pytest.mark.parametrize("config", [V1_0, V1_1], ids=["v1.0", "v1.1"])


def tokens_of(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(2, V1_1.vocab_size, shape, dtype=np.int32)


def rows_of(tokens):
    return Rows(tokens, np.ones_like(tokens))


def run(graphdef, params, encoder_rows, decoder_rows, key=None):
    keys = None if key is None else jax.random.split(key, len(encoder_rows.tokens))
    call = jax.jit(
        lambda params, *rows: t5.hidden_states(graphdef, params, *rows, dropout=keys)
    )
    return call(params, encoder_rows, decoder_rows)


def logits_of(config, params, encoder_tokens, decoder_tokens):
    graphdef, _ = t5.create(config)

    @jax.jit
    def call(params, *rows):
        hidden = t5.hidden_states(graphdef, params, *rows)
        return lm.logits(graphdef, params, hidden)

    return call(params, rows_of(encoder_tokens), rows_of(decoder_tokens))


@pytest.fixture(scope="module")
def model():
    """V1.1 with weights that make attention and its biases matter."""
    graphdef, _ = t5.create(V1_1)
    params = t5.init_params(V1_1, jax.random.key(0))
    for stack in ("encoder", "decoder"):
        table = params[stack]["position_bias"]["table"]
        params[stack]["position_bias"]["table"] = 5 * table
    return graphdef, params


def theirs(config):
    """A random model of transformers whose attention and biases matter."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    shape = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.width,
        d_kv=config.head_dim,
        d_ff=config.mlp_width,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        feed_forward_proj="gated-gelu" if config.gated else "relu",
        tie_word_embeddings=config.tie_embeddings,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(shape).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "bias" in name or name.endswith(".q.weight"):
                weight *= 5
            if "norm" in name:
                weight += 0.2 * torch.randn_like(weight)
    if not config.tie_embeddings:  # version 5 builds none, but reads and writes them
        head = torch.randn(config.vocab_size, config.width)
        model.lm_head.weight = torch.nn.Parameter(head)
        model.all_tied_weights_keys.pop("lm_head.weight")
    return model


def their_logits(model, encoder_tokens, decoder_tokens):
    as_long = lambda tokens: torch.tensor(tokens, dtype=torch.long)  # noqa: E731
    with torch.no_grad():
        return model(
            input_ids=as_long(encoder_tokens), decoder_input_ids=as_long(decoder_tokens)
        ).logits.numpy()


def load_theirs(folder):
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def assert_equal_logits(ours, wanted):
    error = np.abs(np.asarray(ours) - wanted).max()
    print("relative error", error / np.ptp(wanted))
    assert error < 1e-4 * np.ptp(wanted)


@CONFIGS
def test_their_model_loads_here(tmp_path, config):
    model = theirs(config)
    model.save_pretrained(tmp_path)
    assert hf.read_config(tmp_path) == config
    params = hf.load_params(tmp_path, config)
    rows = (tokens_of(2, 43), tokens_of(2, 40, seed=1))
    wanted = their_logits(model, *rows)
    assert_equal_logits(logits_of(config, params, *rows), wanted)


@pytest.mark.parametrize(
    ("config", "max_shard_bytes"), [(V1_0, 20_000), (V1_1, 2**30)], ids=["v1.0", "v1.1"]
)
def test_our_model_loads_there_and_comes_back(tmp_path, config, max_shard_bytes):
    params = t5.init_params(config, jax.random.key(0))
    folder = tmp_path / "new" / "model"
    hf.save(folder, config, params, max_shard_bytes=max_shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_bytes < 2**30)
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
    assert hf.read_config(folder) == config
    back = hf.load_params(folder, config)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    rows = (tokens_of(2, 43), tokens_of(2, 40, seed=1))
    wanted = their_logits(load_theirs(folder), *rows)
    assert_equal_logits(logits_of(config, params, *rows), wanted)
    with pytest.raises(ValueError, match="exists and is not empty"):
        hf.save(folder, config, params)


@pytest.mark.parametrize("tied", [True, False])
def test_tying_and_scaling_are_told_apart(tmp_path, tied):
    config = dataclasses.replace(V1_1, tie_embeddings=tied, scale_outputs=not tied)
    params = t5.init_params(config, jax.random.key(0))
    hf.save(tmp_path / "model", config, params)
    assert hf.read_config(tmp_path / "model") == config
    rows = (tokens_of(1, 5), tokens_of(1, 4))
    wanted = their_logits(load_theirs(tmp_path / "model"), *rows)
    assert_equal_logits(logits_of(config, params, *rows), wanted)


@CONFIGS
def test_greedy_tokens_equal_theirs(tmp_path, config):
    model = theirs(config)
    model.save_pretrained(tmp_path)
    params = hf.load_params(tmp_path, config)
    prompts, lengths = tokens_of(3, 24), np.array([24, 9, 17])
    valid = (np.arange(24)[None] < lengths[:, None]).astype(np.int32)
    wanted = model.generate(
        input_ids=torch.tensor(prompts, dtype=torch.long),
        attention_mask=torch.tensor(valid),
        max_new_tokens=20,
        min_new_tokens=20,
        no_repeat_ngram_size=1,  # else a tied model says the same again and again
        do_sample=False,
        use_cache=False,  # theirs has the encoder's number of layers
    ).numpy()
    graphdef, _ = t5.create(config)
    start = jax.jit(lambda *a: t5.prefill(config, graphdef, *a, max_length=20))
    cache = start(params, Rows(prompts, valid))

    @jax.jit
    def decode(params, tokens_B1, positions_B1, cache):
        hidden, cache = t5.decode(graphdef, params, tokens_B1, positions_B1, cache)
        return lm.logits(graphdef, params, hidden)[:, 0], cache

    found = np.full((3, 1), config.start_id, np.int32)
    for step in range(20):
        positions = np.full((3, 1), step, np.int32)
        logits, cache = decode(params, found[:, -1:], positions, cache)
        logits = np.array(logits)
        logits[:, config.eos_id] = -np.inf
        np.put_along_axis(logits, found, -np.inf, axis=1)
        best = logits.argmax(axis=-1).astype(np.int32)
        found = np.concatenate([found, best[:, None]], axis=1)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (8, 16), (32, 20), (64, 256), (6, 7)])
def test_buckets_are_theirs(sizes, bidirectional):
    modeling = transformers.models.t5.modeling_t5
    num_buckets, max_distance = sizes
    distance = np.arange(-3 * max_distance, 3 * max_distance, dtype=np.int32)
    found = t5_layers.relative_buckets(
        jnp.asarray(distance),
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    wanted = modeling.T5Attention._relative_position_bucket(
        torch.tensor(distance), bidirectional, num_buckets, max_distance
    )
    np.testing.assert_array_equal(found, wanted.numpy())
    assert len(np.unique(found)) > num_buckets // 2


def pack(rows, length):
    """Rows of one example each, side by side, then padding."""
    tokens = np.concatenate([*rows, tokens_of(1, length, seed=9)], axis=1)[:, :length]
    numbers = [np.full(row.shape, n, np.int32) for n, row in enumerate(rows, 1)]
    segments = np.concatenate([*numbers, np.zeros((1, length), np.int32)], axis=1)
    return Rows(tokens, segments[:, :length])


def test_packed_pairs_equal_separate_ones(model):
    prompts = [tokens_of(1, n, seed=n) for n in (19, 7, 30)]
    targets = [tokens_of(1, n, seed=50 + n) for n in (6, 22, 11)]
    # A second row, of other lengths: rows share biases, not segments.
    first = (pack(prompts, 64), pack(targets, 48))
    second = (pack(prompts[::-1], 64), pack(targets[::-1], 48))
    together = run(
        *model,
        *(
            Rows(*(np.concatenate(pair) for pair in zip(*rows, strict=True)))
            for rows in zip(first, second, strict=True)
        ),
    )
    assert np.isfinite(together).all()
    alone = [
        run(*model, rows_of(prompt), rows_of(target))[0]
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    for row, wanted in ((0, alone), (1, alone[::-1])):
        wanted = np.concatenate(wanted)
        np.testing.assert_allclose(together[row, : len(wanted)], wanted, atol=1e-5)


def test_what_depends_on_what(model):
    prompt, target = tokens_of(1, 9), tokens_of(1, 8, seed=1)
    before = run(*model, rows_of(prompt), rows_of(target))
    changed = target.copy()
    changed[0, 5] += 1
    after = run(*model, rows_of(prompt), rows_of(changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1) > 1e-4).all()
    changed = prompt.copy()
    changed[0, 8] += 1  # the encoder reads both ways, the decoder all of it
    after = run(*model, rows_of(changed), rows_of(target))
    assert (np.abs(before - after).max(axis=-1) > 1e-4).all()


def test_decoding_with_a_cache_equals_one_pass(model):
    """Rows whose first calls hold 4 and 6 tokens, then one token at a time."""
    graphdef, params = model
    prompts = Rows(tokens_of(2, 24), np.ones((2, 24), np.int32))
    prompts.segments[1, 13:] = 0
    tokens, lengths = tokens_of(2, 30, seed=1), np.array([4, 6], np.int32)
    whole = run(graphdef, params, prompts, rows_of(tokens))
    start = jax.jit(lambda *a: t5.prefill(V1_1, graphdef, *a, max_length=30))
    decode = jax.jit(lambda *arrays: t5.decode(graphdef, *arrays))
    cache = start(params, prompts)
    first = np.where(np.arange(6)[None] < lengths[:, None], tokens[:, :6], 0)
    positions = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    hidden, cache = decode(params, first, positions, cache)
    np.testing.assert_allclose(hidden[0, :4], whole[0, :4], atol=2e-5)
    np.testing.assert_allclose(hidden[1, :6], whole[1, :6], atol=2e-5)
    for step in range(24):
        at = lengths + step
        new = tokens[np.arange(2), at][:, None]
        hidden, cache = decode(params, new, at[:, None], cache)
        np.testing.assert_allclose(hidden[:, 0], whole[np.arange(2), at], atol=2e-5)


def test_padding_changes_nothing_and_stays_finite(model):
    """Padded columns, a row without a target, and a row that is all padding."""
    graphdef, params = model
    tokens = (tokens_of(1, 6), tokens_of(1, 5, seed=1))
    rows = tuple(Rows(t, np.ones_like(t)) for t in tokens)
    padded = tuple(
        Rows(*(np.pad(array, ((0, 2), (0, 4))) for array in pair)) for pair in rows
    )
    padded[0].segments[1, :4] = 1
    for pair in (padded, (padded[0], rows_of(tokens_of(3, 5)))):
        assert np.isfinite(run(*model, *pair)).all()

    def loss(params, *rows):
        hidden = t5.hidden_states(graphdef, params, *rows)
        valid = (rows[1].segments > 0).astype(jnp.float32)[:, :, None]
        return jnp.sum(jnp.sin(hidden) * valid)

    gradient = jax.jit(jax.grad(loss))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(params, *padded),
        gradient(params, *rows),
    )


def test_dropout_needs_a_key_and_a_rate(model):
    graphdef, params = model
    rows = (rows_of(tokens_of(2, 9)), rows_of(tokens_of(2, 8)))
    off = run(graphdef, params, *rows)
    key = jax.random.key(3)
    on = run(graphdef, params, *rows, key)
    assert np.abs(on - off).max() > 0.1
    np.testing.assert_array_equal(on, run(graphdef, params, *rows, key))
    assert np.abs(on - run(graphdef, params, *rows, jax.random.key(4))).max() > 0.1
    np.testing.assert_allclose((on == 0).mean(), V1_1.dropout, atol=0.04)
    without, _ = t5.create(dataclasses.replace(V1_1, dropout=0.0))
    np.testing.assert_array_equal(off, run(without, params, *rows, key))


def test_random_bits_are_uniform_and_independent():
    """Of rows, of keys that were split, of neighbours, and bit by bit."""
    keys = t5_layers.split_keys(jax.random.split(jax.random.key(0), 3), 2)
    bits = np.asarray(jax.vmap(lambda k: t5_layers.random_bits(k, (4, 50, 1000)))(keys))
    streams = bits.reshape(6, -1)
    num = streams.shape[1]
    share = np.unpackbits(streams.view(np.uint8).reshape(6, num, 4), axis=2).mean(1)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / num**0.5
    found = np.stack([np.bincount(s >> 24, minlength=256) for s in streams])
    chi2 = ((found - num / 256) ** 2 / (num / 256)).sum(1)
    assert (np.abs(chi2 - 255) < 6 * (2 * 255) ** 0.5).all()
    unit = streams / 2**32 - 0.5
    lags = [unit[:, :-lag] * unit[:, lag:] for lag in (1, 2, 1000, 50000)]
    others = [unit[i] * unit[j] for i in range(6) for j in range(i)]
    for products in [*(row for lag in lags for row in lag), *others]:
        assert abs(products.mean()) < 5 / 12 / len(products) ** 0.5


def test_layers_written_out_are_those_of_the_loop(model):
    _, params = model
    rows = (rows_of(tokens_of(2, 9)), rows_of(tokens_of(2, 8)))
    results = []
    for unroll in (False, True):
        graphdef, _ = t5.create(V1_1, unroll=unroll)

        def loss(params, graphdef=graphdef):
            return jnp.sin(run(graphdef, params, *rows, jax.random.key(2))).sum()

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results
    )


def test_dropout_keeps_the_expectation(model):
    first, second = t5_layers._droppers(
        0.2, jax.random.split(jax.random.key(0), 100), 2
    )
    x = jnp.full((100, 100), 3.0)
    np.testing.assert_allclose(first(x).mean(), 3.0, rtol=0.02)
    np.testing.assert_allclose((first(x) == 0).mean(), 0.2, rtol=0.05)
    assert not np.array_equal(first(x), second(x))
    # At a small rate the whole model is close to linear in what falls.
    graphdef, _ = t5.create(dataclasses.replace(V1_1, dropout=0.002))
    rows = (rows_of(tokens_of(1, 9)), rows_of(tokens_of(1, 8)))
    exact = run(graphdef, model[1], *rows)

    @jax.jit
    @jax.vmap
    def draw(key):
        return t5.hidden_states(graphdef, model[1], *rows, dropout=key[None])

    drawn = draw(jax.random.split(jax.random.key(0), 100))
    bias = np.abs(drawn.mean(axis=0) - exact).mean() / np.abs(exact).mean()
    spread = drawn.std(axis=0).mean() / np.abs(exact).mean()
    print("bias", bias, "spread", spread)
    assert bias < 0.05 < spread


@CONFIGS
def test_dropout_is_where_theirs_is(tmp_path, monkeypatch, config):
    """With a sine in its place on both sides, every place shows in the logits."""
    model = theirs(config)
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    params = hf.load_params(tmp_path, config)
    rows = (tokens_of(2, 11), tokens_of(2, 10, seed=1))
    plain = their_logits(model, *rows)
    monkeypatch.setattr(
        torch.nn.functional,
        "dropout",
        lambda x, p, training, *_, **__: torch.sin(x) if training else x,
    )
    wanted = their_logits(model.train(), *rows)
    assert np.abs(wanted - plain).max() > 0.1 * np.ptp(plain)
    monkeypatch.setattr(
        t5_layers, "_droppers", lambda rate, key, count: [jnp.sin] * count
    )
    assert_equal_logits(logits_of(config, params, *rows), wanted)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_gives_the_same_gradients(model, remat):
    _, params = model
    rows = (rows_of(tokens_of(2, 9)), rows_of(tokens_of(2, 8)))

    def gradient(remat):
        graphdef, _ = t5.create(V1_1, remat=remat)
        key = jax.random.key(5)
        loss = lambda params: jnp.sum(jnp.sin(run(graphdef, params, *rows, key)))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(remat),
        gradient("none"),
    )


def test_bfloat16_is_close_and_keeps_float32_gradients(model):
    _, params = model
    graphdef, _ = t5.create(V1_1, dtype="bfloat16")
    rows = (rows_of(tokens_of(2, 9)), rows_of(tokens_of(2, 8)))
    hidden = run(graphdef, params, *rows, jax.random.key(0))
    assert hidden.dtype == jnp.bfloat16
    hidden, exact = run(graphdef, params, *rows), run(*model, *rows)
    error = np.abs(hidden.astype(jnp.float32) - exact).mean()
    assert error < 0.03 * np.abs(exact).mean()
    assert lm.logits(graphdef, params, hidden).dtype == jnp.float32

    def loss(params):
        return jnp.mean(lm.logits(graphdef, params, run(graphdef, params, *rows)) ** 2)

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    cache = t5.prefill(V1_1, graphdef, params, rows[0], max_length=8)
    positions = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    again, _ = t5.decode(graphdef, params, rows[1].tokens, positions, cache)
    assert again.dtype == cache["own"]["key"].dtype == jnp.bfloat16
    difference = (again - hidden).astype(jnp.float32)
    assert np.abs(difference).mean() < 0.03 * np.abs(exact).mean()


def test_sharded_over_eight_devices_gives_the_same(model):
    graphdef, params = model
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = sharding.param_shardings(params, mesh)
    placed = jax.device_put(params, shardings)
    rows = (rows_of(tokens_of(4, 9)), rows_of(tokens_of(4, 8)))
    key = jax.random.key(1)
    np.testing.assert_allclose(
        run(graphdef, placed, *rows, key), run(graphdef, params, *rows, key), atol=2e-5
    )


def test_a_folder_is_read_sharded(tmp_path):
    params = t5.init_params(V1_0, jax.random.key(0))
    hf.save(tmp_path / "model", V1_0, params)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    shardings = sharding.param_shardings(params, mesh)
    loaded = hf.load_params(tmp_path / "model", V1_0, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == shardings


@CONFIGS
def test_create_describes_what_init_params_makes(config):
    graphdef, shapes = t5.create(config, dtype="bfloat16", remat="dots")
    params = t5.init_params(config, jax.random.key(1))
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)
    assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    assert ("head" in params) == (not config.tie_embeddings)
    assert decoder.head_weight(params).shape == (config.vocab_size, config.width)
    hash(graphdef)  # usable as a static argument


def test_init_params_has_their_scales():
    config = dataclasses.replace(
        V1_1,
        vocab_size=500,
        width=64,
        mlp_width=256,
        num_buckets=32,
        max_distance=128,
        init_factor=0.5,
    )
    model = theirs(dataclasses.replace(config, tie_embeddings=True))
    model.config.initializer_factor = 0.5
    model.apply(model._init_weights)  # parts before the modules that hold them
    stds = {name: float(p.detach().std()) for name, p in model.named_parameters()}
    params = t5.init_params(config, jax.random.key(0))
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = hf.join(key_path)
        names, _ = hf_t5.stored_names(config, path, range(len(leaf)))
        if path == "head/weight":
            np.testing.assert_allclose(leaf.std(), 0.5 / 8, rtol=0.05)
        elif "norm" in path:
            assert (leaf == 0.5).all()
        else:
            for name, part in zip(
                names, leaf if len(names) > 1 else [leaf], strict=True
            ):
                np.testing.assert_allclose(part.std(), stds[name], rtol=0.2)


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_configs_of_transformers_4_are_read(tmp_path):
    for config in (V1_0, V1_1):
        raw = hf_t5.write(config)
        del raw["scale_decoder_outputs"]
        assert hf_t5.read(raw, "config.json", bool) == config
    for name in ("feed_forward_proj", "num_decoder_layers", "decoder_start_token_id"):
        del raw[name]
    wanted = dataclasses.replace(V1_1, gated=False, num_decoder_layers=2)
    assert hf_t5.read(raw, "config.json", bool) == wanted


def test_copies_of_the_embedding_are_let_pass(tmp_path):
    params = t5.init_params(V1_0, jax.random.key(0))
    hf.save(tmp_path / "m", V1_0, params)
    edit(tmp_path / "m", scale_decoder_outputs=True)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    shared = tensors.pop("shared.weight")
    bias = tensors[
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ]
    copies = dict.fromkeys(hf_t5.DUPLICATES, shared)
    save_file(tensors | copies | {hf_t5.UNUSED: bias}, file)
    loaded = hf.load_params(tmp_path / "m", V1_0)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    copies["decoder.embed_tokens.weight"] = shared + 1
    save_file(tensors | copies, file)
    with pytest.raises(ValueError, match=r"decoder\.embed_tokens\.weight differs"):
        hf.load_params(tmp_path / "m", V1_0)


def test_wrong_folders_are_refused(tmp_path):
    params = t5.init_params(V1_1, jax.random.key(0))
    hf.save(tmp_path / "m", V1_1, params)
    for fields, message in (
        ({"model_type": "umt5"}, "model_type='umt5' is not supported"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'"),
    ):
        edit(tmp_path / "m", **fields)
        with pytest.raises(ValueError, match=message):
            hf.read_config(tmp_path / "m")
        edit(tmp_path / "m", model_type="t5", feed_forward_proj="gated-gelu")
    for changes, message in (
        ({"num_decoder_layers": 4}, "does not make 4"),
        ({"num_encoder_layers": 1}, "does not make 1"),
        ({"mlp_width": 57}, r"wanted shape \[(57, 32|32, 57)\]"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.load_params(tmp_path / "m", dataclasses.replace(V1_1, **changes))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size=0"),
        ("num_buckets", 7, "num_buckets=7 is not an even number"),
        ("max_distance", 4, "max_distance=4 must exceed"),
        ("dropout", 1.0, "dropout=1.0 is a share"),
    ],
)
def test_impossible_shapes_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        t5.create(dataclasses.replace(V1_1, **{field: value}))


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="dtype='float8'"):
        t5.create(V1_1, dtype="float8")
    with pytest.raises(ValueError, match="remat='some'"):
        t5.create(V1_1, remat="some")
