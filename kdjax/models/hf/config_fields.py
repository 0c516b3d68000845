"""Groups of config.json fields, to and from values of a DecoderConfig.

A family (`kdjax.models.hf.families`) is a few of these parts. `read` takes the part's
fields from a `Json` and returns values of a DecoderConfig; `write` is its inverse.
"""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kdjax.config import DecoderConfig, RopeConfig

Values = dict[str, Any]

# Fields that change no logit, as patterns: bookkeeping, training, generation.
HARMLESS = (
    "_*",
    "*_token_id",
    "*dropout",
    "*version",
    "architectures",
    "attn_implementation",
    "cache_implementation",
    "dtype",
    "finetuning_task",
    "id2label",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "output_*",
    "pretraining_tp",
    "problem_type",
    "return_dict*",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "unsloth_fixed",
    "use_bfloat16",
    "use_cache",
)
# Fields that have one supported value in all families.
FIXED: dict[str, Any] = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "quantization_config": None,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
}
SLIDING, FULL = "sliding_attention", "full_attention"
_NEEDED = object()


class Json:
    """The fields of one config.json; `finish` refuses those that were not read."""

    def __init__(self, raw: Mapping[str, Any], file: str, defaults: Mapping[str, Any]):
        """Remember `defaults` for fields that files of the family may omit."""
        self._raw, self._file, self._defaults = raw, file, defaults
        self._taken = {"model_type"}

    def take(self, name: str, default: Any = _NEEDED) -> Any:
        """Return the value of a field, and mark it as read.

        Raises:
          ValueError: the file lacks it, and there is no default.
        """
        self._taken.add(name)
        default = self._defaults.get(name, default)
        if name not in self._raw and default is _NEEDED:
            raise ValueError(f"{self._file} lacks {name}: add what the model has")
        return self._raw.get(name, default)

    def need(self, name: str) -> Any:
        """Return the value of a field that is there and not null, as `take`."""
        value = self.take(name)
        if value is None:
            raise ValueError(f"{self._file}: {name}=null: say what the model has")
        return value

    def fixed(self, name: str, supported: Any) -> None:
        """Raise ValueError unless the field is absent, null or `supported`."""
        value = self.take(name, None)
        if value is not None and value != supported:
            self.refuse(name, value, f"only {supported!r}")

    def refuse(self, name: str, value: Any, supported: str) -> None:
        """Raise a ValueError that names the file, the field and the remedy."""
        raise ValueError(
            f"{self._file}: {name}={value!r} is not supported, {supported}: use a "
            "model without it"
        )

    def finish(self) -> None:
        """Raise ValueError for a field that might change the numbers."""
        for name, value in FIXED.items():
            self.fixed(name, value)
        for name, value in self._raw.items():
            known = any(fnmatch.fnmatch(name, pattern) for pattern in HARMLESS)
            if name not in self._taken and not known and value is not None:
                raise ValueError(
                    f"{self._file}: {name}={value!r} is unknown to this family: remove "
                    "the field if it changes no number, else use a model without it"
                )


class Part(NamedTuple):
    """Fields that belong together."""

    read: Callable[[Json], Values]
    write: Callable[[DecoderConfig], Values]


def _read_sizes(json: Json) -> Values:
    num_heads, width = json.need("num_attention_heads"), json.need("hidden_size")
    return {
        "vocab_size": json.need("vocab_size"),
        "width": width,
        "num_layers": json.need("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": json.take("num_key_value_heads") or num_heads,
        "head_dim": json.take("head_dim", None) or width // num_heads,
        "mlp_width": json.need("intermediate_size"),
        "norm_eps": json.take("rms_norm_eps", 1e-6),
        "tie_embeddings": json.take("tie_word_embeddings", False),
        "max_length": json.need("max_position_embeddings"),
        "init_std": json.take("initializer_range", 0.02),
    }


def _write_sizes(config: DecoderConfig) -> Values:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "use_cache": True,
    }


sizes = Part(_read_sizes, _write_sizes)


def activation(*names: str) -> Part:
    """Return the part of the MLP's activation; the first of the field's names rules.

    The other fields, if there, must agree: transformers does not read them.
    """
    ours = {
        "silu": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
    }
    theirs = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

    def read(json: Json) -> Values:
        value = json.take(names[0])
        if value not in ours:
            json.refuse(names[0], value, f"only {', '.join(ours)}")
        for other in names[1:]:
            json.fixed(other, value)
        return {"activation": ours[value]}

    return Part(read, lambda config: {names[0]: theirs[config.activation]})


def _read_attention_bias(json: Json) -> Values:
    bias = json.take("attention_bias", False)
    return {"qkv_bias": bias, "out_bias": bias}


attention_bias = Part(
    _read_attention_bias, lambda config: {"attention_bias": config.qkv_bias}
)
mlp_bias = Part(
    lambda json: {"mlp_bias": json.take("mlp_bias", False)},
    lambda config: {"mlp_bias": config.mlp_bias},
)

# RopeConfig's fields by their names in config.json, of each type: needed, optional.
_ROPE_FIELDS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "default": ({}, {}),
    "linear": ({"factor": "factor"}, {}),
    "llama3": (
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_length",
        },
        {},
    ),
    "yarn": (
        {"factor": "factor", "original_max_position_embeddings": "original_length"},
        {
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
        },
    ),
}


def _read_scaling(json: Json, field: str, stated: Values) -> RopeConfig:
    """Read the rotary positions of one dictionary; its theta is read elsewhere."""
    kind = str(stated.get("rope_type", stated.get("type", "default")))
    if kind not in _ROPE_FIELDS:
        json.refuse(field, stated, f"only rope_type {', '.join(_ROPE_FIELDS)}")
    needed, optional = _ROPE_FIELDS[kind]
    inert = {"partial_rotary_factor": 1.0, "truncate": True}
    found: Values = {}
    for name, value in stated.items():
        if name in needed or name in optional:
            if value is not None:
                found[(needed | optional)[name]] = value
        elif (
            name not in ("rope_type", "type", "rope_theta")
            and value is not None
            and inert.get(name, _NEEDED) != value
        ):
            json.refuse(field, stated, f"{name} has no part in {kind}")
    for name, ours in needed.items():
        if ours not in found:
            json.refuse(field, stated, f"{kind} needs {name}")
    return RopeConfig(type=kind, **found)


def _write_scaling(rope: RopeConfig) -> Values:
    needed, optional = _ROPE_FIELDS[rope.type]
    plain = RopeConfig()
    written = {name: getattr(rope, ours) for name, ours in needed.items()}
    for name, ours in optional.items():
        if getattr(rope, ours) != getattr(plain, ours):
            written[name] = getattr(rope, ours)
    return {"rope_type": rope.type} | written


def _stated(json: Json, field: str) -> Values:
    return json.take(field, None) or {}


def _read_rope(json: Json) -> Values:
    # `rope_scaling` until transformers 4, `rope_parameters` from 5 on; either, or both.
    old, new = _stated(json, "rope_scaling"), _stated(json, "rope_parameters")
    theta = json.take("rope_theta", None)
    theta = new.get("rope_theta") or old.get("rope_theta") or theta or 10000.0
    ropes = [
        _read_scaling(json, name, stated)
        for name, stated in (("rope_scaling", old), ("rope_parameters", new))
        if stated
    ] or [RopeConfig()]
    if ropes[0] != ropes[-1]:
        json.refuse("rope_scaling", old, f"rope_parameters={new!r} says otherwise")
    return {"rope_theta": float(theta), "rope": ropes[0]}


def _write_rope(config: DecoderConfig) -> Values:
    scaling = _write_scaling(config.rope)
    old = {} if config.rope.type == "default" else {"rope_scaling": scaling}
    new = {"rope_parameters": scaling | {"rope_theta": config.rope_theta}}
    return {"rope_theta": config.rope_theta} | old | new


rope = Part(_read_rope, _write_rope)


def _read_two_ropes(json: Json) -> Values:
    """Read Gemma 3's two ropes: of global layers, and, not stretched, of local ones."""
    nested, old = _stated(json, "rope_parameters"), _stated(json, "rope_scaling")
    if unknown := nested.keys() - {SLIDING, FULL}:
        json.refuse("rope_parameters", nested, f"{sorted(unknown)} is no layer type")
    whole, local = nested.get(FULL) or {}, nested.get(SLIDING) or {}
    if whole and old:
        ropes = [_read_scaling(json, "rope_scaling", stated) for stated in (old, whole)]
        if ropes[0] != ropes[1]:
            json.refuse("rope_scaling", old, f"rope_parameters={nested!r} disagrees")
    if _read_scaling(json, "rope_parameters", local) != RopeConfig():
        json.refuse("rope_parameters", nested, f"{SLIDING} is not to be stretched")
    theta = json.take("rope_theta", None) or 1e6
    local_theta = json.take("rope_local_base_freq", None) or 10000.0
    return {
        "rope_theta": float(whole.get("rope_theta") or theta),
        "local_rope_theta": float(local.get("rope_theta") or local_theta),
        "rope": _read_scaling(json, "rope_parameters", whole or old),
    }


def _write_two_ropes(config: DecoderConfig) -> Values:
    scaling = _write_scaling(config.rope)
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    old = {} if config.rope.type == "default" else {"rope_scaling": scaling}
    return old | {
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.local_rope_theta,
        "rope_parameters": {
            FULL: scaling | {"rope_theta": config.rope_theta},
            SLIDING: local,
        },
    }


two_ropes = Part(_read_two_ropes, _write_two_ropes)


def _cap(name: str, ours: str) -> Part:
    return Part(
        lambda json: {ours: float(json.take(name) or 0.0)},
        lambda config: {name: getattr(config, ours) or None},
    )


def _read_query_scalar(json: Json) -> Values:
    scalar, head_dim = json.take("query_pre_attn_scalar"), json.take("head_dim")
    return {"query_scalar": 0 if scalar == head_dim else scalar}


query_scalar = Part(
    _read_query_scalar,
    lambda config: {"query_pre_attn_scalar": config.query_scalar or config.head_dim},
)
score_softcap = _cap("attn_logit_softcapping", "attention_softcap")
final_softcap = _cap("final_logit_softcapping", "final_softcap")
