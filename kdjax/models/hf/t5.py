"""T5's Hugging Face folders: names, configs, and weights both ways.

Versions of transformers differ in what `tie_word_embeddings` says. Until version 4 it
is both whether the head is the embedding and whether outputs are scaled. From version 5
on it is always written as true, `scale_decoder_outputs` holds the second, and the first
shows only in whether the weights have a head of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.config import T5Config

HEAD = "lm_head.weight"
# Our path -> Hugging Face name.
TOP_NAMES = {
    "embed/embedding": "shared.weight",
    "head/weight": HEAD,
    **{
        f"{stack}/{ours}": f"{stack}.{theirs}.weight"
        for stack in ("encoder", "decoder")
        for ours, theirs in {
            "norm/scale": "final_layer_norm",
            # Stored with the first layer, used by all.
            "position_bias/table": "block.0.layer.0.SelfAttention."
            "relative_attention_bias",
        }.items()
    },
}
# Our part of a layer -> (number of the sub-layer in encoder, in decoder, its module).
PARTS = {
    "attention_norm": (0, 0, "layer_norm"),
    "attention": (0, 0, "SelfAttention"),
    "cross_norm": (None, 1, "layer_norm"),
    "cross": (None, 1, "EncDecAttention"),
    "mlp_norm": (1, 2, "layer_norm"),
    "mlp": (1, 2, "DenseReluDense"),
}
KERNELS = {"query": "q", "key": "k", "value": "v", "out": "o", "down": "wo"}
# Copies and leftovers that some files hold beside the tensors of the model.
DUPLICATES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
GATED = {"relu": False, "gated-gelu": True}


def stored_names(
    config: T5Config, path: str, layers: Sequence[int]
) -> tuple[list[str], bool]:
    """Return the names of the tensors behind a parameter, and if they are transposed.

    Args:
      config: shape of the model.
      path: of the parameter.
      layers: those wanted of its stack.
    """
    if path in TOP_NAMES:
        return [TOP_NAMES[path]], False
    stack, _, part, *kernel, _ = path.split("/")
    encoder_number, decoder_number, module = PARTS[part]
    number = encoder_number if stack == "encoder" else decoder_number
    if kernel:
        inner = {"gate": "wi_0", "up": "wi_1" if config.gated else "wi"}
        module += f".{(KERNELS | inner)[kernel[0]]}"
    names = [
        f"{stack}.block.{layer}.layer.{number}.{module}.weight" for layer in layers
    ]
    return names, bool(kernel)


def read(raw: Mapping[str, Any], file: str, has_head: Callable[[], bool]) -> T5Config:
    """Read the shape of a model from its config.json and the names of its weights.

    Args:
      raw: content of config.json.
      file: where it stands, for errors.
      has_head: whether the weights have a head of their own; asked where config.json
        leaves it open.

    Raises:
      ValueError: an architecture, or a field that changes the numbers, which `t5` does
        not implement.
    """
    if raw.get("model_type") != "t5":
        raise ValueError(
            f"{file}: model_type={raw.get('model_type')!r} is not supported, only "
            "'t5': use a T5 v1.0, v1.1 or FLAN model"
        )
    absent = [name for name in REQUIRED if raw.get(name) is None]
    if absent:
        raise ValueError(f"{file} lacks {', '.join(absent)}: add what the model has")
    activation = raw.get("feed_forward_proj", "relu")
    if activation not in GATED:
        raise ValueError(
            f"{file}: feed_forward_proj={activation!r} is not supported, only "
            f"{' and '.join(map(repr, GATED))}: use a T5 v1.0, v1.1 or FLAN model"
        )
    tied = raw.get("tie_word_embeddings", True)
    scaled = raw.get("scale_decoder_outputs", tied)
    if "scale_decoder_outputs" in raw and tied:
        tied = not has_head()
    pad_id = raw.get("pad_token_id", 0)
    start_id = raw.get("decoder_start_token_id")
    eos_id = raw.get("eos_token_id", 1)
    if type(eos_id) is not int or pad_id is None:
        raise ValueError(
            f"{file}: eos_token_id={eos_id!r}, pad_token_id={pad_id!r}: T5 has one of "
            "each, a number: correct them"
        )
    return T5Config(
        vocab_size=raw["vocab_size"],
        width=raw["d_model"],
        num_encoder_layers=raw["num_layers"],
        num_decoder_layers=raw.get("num_decoder_layers") or raw["num_layers"],
        num_heads=raw["num_heads"],
        head_dim=raw["d_kv"],
        mlp_width=raw["d_ff"],
        gated=GATED[activation],
        tie_embeddings=tied,
        scale_outputs=scaled,
        num_buckets=raw.get("relative_attention_num_buckets", 32),
        max_distance=raw.get("relative_attention_max_distance", 128),
        dropout=raw.get("dropout_rate", 0.1),
        norm_eps=raw.get("layer_norm_epsilon", 1e-6),
        init_factor=raw.get("initializer_factor", 1.0),
        pad_id=pad_id,
        eos_id=eos_id,
        start_id=pad_id if start_id is None else start_id,
    )


def write(config: T5Config) -> dict[str, Any]:
    """Return the config.json of a shape, without what describes its files.

    Where only one of tied embeddings and scaled outputs holds, which no published model
    has, transformers 5 computes the same numbers, and 4 cannot.
    """
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_width,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_outputs,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_factor": config.init_factor,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "decoder_start_token_id": config.start_id,
        "use_cache": True,
    }


def without_copies(
    tensors: dict[str, Any], files: dict[str, Any], config: T5Config
) -> dict[str, Any]:
    """Drop the tensors that no part of the model reads.

    Raises:
      ValueError: a copy of the embedding that is none.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name != UNUSED}
    copies = [name for name in DUPLICATES if config.tie_embeddings or name != HEAD]
    found = [name for name in ("shared.weight", *copies) if name in kept]
    if not found:
        return kept
    embedding = kept.pop(found[0])
    for name in found[1:]:
        if not np.array_equal(kept.pop(name)[:], embedding[:]):
            raise ValueError(
                f"{files[name]}: {name} differs from {found[0]}, which it should "
                "equal: check tie_word_embeddings in config.json"
            )
    return kept | {"shared.weight": embedding}
