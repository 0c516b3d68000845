"""Held-out measures, by hand."""

import math

import jax
import numpy as np

from kdjax import experiment, sharding
from kdjax.config import MeshConfig
from kdjax.models import decoder
from kdjax.scoring import Scorer
from tests import small
from tests.test_step import FakeCache


def test_nll_and_perplexity_are_the_models_own():
    """Whatever the teacher says of the same tokens."""
    config = small.config()
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    data = experiment.load_data(config)
    model = experiment.make_model(
        experiment.student_shape(config, data.tokenizer), mesh, dtype="float32"
    )
    params = experiment.student_params(config, model, "")()
    cache = FakeCache(data.evaluation, model.shape.vocab_size)
    found = Scorer(config, data, model, mesh, cache=cache)(params)
    total = count = 0
    for segment in data.evaluation:
        ids = np.concatenate([segment.prompt_ids, segment.target_ids])[None, :-1]
        positions = np.arange(ids.shape[1], dtype=np.int32)[None]
        hidden = decoder.hidden_states(
            model.graphdef, params, ids, positions, np.ones_like(ids)
        )
        logits = np.asarray(decoder.logits(params, hidden), np.float64)[0]
        logits = logits[len(segment.prompt_ids) - 1 :]
        log_z = np.log(np.exp(logits).sum(-1))
        total += (log_z - logits[np.arange(len(logits)), segment.target_ids]).sum()
        count += len(logits)
    np.testing.assert_allclose(found["nll"], total / count, rtol=1e-5)
    np.testing.assert_allclose(found["perplexity"], math.exp(total / count), rtol=1e-4)
    assert found["kl"] > 0.1
