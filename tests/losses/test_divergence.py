"""Dense and sparse divergences against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.losses.divergence import (
    DIVERGENCES,
    Divergence,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from kdjax.losses.sparse import TAILS, teacher_at_temperature
from tests.losses.head_cases import sparse_divergence


def log_softmax(z):
    """Return float64 log softmax."""
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.fixture
def pair():
    """Log-probabilities of a student and a teacher, float64 [5, 11]."""
    rng = np.random.default_rng(0)
    return log_softmax(rng.normal(size=(2, 5, 11)))


def split(logp, k):
    """Return float32 (first k log-probs, log of the mass of the others)."""
    tail = np.log(np.exp(logp[:, k:]).sum(-1)) if k < logp.shape[1] else -np.inf
    return jnp.float32(logp[:, :k]), jnp.float32(np.broadcast_to(tail, len(logp)))


def test_definitions(pair):
    q, p = np.exp(pair)
    student, teacher = jnp.float32(pair)
    close = {"rtol": 1e-5, "atol": 1e-7}
    forward = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(forward_kl(student, teacher), forward, **close)
    reverse = (q * np.log(q / p)).sum(-1)
    np.testing.assert_allclose(reverse_kl(student, teacher), reverse, **close)
    distance = 0.5 * np.abs(p - q).sum(-1)
    np.testing.assert_allclose(tvd(student, teacher), distance, **close)
    for share in (0.1, 0.5, 0.9):
        m = share * p + (1 - share) * q
        mixed = share * p * np.log(p / m) + (1 - share) * q * np.log(q / m)
        for rescale, factor in ((False, 1), (True, 1 / (share * (1 - share)))):
            value = jsd(student, teacher, beta=share, rescale=rescale)
            np.testing.assert_allclose(value, factor * mixed.sum(-1), **close)
        value = skew_forward_kl(student, teacher, alpha=share)
        np.testing.assert_allclose(value, (p * np.log(p / m)).sum(-1), **close)
        n = share * q + (1 - share) * p
        value = skew_reverse_kl(student, teacher, alpha=share)
        np.testing.assert_allclose(value, (q * np.log(q / n)).sum(-1), **close)


def test_the_ends_of_jsd_and_the_skewed_are_the_kls(pair):
    student, teacher = jnp.float32(pair)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    for function, name, end, expected in (
        (jsd, "beta", 0.0, forward),
        (jsd, "beta", 1.0, reverse),
        (skew_forward_kl, "alpha", 0.0, forward),
        (skew_reverse_kl, "alpha", 0.0, reverse),
    ):
        at_end = function(student, teacher, **{name: end})
        np.testing.assert_array_equal(at_end, expected)
        near = function(student, teacher, **{name: abs(end - 1e-3)})
        np.testing.assert_allclose(near, expected, rtol=1e-2)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_never_negative_also_when_nearly_equal(name):
    rng = np.random.default_rng(2)
    z = 4 * rng.normal(size=(200, 50))
    for step in (0.0, 1e-4, 1e-2, 10.0):
        near = log_softmax(z + step * rng.normal(size=z.shape))
        value = DIVERGENCES[name](jnp.float32(near), jnp.float32(log_softmax(z)))
        assert (np.asarray(value) >= 0).all() and np.isfinite(value).all()


@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"])
def test_mixtures_are_finite_where_probabilities_are_zero(name):
    inf = np.inf
    teacher = jnp.float32([[0.0, -inf, -inf], [np.log(0.5), np.log(0.5), -inf]])
    student = jnp.float32([[-inf, 0.0, -inf], [np.log(0.2), np.log(0.8), -inf]])
    value, grad = jax.value_and_grad(lambda s: DIVERGENCES[name](s, teacher).sum())(
        student
    )
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "other"}, "divergence='other' is unknown"),
        ({"alpha": 1.0}, "alpha=1.0 must lie in"),
        ({"beta": -0.1}, "beta=-0.1 in"),
    ],
)
def test_a_divergence_checks_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        Divergence(**fields)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_on_itself_and_float32(name, pair):
    half = jnp.asarray(pair[0], jnp.bfloat16)
    value = DIVERGENCES[name](half, half)
    assert value.dtype == jnp.float32
    assert not np.asarray(value).any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient(name, pair):
    student, teacher = jnp.float32(pair)
    loss = DIVERGENCES[name]
    z = jnp.float32(student)
    options = {"modes": ["rev"], "atol": 2e-2, "rtol": 2e-2}
    check_grads(lambda z: loss(jax.nn.log_softmax(z), teacher), (z,), 1, **options)


def test_small_divergence_is_not_lost(pair):
    """A KL of 1e-7 nats, which p log(p / q) in float32 gives as +-1e-7."""
    rng = np.random.default_rng(1)
    near = log_softmax(pair[1] + 1e-3 * rng.normal(size=pair[1].shape))
    p = np.exp(pair[1])
    exact = (p * (pair[1] - near)).sum(-1)
    value = forward_kl(jnp.float32(near), jnp.float32(pair[1]))
    np.testing.assert_allclose(value, exact, rtol=1e-2)
    assert exact.min() < 1e-7


def test_zero_probabilities():
    half = np.log(0.5)
    inf = np.inf
    teacher = jnp.float32([[half, half, -inf], [half, half, -inf], [0, -inf, -inf]])
    student = jnp.float32(
        [[half, half, -inf], [2 * half, half, 2 * half], [-inf, half, half]]
    )
    value = forward_kl(student, teacher)
    np.testing.assert_allclose(value, [0, 0.5 * np.log(2), inf], rtol=1e-6)
    grad = jax.grad(lambda s: forward_kl(s, teacher)[:2].sum())(student)
    assert np.isfinite(grad).all()


def test_extreme_ratios_stay_finite():
    teacher = jnp.float32([[-85.0, 0.0], [-90.0, 0.0], [-1000.0, 0.0]])
    student = jnp.float32([[0.0, -85.0], [0.0, -90.0], [0.0, -100.0]])
    np.testing.assert_allclose(forward_kl(student, teacher), [85, 90, 100], rtol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_tails(tail, pair):
    k = 4
    student, teacher = pair
    q, p = np.exp(student), np.exp(teacher)
    p_k, q_k = p[:, :k], q[:, :k]
    p_sum, q_sum = p_k.sum(-1, keepdims=True), q_k.sum(-1, keepdims=True)
    p_tail, q_tail = 1 - p_sum[:, 0], 1 - q_sum[:, 0]
    expected = {
        "bucket": (p_k * np.log(p_k / q_k)).sum(-1) + p_tail * np.log(p_tail / q_tail),
        "renormalize_teacher": (p_k / p_sum * np.log(p_k / p_sum / q_k)).sum(-1),
        "renormalize_both": (p_k / p_sum * np.log(p_k / p_sum / (q_k / q_sum))).sum(-1),
        "drop": (p_k * np.log(p_k / q_k)).sum(-1),
    }[tail]
    value = sparse_divergence(*split(student, k), split(teacher, k)[0], tail=tail)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_whole_vocabulary_is_dense(name, tail, pair):
    student, teacher = pair
    divergence = Divergence(name=name)
    arguments = (*split(student, 11), split(teacher, 11)[0])
    if (tail, name) == ("renormalize_teacher", "reverse_kl") or (
        tail == "drop" and name != "forward_kl"
    ):
        with pytest.raises(ValueError, match=f"tail='{tail}' with divergence="):
            sparse_divergence(*arguments, divergence=divergence, tail=tail)
        return
    value = sparse_divergence(*arguments, divergence=divergence, tail=tail)
    dense = divergence(jnp.float32(student), jnp.float32(teacher))
    np.testing.assert_allclose(value, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_tail_lost_to_rounding_stays_finite(name):
    """A teacher whose stored mass rounds to 1, a student with something left."""
    teacher = jnp.log(jnp.float32([[0.75, 0.25]]))
    student = jnp.log(jnp.float32([[0.7, 0.2]]))
    divergence = Divergence(name=name, alpha=0.0, beta=1.0)
    value = sparse_divergence(
        student, jnp.log(jnp.float32([0.1])), teacher, divergence=divergence
    )
    assert np.isfinite(value).all() and (np.asarray(value) > 0).all()


@pytest.mark.parametrize("name", ["jsd", "skew_reverse_kl", "tvd"])
def test_bucket_is_the_divergence_of_the_events(name, pair):
    student, teacher = pair
    parts = [split(logp, 4) for logp in (student, teacher)]
    joined = [jnp.concatenate([s, t[:, None]], axis=1) for s, t in parts]
    value = sparse_divergence(
        *parts[0], parts[1][0], divergence=Divergence(name=name), tail="bucket"
    )
    expected = Divergence(name=name)(*joined)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_rows_without_stored_pairs_are_finite(tail):
    empty = jnp.full((2, 3), -jnp.inf)
    full = jnp.zeros(2)

    def total(student, student_tail):
        return sparse_divergence(student, student_tail, empty, tail=tail).sum()

    value, grads = jax.value_and_grad(total, (0, 1))(empty, full)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_bucket_is_a_lower_bound(pair):
    student, teacher = pair
    full = forward_kl(jnp.float32(student), jnp.float32(teacher))
    for k in range(1, 11):
        value = sparse_divergence(*split(student, k), split(teacher, k)[0])
        assert (value >= 0).all()
        assert (value <= full + 1e-6).all()


def test_teacher_at_temperature(pair):
    logp = pair[1]
    log_z = np.log(np.exp(logp / 2).sum(-1))
    value = teacher_at_temperature(jnp.float32(logp[:, :3]), jnp.float32(log_z), 2.0)
    np.testing.assert_allclose(value, log_softmax(logp / 2)[:, :3], rtol=1e-5)


def test_unknown_tail(pair):
    student, teacher = pair
    with pytest.raises(ValueError, match="tail='other' is not a tail policy"):
        sparse_divergence(*split(student, 4), split(teacher, 4)[0], tail="other")
