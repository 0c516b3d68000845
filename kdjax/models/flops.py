"""Floating-point work of a model, and the rate of the device that does it.

Only matrix products are counted, a multiply-add as two operations; norms, rotary
positions, softmax and the optimizer are left out, as is usual for model FLOPs
utilisation (MFU). Recomputation (remat) is not useful work and is not counted.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kdjax.config import DecoderConfig, T5Config

# Dense peak, FLOP/s of one jax device, from the makers' data sheets (no sparsity).
# Keys are looked for in `device.device_kind`, lower case, first hit. TPU v4 and v5p
# chips are one device each. float32 is the rate of XLA's default float32 matmul
# (TF32 on NVIDIA GPUs, one bfloat16 pass on TPU).
_PEAK_FLOPS = {
    "tpu v6": {"bfloat16": 918e12, "float32": 918e12},
    "tpu v5p": {"bfloat16": 459e12, "float32": 459e12},
    "tpu v5 lite": {"bfloat16": 197e12, "float32": 197e12},
    "tpu v5e": {"bfloat16": 197e12, "float32": 197e12},
    "tpu v5": {"bfloat16": 459e12, "float32": 459e12},
    "tpu v4 lite": {"bfloat16": 138e12, "float32": 138e12},
    "tpu v4": {"bfloat16": 275e12, "float32": 275e12},
    "b200": {"bfloat16": 2250e12, "float32": 1125e12},
    "h200": {"bfloat16": 989e12, "float32": 494e12},
    "h100 pcie": {"bfloat16": 756e12, "float32": 378e12},
    "h100": {"bfloat16": 989e12, "float32": 494e12},
    "a100": {"bfloat16": 312e12, "float32": 156e12},
    "l40s": {"bfloat16": 362e12, "float32": 183e12},
    "l40": {"bfloat16": 181e12, "float32": 90e12},
    "l4": {"bfloat16": 121e12, "float32": 60e12},
    "v100": {"float32": 15.7e12},
    "t4": {"float32": 8.1e12},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """What bounds a step on one TPU chip."""

    peak: float  # bfloat16 FLOP/s
    hbm_bytes: float  # of main memory that a program gets
    hbm_rate: float  # bytes/s between it and the core
    ici_rate: float  # bytes/s sent over all links to neighbours together


# Source: the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of
# cloud.google.com/tpu/docs, "Key chip specifications"; "Interchip Interconnect BW" of
# 2400, 1600, 4800 and 3584 Gbps, one way, over 8. Of a capacity of 32, 16, 95 and 32 GB
# the compiler of libtpu 0.0.42 grants programs the bytes below.
_CHIPS = {
    "v4": Chip(peak=275e12, hbm_bytes=30.75 * 2**30, hbm_rate=1228e9, ici_rate=300e9),
    "v5e": Chip(peak=197e12, hbm_bytes=15.75 * 2**30, hbm_rate=819e9, ici_rate=200e9),
    "v5p": Chip(peak=459e12, hbm_bytes=95.74 * 2**30, hbm_rate=2765e9, ici_rate=600e9),
    "v6e": Chip(peak=918e12, hbm_bytes=31.25 * 2**30, hbm_rate=1640e9, ici_rate=448e9),
}


def chip(name: str) -> Chip:
    """A TPU generation, by the name that its topologies begin with.

    Raises:
      ValueError: it is not in the table.
    """
    if name not in _CHIPS:
        raise ValueError(f"chip {name!r} is unknown: use one of {list(_CHIPS)}")
    return _CHIPS[name]


def matmul_params(config: DecoderConfig | T5Config) -> int:
    """Number of weights that multiply every token: all but norms and the look-up.

    L (2 D H Dh + 2 D Hkv Dh + 3 D F) + V D: query and output, key and value, the
    three products of the gated MLP, and the head (tied or not, it is multiplied once).
    T5: both of its stacks, of whose tokens each has its own number.
    """
    head = config.vocab_size * config.width
    if isinstance(config, T5Config):
        per_encoder, per_decoder, per_memory = _t5_layers(config)
        of_decoder = config.num_decoder_layers * (per_decoder + per_memory)
        return config.num_encoder_layers * per_encoder + of_decoder + head
    attention = config.num_heads + config.num_kv_heads
    per_layer = (
        2 * config.width * attention * config.head_dim
        + 3 * config.width * config.mlp_width
    )
    return config.num_layers * per_layer + head


def _t5_layers(config: T5Config) -> tuple[int, int, int]:
    """Weights of a layer: the encoder's, the decoder's, its keys and values of memory.

    4 D H Dh + m D F, m = 3 with a gate, else 2; 2 D H Dh more for queries and output of
    the attention to the encoder's result, whose keys and values are of its tokens.
    """
    attention = 2 * config.width * config.num_heads * config.head_dim
    mlp = (3 if config.gated else 2) * config.width * config.mlp_width
    return 2 * attention + mlp, 3 * attention + mlp, attention


def params_count(config: DecoderConfig | T5Config) -> int:
    """Number of parameters: matmul weights, norm scales, biases, the look-up.

    A layer has 2 D scales, 4 D with post norms and 2 Dh more with those of queries and
    keys; one norm of D is last. A tied look-up is the head, which is counted already.
    T5: 2 D scales an encoder's layer, 3 D a decoder's, and H biases of N buckets and a
    last norm in both stacks.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.width
    width, head_dim = config.width, config.head_dim
    if isinstance(config, T5Config):
        scales = 2 * config.num_encoder_layers + 3 * config.num_decoder_layers + 2
        biases = 2 * config.num_buckets * config.num_heads
        return matmul_params(config) + scales * width + biases + lookup
    per_layer = 2 * width * (1 + config.post_norms) + 2 * head_dim * config.qk_norm
    if config.qkv_bias:
        per_layer += (config.num_heads + 2 * config.num_kv_heads) * head_dim
    if config.out_bias:
        per_layer += width
    if config.mlp_bias:
        per_layer += 2 * config.mlp_width + width
    return matmul_params(config) + config.num_layers * per_layer + width + lookup


def forward_flops(
    config: DecoderConfig | T5Config,
    *,
    num_tokens: int,
    row_length: int,
    num_head_tokens: int,
    num_encoder_tokens: int = 0,
    encoder_row_length: int = 0,
) -> int:
    """FLOPs of one forward pass over rows of `row_length` tokens.

    2 (P - V D) num_tokens + 2 V D num_head_tokens + 4 L H Dh row_length num_tokens:
    P matmul weights; scores and weighted values each cost 2 H Dh per pair of
    positions. All row_length^2 pairs are counted: a causal or packed mask, or a
    window, does not spare a dense attention its products. T5 adds the same of its
    encoder, and the decoder's attention to encoder_row_length positions.

    Args:
        config: the model.
        num_tokens: positions in the batch, padding included; with an encoder, the
            decoder's.
        row_length: positions of one row.
        num_head_tokens: positions that the head is applied to.
        num_encoder_tokens: positions of the encoder.
        encoder_row_length: positions of one of its rows.
    """
    head = 2 * config.vocab_size * config.width * num_head_tokens
    pair = 4 * config.num_heads * config.head_dim  # of positions, in one layer
    if isinstance(config, T5Config):
        per_encoder, per_decoder, per_memory = _t5_layers(config)
        num_layers = config.num_decoder_layers
        decoder = 2 * per_decoder + pair * (row_length + encoder_row_length)
        encoder = 2 * per_encoder + pair * encoder_row_length
        of_encoder = config.num_encoder_layers * encoder + num_layers * 2 * per_memory
        return (
            num_layers * decoder * num_tokens + of_encoder * num_encoder_tokens + head
        )
    body = 2 * (matmul_params(config) - config.vocab_size * config.width)
    body += config.num_layers * pair * row_length
    return body * num_tokens + head


def train_flops(
    config: DecoderConfig | T5Config,
    *,
    num_frozen: int = 0,
    num_frozen_encoder: int = 0,
    trains_head: bool = True,
    **sizes: int,
) -> int:
    """FLOPs of a training step: three times the forward pass.

    Each product of the forward pass has two in the backward pass, one for the
    gradient of each operand. That of a weight that is not trained is never computed.

    Args:
        config: the model.
        num_frozen: weights that multiply every token and are not trained, the head
            aside; of those that multiply the encoder's tokens the next.
        num_frozen_encoder: see there.
        trains_head: whether the output weight is trained.
        **sizes: as in `forward_flops`.
    """
    head = 0 if trains_head else config.vocab_size * config.width
    spared = num_frozen * sizes["num_tokens"] + head * sizes["num_head_tokens"]
    spared += num_frozen_encoder * sizes.get("num_encoder_tokens", 0)
    return 3 * forward_flops(config, **sizes) - 2 * spared


def peak_flops(device: jax.Device, dtype: str = "bfloat16") -> float | None:
    """Peak FLOP/s of one device: the data sheet's, or measured on a CPU.

    Args:
        device: of `jax.devices()`.
        dtype: of the operands, "float32" or "bfloat16".

    Returns:
        FLOP/s, or None for a device or dtype that is not in the table. On a CPU the
        float32 rate of all cores over the number of its (virtual) devices.
    """
    if device.platform == "cpu":
        return measured_cpu_flops() / jax.local_device_count("cpu")
    kind = device.device_kind.lower()
    for name, peaks in _PEAK_FLOPS.items():
        if name in kind:
            return peaks.get(dtype)
    return None


def measured_cpu_flops(*, size: int = 2048, num_trials: int = 3) -> float:
    """Best FLOP/s of a float32 matrix product on the CPU, over `num_trials`."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        matrix = jnp.ones((size, size), jnp.float32)
        product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
        product(matrix, matrix).block_until_ready()
        seconds = []
        for _ in range(num_trials):
            start = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def mfu(
    flops_per_step: float,
    *,
    seconds_per_step: float,
    num_devices: int,
    peak: float | None,
) -> float | None:
    """Model FLOPs utilisation: useful FLOP/s over the peak of all devices.

    flops_per_step / (seconds_per_step num_devices peak); None without a peak.

    Source: Chowdhery et al., 2022, arXiv 2204.02311, appendix B.
    """
    if peak is None:
        return None
    return flops_per_step / (seconds_per_step * num_devices * peak)
