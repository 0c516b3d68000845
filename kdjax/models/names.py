"""Which Hugging Face tensors of a Llama model stand behind each of our parameters."""

from collections.abc import Sequence

import jax

from kdjax.config import DecoderConfig
from kdjax.models import decoder

# Our path -> Hugging Face name.
TOP_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/weight": "lm_head.weight",
}
# Our path -> (Hugging Face module of a layer, whether its matrix is transposed).
LAYER_NAMES = {
    "attention_norm/scale": ("input_layernorm", False),
    "attention/query/kernel": ("self_attn.q_proj", True),
    "attention/key/kernel": ("self_attn.k_proj", True),
    "attention/value/kernel": ("self_attn.v_proj", True),
    "attention/out/kernel": ("self_attn.o_proj", True),
    "mlp_norm/scale": ("post_attention_layernorm", False),
    "mlp/gate/kernel": ("mlp.gate_proj", True),
    "mlp/up/kernel": ("mlp.up_proj", True),
    "mlp/down/kernel": ("mlp.down_proj", True),
}


def join(key_path) -> str:
    """A path of `jax.tree_util` in a nested dict, as "layers/mlp/up/kernel"."""
    return "/".join(key.key for key in key_path)


def stored_names(path: str, layers: Sequence[int]) -> tuple[list[str], bool]:
    """Names of the tensors behind one parameter, and whether they are transposed."""
    if path in TOP_NAMES:
        return [TOP_NAMES[path]], False
    module, transposed = LAYER_NAMES[path.removeprefix("layers/")]
    return [f"model.layers.{layer}.{module}.weight" for layer in layers], transposed


def stored_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the files of a model."""
    _, params = decoder.create(config)
    result: dict[str, tuple[int, ...]] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = join(key_path)
        names, transposed = stored_names(path, range(config.num_layers))
        shape = leaf.shape if path in TOP_NAMES else leaf.shape[1:]
        result |= dict.fromkeys(names, shape[::-1] if transposed else shape)
    return result
