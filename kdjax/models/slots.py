"""Which rows are decoded when: slots, their pages and the pieces of prompts.

A row is a prompt and what is decoded after it. Rows wait in a queue on the devices; the
one with the lowest rank takes the next free slot as soon as the pool has the pages for
its prompt. A slot takes a page when it begins one. Where none is left, the row of the
highest rank gives up its slot and waits again; what it had decoded is then read as a
part of its prompt. A prompt that begins like one whose tokens are in the cache takes
copies of those pages and reads only the rest.

All of it is arithmetic on small arrays in the compiled loop, for one shard.

Shapes: B slots, M pages of S tokens, J pages of a slot at most, N rows of the queue,
P prompt time, W new tokens at most, R lanes of C tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.models.paged_cache import Lanes, Places
from kdjax.models.sampling import Settings

EMPTY, WAITING, ACTIVE, DONE = range(4)  # of a row
MAX_COPIES = 4  # rows that copy pages at one time
MIN_SHARED = 16  # tokens; a shorter common beginning is read again
_NEVER = jnp.iinfo(jnp.int32).max


class Queue(NamedTuple):
    """Rows as the host gives them."""

    prompts: Int[Array, "N P"]
    lengths: Int[Array, "N"]
    limits: Int[Array, "N"]  # new tokens at most, 1 to W
    ranks: Int[Array, "N"]  # distinct; the lowest is first
    seeds: Int[Array, "N"]  # uint32, of draws
    settings: Settings  # [N]


class Rows(NamedTuple):
    """What has become of the rows."""

    status: Int[Array, "N"]
    counts: Int[Array, "N"]  # new tokens so far
    tokens: Int[Array, "N W"]
    log_probs: Float[Array, "N W"]


class Slots(NamedTuple):
    """What is in the slots and pages."""

    row: Int[Array, "B"]  # of the queue; -1 = free
    target: Int[Array, "B"]  # tokens that are read as prompt
    token: Int[Array, "B"]  # the newest one, not yet in the cache
    places: Places
    waited: Int[Array, ""]  # slots times steps that prompts have waited to be read


class Copies(NamedTuple):
    """Pages to copy before the next step, for up to MAX_COPIES rows."""

    source: Int[Array, "Z J"]
    target: Int[Array, "Z J"]  # M = none


class Counters(NamedTuple):
    """What the steps did, of one shard."""

    steps: Int[Array, ""]
    mixed: Int[Array, ""]  # steps that also read prompts
    tokens: Int[Array, ""]  # new tokens
    read: Int[Array, ""]  # tokens of prompts
    copied: Int[Array, ""]  # tokens of prompts that were copied
    preempted: Int[Array, ""]


def empty_slots(num_slots: int, num_pages: int, pages_per_slot: int) -> Slots:
    """Return slots without rows."""
    free_B = jnp.full((num_slots,), -1, jnp.int32)
    zeros_B = jnp.zeros((num_slots,), jnp.int32)
    places = Places(
        table=jnp.full((num_slots, pages_per_slot), num_pages, jnp.int32),
        owner=jnp.full((num_pages,), -1, jnp.int32),
        number=jnp.zeros((num_pages,), jnp.int32),
        cached=zeros_B,
    )
    return Slots(free_B, zeros_B, zeros_B, places, jnp.int32(0))


def empty_rows(num_rows: int, max_new_tokens: int) -> Rows:
    """Return results of no rows."""
    shape = (num_rows, max_new_tokens)
    return Rows(
        status=jnp.full((num_rows,), EMPTY, jnp.int32),
        counts=jnp.zeros((num_rows,), jnp.int32),
        tokens=jnp.zeros(shape, jnp.int32),
        log_probs=jnp.zeros(shape, jnp.float32),
    )


def zero_counters() -> Counters:
    """Return counters of no steps."""
    return Counters(*[jnp.int32(0)] * len(Counters._fields))


def release(slots: Slots, gone_B: Bool[Array, "B"]) -> Slots:
    """Free slots and their pages."""
    places = slots.places
    owner_M = places.owner
    gone_M = (owner_M >= 0) & gone_B[jnp.maximum(owner_M, 0)]
    places = places._replace(
        table=jnp.where(gone_B[:, None], owner_M.shape[0], places.table),
        owner=jnp.where(gone_M, -1, owner_M),
        cached=jnp.where(gone_B, 0, places.cached),
    )
    return slots._replace(
        row=jnp.where(gone_B, -1, slots.row),
        target=jnp.where(gone_B, 0, slots.target),
        token=jnp.where(gone_B, 0, slots.token),
        places=places,
    )


def schedule(
    slots: Slots, rows: Rows, queue: Queue, counters: Counters, *, page_size: int
) -> tuple[Slots, Rows, Counters, Copies]:
    """Give every slot the pages of its next step, and waiting rows free slots."""
    slots, rows, counters = _provide_pages(slots, rows, queue, counters, page_size)
    return _admit(slots, rows, queue, counters, page_size)


def lanes_of(slots: Slots, queue: Queue, num_lanes: int, length: int) -> Lanes:
    """Return the pieces of prompts to read next, the lowest ranks first."""
    num_slots = slots.row.shape[0]
    left_B = _left(slots)
    ranks_B = _ranks(slots, queue)
    order_B = jnp.argsort(jnp.where(left_B > 0, ranks_B, _NEVER))
    pieces_B = -(-left_B // length)[order_B]
    ends_B = jnp.cumsum(pieces_B)
    lane_R = jnp.arange(num_lanes, dtype=jnp.int32)
    place_R = (ends_B[None] <= lane_R[:, None]).sum(1).astype(jnp.int32)
    used_R = place_R < num_slots
    place_R = jnp.minimum(place_R, num_slots - 1)
    slot_R = order_B[place_R].astype(jnp.int32)
    begun_R = (lane_R - (ends_B - pieces_B)[place_R]) * length
    start_R = slots.places.cached[slot_R] + begun_R
    count_R = jnp.minimum(left_B[slot_R] - begun_R, length)
    return Lanes(
        slot=jnp.where(used_R, slot_R, num_slots),
        start=jnp.where(used_R, start_R, 0),
        length=jnp.where(used_R, count_R, 0),
    )


def reads_next(slots: Slots, num_lanes: int, length: int) -> Bool[Array, ""]:
    """Return whether the next step reads prompts beside decoding.

    It does when all lanes are used, when nothing else is to be done, or when prompts
    have waited as long as the unused lanes would take.
    """
    left_B = _left(slots)
    pieces = (-(-left_B // length)).sum()
    unused = jnp.maximum(num_lanes - pieces, 0) * length
    idle = ~decodes(slots).any()
    return (pieces > 0) & ((slots.waited >= unused) | idle)


def decodes(slots: Slots) -> Bool[Array, "B"]:
    """Return the slots whose prompt has been read."""
    return (slots.row >= 0) & (slots.places.cached >= slots.target)


def wait(slots: Slots, *, reads: bool) -> Slots:
    """Count the prompts that a step left unread; one that reads starts anew."""
    waited = jnp.int32(0) if reads else slots.waited
    return slots._replace(waited=waited + (_left(slots) > 0).sum(dtype=jnp.int32))


def lane_inputs(
    lanes: Lanes, slots: Slots, rows: Rows, queue: Queue, position_RC: Array
) -> Int[Array, "R C"]:
    """Return the tokens of lanes: of the prompt, then those decoded already."""
    slot_R = jnp.minimum(lanes.slot, slots.row.shape[0] - 1)
    row_R1 = jnp.maximum(slots.row[slot_R], 0)[:, None]
    length_R1 = queue.lengths[row_R1]
    prompt_RC = queue.prompts[
        row_R1, jnp.clip(position_RC, 0, queue.prompts.shape[1] - 1)
    ]
    new_RC = rows.tokens[
        row_R1, jnp.clip(position_RC - length_R1, 0, rows.tokens.shape[1] - 1)
    ]
    return jnp.where(position_RC < length_R1, prompt_RC, new_RC)


def advance(
    slots: Slots,
    rows: Rows,
    queue: Queue,
    counters: Counters,
    emits_B: Bool[Array, "B"],
    token_B: Int[Array, "B"],
    log_prob_B: Float[Array, "B"],
    written_B: Int[Array, "B"],
    *,
    eos_ids: tuple[int, ...],
) -> tuple[Slots, Rows, Counters]:
    """Take the tokens of a step; rows that end free their slots.

    Args:
      slots: before the step.
      rows: before the step.
      queue: of the rows.
      counters: before the step.
      emits_B: slots that have a new token.
      token_B: the new tokens.
      log_prob_B: theirs.
      written_B: tokens that the step has written to the cache.
      eos_ids: each of them ends a row.
    """
    num_rows, width = rows.tokens.shape
    row_B = jnp.where(emits_B, slots.row, num_rows)
    known_B = jnp.minimum(jnp.maximum(slots.row, 0), num_rows - 1)
    count_B = rows.counts[known_B]
    place = (row_B, jnp.minimum(count_B, width - 1))
    ends_B = count_B + 1 >= queue.limits[known_B]
    for eos_id in eos_ids:
        ends_B |= token_B == eos_id
    ends_B &= emits_B
    rows = rows._replace(
        tokens=rows.tokens.at[place].set(token_B, mode="drop"),
        log_probs=rows.log_probs.at[place].set(log_prob_B, mode="drop"),
        counts=rows.counts.at[row_B].add(1, mode="drop"),
        status=rows.status.at[jnp.where(ends_B, row_B, num_rows)].set(
            DONE, mode="drop"
        ),
    )
    read = jnp.where(decodes(slots), 0, written_B).sum(dtype=jnp.int32)
    places = slots.places
    slots = slots._replace(
        token=jnp.where(emits_B, token_B, slots.token),
        places=places._replace(cached=places.cached + written_B),
    )
    counters = counters._replace(
        steps=counters.steps + 1,
        mixed=counters.mixed + (read > 0).astype(jnp.int32),
        tokens=counters.tokens + emits_B.sum(dtype=jnp.int32),
        read=counters.read + read,
    )
    return release(slots, ends_B), rows, counters


def _provide_pages(
    slots: Slots, rows: Rows, queue: Queue, counters: Counters, page_size: int
) -> tuple[Slots, Rows, Counters]:
    """Give a page to each slot that begins one; rows of high ranks may have to wait."""

    def wanted(slots: Slots) -> Array:
        is_full_B = slots.places.cached >= _held(slots.places) * page_size
        return (decodes(slots) & is_full_B).astype(jnp.int32)

    def is_short(carry: tuple) -> Array:
        return wanted(carry[0]).sum() > _num_free(carry[0].places)

    def preempt(carry: tuple) -> tuple:
        slots, rows, counters = carry
        victim = jnp.argmax(jnp.where(slots.row >= 0, _ranks(slots, queue), -1))
        status_N = rows.status.at[slots.row[victim]].set(WAITING)
        numbers_B = jnp.arange(slots.row.shape[0])
        return (
            release(slots, numbers_B == victim),
            rows._replace(status=status_N),
            counters._replace(preempted=counters.preempted + 1),
        )

    slots, rows, counters = jax.lax.while_loop(
        is_short, preempt, (slots, rows, counters)
    )
    places = _allocate(slots.places, wanted(slots))
    return slots._replace(places=places), rows, counters


def _admit(
    slots: Slots, rows: Rows, queue: Queue, counters: Counters, page_size: int
) -> tuple[Slots, Rows, Counters, Copies]:
    """Give free slots to waiting rows."""
    num_pages, pages_per_slot = slots.places.owner.shape[0], slots.places.table.shape[1]
    first_J = jnp.arange(pages_per_slot, dtype=jnp.int32) * page_size
    numbers_B = jnp.arange(slots.row.shape[0], dtype=jnp.int32)
    nothing_ZJ = jnp.zeros((MAX_COPIES, pages_per_slot), jnp.int32)

    def may_admit(carry: tuple) -> Array:
        slots, rows, *_, num_copies, goes_on = carry
        is_free = (slots.row < 0).any() & (rows.status == WAITING).any()
        return goes_on & is_free & (num_copies < MAX_COPIES)

    def admit(carry: tuple) -> tuple:
        slots, rows, counters, copies, is_new_B, num_copies, _ = carry
        row = jnp.argmin(jnp.where(rows.status == WAITING, queue.ranks, _NEVER))
        slot = jnp.argmax(slots.row < 0).astype(jnp.int32)
        target = queue.lengths[row] + rows.counts[row]
        wanted = (target + page_size) // page_size  # with the next token's
        num_active = (slots.row >= 0).sum(dtype=jnp.int32)
        has_pages = _num_free(slots.places) >= wanted + num_active
        has_pages |= num_active == 0
        common_B = jnp.minimum(_common(slots, queue, row), target - 1)
        ready_B = jnp.minimum(common_B, slots.places.cached)
        ready_B = jnp.where(is_new_B, 0, ready_B)  # their pages are not yet copied
        donor, shared = jnp.argmax(ready_B), ready_B.max()
        shared = jnp.where(shared >= MIN_SHARED, shared, 0)
        # A prompt that is being read may soon be a better one to copy from.
        soon = jnp.where(_left(slots) > 0, common_B, 0).max()
        goes = has_pages & (soon < shared + MIN_SHARED)
        is_slot_B = goes & (numbers_B == slot)
        places = _allocate(slots.places, jnp.where(is_slot_B, wanted, 0))
        places = places._replace(cached=jnp.where(is_slot_B, shared, places.cached))
        is_copied_J = goes & (first_J < shared)
        target_J = jnp.where(is_copied_J, places.table[slot], num_pages)
        return (
            slots._replace(
                row=jnp.where(is_slot_B, row.astype(jnp.int32), slots.row),
                target=jnp.where(is_slot_B, target, slots.target),
                places=places,
            ),
            rows._replace(
                status=rows.status.at[row].set(jnp.where(goes, ACTIVE, WAITING))
            ),
            counters._replace(copied=counters.copied + jnp.where(goes, shared, 0)),
            Copies(
                copies.source.at[num_copies].set(places.table[donor]),
                copies.target.at[num_copies].set(target_J),
            ),
            is_new_B | is_slot_B,
            num_copies + (shared > 0).astype(jnp.int32),
            goes,
        )

    copies = Copies(nothing_ZJ, jnp.full_like(nothing_ZJ, num_pages))
    carry = (
        slots,
        rows,
        counters,
        copies,
        numbers_B < 0,
        jnp.int32(0),
        jnp.bool_(True),
    )
    return jax.lax.while_loop(may_admit, admit, carry)[:4]


def _common(slots: Slots, queue: Queue, row: Array) -> Int[Array, "B"]:
    """Return how many tokens a prompt and those in the slots begin with alike."""
    other_B = jnp.maximum(slots.row, 0)
    length_B = jnp.minimum(queue.lengths[other_B], queue.lengths[row])
    length_B = jnp.where(slots.row >= 0, length_B, 0)
    time_P = jnp.arange(queue.prompts.shape[1])
    equal_BP = queue.prompts[other_B] == queue.prompts[row][None]
    equal_BP &= time_P[None] < length_B[:, None]
    return jnp.cumprod(equal_BP, axis=1, dtype=jnp.int32).sum(1, dtype=jnp.int32)


def _left(slots: Slots) -> Int[Array, "B"]:
    """Return the tokens of each slot's prompt that are not yet in the cache."""
    return jnp.maximum(slots.target - slots.places.cached, 0)


def _ranks(slots: Slots, queue: Queue) -> Int[Array, "B"]:
    return queue.ranks[jnp.maximum(slots.row, 0)]


def _num_free(places: Places) -> Int[Array, ""]:
    return (places.owner < 0).sum(dtype=jnp.int32)


def _held(places: Places) -> Int[Array, "B"]:
    return (places.table < places.owner.shape[0]).sum(1, dtype=jnp.int32)


def _allocate(places: Places, wanted_B: Int[Array, "B"]) -> Places:
    """Append free pages to slots; there must be as many as are wanted."""
    num_slots = wanted_B.shape[0]
    ends_B = jnp.cumsum(wanted_B, dtype=jnp.int32)
    free_M = places.owner < 0
    rank_M = jnp.cumsum(free_M, dtype=jnp.int32) - 1
    taken_M = free_M & (rank_M < ends_B[-1])
    slot_M = (ends_B[None] <= rank_M[:, None]).sum(1, dtype=jnp.int32)
    slot_M = jnp.minimum(slot_M, num_slots - 1)
    index_M = _held(places)[slot_M] + rank_M - (ends_B - wanted_B)[slot_M]
    page_M = jnp.arange(free_M.shape[0], dtype=jnp.int32)
    table_BJ = places.table.at[jnp.where(taken_M, slot_M, num_slots), index_M]
    return places._replace(
        table=table_BJ.set(page_M, mode="drop"),
        owner=jnp.where(taken_M, slot_M, places.owner),
        number=jnp.where(taken_M, index_M, places.number),
    )
