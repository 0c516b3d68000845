"""A model's softcap reaches every place where logits are made."""

import jax
import numpy as np
import pytest

from kdjax import losses
from kdjax.config import MeshConfig, OptimConfig
from kdjax.experiment.models import load_model
from kdjax.models import decoder, lm
from kdjax.parallel import sharding
from kdjax.training import online_teacher, state, step
from kdjax.training.optimizer import make_optimizer, make_schedule
from tests import helpers
from tests.golden.make_families import FOLDER, tokens


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(), devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def models(mesh):
    """Gemma 2 and 3, both with a final softcap: student and teacher."""
    return [
        load_model(str(FOLDER / name), mesh, dtype="float32")
        for name in ("gemma2", "gemma3")
    ]


@pytest.fixture(scope="module")
def batch(mesh):
    rows = helpers.rows_of(tokens()[None], weights={"hard": 0.5, "soft": 0.25})
    return sharding.global_batch(rows, mesh, 2)


@pytest.fixture(scope="module")
def log_probs(models, batch):
    """Of both models, float64 [N, V]."""
    found = []
    for model, params in models:
        hidden = jax.jit(decoder.hidden_states, static_argnums=0)(
            model.graphdef,
            params,
            batch.tokens[0],
            batch.positions[0],
            batch.segments[0],
        )
        assert model.shape.final_softcap == 5.0
        plain = decoder.logits(params, hidden)
        capped = decoder.logits(
            params, hidden, transform=lm.logit_transform(model.graphdef, params)
        )
        assert np.abs(plain - capped).max() > 0.05  # the cap matters
        logits = np.asarray(capped, np.float64).reshape(-1, 96)
        found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return found


def nll_of(log_probs_NV, batch):
    targets_N = np.asarray(batch.targets).reshape(-1)
    return -np.take_along_axis(log_probs_NV, targets_N[:, None], 1)[:, 0]


def test_scoring(mesh, models, batch, log_probs):
    model, params = models[0]
    score = step.make_score_step(
        model.graphdef, mesh, model.abstract, tail="bucket", chunk_size=16
    )
    nll = score(params, batch)["nll"].reshape(-1)
    np.testing.assert_allclose(nll, nll_of(log_probs[0], batch), rtol=1e-4)


def test_labelling(mesh, models, batch, log_probs):
    model, params = models[1]
    label = step.make_label_step(
        model.graphdef,
        mesh,
        model.abstract,
        k=None,
        temperatures=(1.0,),
        chunk_size=16,
    )
    found = label(params, batch, None)["log_probs_NK"]
    np.testing.assert_allclose(found, log_probs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_pairs", [None, 95])
def test_training_with_an_online_teacher(mesh, models, batch, log_probs, num_pairs):
    (model, params), (teacher, frozen) = models
    config = OptimConfig()
    optimizer = make_optimizer(config, steps=2)
    abstract = state.abstract_state(model.abstract, optimizer, mesh)
    train_step = step.make_train_step(
        model.graphdef,
        optimizer,
        make_schedule(config, steps=2),
        mesh,
        abstract,
        num_views=1,
        loss_options=losses.LossOptions(
            logit_transform=lm.logit_transform(model.graphdef, model.abstract),
            teacher_logit_transform=lm.logit_transform(
                teacher.graphdef, teacher.abstract
            ),
            chunk_size=16,
        ),
        teacher=online_teacher.OnlineTeacher(
            teacher.graphdef, teacher.abstract, num_pairs
        ),
    )
    copied = jax.tree.map(lambda x: x.copy(), params)
    current = state.init_state(abstract, optimizer, lambda: copied)
    _, metrics = train_step(current, batch, frozen)
    student, teacher = log_probs
    kl_N = (np.exp(teacher) * (teacher - student)).sum(-1)
    np.testing.assert_allclose(metrics["kl"], [kl_N.sum()], rtol=1e-4)
    np.testing.assert_allclose(
        metrics["nll"], [nll_of(student, batch).sum()], rtol=1e-4
    )
