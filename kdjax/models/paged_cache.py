"""A key/value cache in pages, shared by the slots of a decoding batch.

The cache of a shard is a pool of M pages of S tokens. A page belongs to one slot, and
is its `index`-th; so memory follows what is alive in all slots together, whatever the
lengths of single rows. The pages of one token are read where they lie: every page is
multiplied with the queries of the slot that owns it, and the softmax is put together
from those of the pages,

    p_s = exp(z_s - m) / sum, m = max over pages of m_page,
    mixed = sum over pages of exp(m_page - m) * mixed_page / sum.

Keys and values are held in the compute dtype, in bfloat16, or as int8 with a float32
scale max |x| / 127 per token and head. Those of new tokens are written first, and read
as all others: what comes out does not depend, up to rounding, on how prompts are cut.

Shapes: F shards, B slots, M pages, S tokens per page, J pages of a slot at most, T new
tokens, R lanes, C tokens per lane, X = R C, L layers, H query heads, G key/value heads,
U = H / G, K per head. Functions take one shard's arrays, without F, unless they say so.

Source: Kwon et al., 2023, arXiv 2309.06180, section 4 (pages); Dao et al., 2022, arXiv
2205.14135, section 3.1 (the softmax in parts).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.config import DecoderConfig
from kdjax.models.attention import ScoreOptions

Layer = dict[str, Array]
Cache = Layer | tuple[Layer, ...]  # layers on axis 1, after the shards, or apart
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Places(NamedTuple):
    """Where the tokens of a shard's slots lie."""

    table: Int[Array, "B J"]  # pages of each slot, in order; M beyond the last
    owner: Int[Array, "M"]  # slot of each page; -1 = free
    number: Int[Array, "M"]  # of the page among its slot's
    cached: Int[Array, "B"]  # tokens of each slot that are in the cache, from 0 on


class Lanes(NamedTuple):
    """Pieces of prompts that a step reads, of one shard; lanes of a slot adjoin."""

    slot: Int[Array, "R"]  # B = an unused lane
    start: Int[Array, "R"]  # position of its first token
    length: Int[Array, "R"]  # tokens in use, of C


def init(
    shape: DecoderConfig,
    *,
    num_shards: int,
    num_pages: int,
    page_size: int,
    dtype: str,
    unstack: bool = False,
) -> Cache:
    """Return a zeroed cache: keys [F, M, G, K, S] and values [F, M, G, S, K] of layers.

    Args:
      shape: of the model.
      num_shards: F.
      num_pages: M.
      page_size: S.
      dtype: "float32", "bfloat16" or "int8", which adds scales [F, M, G, S].
      unstack: a tuple of layers instead of arrays with the layers on axis 1.
    """
    pages = (num_shards, num_pages, shape.num_kv_heads)

    def layer() -> Layer:
        cache = {
            "key": jnp.zeros((*pages, shape.head_dim, page_size), dtype),
            "value": jnp.zeros((*pages, page_size, shape.head_dim), dtype),
        }
        if dtype == "int8":
            for name in ("key_scale", "value_scale"):
                cache[name] = jnp.zeros((*pages, page_size), jnp.float32)
        return cache

    if unstack:
        return tuple(layer() for _ in range(shape.num_layers))
    return jax.tree.map(lambda x: jnp.stack([x] * shape.num_layers, 1), layer())


def num_bytes(shape: DecoderConfig, dtype: str) -> int:
    """Return the bytes of the keys and values of one token."""
    heads = 2 * shape.num_layers * shape.num_kv_heads
    scale = 4 if dtype == "int8" else 0
    return heads * (shape.head_dim * jnp.dtype(dtype).itemsize + scale)


def held(key: Float[Array, "... K"], value: Float[Array, "... K"], dtype: str) -> Layer:
    """Return keys and values of new tokens as a layer of the cache holds them."""
    layer = {"key": key, "value": value}
    if dtype != "int8":
        return {name: x.astype(dtype) for name, x in layer.items()}
    for name, x in list(layer.items()):
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=-1) / 127
        data = x / jnp.where(scale > 0, scale, 1.0)[..., None]
        layer[name] = jnp.round(data).astype(jnp.int8)
        layer[f"{name}_scale"] = scale
    return layer


def write(
    cache: Cache,
    number: Any,
    new: Layer,
    page_FT: Int[Array, "F T"],
    offset_FT: Int[Array, "F T"],
) -> Cache:
    """Write new tokens of a layer into their cells.

    Args:
      cache: of all shards and layers.
      number: of the layer; an int where the layers are apart.
      new: as they are `held`, [F, T, G, ...].
      page_FT: page of each token; M = nowhere.
      offset_FT: its cell in the page.
    """

    def of_shard(
        layer: Layer, new: Layer, page_T: Array, offset_T: Array, *first: Any
    ) -> Layer:
        written = {}
        for name, x in layer.items():
            inside = (slice(None),) * (2 if name == "key" else 1)
            # A CPU would convert a whole array of bfloat16 to float32 and back.
            cells = _as_integers(x).at[(*first, page_T, *inside, offset_T)]
            bits = cells.set(_as_integers(new[name]), mode="drop")
            written[name] = jax.lax.bitcast_convert_type(bits, x.dtype)
        return written

    if isinstance(cache, tuple):
        layer = jax.vmap(of_shard)(cache[number], new, page_FT, offset_FT)
        return (*cache[:number], layer, *cache[number + 1 :])
    of_shards = jax.vmap(of_shard, (0, 0, 0, 0, None))
    return of_shards(cache, new, page_FT, offset_FT, number)


def read(cache: Cache, number: Any) -> Layer:
    """Return a layer of a cache, of all shards."""
    if isinstance(cache, tuple):
        return cache[number]
    return {name: x[:, number] for name, x in cache.items()}


def _as_integers(x: Array) -> Array:
    """Return the bits of bfloat16 numbers as integers; others as they are."""
    return x.view(jnp.uint16) if x.dtype == jnp.bfloat16 else x


def copy_pages(
    cache: Cache, source_FZ: Int[Array, "F Z"], target_FZ: Int[Array, "F Z"]
) -> Cache:
    """Copy pages of each shard; a target of M copies nothing."""
    layers = () if isinstance(cache, tuple) else (slice(None),)

    def of_shard(x: Array, source_Z: Array, target_Z: Array) -> Array:
        return x.at[(*layers, target_Z)].set(x[(*layers, source_Z)], mode="drop")

    return jax.tree.map(lambda x: jax.vmap(of_shard)(x, source_FZ, target_FZ), cache)


def attend_tokens(
    query_BHK: Float[Array, "B H K"],
    layer: Layer,
    places: Places,
    options: ScoreOptions,
    window: Int[Array, ""],
) -> Float[Array, "B H K"]:
    """Mix values for the last cached token of each slot, page by page.

    Args:
      query_BHK: of these tokens; without meaning where a slot has none.
      layer: of the cache, one layer of one shard.
      places: of the slots' tokens.
      options: of the scores.
      window: tokens that the layer sees, 0 = all.

    Returns:
      Mixed values, float32.
    """
    groups, page_size, head_dim = layer["value"].shape[1:]
    query_BGUK = _by_group(query_BHK, groups)
    owner_M = jnp.maximum(places.owner, 0)
    first_M = places.number * page_size
    position_MS = first_M[:, None] + jnp.arange(page_size, dtype=jnp.int32)[None]
    cached_M1 = places.cached[owner_M][:, None]
    mask_MS = (places.owner >= 0)[:, None] & (position_MS < cached_M1)
    mask_MS &= (cached_M1 - 1 - position_MS < window) | (window == 0)
    scores_MGUS = _products(query_BGUK[owner_M], layer["key"])
    if "key_scale" in layer:
        scores_MGUS *= layer["key_scale"][:, :, None]
    scores_MGUS = _scaled(scores_MGUS, options, head_dim)
    mask_MGUS = mask_MS[:, None, None]
    max_MGU, weights_MGUS = _weights(scores_MGUS, mask_MGUS)
    sum_MGU = weights_MGUS.sum(-1)
    if "value_scale" in layer:
        weights_MGUS *= layer["value_scale"][:, :, None]
    mixed_MGUK = _products(weights_MGUS, layer["value"])
    # The pages of each slot.
    num_pages = places.table.shape[1]
    first_J = jnp.arange(num_pages, dtype=jnp.int32) * page_size
    used_BJ = first_J[None] < places.cached[:, None]
    table_BJ = jnp.where(used_BJ, places.table, 0)
    max_BJGU = jnp.where(used_BJ[..., None, None], max_MGU[table_BJ], _LOWEST)
    share_BJGU = jnp.exp(max_BJGU - max_BJGU.max(1, keepdims=True))
    share_BJGU = jnp.where(used_BJ[..., None, None], share_BJGU, 0.0)
    total_BGU = (share_BJGU * sum_MGU[table_BJ]).sum(1)
    mixed_BGUK = (share_BJGU[..., None] * mixed_MGUK[table_BJ]).sum(1)
    return _normalised(mixed_BGUK, total_BGU).reshape(query_BHK.shape)


def attend_lanes(
    query_XHK: Float[Array, "X H K"],
    layer: Layer,
    places: Places,
    lanes: Lanes,
    num_pages: Int[Array, ""],
    options: ScoreOptions,
    window: Int[Array, ""],
) -> Float[Array, "X H K"]:
    """Mix values for the tokens of prompts that a step reads, page after page.

    Args:
      query_XHK: of the lanes' tokens.
      layer: of the cache, one layer of one shard.
      places: of the slots' tokens.
      lanes: of the step.
      num_pages: of a slot's, that hold the tokens up to those of the lanes.
      options: of the scores.
      window: tokens that the layer sees, 0 = all.

    Returns:
      Mixed values, float32.
    """
    groups, page_size, head_dim = layer["value"].shape[1:]
    num_slots, num_lanes = places.table.shape[0], lanes.slot.shape[0]
    length = query_XHK.shape[0] // num_lanes
    query_RCGUK = _by_group(query_XHK, groups).reshape(
        num_lanes, length, groups, -1, head_dim
    )
    query_RGAK = query_RCGUK.transpose(0, 2, 3, 1, 4).reshape(
        num_lanes, groups, -1, head_dim
    )
    _, position_X, _ = lane_tokens(lanes, length)
    # Positions of the A = U C queries of a group.
    position_RA = jnp.tile(
        position_X.reshape(num_lanes, length), (1, query_RCGUK.shape[3])
    )
    table_RJ = places.table[jnp.minimum(lanes.slot, num_slots - 1)]

    def add(number: Array, part: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        """Add a page of each lane's slot to the parts of the softmax."""
        max_RGA, total_RGA, mixed_RGAK = part
        page_R = jnp.minimum(table_RJ[:, number], layer["key"].shape[0] - 1)
        page = {name: x[page_R] for name, x in layer.items()}
        scores_RGAS = _products(query_RGAK, page["key"])
        if "key_scale" in page:
            scores_RGAS *= page["key_scale"][:, :, None]
        scores_RGAS = _scaled(scores_RGAS, options, head_dim)
        position_S = number * page_size + jnp.arange(page_size, dtype=jnp.int32)
        distance_RAS = position_RA[..., None] - position_S[None, None]
        mask_RAS = (distance_RAS >= 0) & ((distance_RAS < window) | (window == 0))
        own_max_RGA, weights_RGAS = _weights(scores_RGAS, mask_RAS[:, None])
        new_max_RGA = jnp.maximum(max_RGA, own_max_RGA)
        share_RGA, own_share_RGA = (
            jnp.exp(x - new_max_RGA) for x in (max_RGA, own_max_RGA)
        )
        total_RGA = share_RGA * total_RGA + own_share_RGA * weights_RGAS.sum(-1)
        if "value_scale" in page:
            weights_RGAS *= page["value_scale"][:, :, None]
        own_RGAK = _products(weights_RGAS, page["value"])
        mixed_RGAK = (
            share_RGA[..., None] * mixed_RGAK + own_share_RGA[..., None] * own_RGAK
        )
        return new_max_RGA, total_RGA, mixed_RGAK

    nothing_RGA = jnp.zeros(query_RGAK.shape[:-1], jnp.float32)
    part = (nothing_RGA + _LOWEST, nothing_RGA, jnp.zeros_like(query_RGAK))
    _, total_RGA, mixed_RGAK = jax.lax.fori_loop(0, num_pages, add, part)
    mixed_RGAK = _normalised(mixed_RGAK, total_RGA)
    mixed_RGUCK = mixed_RGAK.reshape(num_lanes, groups, -1, length, head_dim)
    return mixed_RGUCK.transpose(0, 3, 1, 2, 4).reshape(query_XHK.shape)


def lane_tokens(lanes: Lanes, length: int) -> tuple[Array, Array, Array]:
    """Return slot, position and use of the X tokens of lanes of C = `length`."""
    column_C = jnp.arange(length, dtype=jnp.int32)
    shape_RC = (lanes.slot.shape[0], length)
    slot_RC = jnp.broadcast_to(lanes.slot[:, None], shape_RC)
    position_RC = lanes.start[:, None] + column_C[None]
    valid_RC = column_C[None] < lanes.length[:, None]
    return slot_RC.reshape(-1), position_RC.reshape(-1), valid_RC.reshape(-1)


def _by_group(query_THK: Array, groups: int) -> Float[Array, "T G U K"]:
    num_tokens, heads, head_dim = query_THK.shape
    shape = (num_tokens, groups, heads // groups, head_dim)
    return query_THK.astype(jnp.float32).reshape(shape)


def _products(left_MGUA: Array, held_MGAB: Array) -> Float[Array, "M G U B"]:
    """Multiply the few rows of each page with the page's keys or values.

    Float32 pages are multiplied as they are, others in bfloat16 (int8 fits into it).
    """
    dtype = jnp.float32 if held_MGAB.dtype == jnp.float32 else jnp.bfloat16
    return jnp.einsum(
        "mgua,mgab->mgub",
        left_MGUA.astype(dtype),
        held_MGAB.astype(dtype),
        preferred_element_type=jnp.float32,
    )


def _scaled(products: Array, options: ScoreOptions, head_dim: int) -> Array:
    scores = products * options.scale(head_dim)
    if options.softcap:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    return scores


def _weights(scores: Array, mask: Array) -> tuple[Array, Array]:
    """Return the greatest score within a mask, and exp(score - it), 0 outside."""
    scores = jnp.where(mask, scores, _LOWEST)
    highest = scores.max(-1)
    return highest, jnp.where(mask, jnp.exp(scores - highest[..., None]), 0.0)


def _normalised(
    mixed: Float[Array, "... K"], total: Float[Array, "..."]
) -> Float[Array, "... K"]:
    """Divide by the sum of the weights, where there are some."""
    return mixed / jnp.where(total > 0, total, 1.0)[..., None]
