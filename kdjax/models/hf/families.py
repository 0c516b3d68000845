"""config.json fields and tensor names of a DecoderConfig, family by family.

A family is a row of `_TABLE`: the fields of its config.json in groups, what is so in
all its models, and the tensors behind our parameters. Another one is another row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdjax.config import FAMILIES, DecoderConfig
from kdjax.models.hf import config_fields
from kdjax.models.hf.config_fields import Json, Part
from kdjax.models.hf.per_layer_fields import (
    gemma_layers,
    mistral_windows,
    qwen_windows,
    smollm3_layers,
)

# Our path -> the tensor, in its layer or of the whole model. Kernels are transposed.
_TOP_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/weight": "lm_head.weight",
}
HEAD = _TOP_NAMES["head/weight"]
_ROWS = 4096  # of a matrix that are compared at a time
_LAYER_NAMES = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/query/bias": "self_attn.q_proj.bias",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/key/bias": "self_attn.k_proj.bias",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/value/bias": "self_attn.v_proj.bias",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "attention/out/bias": "self_attn.o_proj.bias",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/gate/bias": "mlp.gate_proj.bias",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/up/bias": "mlp.up_proj.bias",
    "mlp/down/kernel": "mlp.down_proj.weight",
    "mlp/down/bias": "mlp.down_proj.bias",
}
_GEMMA_NAMES = _LAYER_NAMES | {
    "attention_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One `model_type`."""

    architecture: str  # its class in transformers
    parts: tuple[Part, ...]  # its config.json
    defaults: Mapping[str, Any]  # of fields of config.json that it may omit
    traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of all models
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of config.json
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _LAYER_NAMES)


_silu = config_fields.activation("hidden_act")
_gelu = config_fields.activation("hidden_activation", "hidden_act")
_gemma = {"norm_offset": 1.0, "scale_embeddings": True, "post_norms": True}
_TABLE = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        parts=(
            config_fields.sizes,
            config_fields.rope,
            _silu,
            config_fields.attention_bias,
            config_fields.mlp_bias,
        ),
        defaults={
            "num_key_value_heads": None,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
        },
        fixed={"sliding_window": None},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        parts=(config_fields.sizes, config_fields.rope, _silu, mistral_windows),
        defaults={"hidden_act": "silu"},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        parts=(config_fields.sizes, config_fields.rope, _silu, qwen_windows),
        defaults={"hidden_act": "silu"},
        traits={"qkv_bias": True},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        parts=(
            config_fields.sizes,
            config_fields.rope,
            _silu,
            config_fields.attention_bias,
            qwen_windows,
        ),
        defaults={"hidden_act": "silu", "head_dim": 128},
        traits={"qk_norm": True},
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        parts=(
            config_fields.sizes,
            config_fields.rope,
            _silu,
            config_fields.attention_bias,
            config_fields.mlp_bias,
            smollm3_layers,
        ),
        defaults={
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "rope_theta": 2000000.0,
        },
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        parts=(
            config_fields.sizes,
            config_fields.rope,
            _gelu,
            config_fields.attention_bias,
            config_fields.query_scalar,
            config_fields.score_softcap,
            config_fields.final_softcap,
            gemma_layers(pattern=2, local_rope=False),
        ),
        defaults={
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
        traits=_gemma,
        fixed={"use_bidirectional_attention": False},
        names=_GEMMA_NAMES,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        parts=(
            config_fields.sizes,
            config_fields.two_ropes,
            _gelu,
            config_fields.attention_bias,
            config_fields.query_scalar,
            config_fields.final_softcap,
            gemma_layers(pattern=6, local_rope=True),
        ),
        defaults={
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "final_logit_softcapping": None,
        },
        traits=_gemma | {"qk_norm": True},
        # transformers' Gemma 3 has a field for a cap of its scores, and no cap.
        fixed={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        names=_GEMMA_NAMES,
    ),
}
assert set(_TABLE) == set(FAMILIES)


def read(raw: Mapping[str, Any], file: str) -> DecoderConfig:
    """Read the shape that the content of a config.json describes.

    Raises:
      ValueError: a family, a field or a value that the decoder does not implement, or
        that it does not know.
    """
    name = raw.get("model_type")
    if name not in _TABLE:
        raise ValueError(
            f"{file}: model_type={name!r} is not supported, only "
            f"{', '.join(_TABLE)}: use a model of one of these"
        )
    family = _TABLE[name]
    json = Json(raw, file, family.defaults)
    values = dict(family.traits)
    for part in family.parts:
        values |= part.read(json)
    for field, value in family.fixed.items():
        json.fixed(field, value)
    json.finish()
    for field, plain in dataclasses.asdict(DecoderConfig()).items():
        value = values.get(field, plain)
        kinds = (int, float) if isinstance(plain, float) else type(plain)
        if field != "rope" and not isinstance(value, kinds):
            kind = type(plain).__name__
            raise ValueError(f"{file} gives {field}={value!r}, not {kind}: correct it")
    return DecoderConfig(family=name, **values)


def write(config: DecoderConfig) -> dict[str, Any]:
    """Return the config.json of a shape, without what describes its files.

    Raises:
      ValueError: the family's config.json cannot say this.
    """
    if config.family not in _TABLE:
        raise ValueError(
            f"family={config.family!r} is unknown: use one of {list(_TABLE)}"
        )
    family = _TABLE[config.family]
    written = {
        "architectures": [family.architecture],
        "model_type": config.family,
    }
    for part in family.parts:
        written |= part.write(config)
    again = read(written, "config.json")
    for field in dataclasses.fields(config):
        wanted, found = getattr(config, field.name), getattr(again, field.name)
        if wanted != found:
            raise ValueError(
                f"{field.name}={wanted!r} is not what a config.json of family="
                f"{config.family!r} can say, it would be read as {found!r}: use that, "
                "or another family"
            )
    return written


def stored_names(
    config: DecoderConfig, path: str, layers: Sequence[int]
) -> tuple[list[str], bool]:
    """Names of the tensors behind one parameter, and whether they are transposed."""
    if not path.startswith("layers/"):
        return [_TOP_NAMES[path]], False
    name = _TABLE[config.family].names[path.removeprefix("layers/")]
    stored = [f"model.layers.{layer}.{name}" for layer in layers]
    return stored, path.endswith("/kernel")


def without_copies(
    tensors: dict[str, Any], files: dict[str, Any], config: DecoderConfig
) -> dict[str, Any]:
    """Drop the rotary frequencies, which follow from the config, and a tied head.

    Raises:
      ValueError: the head of a model with tied embeddings is not the embedding.
    """
    rest = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    embedding = rest.get(_TOP_NAMES["embed/embedding"])
    if not config.tie_embeddings or HEAD not in rest or embedding is None:
        return rest
    head = rest.pop(HEAD)
    parts = [
        slice(start, min(start + _ROWS, head.shape[0]))
        for start in range(0, head.shape[0], _ROWS)
    ]
    same = head.shape == embedding.shape and all(
        np.array_equal(head[part], embedding[part]) for part in parts
    )
    if not same:
        raise ValueError(
            f"{files[HEAD]}: {HEAD} differs from the embedding, and config.json has "
            "tie_word_embeddings=true, which makes them one: set it to false"
        )
    return rest
