"""Losses of layers against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.losses.layer_losses import attention_loss, hidden_loss

RNG = np.random.default_rng(0)
STUDENT = jnp.float32(RNG.normal(size=(2, 3, 5, 4)))
TEACHER = jnp.float32(RNG.normal(size=(2, 3, 5, 6)) * 3)
PROJECTION = jnp.float32(RNG.normal(size=(2, 4, 6)))


def weights(*shape, seed):
    logits = np.random.default_rng(seed).normal(size=shape) * 4
    return jnp.float32(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))


def oracle(kind, h, g):
    h, g = np.float64(h), np.float64(g)
    if kind == "mse":
        return ((h - g) ** 2).mean(-1).mean(0)
    norms = np.linalg.norm(h, axis=-1) * np.linalg.norm(g, axis=-1)
    return (1 - (h * g).sum(-1) / norms).mean(0)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("projected", [True, False])
def test_hidden_loss_is_the_formula(kind, projected):
    projection = PROJECTION if projected else None
    teacher = TEACHER if projected else TEACHER[..., :4]
    wide = np.einsum("nbtd,nde->nbte", STUDENT, PROJECTION) if projected else STUDENT
    loss_BT = hidden_loss(STUDENT, teacher, kind=kind, projection_nDE=projection)
    assert loss_BT.shape == (3, 5) and loss_BT.dtype == jnp.float32
    np.testing.assert_allclose(loss_BT, oracle(kind, wide, teacher), rtol=1e-5)
    # Differences are taken with arrays of NumPy.
    check_grads(
        lambda h: hidden_loss(
            jnp.asarray(h), teacher, kind=kind, projection_nDE=projection
        ),
        (STUDENT,),
        order=1,
        modes=["rev"],
        rtol=2e-2,
    )


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_loss_of_equals_is_zero_and_never_negative(kind):
    assert (hidden_loss(TEACHER, TEACHER, kind=kind) == 0).all()
    close = TEACHER * np.float32(1 + 1e-6)
    assert (np.asarray(hidden_loss(close, TEACHER, kind=kind)) >= 0).all()
    zero = hidden_loss(jnp.zeros_like(TEACHER), TEACHER, kind=kind)
    assert np.isfinite(np.asarray(zero)).all()
    half = TEACHER.astype(jnp.bfloat16)
    assert hidden_loss(half, half, kind=kind).dtype == jnp.float32


def test_cosine_is_blind_to_length():
    loss_BT = hidden_loss(3 * TEACHER, TEACHER, kind="cosine")
    np.testing.assert_allclose(loss_BT, 0, atol=1e-6)


def test_hidden_loss_refuses():
    with pytest.raises(ValueError, match="hidden_projection=True"):
        hidden_loss(STUDENT, TEACHER, kind="mse")
    with pytest.raises(ValueError, match="kind='l1'"):
        hidden_loss(STUDENT, STUDENT, kind="l1")


def test_attention_loss_is_a_kl():
    a, b = weights(2, 3, 5, 5, seed=1), weights(2, 3, 5, 5, seed=2)
    p, q = np.float64(a), np.float64(b)
    expected = (p * np.log(p / q)).sum(-1).mean(0)
    np.testing.assert_allclose(attention_loss(b, a), expected, rtol=1e-5)
    assert (attention_loss(a, a) == 0).all()
    gradient = jax.grad(lambda b: attention_loss(b, a).sum())(b)
    np.testing.assert_allclose(gradient, (1 - p / q) / 2, rtol=1e-4, atol=1e-5)


def test_attention_loss_beyond_the_mask():
    """A position that neither attends to adds nothing, to loss or gradient."""
    a, b = weights(1, 1, 1, 5, seed=3), weights(1, 1, 1, 5, seed=4)
    more = [(0, 0)] * 3 + [(0, 2)]
    wide = attention_loss(jnp.pad(b, more), jnp.pad(a, more))
    np.testing.assert_allclose(wide, attention_loss(b, a), rtol=1e-6)
    gradient = jax.grad(lambda b: attention_loss(b, jnp.pad(a, more)).sum())(
        jnp.pad(b, more)
    )
    assert np.isfinite(np.asarray(gradient)).all()
    lost = attention_loss(jnp.eye(5)[None, None], jnp.full((1, 1, 5, 5), 0.2))
    assert np.isfinite(np.asarray(lost)).all() and (np.asarray(lost) > 0).all()
