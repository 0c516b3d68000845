"""Small random models of every family by transformers, and what they answer.

Makes tests/golden/families/<name>/ (config.json, model.safetensors, expected.json)
again, with torch and transformers installed:

    python -m tests.golden.make_families

The numbers change with torch's random numbers only; the tests read what is here.
"""

import json
import pathlib
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "families"
LENGTH = 40  # tokens a row: beyond every window and original length
POSITIONS = (0, 5, 8, 17, 39)  # whose logits are kept

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 8}
_LOCAL = ["sliding_attention"]
_GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "sliding_window": 8,
    "attention_bias": True,
    "final_logit_softcapping": 5.0,
}
# name -> model_type, fields of its config beside the sizes
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": (
        "llama",
        {"rope_parameters": _LLAMA3, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "llama_linear": (
        "llama",
        {"rope_parameters": _LINEAR, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 8}),
    "qwen2": (
        "qwen2",
        _WINDOWS | {"max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen2_yarn": ("qwen2", {"rope_parameters": _YARN}),
    "qwen3": (
        "qwen3",
        _WINDOWS
        | {
            "head_dim": 8,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    "smollm2": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "smollm3": (
        "smollm3",
        _WINDOWS | {"no_rope_layers": [1, 0, 1, 0], "mlp_bias": True},
    ),
    "gemma2": ("gemma2", _GEMMA | {"attn_logit_softcapping": 2.0}),
    "gemma3": (
        "gemma3_text",
        _GEMMA
        | {
            "layer_types": [*_LOCAL, *_LOCAL, "full_attention", *_LOCAL],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": _LINEAR,
            },
        },
    ),
}


def build(name: str) -> Any:
    """A model of transformers in which no parameter has its neutral value."""
    import torch
    import transformers

    model_type, fields = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **(_SIZES | fields))
    torch.manual_seed(sorted(CASES).index(name))
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # scales of norms, biases
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def tokens() -> np.ndarray:
    """Two rows of ids."""
    rng = np.random.default_rng(0)
    return rng.integers(0, _SIZES["vocab_size"], (2, LENGTH), dtype=np.int32)


def logits(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """The logits of a model of transformers."""
    import torch

    with torch.no_grad():
        ids = torch.tensor(tokens_BT, dtype=torch.long)
        return model(ids, use_cache=False).logits.numpy()


def main() -> None:
    """Writes the folders."""
    for name in CASES:
        folder = FOLDER / name
        build(name).bfloat16().save_pretrained(folder)
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", attn_implementation="eager"
        )
        (folder / "generation_config.json").unlink(missing_ok=True)
        found = logits(model, tokens())[:, POSITIONS]
        rounded = [[[round(float(x), 6) for x in p] for p in row] for row in found]
        (folder / "expected.json").write_text(json.dumps(rounded) + "\n")
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{name}: {size} bytes")


if __name__ == "__main__":
    main()
