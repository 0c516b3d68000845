"""Continuous batching: rows decoded in slots that are refilled as they end.

One compiled loop (`decode_loop`) takes rows from a queue, reads their prompts in pieces
beside the decoding of others, and gives the slot of a finished row to the next one. The
host puts rows into the queue, takes finished ones out, and looks for stop strings. What
a row becomes follows from its prompt, its settings and its seed, not from slots, order
or mesh, up to rounding.

`slots` has the schedule, `paged_cache` the memory and the attention.

Shapes: F shards (data x fsdp), B slots per shard, N rows of a shard's queue, P prompt
time, W new tokens at most, M pages per shard.

Source: Yu et al., 2022, Orca, OSDI, section 3 (slots refilled at every step); Agrawal
et al., 2024, arXiv 2403.02310, section 4 (prompts in pieces beside decoding).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.config import DecoderConfig
from kdjax.models import decode_loop, decoder, paged_cache, slots
from kdjax.models.decode_loop import ROW_AXES, Commands, Loop, State
from kdjax.models.layers import MAX_UNROLLED_LAYERS
from kdjax.models.sampling import Settings
from kdjax.models.slots import Queue

_STEPS, _STEPS_TO_STOP = 256, 8  # between looks of the host; with stop strings
_STEPS_TO_UNROLL = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt, and how it is to be continued."""

    prompt: Sequence[int]
    max_new_tokens: int
    seed: int = 0  # below 2^32; its draws follow from it
    temperature: float = 0.0  # 0 = the most probable token, else sampling
    top_k: int = 0  # sample among the k most probable tokens; 0 = all
    top_p: float = 1.0  # among the fewest tokens of at least this probability; 1 = all
    stop: tuple[str, ...] = ()  # a text ends as soon as it has one of these


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """What follows a prompt."""

    tokens: list[int]  # with the end token, if there is one
    log_probs: list[float]  # of each under the model, at temperature 1; nats
    finish_reason: str  # "end" (an end token), "stop" (a stop string) or "length"

    @property
    def text_tokens(self) -> list[int]:
        """The tokens without the end token."""
        return self.tokens[:-1] if self.finish_reason == "end" else self.tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """Sizes of the slots, the cache and the pieces of prompts."""

    num_slots: int = 16  # of all shards together
    cache_dtype: str = "compute"  # that of the model, or "float32", "bfloat16", "int8"
    cache_tokens: int = 0  # of all shards together; 0 = as many as the slots may need
    page_size: int = 64  # tokens
    num_lanes: int = 8  # pieces of prompts that a shard reads in a step
    lane_length: int = 16  # tokens of a piece


@dataclass(kw_only=True, slots=True)
class Statistics:
    """What the steps of a call did."""

    steps: int = 0
    mixed: int = 0  # steps that also read prompts, of the shard that did most
    tokens: int = 0  # new ones
    read: int = 0  # tokens of prompts that were computed
    copied: int = 0  # and copied
    preempted: int = 0  # times that a row gave up its slot
    slot_steps: int = 0  # steps times slots

    @property
    def useful_share(self) -> float:
        """Share of the slots' steps that gave a token."""
        return self.tokens / max(1, self.slot_steps)


class Engine:
    """Continues prompts by a model that only decodes.

    Args:
      shape: of the model.
      graphdef: from `lm.create`.
      eos_ids: each of them ends a row.
      batching: sizes.
      seed: of sampling, beside each row's own.
      mesh: rows are split over its (data, fsdp), heads over its tensor axis, if they
        divide; None = one device.
      decode_text: text of tokens, for stop strings.

    Attributes:
      compiled: one program per sizes of prompts, new tokens and pages.
      statistics: of the last call.
    """

    def __init__(
        self,
        shape: DecoderConfig,
        graphdef: nnx.GraphDef,
        *,
        eos_ids: tuple[int, ...],
        batching: Batching | None = None,
        seed: int = 0,
        mesh: Mesh | None = None,
        decode_text: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.batching = Batching() if batching is None else batching
        self._shape, self._graphdef, self._eos_ids = shape, graphdef, tuple(eos_ids)
        self._seed, self._mesh, self.decode_text = seed, mesh, decode_text
        self.num_shards = 1
        if mesh is not None:
            self.num_shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.num_slots = -(-self.batching.num_slots // self.num_shards)
        self.num_rows = 2 * self.num_slots
        self.compiled: dict[tuple[int, ...], Any] = {}
        self.statistics = Statistics()

    def __call__(
        self,
        params: decoder.Params,
        requests: Sequence[Request],
        *,
        on_finish: Callable[[int, Continuation], None] | None = None,
    ) -> list[Continuation]:
        """Continue prompts.

        Args:
          params: of the model.
          requests: what to continue.
          on_finish: called with the number of each request and what follows it, as soon
            as that is known.

        Raises:
          ValueError: an empty prompt, or one too long for the model; a setting out of
            range; a cache too small for one row.
        """
        self.statistics = Statistics()
        if not requests:
            return []
        for index, request in enumerate(requests):
            self._check(index, request)
        loop = self.loop(params, requests)
        host = _Host(self, loop, requests)
        params = decode_loop.prepare(params, dtype=loop.dtype, unstack=loop.unroll)
        state, run, orders = self._start(loop, params, host)
        while True:
            state, report = run(params, state, *orders)
            rows, counters = report
            host.take(rows, counters, on_finish)
            if not host.is_busy:
                break
            orders = host.orders()
        self.statistics = host.statistics()
        return host.continuations

    def loop(self, params: decoder.Params, requests: Sequence[Request]) -> Loop:
        """Return the settings of the program for requests, of which there are few."""
        model = nnx.merge(self._graphdef, params)
        batching, limit = self.batching, self._shape.max_length
        size = batching.page_size
        pages = sorted(
            (-(-(len(r.prompt) + r.max_new_tokens) // size) for r in requests),
            reverse=True,
        )
        num_pages = few_sizes(sum(pages[: self.num_slots]))
        if batching.cache_tokens:
            allowed = batching.cache_tokens // (size * self.num_shards)
            if allowed < pages[0]:
                raise ValueError(
                    f"cache_tokens={batching.cache_tokens}: the longest row may take "
                    f"{pages[0] * size} of them on each of {self.num_shards} shards: "
                    f"use at least {pages[0] * size * self.num_shards}"
                )
            num_pages = min(num_pages, allowed)
        longest = max(len(request.prompt) for request in requests)
        most = max(request.max_new_tokens for request in requests)
        return Loop(
            shape=self._shape,
            graphdef=self._graphdef,
            eos_ids=self._eos_ids,
            seed=self._seed,
            num_shards=self.num_shards,
            num_slots=self.num_slots,
            num_rows=self.num_rows,
            prompt_length=min(few_sizes(longest, 16), limit),
            max_new_tokens=min(few_sizes(most, 16), limit),
            num_pages=num_pages,
            pages_per_slot=min(few_sizes(pages[0]), num_pages),
            page_size=size,
            dtype=model.dtype,
            cache_dtype=model.dtype
            if batching.cache_dtype == "compute"
            else batching.cache_dtype,
            unroll=model.unroll and self._unrolls(requests),
            num_lanes=batching.num_lanes,
            lane_length=batching.lane_length,
            draws=any(r.temperature > 0 for r in requests),
            filters=any(r.top_k or r.top_p < 1 for r in requests),
            mesh=self._mesh,
        )

    def _unrolls(self, requests: Sequence[Request]) -> bool:
        """Return whether writing out the layers is worth the time to compile.

        On a CPU it is, from a few layers or some hundreds of steps on: a loop over
        layers copies the weights of each out of their stack, in every step.
        """
        num_tokens = sum(request.max_new_tokens for request in requests)
        num_steps = num_tokens // (self.num_slots * self.num_shards)
        few = self._shape.num_layers <= MAX_UNROLLED_LAYERS
        return few or num_steps >= _STEPS_TO_UNROLL

    def cache_bytes(self, loop: Loop) -> int:
        """Return the bytes of the keys and values of all shards."""
        num_tokens = loop.num_shards * loop.num_pages * loop.page_size
        return num_tokens * paged_cache.num_bytes(self._shape, loop.cache_dtype)

    def place(self, x: Any) -> Any:
        """Put an array on every device."""
        if self._mesh is None:
            return x
        return jax.device_put(x, NamedSharding(self._mesh, P()))

    def _check(self, index: int, request: Request) -> None:
        length, new = len(request.prompt), request.max_new_tokens
        if not length:
            raise ValueError(f"prompts[{index}] is empty: give it at least one token")
        if new < 1:
            raise ValueError(f"max_new_tokens={new}: use at least 1")
        limit = self._shape.max_length
        if length + new > limit:
            raise ValueError(
                f"prompts[{index}]: a prompt of {length} tokens leaves no room: at "
                f"most {limit - new} fit with max_new_tokens={new} under the model's "
                f"max_length={limit}; shorten one of them"
            )
        if request.temperature < 0 or request.top_k < 0 or not 0 < request.top_p <= 1:
            raise ValueError(
                f"temperature={request.temperature}, top_k={request.top_k}, "
                f"top_p={request.top_p}: use temperature >= 0, top_k >= 0 and "
                "0 < top_p <= 1"
            )
        if request.stop and self.decode_text is None:
            raise ValueError(
                f"stop={request.stop} without decode_text: give the engine the "
                "function that makes text of tokens"
            )

    def _start(
        self, loop: Loop, params: decoder.Params, host: "_Host"
    ) -> tuple[State, Callable[..., Any], tuple[Queue, Commands]]:
        """Return an empty state, the compiled loop, and the first orders for it."""
        settings: dict[str, Any] = {}
        init = jax.jit(loop.init)
        if self._mesh is not None:
            shardings = self._shardings(jax.eval_shape(loop.init))
            everywhere = NamedSharding(self._mesh, P())
            init = jax.jit(loop.init, out_shardings=shardings)
            settings = {"out_shardings": (shardings, everywhere)}
        state, orders = init(), host.orders()
        if loop.signature not in self.compiled:
            run = jax.jit(loop.run, donate_argnums=1, **settings)
            self.compiled[loop.signature] = run.lower(params, state, *orders).compile()
        return state, self.compiled[loop.signature], orders

    def _shardings(self, state: State) -> State:
        """Return the shardings of the state: the cache is split, the rest whole."""
        mesh = self._mesh
        assert mesh is not None
        parts = mesh.shape["tensor"]
        heads = None if self._shape.num_kv_heads % parts else "tensor"
        layers = () if isinstance(state.cache, tuple) else (None,)
        pages = NamedSharding(mesh, P(ROW_AXES, *layers, None, heads))
        others = jax.tree.map(lambda x: NamedSharding(mesh, P()), state[1:])
        return State(jax.tree.map(lambda x: pages, state.cache), *others)


class _Row(NamedTuple):
    """A request in the queue, and how much of its text has been searched."""

    request: int  # its index
    searched: int = 0


class _Host:
    """The host's side of a call: which request is which row of the queue."""

    def __init__(self, engine: Engine, loop: Loop, requests: Sequence[Request]) -> None:
        self._engine, self._loop, self._requests = engine, loop, requests
        self.continuations: list[Any] = [None] * len(requests)
        self._left = len(requests)
        shape = (loop.num_shards, loop.num_rows)
        # Prompts that begin alike come one after the other.
        order = sorted(range(len(requests)), key=lambda i: tuple(requests[i].prompt))
        self._ranks = {index: rank for rank, index in enumerate(order)}
        self._pending = [deque(order[f :: shape[0]]) for f in range(shape[0])]
        self._rows: dict[tuple[int, int], _Row] = {}  # (shard, row of its queue)
        self._stopped: Any = np.zeros(shape, bool)
        self._counters: Any = None

        def zeros(dtype: type, *inside: int) -> Any:
            return np.zeros((*shape, *inside), dtype)

        self._queue = Queue(
            prompts=zeros(np.int32, loop.prompt_length),
            lengths=zeros(np.int32),
            limits=zeros(np.int32) + 1,
            ranks=zeros(np.int32),
            seeds=zeros(np.uint32),
            settings=Settings(
                zeros(np.float32), zeros(np.int32), zeros(np.float32) + 1
            ),
        )

    @property
    def is_busy(self) -> bool:
        """Whether a request is not yet finished."""
        return self._left > 0

    def orders(self) -> tuple[Queue, Commands]:
        """Put requests into empty rows of the queue, and return it with commands."""
        new: Any = np.zeros(self._stopped.shape, bool)
        for shard, pending in enumerate(self._pending):
            for row in range(self._loop.num_rows):
                if pending and (shard, row) not in self._rows:
                    self._fill(shard, row, pending.popleft())
                    new[shard, row] = True
        looks = any(self._requests[row.request].stop for row in self._rows.values())
        has_more: Any = np.array([bool(pending) for pending in self._pending])
        max_steps: Any = np.int32(_STEPS_TO_STOP if looks else _STEPS)
        commands = Commands(new, self._stopped, has_more, max_steps)
        self._stopped = np.zeros_like(new)
        return jax.tree.map(self._engine.place, (self._queue, commands))

    def take(
        self,
        rows: Any,
        counters: Any,
        on_finish: Callable[[int, Continuation], None] | None,
    ) -> None:
        """Take the rows that are done, and those that have a stop string."""
        rows, self._counters = jax.device_get((rows, counters))
        for (shard, number), row in list(self._rows.items()):
            is_done = rows.status[shard, number] == slots.DONE
            stop = self._requests[row.request].stop
            if not is_done and not stop:
                continue
            count = int(rows.counts[shard, number])
            tokens = rows.tokens[shard, number, :count].tolist()
            reason = "length"
            if is_done and tokens[-1] in self._loop.eos_ids:
                reason = "end"
            if stop:
                end = self._find_stop(tokens, row.searched, stop, reason == "end")
                if end:
                    tokens, reason = tokens[:end], "stop"
            if not is_done and reason != "stop":
                self._rows[shard, number] = _Row(row.request, count)
                continue
            self._stopped[shard, number] = not is_done
            del self._rows[shard, number]
            self._left -= 1
            done = Continuation(
                tokens=tokens,
                log_probs=rows.log_probs[shard, number, : len(tokens)].tolist(),
                finish_reason=reason,
            )
            self.continuations[row.request] = done
            if on_finish is not None:
                on_finish(row.request, done)

    def statistics(self) -> Statistics:
        """Return what all steps did, on all shards."""
        counters = self._counters
        return Statistics(
            steps=int(counters.steps.max()),
            mixed=int(counters.mixed.max()),
            tokens=int(counters.tokens.sum()),
            read=int(counters.read.sum()),
            copied=int(counters.copied.sum()),
            preempted=int(counters.preempted.sum()),
            slot_steps=int(counters.steps.sum()) * self._loop.num_slots,
        )

    def _fill(self, shard: int, row: int, index: int) -> None:
        """Put a request into a row of the queue."""
        queue, request, at = self._queue, self._requests[index], (shard, row)
        self._rows[at] = _Row(index)
        length = len(request.prompt)
        queue.prompts[at][:length] = request.prompt
        queue.lengths[at], queue.limits[at] = length, request.max_new_tokens
        queue.ranks[at], queue.seeds[at] = self._ranks[index], request.seed
        queue.settings.temperature[at] = request.temperature
        queue.settings.top_k[at] = request.top_k
        queue.settings.top_p[at] = request.top_p

    def _find_stop(
        self, tokens: list[int], searched: int, stop: Sequence[str], has_end: bool
    ) -> int:
        """Return how many tokens it takes until a text has a stop string; 0 = none."""
        decode_text = self._engine.decode_text
        assert decode_text is not None
        last = len(tokens) - has_end

        def has_stop(count: int) -> bool:
            text = decode_text(tokens[:count])
            return any(string in text for string in stop)

        if last <= searched or not has_stop(last):
            return 0
        return next(count for count in range(searched + 1, last + 1) if has_stop(count))


def few_sizes(number: int, least: int = 1) -> int:
    """Return the next of the sizes that programs are compiled for.

    They are at most an eighth apart, and at least `least`.
    """
    number = max(number, least)
    step = max(least, 1 << max(number.bit_length() - 4, 0))
    return -(-number // step) * step
