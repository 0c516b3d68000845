"""Bias, scale, softcap, smoothing, padding, online teachers: against plain autodiff."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kdjax.losses import (
    Divergence,
    LogitTransform,
    LossOptions,
    OnlineTeacherLogits,
    Placement,
    Teacher,
    fused_loss,
)
from kdjax.losses.sparse import teacher_at_temperature
from tests import shape_checks
from tests.losses.head_cases import (
    K,
    V,
    as_jax,
    assert_close,
    make,
    sparse_divergence,
    teacher_of,
)

E = 8  # width of the online teacher
MESHES = [None, (8, 1, 1), (2, 4, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]
FEATURES = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_transform": LogitTransform(scale=0.3)},
    "softcap": {"logit_transform": LogitTransform(softcap=2.0)},
    "all": {
        "bias": True,
        "logit_transform": LogitTransform(scale=0.7, softcap=3.0),
        "label_smoothing": 0.2,
        "num_valid": V - 4,
    },
    "smoothing": {"label_smoothing": 0.1},
    "padding": {"num_valid": V - 4},
}
TEACHERS = {
    "pairs": {},
    "renormalized": {"tail": "renormalize_both"},
    "jsd": {"divergence": Divergence(name="jsd", beta=0.3)},
    "reverse": {"divergence": Divergence(name="reverse_kl"), "dense": True},
    "dense": {"dense": True},
    "live": {"live": True},
    "live_capped": {
        "live": True,
        "teacher_logit_transform": LogitTransform(softcap=1.5),
    },
}


def make_mesh(shape):
    """Return a mesh over as many devices as `shape` needs."""
    devices = jax.devices()[: int(np.prod(shape))]
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh(shape, axes, (AxisType.Auto,) * 3, devices=devices)


def cases(feature, teacher, temperature):
    """Return (arrays, bias, teacher argument, teacher's dense log p, options)."""
    feature, teacher = dict(FEATURES[feature]), dict(TEACHERS[teacher])
    live, dense = teacher.pop("live", False), teacher.pop("dense", False)
    options = feature | teacher | {"temperature": temperature}
    bias = options.pop("bias", False)
    num_valid = options.get("num_valid", V)
    arrays, logits, _ = make()
    hidden, weight, targets, hard, soft = arrays
    targets = targets % num_valid
    rng = np.random.default_rng(1)
    logits[:, num_valid:] = -np.inf
    given = teacher_of(logits, None if dense else K, temperature)
    if live:
        live_hidden, live_weight = (
            rng.normal(size=(len(targets), E)),
            rng.normal(size=(V, E)),
        )
        rule = options.get("teacher_logit_transform", LogitTransform())
        logits = np.array(rule(jnp.asarray(live_hidden @ live_weight.T)))
        logits[:, num_valid:] = -np.inf
        given = OnlineTeacherLogits(jnp.float32(live_hidden), jnp.float32(live_weight))
    bias_V = jnp.float32(rng.normal(size=V)) if bias else None
    arrays = as_jax((hidden, weight, targets, hard, soft))
    log_p_NV = jax.nn.log_softmax(jnp.float32(logits) / temperature, axis=-1)
    return arrays, bias_V, given, log_p_NV, options


def plain(arrays, bias_V, given, log_p_NV, options):
    """The loss, its parts and gradients with all logits at once and autodiff."""
    _, _, targets, hard, soft = arrays
    t, share = options["temperature"], options.get("label_smoothing", 0.0)
    divergence = options.get("divergence", Divergence())
    num_valid = options.get("num_valid", V)
    valid_1V = jnp.arange(V)[None] < num_valid

    def loss(hidden, weight, bias_V):
        logits = hidden @ weight.T + (0 if bias_V is None else bias_V[None])
        rule = options.get("logit_transform", LogitTransform())
        logits = logits * rule.scale
        if rule.softcap:
            logits = rule.softcap * jnp.tanh(logits / rule.softcap)
        logits = jnp.where(valid_1V, logits, -jnp.inf)
        log_q = jax.nn.log_softmax(logits, axis=-1)
        nll = -jnp.take_along_axis(log_q, targets[:, None], axis=-1)[:, 0]
        uniform = -jnp.where(valid_1V, log_q, 0.0).sum(-1) / num_valid
        log_qt = jax.nn.log_softmax(logits / t, axis=-1)
        if getattr(given, "ids_NK", None) is None:
            kl = divergence(log_qt, log_p_NV)
        else:
            rows = jnp.arange(len(targets))[:, None]
            rest = log_qt.at[rows, given.ids_NK].set(-jnp.inf)
            kl = sparse_divergence(
                jnp.take_along_axis(log_qt, given.ids_NK, axis=-1),
                jax.nn.logsumexp(rest, axis=-1),
                teacher_at_temperature(given.log_probs_NK, given.log_z_N, t),
                divergence=divergence,
                tail=options.get("tail", "bucket"),
            )
        kl = jnp.where(soft != 0, kl, 0.0)
        hard_loss = (1 - share) * nll + share * uniform
        return (hard * hard_loss).sum() + t**2 * (soft * kl).sum(), (nll, kl)

    argnums = (0, 1) if bias_V is None else (0, 1, 2)
    run = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))
    (value, (nll, kl)), gradients = run(*arrays[:2], bias_V)
    counted = (hard != 0) | (soft != 0)
    return value, jnp.where(counted, nll, 0.0), kl, gradients


def fused(arrays, bias_V, given, options, mesh):
    """The same by the fused head; the mesh's tensor axis splits the vocabulary."""

    def loss(hidden, weight, bias_V):
        placement = None
        if mesh is not None:
            spec = PartitionSpec(None, "fsdp")
            placement = Placement(make_mesh(mesh), spec, "tensor")
        return fused_loss(
            hidden,
            weight,
            *arrays[2:],
            given,
            LossOptions(chunk_size=4, **options),
            bias_V=bias_V,
            placement=placement,
        )

    argnums = (0, 1) if bias_V is None else (0, 1, 2)
    run = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))
    (value, per_token), gradients = run(*arrays[:2], bias_V)
    return value, per_token["nll"], per_token["kl"], gradients


PAIRS = [
    *itertools.product(FEATURES, ("pairs", "dense")),
    *itertools.product(("all",), (t for t in TEACHERS if t not in ("pairs", "dense"))),
]
SWEPT = [*itertools.product(("plain", "all"), ("pairs", "dense"))]


def slow_unless(condition):
    """Return the marks of a case of a grid that runs complete under `slow` alone."""
    return () if condition else (pytest.mark.slow,)


@pytest.mark.parametrize(
    ("feature", "teacher", "temperature"),
    [
        pytest.param(*pair, t, marks=slow_unless(t == 2.0 or pair in SWEPT))
        for pair, t in itertools.product(PAIRS, (1.0, 2.0, 2.5))
    ],
)
def test_features(feature, teacher, temperature):
    arrays, bias_V, given, log_p_NV, options = cases(feature, teacher, temperature)
    expected = plain(arrays, bias_V, given, log_p_NV, options)
    assert_close(fused(arrays, bias_V, given, options, None), expected)


@pytest.mark.parametrize("mesh", MESHES[1:])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_meshes(mesh, teacher):
    """V = 37 divides over no tensor axis: rows are added, and masked."""
    arrays, bias_V, given, log_p_NV, options = cases("all", teacher, 2.0)
    expected = plain(arrays, bias_V, given, log_p_NV, options)
    assert_close(fused(arrays, bias_V, given, options, mesh), expected)


def test_draws_on_a_split_vocabulary():
    arrays, _, _, _, _ = cases("plain", "pairs", 1.0)
    rng = np.random.default_rng(2)
    ids = np.stack([rng.permutation(V)[:K] for _ in arrays[2]]).astype(np.int32)
    ids[:, -1] = -1
    shares = rng.dirichlet(np.ones(K), len(ids)) * (ids >= 0)
    with np.errstate(divide="ignore"):
        log_shares = jnp.float32(np.log(shares / shares.sum(-1, keepdims=True)))
    entropy = jnp.float32(rng.uniform(size=len(ids)))
    given = Teacher(jnp.asarray(ids), log_shares, 0 * entropy, entropy)
    expected = fused(arrays, None, given, {}, None)
    for mesh in MESHES[1:]:
        assert_close(fused(arrays, None, given, {}, mesh), expected)


def test_an_online_teacher_gets_no_gradient():
    arrays, _, given, _, options = cases("plain", "live", 2.0)

    def loss(given):
        return fused_loss(*arrays, given, LossOptions(chunk_size=4, **options))[0]

    gradient = jax.grad(loss)(given)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("options", "name"),
    [({"softcap": 0.0}, "softcap=0.0"), ({"scale": -1.0}, "scale=-1.0")],
)
def test_a_logit_transform_out_of_range_is_refused(options, name):
    with pytest.raises(ValueError, match=name):
        LogitTransform(**options)


def test_a_bias_of_another_vocabulary_is_refused():
    arrays, _, given, _, _ = cases("plain", "pairs", 1.0)
    with shape_checks.disabled(), pytest.raises(ValueError, match="bias_V"):
        fused_loss(*arrays, given, LossOptions(), bias_V=jnp.zeros(3))


def test_an_online_teacher_of_another_vocabulary_is_refused():
    arrays, _, given, _, _ = cases("plain", "live", 1.0)
    short = given._replace(weight_VE=given.weight_VE[:-1])
    with pytest.raises(ValueError, match="36 rows"):
        fused_loss(*arrays, short, LossOptions())
