"""The compiled loop of continuous batching.

A step decodes one token per slot, and reads pieces of prompts where that is due; then
the schedule gives slots and pages for the next one.

Shapes: F shards, B slots, N rows of the queue, W new tokens at most, T new tokens of a
step, R lanes of C tokens, X = R C, L layers, M pages, J pages of a slot at most,
D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from kdjax.config import DecoderConfig
from kdjax.models import decoder, paged_cache, rotary, sampling, slots
from kdjax.models.layers import transpose_kernels
from kdjax.models.paged_cache import Places
from kdjax.models.slots import Counters, Queue, Rows, Slots

ROW_AXES = ("data", "fsdp")  # of the mesh, over which shards are split
# Parameters that layers cast to the compute dtype where they use them.
_CAST = ("embedding", "weight", "kernel", "bias", "lora_a", "lora_b")


class State(NamedTuple):
    """What is on the devices between two calls of the loop, for all shards."""

    cache: paged_cache.Cache
    slots: Slots
    rows: Rows
    counters: Counters


class Commands(NamedTuple):
    """What the host wants of a call."""

    new: Bool[Array, "F N"]  # rows that are put into the queue
    stopped: Bool[Array, "F N"]  # rows that are over
    has_more: Bool[Array, "F"]  # the host has more rows than are in the queue
    max_steps: Int[Array, ""]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loop:
    """Sizes and settings of a compiled loop.

    `init` makes its state, `run` goes on from one.
    """

    shape: DecoderConfig
    graphdef: nnx.GraphDef
    eos_ids: tuple[int, ...]
    seed: int  # of sampling
    num_shards: int  # F
    num_slots: int  # B
    num_rows: int  # N
    prompt_length: int  # P
    max_new_tokens: int  # W
    num_pages: int  # M
    pages_per_slot: int  # J
    page_size: int
    dtype: str  # compute dtype
    cache_dtype: str
    unroll: bool  # layers apart, and written out in the program
    num_lanes: int  # R
    lane_length: int  # C
    draws: bool  # whether a row is sampled
    filters: bool  # and by top_k or top_p
    mesh: Mesh | None = None

    def place(self, x: Any, *axes: Any) -> Any:
        """Split the first axes of arrays over the mesh, as named; the rest is whole.

        The schedule is computed whole on every device, which takes no communication;
        the cache and what is computed of it are split over the shards.
        """
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))

    @property
    def signature(self) -> tuple[int, ...]:
        """What differs between the programs of one engine."""
        sizes = (self.prompt_length, self.max_new_tokens, self.num_pages)
        flags = (self.unroll, self.draws, self.filters)
        return (*sizes, self.pages_per_slot, *flags)

    def init(self) -> State:
        """Return a state without rows."""
        own = (
            slots.empty_slots(self.num_slots, self.num_pages, self.pages_per_slot),
            slots.empty_rows(self.num_rows, self.max_new_tokens),
            slots.zero_counters(),
        )
        own_F = jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (self.num_shards, *x.shape)), own
        )
        cache = paged_cache.init(
            self.shape,
            num_shards=self.num_shards,
            num_pages=self.num_pages,
            page_size=self.page_size,
            dtype=self.cache_dtype,
            unstack=self.unroll,
        )
        return State(cache, *own_F)

    def run(
        self, params: decoder.Params, state: State, queue: Queue, commands: Commands
    ) -> tuple[State, tuple[Rows, Counters]]:
        """Run steps until all rows are done, or the host is needed.

        Args:
          params: as `prepare` returns them.
          state: of the call before.
          queue: rows of all shards, [F, N].
          commands: of the host.

        Returns:
          The state, and the rows and counters for the host.
        """
        # XLA would compute them in the loop, again for every layer and head.
        positions_1P = jnp.arange(self.pages_per_slot * self.page_size)[None]
        table = rotary.angles(_merged(self.graphdef, params).ropes, positions_1P)
        inputs = _Inputs(params, queue, table)

        def goes_on(carry: tuple) -> Array:
            number, state = carry
            waiting_FN = state.rows.status == slots.WAITING
            is_alive = (state.slots.row >= 0).any() | waiting_FN.any()
            is_hungry_F = commands.has_more & ~waiting_FN.any(axis=1)
            return is_alive & ~is_hungry_F.any() & (number < commands.max_steps)

        def turn(carry: tuple) -> tuple:
            number, state = carry
            state = self._schedule(state, queue)
            reads_next = self._reads_next(state)
            for reads in (False, True):
                step = functools.partial(self._step, inputs, reads=reads)
                state = _do_if(reads_next == reads, step, state)
            return number + 1, state

        start = (jnp.int32(0), _obey(state, commands))
        _, state = jax.lax.while_loop(goes_on, turn, start)
        return state, (state.rows, state.counters)

    def _schedule(self, state: State, queue: Queue) -> State:
        """Give slots and pages for the next step."""
        own = functools.partial(slots.schedule, page_size=self.page_size)
        slots_F, rows_F, counters_F, copies = jax.vmap(own)(
            state.slots, state.rows, queue, state.counters
        )
        return State(self._copied(state.cache, copies), slots_F, rows_F, counters_F)

    def _copied(self, cache: paged_cache.Cache, copies: slots.Copies) -> Any:
        """Copy the pages of shared beginnings, if there are some."""
        source_FZ, target_FZ = (x.reshape(self.num_shards, -1) for x in copies)
        return _do_if(
            (target_FZ < self.num_pages).any(),
            lambda cache: paged_cache.copy_pages(cache, source_FZ, target_FZ),
            cache,
        )

    def _reads_next(self, state: State) -> Bool[Array, ""]:
        own = functools.partial(
            slots.reads_next, num_lanes=self.num_lanes, length=self.lane_length
        )
        return jax.vmap(own)(state.slots).any()

    def _step(self, inputs: "_Inputs", state: State, *, reads: bool) -> State:
        """Decode one token per slot and, if it `reads`, pieces of the prompts."""
        params, queue, angle_table = inputs
        cache, slots_F, rows_F, counters_F = state
        lanes, lane_pages = None, jnp.int32(0)
        if reads:
            own = functools.partial(
                slots.lanes_of, num_lanes=self.num_lanes, length=self.lane_length
            )
            lanes = jax.vmap(own)(slots_F, queue)
            # Of all shards: else each turn of the loop would ask the others.
            lane_pages = -(-(lanes.start + lanes.length).max() // self.page_size)
        new_tokens = functools.partial(_new_tokens, length=self.lane_length)
        new = jax.vmap(new_tokens)(slots_F, rows_F, queue, lanes)
        model = _merged(self.graphdef, params)
        # Where the tokens lie once the new ones are written.
        decodes_FB = jax.vmap(slots.decodes)(slots_F).astype(jnp.int32)
        places_F = slots_F.places._replace(cached=slots_F.places.cached + decodes_FB)
        token_FT, position_FT, places_F, lanes_F = self.place(
            (new.token, new.position, places_F, lanes), ROW_AXES
        )
        cells = functools.partial(
            _cells, page_size=self.page_size, num_pages=self.num_pages
        )
        cells_FT = self.place(jax.vmap(cells)(slots_F, new), ROW_AXES)
        hidden_FTD, cache = model.extend(
            token_FT,
            rotary.look_up(angle_table, position_FT),
            self._attend(places_F, lanes_F, lane_pages, cells_FT, model),
            params["layers"],
            cache,
        )
        last_FB = jax.vmap(_last_tokens, (0, 0, None))(slots_F, lanes, self.lane_length)
        hidden_FBD = jnp.take_along_axis(hidden_FTD, last_FB.token[..., None], axis=1)
        token_FB, log_prob_FB = self._choose(
            params, model, hidden_FBD, slots_F, rows_F, queue
        )
        advance = functools.partial(slots.advance, eos_ids=self.eos_ids)
        slots_F, rows_F, counters_F = jax.vmap(advance)(
            slots_F,
            rows_F,
            queue,
            counters_F,
            last_FB.emits,
            token_FB,
            log_prob_FB,
            last_FB.written,
        )
        waits = jax.vmap(functools.partial(slots.wait, reads=reads))
        return State(cache, waits(slots_F), rows_F, counters_F)

    def _attend(
        self,
        places_F: Places,
        lanes: paged_cache.Lanes | None,
        lane_pages: Int[Array, ""],
        cells_FT: tuple[Array, Array],
        model: Any,
    ) -> Any:
        """Make the attention of one layer's new tokens, which are written first."""
        num_slots, options = self.num_slots, model.score_options

        def attend(query_FTHK, key_FTGK, value_FTGK, cache, number, window):
            new = paged_cache.held(key_FTGK, value_FTGK, self.cache_dtype)
            cache = paged_cache.write(cache, number, new, *cells_FT)

            def of_shard(query, layer, places, lanes):
                mixed = paged_cache.attend_tokens(
                    query[:num_slots], layer, places, options, window
                )
                if lanes is None:
                    return mixed
                of_lanes = paged_cache.attend_lanes(
                    query[num_slots:],
                    layer,
                    places,
                    lanes,
                    lane_pages,
                    options,
                    window,
                )
                return jnp.concatenate([mixed, of_lanes])

            arrays = (query_FTHK, paged_cache.read(cache, number), places_F, lanes)
            if self.num_shards == 1:  # products on a CPU take twice as long with it
                mixed = of_shard(*jax.tree.map(lambda x: x[0], arrays))[None]
            else:
                mixed = jax.vmap(of_shard)(*arrays)
            return mixed.astype(query_FTHK.dtype), cache

        return attend

    def _choose(self, params, model, hidden_FBD, slots_F, rows_F, queue) -> tuple:
        """Choose a token per slot."""
        hidden_BD = hidden_FBD.reshape(-1, hidden_FBD.shape[-1])
        logits_VB = decoder.transposed_logits(
            params, hidden_BD, transform=model.logit_transform
        )
        row_FB = jnp.maximum(slots_F.row, 0)

        def of_rows(x_FN):
            return jnp.take_along_axis(x_FN, row_FB, axis=1).reshape(-1)

        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(self.seed), of_rows(queue.seeds)
        )
        token, log_prob = sampling.choose(
            logits_VB,
            keys,
            of_rows(rows_F.counts),
            jax.tree.map(of_rows, queue.settings),
            draws=self.draws,
            filters=self.filters,
        )
        return self.place((token.reshape(row_FB.shape), log_prob.reshape(row_FB.shape)))


def _do_if(condition: Array, function: Callable[[Any], Any], x: Any) -> Any:
    """Apply a function where a condition holds, in place.

    It is a loop of at most one turn: a conditional would copy the cache.
    """
    return jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(condition), function(carry[1])),
        (condition, x),
    )[1]


@functools.partial(jax.jit, static_argnames=("dtype", "unstack"))
def prepare(params: decoder.Params, *, dtype: str, unstack: bool) -> decoder.Params:
    """Cast the weights to the compute dtype once, and take the layers apart.

    Kernels are transposed (`layers.transpose_kernels`).

    Args:
      params: of the model.
      dtype: compute dtype.
      unstack: whether "layers" becomes a tuple, one tree per layer.
    """

    def cast(path: Any, x: Array) -> Array:
        x = x.astype(dtype) if path[-1].key in _CAST else x
        return x.mT if path[-1].key == "kernel" else x

    params = jax.tree_util.tree_map_with_path(cast, params)
    if unstack:
        num_layers = jax.tree.leaves(params["layers"])[0].shape[0]
        layers = [
            jax.tree.map(lambda x, n=n: x[n], params["layers"])
            for n in range(num_layers)
        ]
        params = params | {"layers": tuple(layers)}
    return params


class _Inputs(NamedTuple):
    """What all steps read."""

    params: decoder.Params
    queue: Queue
    angle_table: rotary.Angles  # of all positions that a slot may have


class _New(NamedTuple):
    """The new tokens of a step, of one shard: one per slot, then those of the lanes."""

    token: Int[Array, "T"]
    position: Int[Array, "T"]
    slot: Int[Array, "T"]
    valid: Bool[Array, "T"]


class _Last(NamedTuple):
    """What a step computes for each slot."""

    token: Int[Array, "B"]  # number of the token whose hidden state predicts the next
    emits: Bool[Array, "B"]  # whether there is one
    written: Int[Array, "B"]  # tokens that come into the cache


def _new_tokens(
    slots_B: Slots,
    rows: Rows,
    queue: Queue,
    lanes: paged_cache.Lanes | None,
    *,
    length: int,
) -> _New:
    decodes_B = slots.decodes(slots_B)
    new = _New(
        token=jnp.where(decodes_B, slots_B.token, 0),
        position=jnp.where(decodes_B, slots_B.places.cached, 0),
        slot=jnp.arange(decodes_B.shape[0], dtype=jnp.int32),
        valid=decodes_B,
    )
    if lanes is None:
        return new
    slot_X, position_X, valid_X = paged_cache.lane_tokens(lanes, length)
    position_RC = position_X.reshape(-1, length)
    token_X = slots.lane_inputs(lanes, slots_B, rows, queue, position_RC).reshape(-1)
    of_lanes = _New(jnp.where(valid_X, token_X, 0), position_X, slot_X, valid_X)
    return jax.tree.map(lambda *x: jnp.concatenate(x), new, of_lanes)


def _cells(
    slots_B: Slots, new: _New, *, page_size: int, num_pages: int
) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
    """Return the page and the cell in it of each new token; page M = nowhere."""
    table_BJ = slots_B.places.table
    slot_T = jnp.minimum(new.slot, table_BJ.shape[0] - 1)
    number_T = jnp.minimum(new.position // page_size, table_BJ.shape[1] - 1)
    page_T = jnp.where(new.valid, table_BJ[slot_T, number_T], num_pages)
    return page_T, new.position % page_size


def _last_tokens(slots_B: Slots, lanes: paged_cache.Lanes | None, length: int) -> _Last:
    num_slots = slots_B.row.shape[0]
    token_B = jnp.arange(num_slots, dtype=jnp.int32)
    decodes_B = slots.decodes(slots_B)
    if lanes is None:
        return _Last(token_B, decodes_B, decodes_B.astype(jnp.int32))
    num_lanes = lanes.slot.shape[0]
    ends_R = lanes.start + lanes.length
    known_R = jnp.minimum(lanes.slot, num_slots - 1)
    is_last_R = (lanes.slot < num_slots) & (ends_R == slots_B.target[known_R])
    slot_R = jnp.where(is_last_R, lanes.slot, num_slots)
    first_R = num_slots + jnp.arange(num_lanes, dtype=jnp.int32) * length
    read_B = jnp.zeros_like(token_B).at[lanes.slot].add(lanes.length, mode="drop")
    return _Last(
        token=token_B.at[slot_R].set(first_R + lanes.length - 1, mode="drop"),
        emits=decodes_B.at[slot_R].set(True, mode="drop"),
        written=read_B + decodes_B.astype(jnp.int32),
    )


def _merged(graphdef: nnx.GraphDef, params: decoder.Params) -> Any:
    """Return the model, as `prepare` changes it, whose own layers are not used."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        layers = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((len(layers), *x.shape), x.dtype), layers[0]
        )
    model = nnx.merge(graphdef, params | {"layers": layers})
    transpose_kernels(model)
    return model


def _obey(state: State, commands: Commands) -> State:
    """Put new rows into the queue, and free the slots of those that are stopped."""
    rows_F = state.rows
    status_FN = jnp.where(commands.stopped, slots.DONE, rows_F.status)
    rows_F = rows_F._replace(
        status=jnp.where(commands.new, slots.WAITING, status_FN),
        counts=jnp.where(commands.new, 0, rows_F.counts),
    )
    row_FB = state.slots.row
    gone_FB = jnp.take_along_axis(commands.stopped, jnp.maximum(row_FB, 0), axis=1)
    slots_F = jax.vmap(slots.release)(state.slots, gone_FB & (row_FB >= 0))
    return State(state.cache, slots_F, rows_F, state.counters)
