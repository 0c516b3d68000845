"""Continuous batching: the same rows whatever the slots, pages, pieces and mesh."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import DecoderConfig, MeshConfig
from kdjax.models import decoder, sampling
from kdjax.models.continuous import Batching, Engine, Request
from kdjax.parallel import sharding

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
END, WIDTH = 5, 48
_DRAWS = np.random.default_rng(7)
_BEGIN = _DRAWS.integers(6, 23, 19).tolist()
PROMPTS = [_DRAWS.integers(0, 23, n).tolist() for n in (1, 2, 3, 7, 11, 17, 26, 30, 5)]
PROMPTS += [[*_BEGIN, *_DRAWS.integers(0, 23, n)] for n in (1, 4, 9)]
LIMITS = [12, 1, 14, 3, 12, 16, 9, 12, 16, 7, 12, 12]
ALL = tuple(range(len(PROMPTS)))
SMALL = Batching(num_slots=3, page_size=8, num_lanes=2, lane_length=4)


def text_of(tokens):
    return "".join(chr(ord("a") + token) for token in tokens)


@pytest.fixture(scope="module")
def model():
    return decoder.create(CONFIG)[0], decoder.init_params(CONFIG, jax.random.key(3))


@pytest.fixture(scope="module")
def forward(model):
    """Log-probabilities of all next tokens along a row, without a cache."""

    @jax.jit
    def log_probs(tokens_1T):
        positions_1T = jnp.arange(WIDTH, dtype=jnp.int32)[None]
        hidden = decoder.hidden_states(
            *model, tokens_1T, positions_1T, jnp.ones_like(tokens_1T)
        )
        return jax.nn.log_softmax(decoder.logits(model[1], hidden)[0], axis=-1)

    def of_row(tokens):
        row = np.zeros((1, WIDTH), np.int32)
        row[0, : len(tokens)] = tokens
        return np.asarray(log_probs(row))

    return of_row


@pytest.fixture(scope="module")
def expected(forward):
    """Greedy continuations of the prompts, with the end token."""
    rows = []
    for prompt, limit in zip(PROMPTS, LIMITS, strict=True):
        new = []
        while len(new) < limit and END not in new:
            tokens = [*prompt, *new]
            new.append(int(forward(tokens)[len(tokens) - 1].argmax()))
        rows.append(new)
    return rows


@pytest.fixture(scope="module")
def engine(model):
    return Engine(CONFIG, model[0], eos_ids=(END,), batching=SMALL, decode_text=text_of)


def requests(order=ALL, **fields):
    return [
        Request(prompt=PROMPTS[i], max_new_tokens=LIMITS[i], seed=i, **fields)
        for i in order
    ]


def tokens_of(continuations):
    return [continuation.tokens for continuation in continuations]


def test_rows_are_those_of_whole_forward_passes(model, engine, expected, forward):
    found = engine(model[1], requests())
    assert tokens_of(found) == expected
    assert {row[-1] == END for row in expected} == {True, False}
    for prompt, done, limit in zip(PROMPTS, found, LIMITS, strict=True):
        ended = done.tokens[-1] == END
        assert done.finish_reason == ("end" if ended else "length")
        assert ended or len(done.tokens) == limit
        assert done.text_tokens == done.tokens[: -1 if ended else None]
        all_TV = forward([*prompt, *done.tokens])[len(prompt) - 1 :]
        wanted = [all_TV[n, token] for n, token in enumerate(done.tokens)]
        np.testing.assert_allclose(done.log_probs, wanted, atol=2e-5)


@pytest.mark.parametrize("unroll", [False, True])
def test_layers_see_their_windows(unroll):
    config = dataclasses.replace(CONFIG, windows=(5, 0))
    graphdef = decoder.create(config, unroll=unroll)[0]
    params = decoder.init_params(config, jax.random.key(3))
    engine = Engine(config, graphdef, eos_ids=(), batching=SMALL)
    for prompt, done in zip(PROMPTS, engine(params, requests()), strict=True):
        tokens_1T = np.asarray([[*prompt, *done.tokens]], np.int32)
        tokens_1T = np.pad(tokens_1T, [(0, 0), (0, WIDTH - tokens_1T.shape[1])])
        positions_1T = np.arange(WIDTH, dtype=np.int32)[None]
        hidden = decoder.hidden_states(
            graphdef, params, tokens_1T, positions_1T, np.ones_like(tokens_1T)
        )
        all_TV = jax.nn.log_softmax(decoder.logits(params, hidden)[0], axis=-1)
        all_TV = np.asarray(all_TV)[len(prompt) - 1 :]
        assert done.tokens == all_TV[: len(done.tokens)].argmax(1).tolist()
        wanted = [all_TV[n, token] for n, token in enumerate(done.tokens)]
        np.testing.assert_allclose(done.log_probs, wanted, atol=2e-5)


def test_slots_are_refilled_and_beginnings_copied(model, engine):
    finished = {}
    found = engine(model[1], requests(), on_finish=finished.__setitem__)
    assert [finished[i] for i in range(len(PROMPTS))] == found
    done, new = engine.statistics, sum(map(len, tokens_of(found)))
    assert done.tokens == new and done.preempted == 0
    # Of three prompts that begin alike two take the pages of another one.
    assert done.copied >= 2 * len(_BEGIN)
    assert done.read + done.copied == sum(map(len, PROMPTS))
    # Batches of three that wait for their slowest row would take more steps.
    slowest = sum(sorted(LIMITS, reverse=True)[::3])
    assert done.steps - done.mixed < slowest
    assert done.slot_steps == 3 * done.steps
    assert done.useful_share == new / done.slot_steps


def test_order_is_kept_and_does_not_matter(model, engine, expected):
    order = _DRAWS.permutation(len(PROMPTS)).tolist()
    found = engine(model[1], requests(order))
    assert tokens_of(found) == [expected[i] for i in order]
    assert engine(model[1], []) == []
    assert len(engine.compiled) == 1


def test_rows_are_the_same_in_a_cache_that_is_short(model, expected):
    """Room for some of five rows: others give up their slots and wait again."""
    batching = Batching(
        num_slots=5, page_size=4, num_lanes=3, lane_length=7, cache_tokens=64
    )
    graphdef = decoder.create(CONFIG, unroll=True)[0]
    engine = Engine(CONFIG, graphdef, eos_ids=(END,), batching=batching)
    assert tokens_of(engine(model[1], requests())) == expected
    assert engine.statistics.preempted > 0
    assert not copies_of_pages(engine)


def copies_of_pages(engine):
    """Operations of the program that copy all pages of a layer, or of all layers."""
    [(signature, compiled)] = engine.compiled.items()
    pages, text = rf"\[1,(2,)?{signature[2]},2,", compiled.as_text()
    assert re.search(pages, text)
    return re.findall(pages + r"[0-9,]+\]\S* copy\(", text)


@pytest.mark.slow
def test_rows_are_the_same_on_a_mesh(model, expected):
    mesh = MeshConfig(data=2, fsdp=1, tensor=2)
    devices = sharding.make_mesh(mesh, devices=jax.devices()[:4])
    params = jax.device_put(model[1], sharding.param_shardings(model[1], devices))
    engine = Engine(CONFIG, model[0], eos_ids=(END,), batching=SMALL, mesh=devices)
    assert tokens_of(engine(params, requests())) == expected
    assert engine.num_shards == 2 and engine.num_slots == 2


def test_stop_strings_span_tokens(model, engine, expected):
    longest = max(ALL, key=lambda i: len(expected[i]))
    stop = text_of(expected[longest])[9:12], "never in it"
    first = (text_of(expected[0])[:2],)  # it ends before the host looks
    stops = {longest: stop, 0: first, 4: ("never in it",)}
    asked = [
        dataclasses.replace(one, stop=stops.get(i, ()))
        for i, one in enumerate(requests())
    ]
    found = engine(model[1], asked)
    ends = {longest: text_of(expected[longest]).index(stop[0]) + 3, 0: 2}
    for i, done in enumerate(found):
        assert done.tokens == expected[i][: ends.get(i)]
        assert (done.finish_reason == "stop") == (i in ends)
        assert len(done.log_probs) == len(done.tokens)


@pytest.mark.slow
def test_rows_have_settings_of_their_own(model, engine, expected):
    mixed = [
        Request(prompt=PROMPTS[i], max_new_tokens=LIMITS[i], seed=i, **fields)
        for i, fields in enumerate(
            [{}, {"temperature": 3.0, "top_k": 1}, {"temperature": 2.0}] * 4
        )
    ]
    found = tokens_of(engine(model[1], mixed))
    for i in range(len(PROMPTS)):
        if i % 3 < 2:
            assert found[i] == expected[i]
    assert [found[i] for i in (2, 5, 8, 11)] != [expected[i] for i in (2, 5, 8, 11)]
    turned = engine(model[1], mixed[::-1])
    assert tokens_of(turned) == found[::-1]


def test_filters_of_rows_are_those_of_one_setting():
    logits_BV = jax.random.normal(jax.random.key(1), (6, 40)) * 2
    top_k = [0, 3, 0, 5, 50, 1]
    top_p = [1.0, 1.0, 0.6, 0.7, 0.9, 0.3]
    found = sampling.filter_rows(logits_BV, jnp.array(top_k), jnp.array(top_p))
    for row, (k, p) in enumerate(zip(top_k, top_p, strict=True)):
        [alone] = sampling.filter_logits(logits_BV[row][None], top_k=k, top_p=p)
        np.testing.assert_array_equal(found[row], alone)


@pytest.mark.slow
def test_an_int8_cache_is_close_smaller_and_updated_in_place(model, engine):
    batching = dataclasses.replace(SMALL, cache_dtype="int8")
    small = Engine(CONFIG, model[0], eos_ids=(END,), batching=batching)
    found, exact = small(model[1], requests()), engine(model[1], requests())
    # The first token: what it sees of the prompt is as the cache holds it.
    pairs = [
        (a, b) for a, b in zip(found, exact, strict=True) if a.tokens[0] == b.tokens[0]
    ]
    assert len(pairs) >= len(PROMPTS) - 2
    for one, other in pairs:
        assert abs(one.log_probs[0] - other.log_probs[0]) < 0.1
    loop, other = (run.loop(model[1], requests()) for run in (small, engine))
    assert small.cache_bytes(loop) < engine.cache_bytes(other) / 2
    assert not copies_of_pages(small)


def test_bad_requests_are_refused(model, engine):
    def refused(**fields):
        one = Request(**({"prompt": [1], "max_new_tokens": 2} | fields))
        with pytest.raises(ValueError) as error:
            engine(model[1], [one])
        return str(error.value)

    assert "prompts[0] is empty" in refused(prompt=[])
    assert "a prompt of 63 tokens leaves no room" in refused(prompt=[1] * 63)
    assert "max_new_tokens=0: use at least 1" in refused(max_new_tokens=0)
    assert "top_p=0" in refused(top_p=0)
    batching = Batching(num_slots=2, page_size=8, cache_tokens=16)
    tight = Engine(CONFIG, model[0], eos_ids=(), batching=batching)
    with pytest.raises(ValueError, match=r"cache_tokens=16: .* use at least 24"):
        tight(model[1], [Request(prompt=[1] * 10, max_new_tokens=10)])
    with pytest.raises(ValueError, match="without decode_text"):
        tight(model[1], [Request(prompt=[1], max_new_tokens=1, stop=("a",))])
