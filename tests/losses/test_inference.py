"""Scores and labels from the head, the chunk size, and refused options and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.losses import (
    LabelOptions,
    LossOptions,
    Teacher,
    chunk_label,
    chunk_size,
    fused_loss,
    label,
    score,
)
from tests import shape_checks
from tests.losses import head_cases as oracle
from tests.losses.head_cases import K, N, V, as_jax, assert_close, make


def test_score_top1():
    arrays, _, _ = make()
    hidden, weight, targets, *_ = arrays
    scored = score(
        jnp.float32(hidden),
        jnp.float32(weight),
        jnp.int32(targets),
        None,
        LossOptions(chunk_size=8, num_valid=30),
    )
    logits = (hidden @ weight.T)[:, :30]
    np.testing.assert_array_equal(scored["top1_ids"], logits.argmax(-1))
    assert not np.asarray(scored["kl"]).any()
    assert scored["nll"].shape == (N,)


def test_label():
    (hidden, weight, targets, *_), _, _ = make()
    targets = targets % 30
    arrays = jnp.float32(hidden), jnp.float32(weight), jnp.int32(targets)
    logp = oracle.log_softmax((hidden @ weight.T)[:, :30])
    temperatures = (1.0, 2.0)
    options = {"temperatures": temperatures, "chunk_size": 8, "num_valid": 30}
    top = label(*arrays, LabelOptions(k=K, **options))
    assert top["ids_NK"].dtype == jnp.int32
    ids = np.argsort(-logp, -1)[:, :K]
    np.testing.assert_array_equal(top["ids_NK"], ids)
    assert_close(top["log_probs_NK"], np.take_along_axis(logp, ids, -1))
    assert_close(top["target_log_probs_N"], logp[np.arange(N), targets])
    assert not np.asarray(top["log_z_NS"][:, 0]).any()
    for s, t in enumerate(temperatures):
        logp_t = oracle.log_softmax(logp / t)
        assert_close(top["log_z_NS"][:, s], np.log(np.exp(logp / t).sum(-1)))
        assert_close(top["entropy_NS"][:, s], -(np.exp(logp_t) * logp_t).sum(-1))
    dense = label(*arrays, LabelOptions(k=None, **options))
    assert "ids_NK" not in dense
    assert_close(dense["log_probs_NK"][:, :30], logp)
    assert (dense["log_probs_NK"][:, 30:] == -jnp.inf).all()
    assert np.isfinite(dense["entropy_NS"]).all()


@pytest.mark.parametrize("size", [400, 4 * 32 * K, 32 * 40 + 7, 5000])
@pytest.mark.parametrize("spread", [2, 30, None])
def test_top_k_is_that_of_the_library(size, spread):
    """Many ties, some and none; masked values among them."""
    draws = np.random.default_rng(size)
    values = draws.normal(size=(40, size)).astype(np.float32)
    if spread is not None:
        values = draws.integers(0, spread, (40, size)).astype(np.float32)
    values[::2, draws.integers(0, size, size // 2)] = -np.inf
    values[0] = values[2, 3:] = -np.inf
    largest = chunk_label.top_k(jnp.asarray(values), K)
    for actual, expected in zip(largest, jax.lax.top_k(values, K), strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


def test_label_then_loss_is_zero():
    """The teacher's own labels give its own head a KL of zero."""
    (hidden, weight, targets, hard, soft), _, _ = make()
    arrays = as_jax((hidden, weight, targets, hard, soft))
    options = LabelOptions(k=K, temperatures=(2.0,), chunk_size=8)
    labels = label(*arrays[:3], options)
    teacher = Teacher(
        labels["ids_NK"], labels["log_probs_NK"], labels["log_z_NS"][:, 0]
    )
    scored = score(*arrays[:3], teacher, LossOptions(temperature=2.0, chunk_size=8))
    assert scored["kl"].min() >= 0 and scored["kl"].max() < 1e-9
    assert_close(scored["nll"], -labels["target_log_probs_N"], 1e-6)


@pytest.mark.parametrize(
    ("memory_mib", "vocab_size", "expected"),
    [(16, 32000, 128), (64, 49152, 256), (1, 10**6, 8), (64, 100, 1024), (1, 2**15, 8)],
)
def test_chunk_size(memory_mib, vocab_size, expected):
    assert chunk_size(memory_mib, vocab_size) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": "ghost"}, "tail='ghost'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"num_valid": V + 1}, f"num_valid={V + 1}"),
    ],
)
def test_bad_options(options, message):
    arrays, _, teacher = make()
    with pytest.raises(ValueError, match=message):
        fused_loss(*as_jax(arrays), teacher, LossOptions(**options))


def test_bad_shapes():
    arrays, _, teacher = make()
    hidden, weight, *rest = as_jax(arrays)
    options = LossOptions(chunk_size=8)
    with shape_checks.disabled(), pytest.raises(ValueError, match="width"):
        fused_loss(hidden[:, 1:], weight, *rest, teacher, options)
    with shape_checks.disabled(), pytest.raises(ValueError, match="does not belong"):
        fused_loss(hidden[1:], weight, *rest, teacher, options)
    dense = make(k=None)[2]
    with pytest.raises(ValueError, match="dense teacher of 37"):
        fused_loss(hidden, weight[1:], *rest, dense, options)
    with pytest.raises(ValueError, match="k=38"):
        label(hidden, weight, rest[0], LabelOptions(k=38, temperatures=(1.0,)))


@pytest.mark.parametrize("vocab_size", [1024, 1025, 3000])
def test_sums_over_slabs_are_those_over_rows(vocab_size):
    """The last slab of ids overlaps the one before and counts what is new alone."""
    logits_CV = 4 * jax.random.normal(jax.random.key(0), (3, vocab_size))
    logits_CV = logits_CV.at[:, -2].set(-jnp.inf)
    found = chunk_label.chunk_label(
        logits_CV, jnp.zeros(3, jnp.int32), k=4, temperatures=(1.0, 2.0, 0.7)
    )
    logits = np.asarray(logits_CV, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for column, t in enumerate((1.0, 2.0, 0.7)):
        p = np.exp(log_p / t)
        log_z = np.log(p.sum(-1))
        p /= p.sum(-1, keepdims=True)
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
        np.testing.assert_allclose(found["log_z_NS"][:, column], log_z, atol=2e-5)
        np.testing.assert_allclose(found["entropy_NS"][:, column], entropy, atol=2e-5)
