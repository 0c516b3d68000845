"""Generation against decoding without a cache, and the sampling filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import DecoderConfig
from kdjax.models import decoder, generate, lm
from kdjax.models.generate import Decoding, Generator

CONFIG = DecoderConfig(
    vocab_size=23,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_length=64,
    init_std=0.5,
    tie_embeddings=False,
)
PAD, NEW = 0, 8
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5], [3, 5, 8, 9, 7, 9, 3]]


@pytest.fixture(scope="module")
def model():
    return decoder.create(CONFIG)[0], decoder.init_params(CONFIG, jax.random.key(3))


@pytest.fixture(scope="module")
def uncached(model):
    """Greedy continuations by running the whole row again for every token."""
    graphdef, params = model
    width = 16
    positions_1T = np.arange(width, dtype=np.int32)[None]

    @jax.jit
    def next_logits(tokens_1T, length):
        segments_1T = (positions_1T < length).astype(jnp.int32)
        hidden = decoder.hidden_states(
            graphdef, params, tokens_1T, positions_1T, segments_1T
        )
        return decoder.logits(params, hidden)[0, length - 1]

    results = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW):
            row = np.array([tokens + [PAD] * (width - len(tokens))], np.int32)
            tokens.append(int(jnp.argmax(next_logits(row, len(tokens)))))
        results.append(tokens[len(prompt) :])
    return results


def arrays_of(prompts, width):
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    rows = [[*prompt, *[PAD] * (width - len(prompt))] for prompt in prompts]
    return np.array(rows, np.int32), lengths_B


def decoding(**fields):
    return Decoding(**{"max_new_tokens": NEW, "eos_ids": (), "pad_id": PAD} | fields)


def continued(model, prompts, *, batch_size=16, seeds=None, **fields):
    run = Generator(CONFIG, model[0], decoding(**fields), batch_size=batch_size)
    return run(model[1], prompts, seeds=seeds)


def make(model, *, max_prompt=8, **fields):
    return generate.make_generate(
        CONFIG, model[0], decoding(**fields), max_prompt=max_prompt
    )


def keys(num_rows, seed=0):
    return generate.row_keys(seed, np.arange(num_rows, dtype=np.uint32))


def test_greedy_equals_decoding_without_a_cache(model, uncached):
    tokens_BN = make(model)(model[1], *arrays_of(PROMPTS, 8), keys(4))
    assert tokens_BN.tolist() == uncached


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7])
def test_prompts_are_read_in_chunks(model, uncached, monkeypatch, chunk_size):
    monkeypatch.setattr(lm, "_MIN_CHUNK", chunk_size)
    tokens_BN = make(model)(model[1], *arrays_of(PROMPTS, 8), keys(4))
    assert tokens_BN.tolist() == uncached


def rows_read(monkeypatch) -> list[int]:
    """Filled with the number of rows of every prefill chunk."""
    read, decode = [], decoder.decode

    def counted(graphdef, params, tokens_BT, *rest):
        if tokens_BT.shape[1] > 1:
            read.append(tokens_BT.shape[0])
        return decode(graphdef, params, tokens_BT, *rest)

    monkeypatch.setattr(decoder, "decode", counted)
    return read


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([[7, 7, 2, 9, 4]] * 4, [1, 1, 5, 5, 5, 5, 5, 5]),
        ([[7, 7, 2, 9, 4], [7, 8, 1, 3, 2]] * 2, [2, 2, 5, 5, 5, 5, 5, 5]),
        ([[7, 7, 2, 9, 4], [7, 7, 8, 1, 3]] * 2, [2, 2, 5, 5, 5, 5, 5, 5]),
        ([[7, 7, n, 9, 4] for n in range(4)], [1, 5, 5, 5, 5, 5, 5, 5]),
        ([[n] * 5 for n in range(4, 8)], [4, 4, 5, 5, 5, 5, 5, 5]),
    ],
)
def test_what_prompts_begin_with_is_read_once_a_group(
    model, monkeypatch, starts, expected
):
    """Rows of four prompts, and one without any; 16 tokens in chunks of two."""
    monkeypatch.setattr(lm, "_MIN_CHUNK", 2)
    read = rows_read(monkeypatch)
    long = [[*start, *prompt] for start, prompt in zip(starts, PROMPTS, strict=True)]
    together = continued(model, long, batch_size=5)
    assert read == expected
    apart = [continued(model, [prompt], batch_size=1)[0] for prompt in long]
    assert together == apart


def test_groups_share_what_saves_most_and_no_last_token(monkeypatch):
    monkeypatch.setattr(lm, "_MIN_CHUNK", 1)

    def found(*prompts):
        shared = generate.find_shared_prefix(CONFIG, prompts, width=8)
        return shared.num_tokens, *(array.tolist() for array in shared.arrays)

    one, two = [1, 2, 3, 4], [1, 2, 3, 5]
    assert found(one, two) == (3, [0], [0, 0])
    assert found([1, 2], two) == (1, [0], [0, 0])  # the first one's last is its own
    assert found([1, 2, 3], [2, 2, 3]) == (0,)
    assert found([], one, two, [], []) == (3, [1], [0, 0, 0, 0, 0])
    assert found(one, [7, 7, 7, 7], two, [7, 7, 7, 8]) == (3, [0, 1], [0, 1, 0, 1])
    assert found([1, 2, 3, 4, 5, 6], [1, 9, 3, 4, 5, 6]) == (1, [0], [0, 0])
    assert found(one) == (0,)


def test_prompts_have_few_shapes_and_little_padding():
    shapes = {generate.padded_length(n, 2000) for n in range(1, 2001)}
    assert shapes == {16, 32, 64, *range(128, 2000, 128), 2000}
    assert generate.padded_length(33, 2000) == 64
    assert generate.padded_length(1139, 2000) == 1152
    assert generate.padded_length(5000, 9000) == 5120


def test_rows_end_at_the_end_token_and_the_loop_with_the_last_row(model, uncached):
    eos = uncached[1][2]
    prompts_BP, lengths_B = arrays_of([*PROMPTS, []], 8)
    call = make(model, eos_ids=(eos,))
    tokens_BN = call(model[1], prompts_BP, lengths_B, keys(5))
    for row, expected in zip(tokens_BN.tolist(), uncached, strict=False):
        stop = expected.index(eos) + 1 if eos in expected else NEW
        assert row == expected[:stop] + [PAD] * (NEW - stop)
    assert tokens_BN[-1].tolist() == [PAD] * NEW


def test_a_generator_keeps_order_drops_the_end_token_and_compiles_once(model, uncached):
    eos = uncached[0][3]
    # Padding that looks like the end must not confuse it.
    method = decoding(eos_ids=(eos,), pad_id=eos)
    expected = [row[: row.index(eos)] if eos in row else row for row in uncached]
    run = Generator(CONFIG, model[0], method, batch_size=5)
    for _ in range(2):
        assert run(model[1], PROMPTS) == expected
    assert [call._cache_size() for call in run.compiled.values()] == [1]
    assert not run.engine.compiled


def test_many_prompts_refill_slots(model, uncached):
    """Greedy, forced and sampled, as batches do it."""
    eos = uncached[0][3]
    together = Generator(CONFIG, model[0], decoding(eos_ids=(eos,)), batch_size=5)
    refilled = Generator(CONFIG, model[0], decoding(eos_ids=(eos,)), batch_size=1)
    finished = {}
    for forced in (None, [[], [4, 5], [6], []]):
        expected = together(model[1], PROMPTS, forced=forced)
        found = refilled(
            model[1], PROMPTS, forced=forced, on_finish=finished.__setitem__
        )
        assert found == expected == [finished[n] for n in range(len(PROMPTS))]
    assert len(refilled.engine.compiled) == 1 and not refilled.compiled
    drawn = decoding(temperature=0.9, top_k=11, top_p=0.9, seed=3)
    pair = [Generator(CONFIG, model[0], drawn, batch_size=size) for size in (5, 1)]
    seeds = [5, 1, 2**31, 7]
    expected, found = (run(model[1], PROMPTS, seeds=seeds) for run in pair)
    assert found == expected


def test_a_small_cache_is_for_engines_alone(model):
    small = Generator(CONFIG, model[0], decoding(), cache_dtype="int8")
    small(model[1], PROMPTS)
    assert small.engine.compiled
    with pytest.raises(ValueError, match=r"cache_dtype='int8': .* use .*'compute'"):
        Generator(CONFIG, model[0], decoding(contrast_weight=0.5), cache_dtype="int8")


def test_every_end_token_ends_a_row(model, uncached):
    ends = (uncached[0][3], uncached[1][2])
    run = Generator(CONFIG, model[0], decoding(eos_ids=ends), batch_size=3)
    expected = [
        row[: min([row.index(end) for end in ends if end in row], default=None)]
        for row in uncached
    ]
    assert run(model[1], PROMPTS) == expected


def test_sampling_follows_the_temperature_and_repeats_with_its_key(model):
    graphdef, params = model
    prompts_BP, lengths_B = arrays_of([PROMPTS[0]] * 2000, 8)
    call = make(model, max_new_tokens=1, temperature=2.0)
    tokens = call(params, prompts_BP, lengths_B, keys(2000))
    same = call(params, prompts_BP, lengths_B, keys(2000))
    np.testing.assert_array_equal(tokens, same)
    row = np.array([PROMPTS[0]], np.int32)
    positions = np.arange(3, dtype=np.int32)[None]
    hidden = decoder.hidden_states(graphdef, params, row, positions, np.ones_like(row))
    probs = jax.nn.softmax(decoder.logits(params, hidden)[0, -1] / 2.0)
    frequency = np.bincount(tokens[:, 0], minlength=CONFIG.vocab_size) / 2000
    assert np.abs(frequency - probs).max() < 0.04  # four standard deviations


def test_top_k_of_one_is_greedy(model, uncached):
    call = make(model, top_k=1, temperature=5.0)
    tokens_BN = call(model[1], *arrays_of(PROMPTS, 8), keys(4))
    assert tokens_BN.tolist() == uncached


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.45}, [3]),
        ({"top_p": 0.55}, [1, 3]),
        ({"top_p": 0.85}, [0, 1, 3]),
        ({"top_k": 3, "top_p": 0.99}, [0, 1, 3]),
    ],
)
def test_filters_keep_the_most_probable(fields, kept):
    logits_1V = jnp.log(jnp.array([[0.15, 0.3, 0.05, 0.5]]))
    filtered = generate.filter_logits(logits_1V, **fields)
    assert np.flatnonzero(np.isfinite(filtered[0])).tolist() == kept
    np.testing.assert_array_equal(filtered[0, kept[0]], logits_1V[0, kept[0]])


def test_bfloat16(model):
    graphdef, _ = decoder.create(CONFIG, dtype="bfloat16")
    tokens_BN = make((graphdef,))(model[1], *arrays_of(PROMPTS, 8), keys(4))
    assert ((tokens_BN >= 0) & (tokens_BN < CONFIG.vocab_size)).all()


def test_refusals(model):
    with pytest.raises(ValueError, match="exceeds the model's max_length=64"):
        make(model, max_prompt=60)
    with pytest.raises(ValueError, match=r"top_p=1\.5"):
        make(model, top_p=1.5)
    with pytest.raises(ValueError, match="max_new_tokens=0: use at least 1"):
        decoding(max_new_tokens=0)
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        continued(model, [[1], []])
    with pytest.raises(ValueError, match="a prompt of 60 tokens leaves no room"):
        continued(model, [[1] * 60])
    with pytest.raises(ValueError, match=r"contrast_weight=0\.5 with contrasts=None"):
        continued(model, [[1]], contrast_weight=0.5)


def test_draws_follow_from_the_seeds_and_not_from_other_prompts(model):
    fields = {"temperature": 2.0, "batch_size": 4}
    together = continued(model, PROMPTS, seeds=[7, 5, 3, 2**32 - 1], **fields)
    for order in ([3, 1, 0, 2], [2]):
        apart = continued(
            model,
            [PROMPTS[i] for i in order],
            seeds=[[7, 5, 3, 2**32 - 1][i] for i in order],
            **fields,
        )
        assert apart == [together[i] for i in order]
    assert len({tuple(row) for row in together}) > 1
    assert continued(model, PROMPTS, seed=1, **fields) != together
