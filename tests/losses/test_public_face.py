"""The losses in a loop that is not kdjax's: a Flax model, optax, a dense loss."""

import subprocess
import sys

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import jaxtyping
import optax
import pytest

from kdjax import losses
from tests.losses.head_cases import as_jax, assert_close, make

V, N, T = 96, 48, 2.0


class Model(nnx.Module):
    def __init__(self, width, rngs):
        self.embed = nnx.Embed(V, width, rngs=rngs)
        self.mlp = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, V, rngs=rngs)

    def __call__(self, tokens_N):
        x_ND = self.embed(tokens_N)
        hidden_ND = x_ND + nnx.gelu(self.mlp(x_ND))
        return hidden_ND, self.head.kernel[...].T, self.head.bias[...]


@pytest.fixture
def case():
    """Return (graphdef, params, inputs, targets, dense teacher) of a foreign model."""
    tokens = jax.random.randint(jax.random.key(0), (N + 1,), 0, V)
    inputs_N, targets_N = tokens[:-1], tokens[1:]
    hidden_ND, weight_VD, bias_V = Model(24, nnx.Rngs(1))(inputs_N)
    options = losses.LabelOptions(k=None, temperatures=(T,))
    labels = losses.label(hidden_ND, weight_VD, targets_N, options, bias_V=bias_V)
    teacher = losses.Teacher(None, labels["log_probs_NK"], labels["log_z_NS"][:, 0])
    graphdef, params = nnx.split(Model(16, nnx.Rngs(2)), nnx.Param)
    return graphdef, params, inputs_N, targets_N, teacher


def test_a_foreign_model_learns_with_the_gradients_of_optax(case):
    graphdef, params, inputs_N, targets_N, teacher = case
    options = losses.LossOptions(temperature=T, chunk_size=16)
    weights_N = jnp.full(N, 0.5 / N)

    def fused(params):
        hidden_ND, weight_VD, bias_V = nnx.merge(graphdef, params)(inputs_N)
        arrays = hidden_ND, weight_VD, targets_N, weights_N, weights_N
        return losses.fused_loss(*arrays, teacher, options, bias_V=bias_V)[0]

    def dense(params):
        hidden_ND, weight_VD, bias_V = nnx.merge(graphdef, params)(inputs_N)
        logits_NV = hidden_ND @ weight_VD.T + bias_V[None]
        p_NV = jax.nn.softmax(teacher.log_probs_NK / T)
        log_q_NV = jax.nn.log_softmax(logits_NV / T)
        kl_N = optax.losses.kl_divergence(log_q_NV, p_NV)
        nll_N = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits_NV, targets_N
        )
        return (0.5 * nll_N + 0.5 * T**2 * kl_N).mean()

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected, actual = (
            jax.jit(jax.value_and_grad(f))(params) for f in (dense, fused)
        )
        assert_close(actual, expected)

        optimizer = optax.adam(1e-2)
        opt_state, values = optimizer.init(params), []

        @jax.jit
        def train_step(params, opt_state):
            loss, grads = jax.value_and_grad(fused)(params)
            updates, opt_state = optimizer.update(grads, opt_state)
            return optax.apply_updates(params, updates), opt_state, loss

        for _ in range(20):
            params, opt_state, loss = train_step(params, opt_state)
            values.append(float(loss))
    assert values[-1] < 0.7 * values[0]


def test_the_face_exports_what_it_names():
    assert all(hasattr(losses, name) for name in losses.__all__)


def test_a_wrong_shape_is_noticed_in_tests():
    arrays, _, teacher = make()
    hidden, weight, targets, hard, soft = as_jax(arrays)
    with pytest.raises(jaxtyping.TypeCheckError, match="soft_weights_N"):
        losses.fused_loss(
            hidden, weight, targets, hard, soft[1:], teacher, losses.LossOptions()
        )


def test_importing_the_losses_imports_jax_alone():
    code = (
        "import sys, kdjax.losses;"
        "sys.exit(bool({'absl', 'flax', 'optax', 'orbax', 'grain'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
