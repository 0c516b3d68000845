"""Draws: content decides them, and they estimate the whole distribution unbiasedly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.losses import LossOptions, Teacher, fused_loss
from kdjax.losses.chunk_label import chunk_label
from kdjax.teacher import codec, record_checks, sampling
from kdjax.teacher.byte_planes import IdCoder
from kdjax.teacher.manifest import Manifest

VOCAB_SIZE, NUM_DRAWS, NUM_ROUNDS = 40, 12, 400
TEMPERATURES = (1.0, 2.0)
MANIFEST = Manifest(
    kind="sampled",
    k=NUM_DRAWS,
    num_rounds=NUM_ROUNDS,
    vocab_size=VOCAB_SIZE,
    temperatures=TEMPERATURES,
    tokenizer_fingerprint="tokenizer",
    teacher_path="teacher",
    teacher_fingerprint="weights",
)


def labelled(num_tokens=6, *, k=None, drawn=False, num_rounds=NUM_ROUNDS, seed=0):
    """What the label step says of random teacher logits, as a record."""
    rng = np.random.default_rng(seed)
    logits_TV = (2 * rng.normal(size=(num_tokens, VOCAB_SIZE))).astype(np.float32)
    targets_T = rng.integers(0, VOCAB_SIZE, num_tokens).astype(np.int32)
    uniforms = sampling.stratified_uniforms(
        b"key", num_tokens, len(TEMPERATURES), num_rounds, NUM_DRAWS
    ).reshape(num_tokens, len(TEMPERATURES), -1)
    found = jax.tree.map(
        np.asarray,
        chunk_label(
            jnp.asarray(logits_TV),
            jnp.asarray(targets_T),
            k=k,
            temperatures=TEMPERATURES,
            uniforms_CSP=jnp.asarray(uniforms) if drawn else None,
        ),
    )
    common = {
        "target_ids": targets_T,
        "target_log_probs": found["target_log_probs_N"],
        "log_z": found["log_z_NS"],
        "entropy": found["entropy_NS"],
    }
    none = np.zeros((num_tokens, 0), np.int32)
    if drawn:
        shape = (num_tokens, len(TEMPERATURES), num_rounds, NUM_DRAWS)
        ids, counts = sampling.count_draws(found["drawn_ids_NSP"].reshape(shape))
        return codec.Record(
            ids=ids,
            counts=counts,
            log_probs=none.astype(np.float32),
            kind="sampled",
            **common,
        )
    return codec.Record(
        ids=found.get("ids_NK", none),
        log_probs=found["log_probs_NK"],
        kind="dense" if k is None else "top_k",
        **common,
    )


def test_uniforms_depend_on_the_key_alone_and_lie_in_their_strata():
    uniforms = sampling.stratified_uniforms(b"a", 5, 2, 3, 8)
    np.testing.assert_array_equal(
        uniforms, sampling.stratified_uniforms(b"a", 5, 2, 3, 8)
    )
    assert (uniforms != sampling.stratified_uniforms(b"b", 5, 2, 3, 8)).any()
    strata = np.floor(uniforms * 8).astype(int)
    assert (strata == np.arange(8)).all() and uniforms.dtype == np.float32


def test_count():
    ids = np.array([[1, 3, 3, 7], [2, 2, 2, 2], [0, 1, 2, 3]], np.int32)
    found, counts = sampling.count_draws(ids[:, None, None])
    assert found[:, 0, 0].tolist() == [[3, 1, 7, -1], [2, -1, -1, -1], [0, 1, 2, 3]]
    assert counts[:, 0, 0].tolist() == [[2, 1, 1, 0], [4, 0, 0, 0], [1, 1, 1, 1]]


def test_an_id_without_probability_is_never_drawn():
    logits = np.full((1, VOCAB_SIZE), -np.inf, np.float32)
    logits[0, [3, 30]] = 0.0
    uniforms = np.float32([[[0.0, 0.25, 0.4999, 0.5001, 0.75, 1 - 2**-24]]])
    found = chunk_label(
        jnp.asarray(logits),
        jnp.zeros(1, jnp.int32),
        k=None,
        temperatures=(1.0,),
        uniforms_CSP=jnp.asarray(uniforms),
    )
    assert np.asarray(found["drawn_ids_NSP"])[0, 0].tolist() == [3, 3, 3, 30, 30, 30]


@functools.partial(jax.jit, static_argnames=("temperature", "tail"))
def losses(teacher, *, temperature, tail):
    """KL of each token, and its gradient in the logits, for random student logits."""
    num_tokens = teacher.log_probs_NK.shape[0]
    hidden_ND = 2 * jax.random.normal(jax.random.key(9), (num_tokens, VOCAB_SIZE))

    def loss(hidden_ND):
        total, tokens = fused_loss(
            hidden_ND,
            jnp.eye(VOCAB_SIZE),
            jnp.zeros(num_tokens, jnp.int32),
            jnp.zeros(num_tokens),
            jnp.ones(num_tokens),
            teacher,
            LossOptions(temperature=temperature, tail=tail, chunk_size=64),
        )
        return total, tokens["kl"]

    gradient_ND, kl_N = jax.grad(loss, has_aux=True)(hidden_ND)
    return jnp.concatenate([kl_N[:, None], gradient_ND], axis=1)


def loss_and_gradients(record, column, number=0, *, tail="bucket"):
    ids, log_probs, entropy = record.ids, record.log_probs, None
    if record.kind == "sampled":
        ids = record.ids[:, column, number]
        shares = record.counts[:, column, number] / np.float32(NUM_DRAWS)
        log_probs = np.log(shares, out=np.full_like(shares, -np.inf), where=shares > 0)
        entropy = jnp.asarray(record.entropy[:, column])
    teacher = Teacher(
        None if record.kind == "dense" else jnp.asarray(ids),
        jnp.asarray(log_probs),
        jnp.asarray(record.log_z[:, column]),
        entropy,
    )
    return np.asarray(losses(teacher, temperature=TEMPERATURES[column], tail=tail))


@pytest.mark.parametrize("column", [0, 1])
def test_draws_are_unbiased_in_loss_and_gradient_and_truncation_is_not(column):
    temperature = TEMPERATURES[column]
    dense = loss_and_gradients(labelled(), column)
    sampled = labelled(drawn=True)
    found = np.stack(
        [loss_and_gradients(sampled, column, r) for r in range(NUM_ROUNDS)]
    )
    # The deviation of independent draws; of the loss that of the rounds themselves.
    p_TV = np.exp(labelled().log_probs / temperature - sampled.log_z[:, column, None])
    num_draws = NUM_DRAWS * NUM_ROUNDS
    of_gradient_TV = temperature * np.sqrt(p_TV * (1 - p_TV) / num_draws)
    of_loss_T = found[..., 0].std(axis=0) / np.sqrt(NUM_ROUNDS)
    # An id so rare that it is hardly ever drawn is off by a draw or two.
    limit = 5 * np.concatenate([of_loss_T[:, None], of_gradient_TV], axis=1)
    limit += 2 * temperature / num_draws
    assert (np.abs(found.mean(axis=0) - dense) < limit).all()
    truncated = loss_and_gradients(labelled(k=4), column, tail="renormalize_teacher")
    assert (np.abs(truncated - dense) > limit).mean() > 0.25


def test_strata_are_no_noisier_than_independent_draws():
    sampled = labelled(drawn=True)
    p_TV = np.exp(labelled().log_probs)
    values_V = np.random.default_rng(1).normal(size=VOCAB_SIZE)
    shares = sampled.counts[:, 0] / NUM_DRAWS
    means_TR = (shares * values_V[sampled.ids[:, 0]]).sum(axis=-1)
    independent_T = (p_TV @ values_V**2 - (p_TV @ values_V) ** 2) / NUM_DRAWS
    assert (means_TR.var(axis=1) < independent_T).all()


def test_records_of_draws_come_back():
    record = labelled(drawn=True, num_rounds=3)
    coder = IdCoder.from_ids(record.ids, VOCAB_SIZE)
    found = codec.decode(
        codec.encode(record, coder, temperatures=TEMPERATURES),
        coder,
        kind="sampled",
        temperatures=TEMPERATURES,
    )
    np.testing.assert_array_equal(found.counts, record.counts)
    np.testing.assert_array_equal(found.ids, record.ids)
    np.testing.assert_allclose(found.entropy, record.entropy, rtol=2.0**-16)
    assert found.kind == "sampled" and found.log_probs.shape == (6, 0)


@pytest.mark.parametrize("kind", ["top_k", "sampled", "dense"])
def test_rows_shifted_by_one_token_are_noticed(kind):
    record = labelled(
        40, k=8 if kind == "top_k" else None, drawn=kind == "sampled", seed=5
    )
    manifest = MANIFEST
    assert record_checks.find_error(record, manifest) == ""
    for shift in (1, -1):
        shifted = record._replace(
            ids=np.roll(record.ids, shift, axis=0),
            log_probs=np.roll(record.log_probs, shift, axis=0),
            counts=np.roll(record.counts, shift, axis=0),
        )
        assert "shifted against" in record_checks.find_error(shifted, manifest)
        moved = record._replace(target_ids=np.roll(record.target_ids, shift))
        assert "shifted against" in record_checks.find_error(moved, manifest)


@pytest.mark.parametrize("kind", ["top_k", "dense"])
def test_a_wrong_log_z_is_noticed(kind):
    record = labelled(20, k=8 if kind == "top_k" else None)
    assert record_checks.find_error(record, MANIFEST) == ""
    wrong = record._replace(log_z=record.log_z - np.float32([0, 0.9]))
    assert "at temperature 2.0 sum to" in record_checks.find_error(wrong, MANIFEST)
