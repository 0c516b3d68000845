"""FLOP counts against hand counts and against the compiler's own."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kdjax.config import DecoderConfig
from kdjax.models import decoder, flops

CONFIG = DecoderConfig(
    vocab_size=100,
    width=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
)


def test_matmul_params_by_hand():
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    assert flops.matmul_params(CONFIG) == attention + 3 * 32 * 48 + 100 * 32


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_params_count_is_that_of_the_model(tied, num_layers):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, num_layers=num_layers)
    _, params = decoder.create(config)
    assert flops.params_count(config) == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )


def test_forward_flops_agree_with_the_compiler():
    # One layer: the compiler counts the body of a loop over layers once. Widths large
    # enough that what is not a matrix product is a small share.
    config = dataclasses.replace(
        CONFIG, width=128, head_dim=32, mlp_width=256, vocab_size=512
    )
    graphdef, params = decoder.create(config)
    tokens_BT = jnp.zeros((2, 64), jnp.int32)

    def forward(params, tokens_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(64)[None], tokens_BT.shape)
        hidden_BTD = decoder.hidden_states(
            graphdef, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT)
        )
        return decoder.logits(params, hidden_BTD)

    counted = jax.jit(forward).lower(params, tokens_BT).compile().cost_analysis()
    expected = flops.forward_flops(
        config, num_tokens=128, row_length=64, num_head_tokens=128
    )
    assert counted["flops"] == pytest.approx(expected, rel=0.1)
    assert counted["flops"] >= expected


def test_forward_flops_by_hand():
    products = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    attention = 2 * 2 * 4 * 8 * 16  # scores and values, 4 heads of 8, 16 keys
    head = 2 * 100 * 32
    arguments = dict(num_tokens=32, row_length=16, num_head_tokens=10)
    expected = 32 * (products + attention) + 10 * head
    assert flops.forward_flops(CONFIG, **arguments) == expected
    assert flops.train_flops(CONFIG, **arguments) == 3 * expected
    spared = flops.train_flops(CONFIG, **arguments, num_frozen=7, trains_head=False)
    assert spared == 3 * expected - 2 * 7 * 32 - 10 * head


def test_mfu_is_useful_over_peak():
    assert flops.mfu(2e12, seconds_per_step=2.0, num_devices=4, peak=1e12) == 0.25
    assert flops.mfu(1.0, seconds_per_step=1.0, num_devices=1, peak=None) is None
