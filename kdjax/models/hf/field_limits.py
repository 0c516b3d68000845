"""Types and limits of config.json fields, checked before anything is made of them.

A folder from a stranger may say that a model has 10^8 layers. Whoever really has more
than a limit finds it here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from kdjax.config import Range
from kdjax.runtime.untrusted import quote

_COUNT = {"at_least": 1}
_LAYERS = Range(**_COUNT, at_most=4096)
_HEADS = Range(**_COUNT, at_most=2**14)
_WIDTH = Range(**_COUNT, at_most=2**20)
_VOCABULARY = Range(**_COUNT, at_most=2**24)
_POSITIONS = Range(**_COUNT, at_most=2**31 - 1)
_EPSILON = Range(at_least=0, at_most=1)
_BASE = Range(above=1, at_most=1e15)
_FACTOR = Range(above=0, at_most=1e6)

# Field -> its type and limit; null counts as absent.
_FIELDS: dict[str, tuple[type, Range | None]] = {
    "model_type": (str, None),
    "vocab_size": (int, _VOCABULARY),
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "num_decoder_layers"), (int, _LAYERS)
    ),
    **dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads", "num_heads"), (int, _HEADS)
    ),
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "d_model", "d_ff", "head_dim", "d_kv"),
        (int, _WIDTH),
    ),
    "max_position_embeddings": (int, _POSITIONS),
    "sliding_window": (int, Range(at_least=0, at_most=2**31 - 1)),
    "max_window_layers": (int, Range(at_least=0, at_most=2**31 - 1)),
    "relative_attention_num_buckets": (int, Range(at_least=4, at_most=2**16)),
    "relative_attention_max_distance": (int, _POSITIONS),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon"), (float, _EPSILON)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), (float, _BASE)),
    **dict.fromkeys(
        ("initializer_range", "initializer_factor"), (float, Range(at_least=0))
    ),
    "query_pre_attn_scalar": (float, _FACTOR),
    **dict.fromkeys(
        ("attn_logit_softcapping", "final_logit_softcapping"),
        (float, Range(at_least=0)),
    ),
    "dropout_rate": (float, Range(at_least=0, below=1)),
    **dict.fromkeys(
        (
            "tie_word_embeddings",
            "attention_bias",
            "mlp_bias",
            "use_sliding_window",
            "scale_decoder_outputs",
        ),
        (bool, None),
    ),
    **dict.fromkeys(
        ("hidden_act", "hidden_activation", "feed_forward_proj"), (str, None)
    ),
    **dict.fromkeys(("layer_types", "no_rope_layers"), (list, None)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (dict, None)),
    **dict.fromkeys(
        ("pad_token_id", "decoder_start_token_id"),
        (int, Range(at_least=-1, at_most=2**24)),
    ),
}
# The same inside rope_scaling and rope_parameters.
_ROPE_FIELDS: dict[str, tuple[type, Range | None]] = {
    **dict.fromkeys(("rope_type", "type"), (str, None)),
    "rope_theta": (float, _BASE),
    "factor": (float, Range(at_least=1, at_most=1e6)),
    **dict.fromkeys(
        ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
        (float, _FACTOR),
    ),
    "attention_factor": (float, Range(at_least=0, at_most=1e6)),
    "original_max_position_embeddings": (int, _POSITIONS),
}


def check(raw: Mapping[str, Any], file: str) -> None:
    """Check type and limit of the fields that describe a model.

    Args:
      raw: content of a config.json.
      file: where it stands, for errors.

    Raises:
      ValueError: one of another type, or out of range.
    """
    for name, value, kind, limit in _values(raw):
        if value is None:
            continue
        types: Any = (int, float) if kind is float else kind
        if not isinstance(value, types) or (type(value) is bool) != (kind is bool):
            raise ValueError(
                f"{file}: {name}={quote(value)} is not of type {kind.__name__}: "
                "correct it, or use another model"
            )
        if limit is not None and (error := limit.error(value)):
            raise ValueError(f"{file}: {name}={quote(value)} {error}")


def _values(
    raw: Mapping[str, Any],
) -> Iterator[tuple[str, Any, type, Range | None]]:
    """Yield name, value, type and limit of the fields that are there."""
    for name, (kind, limit) in _FIELDS.items():
        if name in raw:
            yield name, raw[name], kind, limit
    for name in ("rope_scaling", "rope_parameters"):
        stated = raw.get(name)
        if not isinstance(stated, dict):
            continue
        # Of one kind of layer, or of each.
        parts = {f"{name}.{key}": x for key, x in stated.items() if isinstance(x, dict)}
        for prefix, part in ({name: stated} | parts).items():
            for field, (kind, limit) in _ROPE_FIELDS.items():
                if field in part:
                    yield f"{prefix}.{field}", part[field], kind, limit
