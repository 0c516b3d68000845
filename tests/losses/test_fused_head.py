"""The fused loss against a float64 oracle, itself in other cuts, and its memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.losses import (
    DIVERGENCES,
    TAILS,
    Divergence,
    LossOptions,
    Teacher,
    fused_loss,
    score,
)
from tests.losses import head_cases as oracle
from tests.losses.head_cases import (
    D,
    K,
    N,
    V,
    as_jax,
    assert_close,
    make,
    teacher_of,
    value_and_grads,
)

# Integers up to 8 share one exponential with temperature 1, others do not.
TEMPERATURES = [0.5, 1.0, 2.0, 2.5, 8.0]


# Met by default: the first tail with every temperature, the others with two.
PAIRWISE = {
    "renormalize_teacher": (0.5, 2.0),
    "renormalize_both": (1.0, 2.5),
    "drop": (2.0, 8.0),
}


@pytest.mark.parametrize(
    ("tail", "temperature"),
    [
        pytest.param(
            tail,
            t,
            marks=() if t in PAIRWISE.get(tail, TEMPERATURES) else pytest.mark.slow,
        )
        for tail, t in itertools.product(TAILS, TEMPERATURES)
    ],
)
def test_oracle(tail, temperature):
    arrays, teacher_logits, teacher = make(temperature=temperature)
    value, per_token, d_hidden, d_weight = value_and_grads(
        as_jax(arrays), teacher, temperature=temperature, tail=tail, chunk_size=8
    )
    total, nll, kl, *gradients = oracle.loss(
        *arrays, teacher_logits, k=K, temperature=temperature, tail=tail
    )
    assert_close(value, total)
    assert_close((per_token["nll"], per_token["kl"]), (nll, kl))
    assert_close((d_hidden, d_weight), gradients)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dense_and_k_equal_to_vocabulary(temperature):
    arrays, teacher_logits, dense = make(temperature=temperature, k=None)
    options = {"temperature": temperature, "chunk_size": 8}
    expected = oracle.loss(
        *arrays, teacher_logits, k=V, temperature=temperature, tail="bucket"
    )
    every = teacher_of(teacher_logits, V, temperature)
    cases = [(dense, "bucket"), (every, "bucket"), (every, "renormalize_both")]
    for teacher, tail in cases:
        value, per_token, d_hidden, d_weight = value_and_grads(
            as_jax(arrays), teacher, tail=tail, **options
        )
        actual = (value, per_token["nll"], per_token["kl"], d_hidden, d_weight)
        assert_close(actual, expected)


def test_without_teacher():
    arrays, teacher_logits, _ = make()
    hidden, weight, targets, hard, soft = arrays
    expected = oracle.loss(
        hidden,
        weight,
        targets,
        hard,
        0 * soft,
        teacher_logits,
        k=1,
        temperature=1.0,
        tail="bucket",
    )
    value, per_token, d_hidden, d_weight = value_and_grads(
        as_jax(arrays), None, chunk_size=8, temperature=2.0
    )
    actual = (value, per_token["nll"], per_token["kl"], d_hidden, d_weight)
    assert_close(actual, expected)


@pytest.mark.parametrize("scale_by_t2", [True, False])
def test_scale_by_t2(scale_by_t2):
    arrays, _, teacher = make(temperature=3.0)
    hidden, weight, targets, hard, soft = as_jax(arrays)
    value, per_token = fused_loss(
        hidden,
        weight,
        targets,
        0 * hard,
        soft,
        teacher,
        LossOptions(temperature=3.0, scale_by_t2=scale_by_t2, chunk_size=8),
    )
    factor = 9.0 if scale_by_t2 else 1.0
    assert_close(value, factor * np.dot(soft, per_token["kl"]))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [K, None])
def test_check_grads(tail, k):
    arrays, _, teacher = make(num_tokens=8, vocab_size=11, temperature=2.0, k=k)
    hidden, weight, *rest = as_jax(arrays)

    def total(hidden, weight):
        # Differences are taken with arrays of NumPy.
        hidden, weight = jnp.asarray(hidden), jnp.asarray(weight)
        options = LossOptions(temperature=2.0, tail=tail, chunk_size=4)
        return 3.0 * fused_loss(hidden, weight, *rest, teacher, options)[0]

    check_grads(total, (hidden, weight), 1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
def test_kl_of_the_teacher_itself_is_zero(tail):
    arrays, _, _ = make()
    hidden, weight, targets, hard, soft = arrays
    teacher = teacher_of(hidden @ weight.T, K, 2.0)
    arrays = as_jax((hidden, weight, targets, 0 * hard, soft))
    value, per_token, d_hidden, _ = value_and_grads(
        arrays, teacher, temperature=2.0, tail=tail, chunk_size=8
    )
    assert 0 <= value < 1e-9
    assert per_token["kl"].min() >= 0
    assert np.abs(d_hidden).max() < 1e-5


@pytest.mark.parametrize("tail", ["bucket", "renormalize_teacher", "renormalize_both"])
def test_kl_is_never_negative(tail):
    options = LossOptions(tail=tail, chunk_size=8)
    score_tokens = jax.jit(functools.partial(score, options=options))
    for seed, scale in enumerate([1e-4, 1e-3, 1e-2, 1.0, 30.0]):
        rng = np.random.default_rng(seed)
        (hidden, weight, targets, *_), _, _ = make(seed)
        near = teacher_of(hidden @ weight.T + scale * rng.normal(size=(N, V)), K, 1.0)
        arrays = *map(jnp.float32, (hidden, weight)), jnp.int32(targets)
        kl = score_tokens(*arrays, near)["kl"]
        assert kl.min() >= 0
        assert np.isfinite(kl).all()


def test_tiny_tail_keeps_its_gradient():
    """A student tail of e^-30 must still be pulled towards the teacher's tail."""
    logits = np.zeros((1, V))
    logits[0, :K] = 35.0
    teacher_logits = np.zeros((1, V))
    teacher_logits[0, :K] = 4.0
    weight = np.eye(V)
    arrays = (logits, weight, np.array([0]), np.zeros(1), np.ones(1))
    value, _, d_hidden, _ = value_and_grads(
        as_jax(arrays), teacher_of(teacher_logits, K, 1.0), chunk_size=8
    )
    expected = oracle.loss(*arrays, teacher_logits, k=K, temperature=1.0, tail="bucket")
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(d_hidden, expected[3], rtol=1e-4)
    assert (np.asarray(d_hidden)[0, K:] < -1e-3).all()


@pytest.mark.parametrize("k", [K, None])
def test_chunk_size_does_not_matter(k):
    arrays, _, teacher = make(temperature=2.0, k=k)
    results = [
        value_and_grads(as_jax(arrays), teacher, temperature=2.0, chunk_size=c)
        for c in (1, 8, 64)
    ]
    for result in results[1:]:
        assert_close(result, results[0], 1e-6)


@pytest.mark.parametrize("k", [K, None])
def test_padding_tokens_count_exactly_nothing(k):
    arrays, _, teacher = make(temperature=2.0, k=k)
    short = as_jax(arrays)
    hidden, weight, *rest = short
    extra = 11
    big = jnp.full((extra, D), 1e4, jnp.float32)

    def zeros(x):
        return jnp.concatenate([x, jnp.zeros((extra, *x.shape[1:]), x.dtype)])

    padded = (jnp.concatenate([hidden, big]), weight, *map(zeros, rest))
    options = {"temperature": 2.0, "chunk_size": 16}
    value, per_token, d_hidden, d_weight = value_and_grads(
        padded, jax.tree.map(zeros, teacher), **options
    )
    expected = value_and_grads(short, teacher, **options)
    first = jax.tree.map(lambda x: x[:N], (per_token, d_hidden))
    assert_close((value, *first, d_weight), expected, 1e-6)
    assert not np.asarray(d_hidden[N:]).any()
    assert not np.asarray(per_token["kl"][N:]).any()
    assert not np.asarray(d_hidden[5]).any()  # both weights 0, see `make`


def test_all_weights_zero():
    arrays, _, teacher = make()
    hidden, weight, targets, hard, soft = as_jax(arrays)
    value, _, *gradients = value_and_grads(
        (hidden, weight, targets, 0 * hard, 0 * soft), teacher, chunk_size=8
    )
    assert value == 0
    assert not any(np.asarray(g).any() for g in gradients)


@pytest.mark.parametrize("k", [K, None])
def test_num_valid(k):
    arrays, _, teacher = make(temperature=2.0, k=k)
    hidden, weight, *rest = as_jax(arrays)
    padded_weight = jnp.concatenate([weight, 5 * weight[:3]])
    padded_teacher = teacher
    if k is None:
        log_probs = jnp.pad(teacher.log_probs_NK, ((0, 0), (0, 3)))
        log_probs = log_probs.at[:, V:].set(-jnp.inf)
        padded_teacher = teacher._replace(log_probs_NK=log_probs)
    options = {"temperature": 2.0, "chunk_size": 8}
    value, per_token, d_hidden, d_weight = value_and_grads(
        (hidden, padded_weight, *rest), padded_teacher, num_valid=V, **options
    )
    expected = value_and_grads((hidden, weight, *rest), teacher, **options)
    assert_close((value, per_token, d_hidden, d_weight[:V]), expected, 1e-6)
    assert not np.asarray(d_weight[V:]).any()


@pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
def test_unused_slots(tail):
    """Slots with id -1 change nothing."""
    arrays, _, teacher = make(temperature=2.0)
    ids, log_probs, log_z, *_ = teacher
    wide = Teacher(
        jnp.pad(ids, ((0, 0), (0, 2)), constant_values=-1),
        jnp.pad(log_probs, ((0, 0), (0, 2)), constant_values=-jnp.inf),
        log_z,
    )
    options = {"temperature": 2.0, "chunk_size": 8, "tail": tail}
    actual = value_and_grads(as_jax(arrays), wide, **options)
    assert_close(actual, value_and_grads(as_jax(arrays), teacher, **options), 1e-6)


def test_bfloat16():
    arrays, _, teacher = make(temperature=2.0)
    options = {"temperature": 2.0, "chunk_size": 8}
    half = as_jax(arrays, jnp.bfloat16)
    rounded = (half[0].astype(jnp.float32), half[1].astype(jnp.float32), *half[2:])
    actual = value_and_grads(half, teacher, **options)
    assert actual[2].dtype == actual[3].dtype == jnp.bfloat16
    assert actual[0].dtype == jnp.float32
    expected = value_and_grads(rounded, teacher, **options)
    assert_close(actual[:2], expected[:2], 1e-5)  # logits and losses are float32
    assert_close(actual[2:], expected[2:], 1e-2)


def test_float32_weight_with_bfloat16_hidden():
    arrays, _, teacher = make()
    hidden, weight, *rest = as_jax(arrays)
    mixed = (hidden.astype(jnp.bfloat16), weight, *rest)
    _, _, d_hidden, d_weight = value_and_grads(mixed, teacher, chunk_size=8)
    assert d_hidden.dtype == jnp.bfloat16
    assert d_weight.dtype == jnp.float32


def test_value_alone_makes_no_gradients():
    arrays, _, teacher = make()
    hidden, weight, *rest = as_jax(arrays)

    def value(hidden, weight):
        return fused_loss(hidden, weight, *rest, teacher, LossOptions(chunk_size=N))

    def num_matmuls(function):
        return str(jax.make_jaxpr(function)(hidden, weight)).count("dot_general")

    assert num_matmuls(value) == 1
    assert num_matmuls(jax.grad(lambda *x: value(*x)[0], (0, 1))) == 3


def test_memory():
    """Temporary memory beyond the gradient of the head, in units of [B, T, V]."""
    num_tokens, vocab_size, width, k = 8 * 512, 32000, 512, 64
    f32, i32 = jnp.float32, jnp.int32

    def run(hidden, weight, targets, hard, soft, teacher):
        def total(hidden, weight):
            arrays = hidden, weight, targets, hard, soft
            return fused_loss(*arrays, teacher, LossOptions(chunk_size=128))[0]

        return jax.value_and_grad(total, (0, 1))(hidden, weight)

    shape = jax.ShapeDtypeStruct
    per_token = shape((num_tokens,), f32)
    teacher = Teacher(
        shape((num_tokens, k), i32), shape((num_tokens, k), f32), per_token
    )
    lowered = jax.jit(run).lower(
        shape((num_tokens, width), f32),
        shape((vocab_size, width), f32),
        shape((num_tokens,), i32),
        per_token,
        per_token,
        teacher,
    )
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    memory -= vocab_size * width * 4
    assert memory <= 0.15 * num_tokens * vocab_size * 4


@pytest.mark.parametrize("k", [K, None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n != "forward_kl"])
def test_every_divergence_fused_is_the_dense_one(name, temperature, k):
    """Value and gradients against plain autodiff of all logits."""
    arrays, _, teacher = make(k=k, temperature=temperature)
    arrays = as_jax(arrays)
    divergence = Divergence(name=name, alpha=0.2, beta=0.3)
    fused = value_and_grads(
        arrays, teacher, temperature=temperature, divergence=divergence, chunk_size=8
    )

    def plain(hidden, weight, targets, hard, soft, teacher, _):
        logits = hidden @ weight.T
        log_q = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_q, targets[:, None], 1)[:, 0]
        log_qt = jax.nn.log_softmax(logits / temperature)
        log_pt = teacher.log_probs_NK / temperature - teacher.log_z_N[:, None]
        if teacher.ids_NK is not None:
            stored = jnp.zeros(logits.shape, bool)
            stored = stored.at[jnp.arange(N)[:, None], teacher.ids_NK].set(True)
            tail = jax.nn.logsumexp(jnp.where(stored, -jnp.inf, log_qt), axis=1)
            log_qt = jnp.take_along_axis(log_qt, teacher.ids_NK, 1)
            log_qt = jnp.concatenate([log_qt, tail[:, None]], 1)
            left = jnp.log1p(-jnp.exp(log_pt).sum(1))
            log_pt = jnp.concatenate([log_pt, left[:, None]], 1)
        value = divergence(log_qt, log_pt)
        value = jnp.where(soft != 0, value, 0.0)
        total = (hard * nll + soft * value * temperature**2).sum()
        nll = jnp.where((hard != 0) | (soft != 0), nll, 0.0)
        return total, {"nll": nll, "kl": value}

    assert_close(fused, value_and_grads(arrays, teacher, loss=plain), tol=2e-5)


def test_draws_refuse_another_divergence():
    arrays, _, teacher = make()
    drawn = teacher._replace(entropy_N=jnp.ones(N))
    with pytest.raises(ValueError, match="divergence='jsd' with draws"):
        options = LossOptions(divergence=Divergence(name="jsd"), chunk_size=8)
        fused_loss(*as_jax(arrays), drawn, options)
