"""What is decoded, against the teacher's own rows on real text."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import MeshConfig
from kdjax.data import tokenizer as tokenizers
from kdjax.experiment.models import load_model
from kdjax.losses.chunk_label import chunk_label
from kdjax.losses.chunk_loss import Teacher, Tokens, chunk_loss
from kdjax.losses.options import LossOptions
from kdjax.losses.vocab_shard import VocabShard
from kdjax.models import decoder
from kdjax.parallel import sharding
from kdjax.teacher import codec
from kdjax.teacher.byte_planes import IdCoder

K, TEMPERATURES = 64, (0.5, 1.0, 2.0)


@pytest.mark.real_data
def test_decoded_rows_are_the_teachers(smollm2, real_data):
    """Probabilities, tail mass and KL at every declared temperature, float64 oracle."""
    lines = (real_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:4]
    tokenizer = tokenizers.load(str(smollm2))
    texts = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]
    tokens = np.asarray(tokenizer(" ".join(texts))["input_ids"][:257], np.int32)
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    model, params = load_model(str(smollm2), mesh, dtype="float32")
    inputs_BT, targets = jnp.asarray(tokens[None, :-1]), tokens[1:]

    @functools.partial(jax.jit, static_argnames="k")
    def run(params, k):
        hidden_BTD = decoder.hidden_states(
            model.graphdef,
            params,
            inputs_BT,
            jnp.arange(inputs_BT.shape[1], dtype=jnp.int32)[None],
            jnp.ones_like(inputs_BT),
        )
        logits_TV = jnp.einsum("td,vd->tv", hidden_BTD[0], decoder.head_weight(params))
        found = chunk_label(
            logits_TV, jnp.asarray(targets), k=k, temperatures=TEMPERATURES
        )
        return logits_TV, found

    logits_TV, found = jax.tree.map(np.asarray, run(params, K))
    vocab_size = logits_TV.shape[1]
    record = codec.Record(
        ids=found["ids_NK"],
        log_probs=found["log_probs_NK"],
        target_ids=targets,
        target_log_probs=found["target_log_probs_N"],
        log_z=found["log_z_NS"],
        entropy=found["entropy_NS"],
    )
    coder = IdCoder.from_ids(record.ids, vocab_size)
    data = codec.encode(record, coder, temperatures=TEMPERATURES)
    decoded = codec.decode(data, coder, kind="top_k", temperatures=TEMPERATURES)
    np.testing.assert_array_equal(decoded.ids, record.ids)
    assert len(data) / record.ids.size < 2.0

    exact_TV = logits_TV.astype(np.float64)
    exact_TV -= exact_TV.max(1, keepdims=True)
    exact_TV -= np.log(np.exp(exact_TV).sum(1, keepdims=True))
    for column, temperature in enumerate(TEMPERATURES):
        log_p_TV = exact_TV / temperature
        log_p_TV -= np.log(np.exp(log_p_TV).sum(1, keepdims=True))
        p_TK = np.exp(np.take_along_axis(log_p_TV, record.ids, 1))
        q_TK = np.exp(
            decoded.log_probs.astype(np.float64) / temperature
            - decoded.log_z[:, [column]]
        )
        # Codes are (1 + x) / 96 apart; then the row is shifted to its exact mass.
        step_TK = (1 - decoded.log_probs) / 96 / temperature
        assert (np.abs(np.log(q_TK / p_TK)) < step_TK).all()
        np.testing.assert_allclose(1 - q_TK.sum(1), 1 - p_TK.sum(1), atol=2e-5)
        teacher = Teacher(
            *map(jnp.asarray, (decoded.ids, decoded.log_probs)),
            jnp.asarray(decoded.log_z[:, column]),
        )
        ones_T = jnp.ones(len(targets))
        loss = chunk_loss(
            jnp.asarray(logits_TV),
            Tokens(jnp.asarray(targets), 0 * ones_T, ones_T, teacher),
            LossOptions(temperature=temperature),
            VocabShard(size=vocab_size, num_valid=vocab_size),
        )
        kl_T = np.asarray(loss.kl_C)
        assert kl_T.min() >= 0 and kl_T.mean() < 1e-4, (temperature, kl_T.mean())
