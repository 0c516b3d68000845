"""Attention within the segments of packed rows, by the kernel that suits the devices.

    xla     any device: the queries of a row in up to four blocks, each of which has
            scores of the keys up to its end, [B, H, T / 4, S] float32
    splash  TPU: blocks of scores stay in vector memory; blocks above the diagonal are
            skipped; key heads are not repeated. Wants rows of a multiple of 128 tokens,
            a head_dim that is a multiple of 64 and heads that divide the tensor axis
    cudnn   NVIDIA GPUs of compute capability 8.0 and later: flash attention in bfloat16
            with causal skipping and a [B, 1, T, T] mask of segments (cuDNN has an
            interface of segment offsets, which JAX does not expose for shared key
            heads). Wants rows of an even length, a head_dim that is a multiple of 8 and
            at most 128, and heads that divide the tensor axis

A layer may see a window of the last tokens only, and cap its scores by tanh. xla and
splash do both; cudnn has windows, as part of the mask, but no cap. Layers of two sizes
of window (0, none, counts as one) run in one scan: splash has a kernel for each.

All give the same numbers up to rounding. The kernel is chosen once, when a model is
made; rows of a length that it does not support fall back to xla (`kernel_name`).
Decoding with a cache is always xla: its rows are one token long.

Shapes: B rows, T time, S key/value time, H query heads, G key/value heads, K per head.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kdjax.config import DecoderConfig

# (query, key, value) -> mixed values; `window=` where layers differ in theirs.
Attend = Callable[..., Array]

_ROW_MULTIPLE = {"xla": 1, "splash": 128, "cudnn": 2}
_BLOCKS = (512, 256, 128)  # tokens of a block of the splash kernel, the best first
_MAX_XLA_BLOCKS, _MIN_XLA_BLOCK = 4, 128  # blocks of queries, and tokens of one
_HEADS_SPEC = PartitionSpec(("data", "fsdp"), None, "tensor", None)
_ROWS_SPEC = PartitionSpec(("data", "fsdp"), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """An attention kernel, a static part of a model."""

    name: str = "xla"  # "xla", "splash" or "cudnn"
    mesh: Mesh | None = None  # (data, fsdp, tensor); needed by splash and cudnn
    interpret: bool = False  # run splash's kernel in Python, on any device: for tests


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreOptions:
    """Scale, softcap and windows of the scores, a static part of a model."""

    scalar: float = 0.0  # scores are divided by its root; 0 = head_dim
    softcap: float = 0.0  # scores stay within +-this; 0 = no cap
    windows: tuple[int, ...] = (0,)  # sizes that layers have, ascending; 0 = all tokens

    def scale(self, head_dim: int) -> float:
        """Return the factor of the products of queries and keys."""
        return (self.scalar or head_dim) ** -0.5


XLA = Kernel()
DEFAULT_OPTIONS = ScoreOptions()


def score_options(shape: DecoderConfig) -> ScoreOptions:
    """Return the score options of a model."""
    return ScoreOptions(
        scalar=shape.query_scalar,
        softcap=shape.attention_softcap,
        windows=tuple(sorted(set(shape.windows))) or (0,),
    )


def select_kernel(
    shape: DecoderConfig, mesh: Mesh, *, dtype: str, name: str = "auto"
) -> Kernel:
    """Select the attention kernel of a model on a mesh.

    Args:
      shape: of the model.
      mesh: devices, real or described.
      dtype: compute dtype.
      name: "auto" takes what the devices have, or "xla" where the model does not fit
        it; another name insists.

    Raises:
      ValueError: a name that is unknown, or a kernel that cannot run this model.
    """
    device = mesh.devices.flat[0]
    if name == "auto":
        name = {"tpu": "splash", "gpu": "cudnn"}.get(device.platform, "xla")
        if _unsupported_reason(name, shape, mesh, dtype):
            name = "xla"
    if name not in _ROW_MULTIPLE:
        known = ["auto", *_ROW_MULTIPLE]
        raise ValueError(f"attention={name!r} is unknown: use one of {known}")
    if reason := _unsupported_reason(name, shape, mesh, dtype):
        raise ValueError(f"attention={name!r}: {reason}: use attention='xla'")
    if name == "xla":
        return XLA
    return Kernel(name=name, mesh=mesh, interpret=device.platform == "cpu")


def kernel_name(kernel: Kernel, row_length: int) -> str:
    """Return the name of the kernel that runs on rows of `row_length` tokens."""
    return "xla" if row_length % _ROW_MULTIPLE[kernel.name] else kernel.name


def _unsupported_reason(name: str, shape: DecoderConfig, mesh: Mesh, dtype: str) -> str:
    """Return why a kernel cannot run a model, "" if it can."""
    if name == "xla" or name not in _ROW_MULTIPLE:
        return ""
    device, head_dim = mesh.devices.flat[0], shape.head_dim
    parts = mesh.shape["tensor"]
    if shape.num_heads % parts or shape.num_kv_heads % parts:
        return (
            f"num_heads={shape.num_heads}, num_kv_heads={shape.num_kv_heads} do not "
            f"divide over mesh.tensor={parts}"
        )
    if name == "splash":
        if device.platform not in ("tpu", "cpu"):
            return f"it runs on TPU, not on {device.platform}"
        if len(set(shape.windows)) > 2:
            return f"windows={shape.windows} are of more than two sizes"
        return f"head_dim={head_dim} is not a multiple of 64" if head_dim % 64 else ""
    if device.platform != "gpu" or not _has_flash(device):
        return "it runs on NVIDIA GPUs of compute capability 8.0 and later"
    if shape.attention_softcap:
        return f"attention_softcap={shape.attention_softcap} is not in its interface"
    if dtype != "bfloat16":
        return f"dtype={dtype} is not bfloat16"
    if head_dim % 8 or head_dim > 128:
        return f"head_dim={head_dim} is not a multiple of 8 up to 128"
    return ""


def _has_flash(device: jax.Device) -> bool:
    capability = str(getattr(device, "compute_capability", ""))
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8.0


def within_segments(
    kernel: Kernel,
    segments_BT: Int[Array, "B T"],
    options: ScoreOptions = DEFAULT_OPTIONS,
) -> Attend:
    """Make causal attention between tokens of one segment, padding (0) included.

    Args:
      kernel: from `select_kernel`.
      segments_BT: 0 for padding, 1, 2, ... for the examples packed in a row.
      options: of the scores. Distances in a row are distances in a segment.

    Returns:
      (query_BTHK, key_BTGK, value_BTGK) -> mixed_BTHK; with options of several windows
      it also takes the layer's, `window=`, an int32 scalar.
    """
    name = kernel_name(kernel, segments_BT.shape[1])
    if name == "xla":
        return _in_blocks(segments_BT, options)
    local = functools.partial(_splash, interpret=kernel.interpret)
    # The partitioner cannot look into a kernel: rows and heads are split by hand.
    mapped = jax.shard_map(
        functools.partial(local if name == "splash" else _cudnn, options=options),
        mesh=kernel.mesh,
        in_specs=(_HEADS_SPEC, _HEADS_SPEC, _HEADS_SPEC, _ROWS_SPEC, PartitionSpec()),
        out_specs=_HEADS_SPEC,
        check_vma=False,  # kernels do not say over which axes their results vary
    )

    def attend_by_kernel(query, key, value, window=None):
        return mapped(query, key, value, segments_BT, window)

    return attend_by_kernel


def _in_blocks(segments_BT: Int[Array, "B T"], options: ScoreOptions) -> Attend:
    """Make causal attention, by xla, without most of the scores above the diagonal.

    Every query has the same keys in the same product as in one block: four blocks of
    512 tokens halve its time on a CPU, forward and backward.
    """
    mask_BTT, distance_1TT = _causal(segments_BT)

    def attend_in_blocks(query, key, value, window=None):
        mixed = []
        for start, stop in xla_blocks(segments_BT.shape[1]):
            block = (slice(None), slice(start, stop), slice(stop))
            attend_block = masked(mask_BTT[block], distance_1TT[block], options)
            of_block = (query[:, start:stop], key[:, :stop], value[:, :stop])
            mixed.append(attend_block(*of_block, window))
        return jnp.concatenate(mixed, axis=1)

    return attend_in_blocks


def xla_blocks(row_length: int) -> list[tuple[int, int]]:
    """Return where the queries of each block of `xla` begin, and where its keys end."""
    size = max(-(-row_length // _MAX_XLA_BLOCKS), _MIN_XLA_BLOCK)
    starts = range(0, row_length, size)
    return [(start, min(start + size, row_length)) for start in starts]


def masked(
    mask_BTS: Bool[Array, "B T S"],
    distance_BTS: Int[Array, "B T S"],
    options: ScoreOptions,
) -> Attend:
    """Make attention, by xla, within a mask and the layer's window.

    Args:
      mask_BTS: whether a query may attend to a key, windows aside.
      distance_BTS: tokens from the key to the query.
      options: of the scores.

    Returns:
      As `within_segments`.
    """

    def attend_masked(query, key, value, window=None):
        mask = _windowed(mask_BTS, distance_BTS, options, window)
        return attend(query, key, value, mask[:, None], options)

    return attend_masked


def _windowed(
    mask_BTS, distance_BTS, options: ScoreOptions, window
) -> Bool[Array, "B T S"]:
    """Return the mask of a layer; `window` is given where layers differ in theirs."""
    if window is None and options.windows == (0,):
        return mask_BTS
    size = options.windows[0] if window is None else window
    return mask_BTS & _reaches(distance_BTS, size)


def attend(
    query_BTHK: Float[Array, "B T H K"],
    key_BSGK: Float[Array, "B S G K"],
    value_BSGK: Float[Array, "B S G K"],
    mask_B1TS: Bool[Array, "B 1 T S"],
    options: ScoreOptions = DEFAULT_OPTIONS,
    *,
    bias_BHTS: Float[Array, "#B H T S"] | None = None,
    drop: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T H K"]:
    """Apply softmax attention within a mask, the softmax in float32.

    Windows of `options` are not applied: they are part of the mask.

    The H / G query heads that share a key head become rows of one matrix product. On a
    CPU that halves the time of `jax.nn.dot_product_attention` with its gradient.

    Args:
      query_BTHK: H heads.
      key_BSGK: G heads, each shared by H / G of the query's.
      value_BSGK: as the keys.
      mask_B1TS: what each query may read. A query that may read nothing gets the mean
        of all values, which keeps padding finite.
      options: of the scores.
      bias_BHTS: added to the scaled products, in float32.
      drop: applied to the weights after the softmax.
    """
    num_rows, time, _, head_dim = query_BTHK.shape
    weights = _weights(query_BTHK, key_BSGK, mask_B1TS, options, bias_BHTS)
    _, groups, shared, _, _ = weights.shape
    weights = weights if drop is None else drop(weights)
    value = value_BSGK.transpose(0, 2, 1, 3)
    weights = weights.astype(value.dtype).reshape(num_rows, groups, shared * time, -1)
    mixed = jnp.einsum("bgts,bgsk->bgtk", weights, value)
    mixed = mixed.reshape(num_rows, groups, shared, time, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query_BTHK.shape)


def mean_weights(
    query_BTHK: Float[Array, "B T H K"],
    key_BTGK: Float[Array, "B T G K"],
    segments_BT: Int[Array, "B T"],
    options: ScoreOptions = DEFAULT_OPTIONS,
    window: Int[Array, ""] | None = None,
) -> Float[Array, "B T T"]:
    """Compute the weights of `within_segments`, averaged over the heads.

    The backward pass computes the heads' weights again instead of keeping them.
    """
    mask_BTT = _windowed(*_causal(segments_BT), options, window)

    def mean(query_BTHK: Array, key_BTGK: Array) -> Array:
        weights = _weights(query_BTHK, key_BTGK, mask_BTT[:, None], options)
        return weights.mean((1, 2))

    return jax.checkpoint(mean, prevent_cse=False)(query_BTHK, key_BTGK)


def _weights(
    query_BTHK: Array,
    key_BSGK: Array,
    mask_B1TS: Array,
    options: ScoreOptions,
    bias_BHTS: Array | None = None,
) -> Array:
    """Compute the masked softmax of the scores, float32 [B, G, H / G, T, S]."""
    num_rows, time, num_heads, head_dim = query_BTHK.shape
    groups = key_BSGK.shape[2]
    shared = num_heads // groups
    query = query_BTHK.reshape(num_rows, time, groups, shared, head_dim)
    query = query.transpose(0, 2, 3, 1, 4).reshape(num_rows, groups, -1, head_dim)
    scores = jnp.einsum(
        "bgtk,bgsk->bgts",
        query,
        key_BSGK.transpose(0, 2, 1, 3),
        preferred_element_type=jnp.float32,
    )
    scores = scores * options.scale(head_dim)
    if options.softcap:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    scores = scores.reshape(num_rows, groups, shared, time, -1)
    if bias_BHTS is not None:
        scores += bias_BHTS.reshape(-1, *scores.shape[1:])
    lowest = jnp.finfo(jnp.float32).min
    return jax.nn.softmax(jnp.where(mask_B1TS[:, :, None], scores, lowest), axis=-1)


def _causal(
    segments_BT: Int[Array, "B T"],
) -> tuple[Bool[Array, "B T T"], Int[Array, "1 T T"]]:
    """Return the causal mask of packed rows, and the tokens from key to query."""
    distance_1TS = _distances(segments_BT.shape[1])[None]
    return _same(segments_BT) & (distance_1TS >= 0), distance_1TS


def _same(segments_BT: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    return segments_BT[:, :, None] == segments_BT[:, None, :]


def _distances(length: int) -> Int[Array, "T T"]:
    time = jnp.arange(length)
    return time[:, None] - time[None, :]


def _reaches(distance: Int[Array, "..."], window: Array | int) -> Bool[Array, "..."]:
    return (distance < window) | (window == 0)


def _splash(
    query_BTHK,
    key_BTGK,
    value_BTGK,
    segments_BT,
    window,
    *,
    options: ScoreOptions,
    interpret,
) -> Array:
    """Run splash attention: blocks of scores in vector memory, key heads shared.

    Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
    """
    # Imported where it runs: the kernel's modules need what only TPU users install.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, num_heads, head_dim = query_BTHK.shape[1:]
    block = next(b for b in _BLOCKS if length % b == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def mix(size, query, key, value, segments_BT):
        mask = splash.CausalMask((length, length))
        if size:
            mask = splash.LocalMask((length, length), (size - 1, 0), 0)
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * num_heads),
            block_sizes=sizes,
            attn_logits_soft_cap=options.softcap or None,
            interpret=interpret,
        )
        return jax.vmap(
            lambda query, key, value, ids: kernel(
                query, key, value, segment_ids=splash.SegmentIds(ids, ids)
            )
        )(query, key, value, segments_BT)

    # The kernel takes scaled queries; the factor is exact only in float32.
    scaled = query_BTHK.astype(jnp.float32) * options.scale(head_dim)
    arrays = (
        *(
            x.transpose(0, 2, 1, 3)
            for x in (scaled.astype(query_BTHK.dtype), key_BTGK, value_BTGK)
        ),
        segments_BT,
    )
    kernels = [functools.partial(mix, size) for size in options.windows]
    if window is None:
        mixed_BHTK = kernels[0](*arrays)
    else:  # masks are static: a kernel for each of the two sizes
        mixed_BHTK = jax.lax.cond(window == options.windows[0], *kernels, *arrays)
    return mixed_BHTK.transpose(0, 2, 1, 3)


def _cudnn(
    query_BTHK, key_BTGK, value_BTGK, segments_BT, window, *, options: ScoreOptions
) -> Array:
    """Run cuDNN's flash attention; the blocks above the diagonal are skipped.

    A window is part of the mask, which there is anyway; its blocks are not skipped.
    """
    distance_1TT = _distances(segments_BT.shape[1])[None]
    mask_BTT = _windowed(_same(segments_BT), distance_1TT, options, window)
    return jax.nn.dot_product_attention(
        query_BTHK,
        key_BTGK,
        value_BTGK,
        mask=mask_BTT[:, None],
        scale=options.scale(query_BTHK.shape[-1]),
        is_causal=True,
        implementation="cudnn",
    )
