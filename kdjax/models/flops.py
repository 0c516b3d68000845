"""Number of parameters and floating-point operations of a model, and MFU.

Only matrix products are counted, a multiply-add as two operations; norms, rotary
positions, softmax and the optimizer are left out, as is usual for model FLOPs
utilisation (MFU). Recomputation (remat) is not useful work and is not counted.
"""

from kdjax.config import DecoderConfig, T5Config


def matmul_params(config: DecoderConfig | T5Config) -> int:
    """Count the weights that multiply every token: all but norms and the look-up.

    L (2 D H Dh + 2 D Hkv Dh + 3 D F) + V D: query and output, key and value, the
    three products of the gated MLP, and the head (tied or not, it is multiplied once).
    T5: of both stacks, whose numbers of tokens differ.
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
    """Count the weights of encoder layer, decoder layer, and cross keys and values.

    4 D H Dh + m D F, m = 3 with a gate, else 2. A decoder layer has 2 D H Dh more for
    queries and output of its cross-attention; keys and values multiply the encoder's
    tokens and are counted apart.
    """
    attention = 2 * config.width * config.num_heads * config.head_dim
    mlp = (3 if config.gated else 2) * config.width * config.mlp_width
    return 2 * attention + mlp, 3 * attention + mlp, attention


def params_count(config: DecoderConfig | T5Config) -> int:
    """Count all parameters: matmul weights, norm scales, biases, the look-up.

    A layer has 2 D scales, 4 D with post norms and 2 Dh more with those of queries and
    keys; one norm of D is last. A tied look-up is the head, which is counted already.
    T5: 2 D scales per encoder layer, 3 D per decoder layer, and per stack N buckets of
    H biases and a last norm.
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
    """Compute the FLOPs of one forward pass over rows of `row_length` tokens.

    2 (P - V D) num_tokens + 2 V D num_head_tokens + 4 L H Dh row_length num_tokens:
    P matmul weights; scores and weighted values each cost 2 H Dh per pair of
    positions. All row_length^2 pairs are counted: a causal or packed mask, or a
    window, saves a dense attention no products. T5 adds the same of its
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
    """Compute the FLOPs of a training step: three times the forward pass.

    Each product of the forward pass has two in the backward pass, one for the
    gradient of each operand. That of a weight that is not trained is never computed.

    Args:
      config: the model.
      num_frozen: weights that multiply every (decoder) token and are not trained,
        without the head.
      num_frozen_encoder: the same of the encoder's tokens.
      trains_head: whether the output weight is trained.
      **sizes: as in `forward_flops`.
    """
    head = 0 if trains_head else config.vocab_size * config.width
    skipped = num_frozen * sizes["num_tokens"] + head * sizes["num_head_tokens"]
    skipped += num_frozen_encoder * sizes.get("num_encoder_tokens", 0)
    return 3 * forward_flops(config, **sizes) - 2 * skipped


def mfu(
    flops_per_step: float,
    *,
    seconds_per_step: float,
    num_devices: int,
    peak: float | None,
) -> float | None:
    """Compute the model FLOPs utilisation: useful FLOP/s over the peak of all devices.

    flops_per_step / (seconds_per_step num_devices peak); None without a peak.

    Source: Chowdhery et al., 2022, arXiv 2204.02311, appendix B.
    """
    if peak is None:
        return None
    return flops_per_step / (seconds_per_step * num_devices * peak)
