"""Contrastive decoding, against a whole forward pass for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import DecoderConfig, T5Config
from kdjax.models import generate, lm
from kdjax.models.generate import Decoding, Generator
from tests import helpers

DECODER = DecoderConfig(
    vocab_size=61,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_length=64,
    init_std=0.3,
)
T5 = T5Config(
    vocab_size=61, width=32, num_heads=4, head_dim=8, mlp_width=48, init_factor=2.0
)
PROMPTS = [[5, 9, 14], [7], [3, 4, 5, 6, 7, 8, 9], [11, 2]]
CONTRASTS = [[5, 9, 20, 21], [7, 30], [3, 4, 5, 6, 8, 8], [12, 2]]
NEW, PAD = 6, 0


@pytest.fixture(scope="module", params=[DECODER, T5], ids=["decoder", "t5"])
def model(request):
    shape = request.param
    graphdef, _ = lm.create(shape)
    return shape, graphdef, lm.init_params(shape, jax.random.key(0))


@functools.cache
def forward(graphdef):
    """Compile the logits after one position of a row."""

    def logits(params, rows, position):
        hidden_1TD = lm.hidden_states(graphdef, params, rows)
        return lm.logits(graphdef, params, hidden_1TD[0, position])

    return jax.jit(logits)


def whole_log_probs(model, prompt, new):
    """log p(next | prompt, new) without a cache, in float64."""
    shape, graphdef, params = model
    if isinstance(shape, T5Config):
        tokens, encoder = [shape.start_id, *new], np.array([prompt], np.int32)
    else:
        tokens, encoder = [*prompt, *new], None
    width = 16  # one compiled shape
    tokens_1T = np.array([tokens + [PAD] * (width - len(tokens))], np.int32)
    segments_1T = (np.arange(width) < len(tokens)).astype(np.int32)[None]
    rows = helpers.rows_of(tokens_1T, encoder=encoder, segments=segments_1T)
    logits_V = np.asarray(
        forward(graphdef)(params, rows, np.int32(len(tokens) - 1)), np.float64
    )
    return logits_V - np.log(np.exp(logits_V - logits_V.max()).sum()) - logits_V.max()


def by_force(model, prompt, contrast, weight, eos=-1):
    new = []
    while len(new) < NEW:
        score_V = whole_log_probs(model, prompt, new)
        score_V -= weight * whole_log_probs(model, contrast, new)
        best = np.sort(score_V)
        assert best[-1] - best[-2] > 1e-4  # a tie would test nothing
        new.append(int(np.argmax(score_V)))
        if new[-1] == eos:
            return new[:-1]
    return new


def by_force_until_the_teacher_ends(model, prompt, contrast, weight, eos):
    """SCOTT's rule: a text ends where the teacher's own most probable token ends it."""
    new = []
    while len(new) < NEW:
        own_V = whole_log_probs(model, prompt, new)
        if int(np.argmax(own_V)) == eos:
            break
        score_V = own_V - weight * whole_log_probs(model, contrast, new)
        score_V[eos] = -np.inf
        new.append(int(np.argmax(score_V)))
    return new


def generator(model, weight, *, batch_size=3, **fields):
    fields = {"max_new_tokens": NEW, "eos_ids": (), "pad_id": PAD} | fields
    method = Decoding(contrast_weight=weight, **fields)
    return Generator(*model[:2], method, batch_size=batch_size)


def texts(model, weight, **fields):
    return generator(model, weight, **fields)(model[2], PROMPTS, contrasts=CONTRASTS)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_equals_a_forward_pass_a_token(model, weight):
    expected = [
        by_force(model, *pair, weight) for pair in zip(PROMPTS, CONTRASTS, strict=True)
    ]
    assert texts(model, weight) == expected
    assert expected != texts(model, 0.0)
    eos = expected[0][2]
    assert texts(model, weight, eos_ids=(eos,), contrast_stop="contrast") == [
        row[: row.index(eos)] if eos in row else row for row in expected
    ]


def test_a_text_ends_where_the_teacher_would_end_it(model):
    # The token that some prompt's most probable continuation has, and not its first.
    own = [whole_log_probs(model, prompt, []) for prompt in PROMPTS]
    first = int(np.argmax(own[1]))
    pairs = list(zip(PROMPTS, CONTRASTS, strict=True))
    free = [by_force(model, *pair, 0.5) for pair in pairs]
    second = [
        int(np.argmax(whole_log_probs(model, prompt, row[:2])))
        for (prompt, _), row in zip(pairs, free, strict=True)
    ]
    for eos in {first, second[0]}:
        expected = [
            by_force_until_the_teacher_ends(model, *pair, 0.5, eos) for pair in pairs
        ]
        assert texts(model, 0.5, eos_ids=(eos,)) == expected
        assert any(len(row) < NEW for row in expected)
    assert texts(model, 0.5, eos_ids=(first,))[1] == []
    with pytest.raises(ValueError, match="contrast_stop='never': use one of"):
        generator(model, 0.5, contrast_stop="never")


def test_a_continuation_begins_with_what_is_forced(model):
    greedy = generator(model, None)
    free = greedy(model[2], PROMPTS)
    forced = [row[:length] for row, length in zip(free, (2, 0, 1, 3), strict=True)]
    rest = greedy(model[2], PROMPTS, forced=forced)
    assert [a + b for a, b in zip(forced, rest, strict=True)] == free
    other = [[17, 23], [], [4], [8, 8, 8]]
    for prompt, start, row in zip(
        PROMPTS, other, greedy(model[2], PROMPTS, forced=other), strict=True
    ):
        new = list(start)
        while len(new) < NEW:
            new.append(int(np.argmax(whole_log_probs(model, prompt, new))))
        assert start + row == new
    with pytest.raises(ValueError, match="6 tokens are forced, which leaves no room"):
        greedy(model[2], PROMPTS, forced=[[1] * 6, [], [], []])


def test_what_a_prompt_and_its_contrast_begin_with_is_read_once(model, monkeypatch):
    expected = texts(model, 0.5)
    monkeypatch.setattr(lm, "_MIN_CHUNK", 1)
    starts = [[n, 9, 9] for n in range(20, 24)]
    sides = [
        [start + side[:1] for start, side in zip(starts, sides, strict=True)]
        for sides in (PROMPTS, CONTRASTS)
    ]
    run = generator(model, 0.5, batch_size=5)
    found = run(model[2], sides[0], contrasts=sides[1])
    assert found == [by_force(model, *pair, 0.5) for pair in zip(*sides, strict=True)]
    assert found != expected
    shared = [2, 4] if isinstance(model[0], DecoderConfig) else [0]
    assert [list(kind[2:]) for kind in run.compiled] == [shared]


def test_a_weight_of_zero_is_greedy_decoding(model):
    assert texts(model, 0.0) == generator(model, None)(model[2], PROMPTS)


def test_equal_prompts_choose_as_the_one_does(model):
    """log p - w log p is (1 - w) log p: the same order for w < 1, reversed beyond."""
    greedy = generator(model, None)(model[2], PROMPTS)
    assert generator(model, 0.5)(model[2], PROMPTS, contrasts=PROMPTS) == greedy
    least = generator(model, 2.0)(model[2], PROMPTS, contrasts=PROMPTS)
    for prompt, row in zip(PROMPTS, least, strict=True):
        assert row[0] == int(np.argmin(whole_log_probs(model, prompt, [])))


def test_samples_follow_the_scores_and_a_rows_own_key(model):
    shape, graphdef, params = model
    fields = {"max_new_tokens": 1, "eos_ids": (), "pad_id": PAD, "temperature": 2.0}
    method = Decoding(contrast_weight=0.5, **fields)
    call = generate.make_generate(shape, graphdef, method, max_prompt=4)
    rows = 2000
    both = [side[0] for side in (PROMPTS, CONTRASTS) for _ in range(rows)]
    arrays = generate.pad_prompts(both, 4, PAD)
    keys = jax.random.split(jax.random.key(1), rows)
    tokens_BN = call(params, *arrays, keys)
    score_V = whole_log_probs(model, PROMPTS[0], [])
    score_V -= 0.5 * whole_log_probs(model, CONTRASTS[0], [])
    frequency = np.bincount(tokens_BN[:, 0], minlength=shape.vocab_size) / rows
    expected = np.asarray(jax.nn.softmax(jnp.asarray(score_V, jnp.float32) / 2.0))
    assert np.abs(frequency - expected).max() < 0.045  # four standard deviations
    again = texts(model, 0.5, temperature=1.0, batch_size=3)
    assert again == texts(model, 0.5, temperature=1.0, batch_size=4)


def test_an_empty_contrast_is_refused(model):
    with pytest.raises(ValueError, match=r"contrasts\[0\] is empty"):
        generator(model, 0.5)(model[2], [[1]], contrasts=[[]])
