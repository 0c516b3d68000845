"""The fused head against a float64 oracle, itself in other cuts, and its memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from kdjax.losses import head
from kdjax.losses.sparse import TAILS
from tests.losses import oracle

N, V, D, K = 21, 37, 8, 6


def make(seed=0, *, k=K, temperature=1.0, num_tokens=N, vocab_size=V, sharpness=1.5):
    """Return float64 arrays: hidden, weight, targets, hard, soft, teacher logits."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(num_tokens, D))
    weight = rng.normal(size=(vocab_size, D))
    targets = rng.integers(0, vocab_size, num_tokens)
    targets[:2] = 0, vocab_size - 1
    hard, soft = rng.uniform(0.1, 1.0, (2, num_tokens))
    hard[3], soft[4], hard[5], soft[5] = 0, 0, 0, 0
    teacher_logits = sharpness * rng.normal(size=(num_tokens, vocab_size))
    teacher = teacher_of(teacher_logits, k, temperature)
    arrays = (hidden, weight, targets, hard, soft)
    return arrays, teacher_logits, teacher


def teacher_of(logits, k, temperature):
    """Return the top-k `Teacher` (k None: dense) of float64 logits."""
    if k is None:
        logp, log_z = (
            oracle.log_softmax(logits),
            oracle.teacher_pairs(logits, 1, temperature)[2],
        )
        return head.Teacher(None, jnp.float32(logp), jnp.float32(log_z))
    ids, logp, log_z = oracle.teacher_pairs(logits, k, temperature)
    return head.Teacher(jnp.int32(ids), jnp.float32(logp), jnp.float32(log_z))


def as_jax(arrays, dtype=jnp.float32):
    """Return the arrays of `make` in the dtypes of the head."""
    hidden, weight, targets, hard, soft = arrays
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(weight, dtype),
        jnp.int32(targets),
        jnp.float32(hard),
        jnp.float32(soft),
    )


def value_and_grads(arrays, teacher, *, loss=head.fused_loss, **options):
    """Return (loss, per-token, d_hidden, d_weight) under jit."""
    hidden, weight, *rest = arrays

    @jax.jit
    def run(hidden, weight, rest, teacher):
        def total(hidden, weight):
            return loss(hidden, weight, *rest, teacher, **options)

        return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, weight)

    (value, per_token), (d_hidden, d_weight) = run(hidden, weight, rest, teacher)
    return value, per_token, d_hidden, d_weight


def assert_close(actual, expected, tol=1e-5):
    """Compare trees with a tolerance relative to the largest entry."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tol * max(1.0, np.abs(e).max()))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
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


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dense_and_k_equal_to_vocabulary(temperature):
    arrays, teacher_logits, dense = make(temperature=temperature, k=None)
    options = {"temperature": temperature, "chunk_size": 8}
    expected = oracle.loss(
        *arrays, teacher_logits, k=V, temperature=temperature, tail="bucket"
    )
    every = teacher_of(teacher_logits, V, temperature)
    for teacher, tail in [(dense, "bucket")] + [(every, tail) for tail in TAILS]:
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
    value, per_token = head.fused_loss(
        hidden,
        weight,
        targets,
        0 * hard,
        soft,
        teacher,
        temperature=3.0,
        scale_by_t2=scale_by_t2,
        chunk_size=8,
    )
    factor = 9.0 if scale_by_t2 else 1.0
    assert_close(value, factor * np.dot(soft, per_token["kl"]))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [K, None])
def test_check_grads(tail, k):
    arrays, _, teacher = make(num_tokens=8, vocab_size=11, temperature=2.0, k=k)
    hidden, weight, *rest = as_jax(arrays)

    def total(hidden, weight):
        options = {"temperature": 2.0, "tail": tail, "chunk_size": 4}
        return 3.0 * head.fused_loss(hidden, weight, *rest, teacher, **options)[0]

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
    for seed, scale in enumerate([1e-4, 1e-3, 1e-2, 1.0, 30.0]):
        rng = np.random.default_rng(seed)
        (hidden, weight, targets, _, _), _, _ = make(seed)
        near = hidden @ weight.T + scale * rng.normal(size=(N, V))
        scored = head.score(
            jnp.float32(hidden),
            jnp.float32(weight),
            jnp.int32(targets),
            teacher_of(near, K, 1.0),
            tail=tail,
            chunk_size=8,
        )
        assert scored["kl"].min() >= 0
        assert np.isfinite(scored["kl"]).all()


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
        for c in (1, 4, 7, N, 64)
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
    arrays, teacher_logits, teacher = make(temperature=2.0, k=k)
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


def test_unused_slots():
    """Slots with id -1 change nothing, for every tail policy."""
    arrays, _, teacher = make(temperature=2.0)
    ids, log_probs, log_z = teacher
    wide = head.Teacher(
        jnp.pad(ids, ((0, 0), (0, 2)), constant_values=-1),
        jnp.pad(log_probs, ((0, 0), (0, 2)), constant_values=-jnp.inf),
        log_z,
    )
    for tail in TAILS:
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
        return head.fused_loss(hidden, weight, *rest, teacher, chunk_size=8)

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
            return head.fused_loss(
                hidden, weight, targets, hard, soft, teacher, chunk_size=128
            )[0]

        return jax.value_and_grad(total, (0, 1))(hidden, weight)

    shape = jax.ShapeDtypeStruct
    per_token = shape((num_tokens,), f32)
    teacher = head.Teacher(
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


MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]
SPECS = [
    PartitionSpec(None, "fsdp"),
    PartitionSpec("tensor", "fsdp"),
    PartitionSpec(("fsdp", "tensor"), None),
    PartitionSpec(),
]


def make_mesh(shape):
    """Return a mesh over as many devices as `shape` needs."""
    devices = jax.devices()[: int(np.prod(shape))]
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh(shape, axes, (AxisType.Auto,) * 3, devices=devices)


@pytest.mark.parametrize("shape", MESHES)
def test_meshes(shape):
    arrays, _, teacher = make(temperature=2.0, vocab_size=40)  # N = 21: uneven
    options = {"temperature": 2.0, "chunk_size": 2}
    expected = value_and_grads(as_jax(arrays), teacher, **options)
    mesh = make_mesh(shape)
    specs = SPECS if shape == (2, 2, 2) else SPECS[:1]
    for spec in specs:
        hidden, weight, *rest = as_jax(arrays)
        weight = jax.device_put(weight, NamedSharding(mesh, spec))

        def loss(*arrays, spec=spec, **options):
            return head.sharded_fused_loss(mesh, *arrays, weight_spec=spec, **options)

        actual = value_and_grads((hidden, weight, *rest), teacher, loss=loss, **options)
        assert_close(actual, expected, 1e-6)


def test_sharded_score_and_label():
    arrays, _, teacher = make(vocab_size=40)
    hidden, weight, targets, *_ = as_jax(arrays)
    mesh, spec = make_mesh((2, 2, 2)), SPECS[1]
    actual = head.sharded_score(
        mesh, hidden, weight, targets, teacher, weight_spec=spec, chunk_size=2
    )
    assert_close(actual, head.score(hidden, weight, targets, teacher, chunk_size=8))
    options = {"k": 4, "temperatures": (1.0, 2.0), "chunk_size": 2}
    actual = head.sharded_label(
        mesh, hidden, weight, targets, weight_spec=spec, **options
    )
    assert_close(actual, head.label(hidden, weight, targets, **options))


def test_no_collective_inside_the_loop():
    arrays, _, teacher = make(num_tokens=64, vocab_size=64)
    hidden, weight, *rest = as_jax(arrays)
    mesh, spec = make_mesh((2, 2, 2)), PartitionSpec(None, "fsdp")
    weight = jax.device_put(weight, NamedSharding(mesh, spec))

    def total(hidden, weight):
        return head.sharded_fused_loss(
            mesh, hidden, weight, *rest, teacher, weight_spec=spec, chunk_size=4
        )[0]

    step = jax.jit(jax.value_and_grad(total, (0, 1)))
    text = step.lower(hidden, weight).compile().as_text()
    collective = re.compile(
        r"= .*\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    )
    computations = re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ \(.*\{\n)", text)
    entry = [c for c in computations if c.startswith("ENTRY")]
    others = [c for c in computations if not c.startswith(("ENTRY", "HloModule"))]
    assert len(entry) == 1 and any("body=" in c for c in computations)
    assert collective.search(entry[0])
    assert not [c for c in others if collective.search(c)]


def test_score_top1():
    arrays, _, _ = make()
    hidden, weight, targets, *_ = arrays
    scored = head.score(
        jnp.float32(hidden),
        jnp.float32(weight),
        jnp.int32(targets),
        None,
        chunk_size=8,
        num_valid=30,
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
    top = head.label(*arrays, k=K, **options)
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
    dense = head.label(*arrays, k=None, **options)
    assert "ids_NK" not in dense
    assert_close(dense["log_probs_NK"][:, :30], logp)
    assert (dense["log_probs_NK"][:, 30:] == -jnp.inf).all()
    assert np.isfinite(dense["entropy_NS"]).all()


def test_label_then_loss_is_zero():
    """The teacher's own labels give its own head a KL of zero."""
    (hidden, weight, targets, hard, soft), _, _ = make()
    arrays = as_jax((hidden, weight, targets, hard, soft))
    labels = head.label(*arrays[:3], k=K, temperatures=(2.0,), chunk_size=8)
    teacher = head.Teacher(
        labels["ids_NK"], labels["log_probs_NK"], labels["log_z_NS"][:, 0]
    )
    scored = head.score(*arrays[:3], teacher, temperature=2.0, chunk_size=8)
    assert scored["kl"].min() >= 0 and scored["kl"].max() < 1e-9
    np.testing.assert_array_equal(scored["nll"], -labels["target_log_probs_N"])


@pytest.mark.parametrize(
    ("memory_mib", "vocab_size", "expected"),
    [(16, 32000, 128), (64, 49152, 256), (1, 10**6, 8), (64, 100, 1024), (1, 2**15, 8)],
)
def test_chunk_size(memory_mib, vocab_size, expected):
    assert head.chunk_size(memory_mib, vocab_size) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": "ghost"}, "tail='ghost'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"num_valid": V + 1}, f"num_valid={V + 1}"),
    ],
)
def test_bad_options(options, message):
    arrays, _, teacher = make()
    with pytest.raises(ValueError, match=message):
        head.fused_loss(*as_jax(arrays), teacher, **({"chunk_size": 8} | options))


def test_bad_shapes():
    arrays, _, teacher = make()
    hidden, weight, *rest = as_jax(arrays)
    with pytest.raises(ValueError, match="width"):
        head.fused_loss(hidden[:, 1:], weight, *rest, teacher, chunk_size=8)
    with pytest.raises(ValueError, match="does not belong"):
        head.fused_loss(hidden[1:], weight, *rest, teacher, chunk_size=8)
    dense = make(k=None)[2]
    with pytest.raises(ValueError, match="dense teacher of 37"):
        head.fused_loss(hidden, weight[1:], *rest, dense, chunk_size=8)
    with pytest.raises(ValueError, match="k=38"):
        head.label(hidden, weight, rest[0], k=38, temperatures=(1.0,), chunk_size=8)
