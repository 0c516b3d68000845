"""Outputs of single layers, against transformers and against the plain pass."""

import jax
import numpy as np
import pytest
import torch
import transformers

from kdjax.models import decoder, hf
from tests.models.test_decoder import CONFIG, positions_of, run, tokens_of


@pytest.fixture(scope="module")
def model():
    graphdef, _ = decoder.create(CONFIG)
    return graphdef, decoder.init_params(CONFIG, jax.random.key(0))


def captured_states(graphdef, params, tokens, positions, segments, capture):
    call = jax.jit(
        lambda *arrays: decoder.captured_states(graphdef, *arrays, capture=capture)
    )
    return jax.tree.map(np.asarray, call(params, tokens, positions, segments))


def test_layers_are_those_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    shape = hf.read_config(tmp_path)
    graphdef, _ = decoder.create(shape)
    tokens = tokens_of(2, 9)
    with torch.no_grad():
        wanted = reference(
            torch.tensor(tokens.astype(np.int64)),
            output_hidden_states=True,
            output_attentions=True,
        )
    layers = (2, 0)
    _, found = captured_states(
        graphdef,
        hf.load_params(tmp_path, shape),
        tokens,
        positions_of(2, 9),
        np.ones_like(tokens),
        decoder.Capture(layers, attention=True),
    )
    for slot, layer in enumerate(layers):
        np.testing.assert_allclose(
            found.states_nBTD[slot],
            wanted.hidden_states[layer + 1].numpy(),
            atol=1e-4,
        )
        np.testing.assert_allclose(
            found.attention_nBTT[slot],
            wanted.attentions[layer].mean(1).numpy(),
            atol=1e-5,
        )


def test_capturing_changes_nothing(model):
    tokens = tokens_of(2, 12)
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3] * 2, np.int32)
    positions = np.array([[*range(5), *range(4), *range(3)]] * 2, np.int32)
    plain = run(*model, tokens, positions, segments)
    capture = decoder.Capture((1,), attention=True)
    hidden, found = captured_states(*model, tokens, positions, segments, capture)
    np.testing.assert_array_equal(plain, hidden)
    assert found.states_nBTD.shape == (1, *hidden.shape)
    attention = found.attention_nBTT[0]
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    apart = (segments[:, :, None] != segments[:, None, :]) | ~np.tri(12, dtype=bool)
    assert (attention[apart] == 0).all()
    assert (
        captured_states(*model, tokens, positions, segments, decoder.Capture())[1]
        is None
    )


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_gradients_pass_through_captured_outputs(model, remat):
    tokens, segments = tokens_of(1, 6), np.ones((1, 6), np.int32)

    def loss(params, graphdef):
        _, found = decoder.captured_states(
            graphdef,
            params,
            tokens,
            positions_of(1, 6),
            segments,
            capture=decoder.Capture((0, 1), attention=True),
        )
        return (found.states_nBTD**2).sum() + (found.attention_nBTT**2).sum()

    graphdef, params = model
    plain = jax.jit(jax.grad(lambda p: loss(p, graphdef)))(params)
    other, _ = decoder.create(CONFIG, remat=remat)
    again = jax.jit(jax.grad(lambda p: loss(p, other)))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        plain,
        again,
    )
    query = plain["layers"]["attention"]["query"]["kernel"]
    assert np.abs(query[0]).max() > 0 and np.abs(query[1]).max() > 0
    assert (np.asarray(query[2]) == 0).all()  # nothing watches the last layer
