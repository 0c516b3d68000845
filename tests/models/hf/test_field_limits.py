"""A config.json from a stranger: types and limits, before anything is made of it."""

import json
import time

import pytest

from kdjax.models import hf
from kdjax.models.hf import field_limits
from tests.golden.make_families import CASES, FOLDER
from tests.models.hf.published import PUBLISHED

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "tie_word_embeddings": False,
}
HUGE = int("9" * 4000)


def read(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    return hf.read_config(folder)


@pytest.mark.parametrize("base", [LLAMA, T5], ids=["llama", "t5"])
def test_the_base_is_read(tmp_path, base):
    assert read(tmp_path, base).vocab_size == 64


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        *((LLAMA, {"rope_theta": x}) for x in ("x", 0, -1, 1, True, [1e4], 1e300)),
        *((LLAMA, {"rms_norm_eps": x}) for x in (-1, "1e-5", 2, {})),
        *((LLAMA, {"max_position_embeddings": x}) for x in (0, -5, 2.5, 2**40)),
        *((LLAMA, {"num_hidden_layers": x}) for x in (10**8, 0, "2", 2.0, True, HUGE)),
        *((LLAMA, {"hidden_size": x}) for x in (0, -32, 2**30, None)),
        *((LLAMA, {"num_attention_heads": x}) for x in (0, "four", 2**20)),
        *((LLAMA, {"num_key_value_heads": x}) for x in (-1, [2])),
        *((LLAMA, {"vocab_size": x}) for x in (0, -1, 2**40, "64")),
        *((LLAMA, {"head_dim": x}) for x in (0, "8", -8)),
        *((LLAMA, {"model_type": x}) for x in (["llama"], {}, 3, None)),
        *((LLAMA, {"rope_scaling": x}) for x in ("linear", [1], 4)),
        *(
            (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": x}})
            for x in ("2", 0, -1, 1e9, None, True)
        ),
        (LLAMA, {"rope_scaling": {"rope_type": ["linear"], "factor": 2}}),
        (LLAMA, {"rope_parameters": {"rope_theta": "x", "rope_type": "default"}}),
        (LLAMA, {"tie_word_embeddings": "no"}),
        (LLAMA, {"attention_bias": 1}),
        (LLAMA, {"hidden_act": ["silu"]}),
        (LLAMA, {"initializer_range": -1}),
        *((T5, {"num_layers": x}) for x in (10**8, 0, "2")),
        *((T5, {"layer_norm_epsilon": x}) for x in (-1, "x")),
        *((T5, {"feed_forward_proj": x}) for x in (["relu"], 3, {})),
        *((T5, {"relative_attention_num_buckets": x}) for x in (0, 10**9)),
        (T5, {"dropout_rate": 1.0}),
        (T5, {"decoder_start_token_id": "0"}),
        (T5, {"eos_token_id": [1]}),
    ],
)
def test_what_no_model_has_is_refused_in_one_line(tmp_path, base, changes):
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"config\.json") as refusal:
        read(tmp_path, base | changes)
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 1000
    assert next(iter(changes)) in message
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("[]", "holds no object"),
        ('{"rope_theta": NaN}', "NaN is no number"),
        ('{"rms_norm_eps": Infinity}', "Infinity is no number"),
        ('{"vocab_size": 1, "vocab_size": 2}', "comes twice"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "no valid JSON"),
        ("\ufeff{}", "no valid JSON"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(tmp_path, text, reason):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json") as refusal:
        hf.read_config(tmp_path)
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


def test_published_configs_are_within_the_limits():
    for name, (raw, _) in PUBLISHED.items():
        field_limits.check(raw, name)
    for name in CASES:
        hf.read_config(FOLDER / name)
