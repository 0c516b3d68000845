import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from kdjax.data import loader, teacher_records
from kdjax.data.packing import pack
from kdjax.data.views import Segment


def term(view, kind="hard", weight=1.0):
    return SimpleNamespace(name=f"{view}/{kind}", view=view, kind=kind, weight=weight)


def make_segments(num=60, num_views=2, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Segment(
            example_id=f"e{i // num_views}",
            view=i % num_views,
            prompt_ids=rng.integers(1, 90, rng.integers(1, 12)).astype(np.int32),
            target_ids=rng.integers(1, 90, rng.integers(1, 10)).astype(np.int32),
            key=i.to_bytes(16, "big"),
        )
        for i in range(num)
    ]


def with_alternatives(num=24, seed=0):
    """Two views of each example; the second has four alternatives, with prefixes."""
    rng = np.random.default_rng(seed)
    found = []
    for segment in make_segments(num * 2, 2, seed):
        if segment.view == 0:
            found.append(segment)
            continue
        for choice in range(4):
            found.append(
                dataclasses.replace(
                    segment,
                    target_ids=np.asarray([80 + choice, 1], np.int32),
                    prefix_ids=rng.integers(1, 90, 3 + choice).astype(np.int32),
                    key=segment.key[1:] + bytes([choice]),
                )
            )
    return found


def make_plan(segments, **changes):
    arguments = {"batch_size": 4, "row_length": 32, "num_microbatches": 1, "seed": 3}
    return loader.BatchPlan(segments, **arguments | changes)


# A student that only decodes, and one whose encoder reads the prompts.
FORMS = pytest.mark.parametrize(
    "form", [{}, {"encoder_length": 24, "start_id": 91}], ids=["decoder", "pair"]
)


class FakeCache:
    """Says at each row which target token of which segment it belongs to."""

    temperatures = (1.0, 2.0)
    vocab_size = 90

    def __init__(self, segments, kind="top_k", k=3):
        self.kind, self.k = kind, 90 if kind == "dense" else k
        self.segments = {segment.key: segment for segment in segments}

    def has(self, key):
        return key in self.segments

    def contains(self, keys):
        return np.asarray([key.tobytes() in self.segments for key in keys])

    def read(self, key):
        target = self.segments[key].loss_ids
        offsets = np.arange(self.k)
        return SimpleNamespace(
            kind=self.kind,
            num_tokens=len(target),
            target_ids=target,
            ids=target[:, None] + offsets,
            log_probs=-(target[:, None] + offsets).astype(np.float32),
            log_z=np.stack([np.zeros(len(target)), target], 1).astype(np.float32),
        )


def epoch_rows(plan, epoch):
    return plan._order.rows(epoch, 0, plan._order.num_rows(epoch))


def flatten(rows):
    return np.concatenate(rows).tolist()


def test_packing_efficiency_is_the_share_of_positions_taken():
    segment = dataclasses.replace(
        make_segments(1)[0],
        prompt_ids=np.arange(1, 8, dtype=np.int32),
        target_ids=np.arange(1, 5, dtype=np.int32),
    )
    segments = [dataclasses.replace(segment, example_id=str(i)) for i in range(6)]
    # Each takes 10 positions: its last token is not read.
    assert make_plan(segments, row_length=19).packing_efficiency() == 10 / 19
    assert make_plan(segments, row_length=20).packing_efficiency() == 1


@FORMS
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_segment_once(shuffle, form):
    plan = make_plan(make_segments(), shuffle=shuffle, **form)
    step = 0
    for epoch in range(3):
        items = []
        for index in range(plan.steps_per_epoch(epoch)):
            assert plan.locate(step) == (epoch, index)
            items += flatten(plan.batch(step))
            step += 1
        assert sorted(items) == list(range(60))


@FORMS
def test_an_epoch_takes_one_of_the_alternatives(form):
    segments = with_alternatives()
    plan = make_plan(segments, **form)
    taken = []
    for epoch in range(200):
        rows = [segments[item] for item in np.concatenate(epoch_rows(plan, epoch))]
        found = sorted((s.example_id, s.view) for s in rows)
        assert found == sorted((f"e{i}", view) for i in range(24) for view in (0, 1))
        taken.append({s.example_id: s.target_ids[0] - 80 for s in rows if s.view})
        if epoch in (0, 3):
            again = epoch_rows(make_plan(segments, **form), epoch)
            assert flatten(again) == flatten(epoch_rows(plan, epoch))
    choices = np.asarray([[of[f"e{i}"] for i in range(24)] for of in taken])
    # 4,800 draws of 4: a standard deviation is 30; 200 of one example: 6.
    assert np.abs(np.bincount(choices.ravel()) - 1200).max() < 120
    for i in range(24):
        assert np.abs(np.bincount(choices[:, i], minlength=4) - 50).max() < 27
    # One epoch does not say what the next one takes.
    repeats = (choices[1:] == choices[:-1]).mean()
    assert 0.22 < repeats < 0.28
    other = epoch_rows(make_plan(segments, seed=4, **form), 0)
    assert flatten(other) != flatten(epoch_rows(plan, 0))


def test_alternatives_stand_anywhere_in_an_epoch():
    """Of four, the first in a random order would stand at a fifth, not at a half."""
    segments = with_alternatives()
    plan = make_plan(segments)
    places = []
    for epoch in range(200):
        order = np.concatenate(epoch_rows(plan, epoch))
        places.append(np.argwhere(plan.views[order] == 1).mean() / (len(order) - 1))
    # Packing moves what is short a little to the front.
    assert abs(np.mean(places) - 0.5) < 0.04


def test_without_shuffling_all_alternatives_are_there():
    segments = with_alternatives()
    plan = make_plan(segments, shuffle=False)
    items = [
        item for step in range(plan.steps_per_epoch(0)) for item in plan.batch(step)
    ]
    assert sorted(flatten(items)) == list(range(24 * 5))


@FORMS
def test_a_plan_without_alternatives_is_the_permutation_packed(form):
    segments = make_segments()
    plan = make_plan(segments, **form)
    lengths, limits = plan._order._lengths, plan._order._limits
    for epoch in range(3):
        order = np.random.default_rng([3, epoch]).permutation(np.arange(60))
        wanted = pack(lengths, order, limits)
        for row, other in zip(epoch_rows(plan, epoch), wanted, strict=True):
            np.testing.assert_array_equal(row, other)


@FORMS
def test_a_prefix_is_read_before_the_target_and_not_learnt(form):
    segments = with_alternatives()
    plan = make_plan(segments, **form)
    cache = FakeCache(segments)
    terms = [term(0), term(1), term(1, "soft")]
    batch = loader.make_batch(plan, 0, terms=terms, cache=cache, temperature=2.0)
    seen = 0
    for row, items in enumerate(plan.batch(0)):
        for at in loader.segment_spans(plan, items):
            segment = at.segment
            before = [91] if form else segment.prompt_ids
            ids = np.concatenate([before, segment.prefix_ids, segment.target_ids])
            np.testing.assert_array_equal(batch.tokens[0, row, at.inputs], ids[:-1])
            np.testing.assert_array_equal(batch.targets[0, row, at.inputs], ids[1:])
            learnt = np.arange(len(ids) - 1) >= len(ids) - 1 - len(segment.target_ids)
            weights = batch.weights["hard"][0, row, at.inputs]
            np.testing.assert_array_equal(weights > 0, learnt)
            view = batch.view[0, row, at.inputs]
            np.testing.assert_array_equal(view, np.where(learnt, segment.view, -1))
            stored = batch.teacher.ids[0, row, at.inputs, 0]
            soft = learnt if segment.view else np.zeros_like(learnt)
            np.testing.assert_array_equal(stored, np.where(soft, ids[1:], -1))
            seen += len(segment.prefix_ids) > 0
            if form:
                prompt = batch.encoder.tokens[0, row, at.prompt]
                np.testing.assert_array_equal(prompt, [*segment.prompt_ids, 0])
    assert seen > 2


def with_masks(segments, seed=5):
    """The segments, some target tokens left out of the loss; the last never is."""
    rng = np.random.default_rng(seed)
    masks = [rng.random(len(s.target_ids)) < 0.5 for s in segments]
    for mask in masks:
        mask[-1] = True
    return [
        dataclasses.replace(segment, loss_mask=mask)
        for segment, mask in zip(segments, masks, strict=True)
    ]


@FORMS
def test_tokens_outside_the_loss_mask_are_read_and_weigh_nothing(form):
    plain = make_segments()
    segments = with_masks(plain)
    plan, whole = make_plan(segments, **form), make_plan(plain, **form)
    cache = FakeCache(segments)
    terms = [term(0), term(1), term(1, "soft")]
    batch = loader.make_batch(plan, 0, terms=terms, cache=cache, temperature=2.0)
    read = loader.make_batch(whole, 0, terms=terms, cache=FakeCache(plain))
    for name in ("tokens", "targets", "positions", "segments"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(read, name))
    counts = [0, 0]
    for row, items in enumerate(plan.batch(0)):
        for at in loader.segment_spans(plan, items):
            mask = at.segment.loss_mask
            counts[at.segment.view] += mask.sum()
            assert at.segment.num_loss_tokens == mask.sum() == len(at.segment.loss_ids)
            view = batch.view[0, row, at.target]
            np.testing.assert_array_equal(view, np.where(mask, at.segment.view, -1))
            soft = mask & (at.segment.view == 1)
            stored = batch.teacher.ids[0, row, at.target, 0]
            ids = at.segment.target_ids
            np.testing.assert_array_equal(stored, np.where(soft, ids, -1))
            log_probs = batch.teacher.log_probs[0, row, at.target, 0]
            assert (np.isfinite(log_probs) == soft).all()
    for view, count in enumerate(counts):
        of_view = batch.weights["hard"][batch.view == view]
        np.testing.assert_allclose(of_view, 1 / count, rtol=1e-6)
        np.testing.assert_allclose(of_view.sum(), 1, rtol=1e-5)
    assert not batch.weights["hard"][batch.view < 0].any()


def test_a_view_without_tokens_has_no_weight():
    segments = [segment for segment in make_segments() if segment.view == 0]
    alone = loader.make_batch(make_plan(segments), 0, terms=[term(0)])
    batch = loader.make_batch(make_plan(segments), 0, terms=[term(0), term(1)])
    jax.tree.map(np.testing.assert_array_equal, batch, alone)


@FORMS
def test_order_is_a_pure_function_of_seed_and_step(form):
    segments = make_segments()
    plan = make_plan(segments, **form)
    forward = [flatten(plan.batch(step)) for step in range(40)]
    for step in (39, 0, 17, 5):
        assert flatten(make_plan(segments, **form).batch(step)) == forward[step]
        assert flatten(plan.batch(step)) == forward[step]
    steps = plan.steps_per_epoch(0)
    assert forward[0] != forward[steps]
    assert forward[0] != flatten(make_plan(segments, seed=4, **form).batch(0))


def test_the_last_batch_is_filled_with_empty_rows():
    plan = make_plan(make_segments(num=6), batch_size=8)
    assert plan.steps_per_epoch(0) == 1
    batch = loader.make_batch(plan, 0, terms=[term(0)])
    assert batch.tokens.shape == (1, 8, 32)
    assert not batch.segments[0, -1].any()
    assert not batch.weights["hard"][0, -1].any()


def test_rows_hold_the_segments():
    segments = make_segments()
    plan = make_plan(segments)
    batch = loader.make_batch(plan, 1, terms=[term(0), term(1)])
    assert batch.tokens.dtype == batch.view.dtype == np.int32
    assert batch.weights["hard"].dtype == np.float32
    for row, items in enumerate(plan.batch(1)):
        start = 0
        for number, item in enumerate(items, 1):
            segment = segments[item]
            ids = np.concatenate([segment.prompt_ids, segment.target_ids])
            at = slice(start, start + len(ids) - 1)
            place = jax.tree.map(lambda x, row=row, at=at: x[0, row, at], batch)
            np.testing.assert_array_equal(place.tokens, ids[:-1])
            np.testing.assert_array_equal(place.targets, ids[1:])
            np.testing.assert_array_equal(place.positions, np.arange(len(ids) - 1))
            assert (place.segments == number).all()
            trained = place.view == segment.view
            assert (place.view[~trained] == -1).all()
            np.testing.assert_array_equal(place.targets[trained], segment.target_ids)
            start = at.stop
        assert (batch.segments[0, row, start:] == 0).all()
        assert (batch.view[0, row, start:] == -1).all()


def test_pairs_lie_in_rows_of_the_same_number():
    segments = make_segments()
    plan = make_plan(segments, encoder_length=24, start_id=91, end_id=92)
    batch = loader.make_batch(plan, 1, terms=[term(0), term(1)])
    assert batch.encoder.tokens.shape == (1, 4, 24)
    assert batch.tokens.shape == batch.view.shape == (1, 4, 32)
    assert batch.encoder.segments.dtype == np.int32
    for row, items in enumerate(plan.batch(1)):
        starts = {"": 0, "encoder_": 0}

        def place(prefix, length, row=row, starts=starts):
            start = starts[prefix]
            starts[prefix] += length
            names = ("tokens", "positions", "segments")
            rows = batch.encoder if prefix else batch
            arrays = (getattr(rows, name)[0, row] for name in names)
            return [array[start : start + length] for array in arrays]

        for number, item in enumerate(items, 1):
            segment = segments[item]
            prompt, target = [*segment.prompt_ids, 92], segment.target_ids
            tokens, positions, numbers = place("encoder_", len(prompt))
            np.testing.assert_array_equal(tokens, prompt)
            np.testing.assert_array_equal(positions, np.arange(len(prompt)))
            assert (numbers == number).all()
            at = slice(starts[""], starts[""] + len(target))
            np.testing.assert_array_equal(batch.targets[0, row, at], target)
            assert (batch.view[0, row, at] == segment.view).all()
            assert (batch.weights["hard"][0, row, at] > 0).all()
            tokens, positions, numbers = place("", len(target))
            np.testing.assert_array_equal(tokens, [91, *target[:-1]])
            np.testing.assert_array_equal(positions, np.arange(len(target)))
            assert (numbers == number).all()
        assert not batch.segments[0, row, starts[""] :].any()
        assert not batch.weights["hard"][0, row, starts[""] :].any()
        assert not batch.encoder.segments[0, row, starts["encoder_"] :].any()


@FORMS
@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_weights_of_a_term_sum_to_its_weight(num_microbatches, form):
    segments = make_segments()
    plan = make_plan(segments, num_microbatches=num_microbatches, **form)
    terms = [term(0, weight=0.3), term(1, weight=0.5), term(1, "soft", 0.2)]
    cache = FakeCache(segments)
    for step in range(5):
        batch = loader.make_batch(plan, step, terms=terms, cache=cache)
        hard, soft, view = batch.weights["hard"], batch.weights["soft"], batch.view
        # An epoch's last batch may lack a view.
        assert step or {0, 1} <= set(view.flat)
        for weights, of, wanted in ((hard, 0, 0.3), (hard, 1, 0.5), (soft, 1, 0.2)):
            total, wanted = weights[view == of].sum(), wanted * (view == of).any()
            np.testing.assert_allclose(total, wanted, rtol=1e-5)
        assert not soft[view != 1].any() and not hard[view == -1].any()


def test_terms_of_one_kind_and_view_add():
    plan = make_plan(make_segments())
    once = loader.make_batch(plan, 0, terms=[term(0, weight=0.75)])
    twice = loader.make_batch(
        plan, 0, terms=[term(0, weight=0.5), term(0, weight=0.25)]
    )
    np.testing.assert_array_equal(once.weights["hard"], twice.weights["hard"])


@FORMS
@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_slices_of_two_hosts_make_the_global_batch(num_microbatches, form):
    segments = make_segments()
    plan = make_plan(segments, num_microbatches=num_microbatches, **form)
    arguments = {"terms": [term(0), term(1, "soft")], "cache": FakeCache(segments)}
    whole = loader.make_batch(plan, 2, **arguments)
    half = 4 // num_microbatches // 2
    parts = [
        loader.make_batch(plan, 2, rows=rows, **arguments)
        for rows in (slice(0, half), slice(half, None))
    ]
    joined = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *parts)
    jax.tree.map(np.testing.assert_array_equal, whole, joined)
    assert whole.tokens.shape[:2] == (num_microbatches, 2 * half)


@FORMS
@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_microbatches_are_a_reshape(num_microbatches, form):
    segments = make_segments()
    one = loader.make_batch(make_plan(segments, **form), 0, terms=[term(0)])
    plan = make_plan(segments, num_microbatches=num_microbatches, **form)
    many = loader.make_batch(plan, 0, terms=[term(0)])
    joined = jax.tree.map(lambda x, y: y.reshape(x.shape), one, many)
    jax.tree.map(np.testing.assert_array_equal, one, joined)


@FORMS
@pytest.mark.parametrize("kind", ["top_k", "dense"])
def test_teacher_rows_stand_where_their_token_is_predicted(kind, form):
    segments = make_segments()
    cache = FakeCache(segments, kind)
    plan = make_plan(segments, **form)
    terms = [term(0), term(1), term(1, "soft")]
    batch = loader.make_batch(plan, 0, terms=terms, cache=cache, temperature=2.0)
    soft = batch.weights["soft"] > 0
    targets = batch.targets[soft]
    assert soft.sum() > 10
    np.testing.assert_array_equal(batch.teacher.log_probs[soft][:, 0], -targets)
    np.testing.assert_array_equal(batch.teacher.log_z[soft], targets)
    assert np.isneginf(batch.teacher.log_probs[~soft]).all()
    assert not batch.teacher.log_z[~soft].any()
    if kind == "dense":
        assert batch.teacher.ids is None
        assert batch.teacher.log_probs.shape[-1] == 90
    else:
        np.testing.assert_array_equal(batch.teacher.ids[soft][:, 0], targets)
        assert (batch.teacher.ids[~soft] == -1).all()


@FORMS
def test_segment_spans_hold_the_targets(form):
    plan = make_plan(make_segments(), **form)
    batch = loader.make_batch(plan, 0, terms=())
    assert not batch.weights["hard"].any()
    for row, items in enumerate(plan.batch(0)):
        spans = list(loader.segment_spans(plan, items))
        assert [at.item for at in spans] == items.tolist()
        for at in spans:
            targets = batch.targets[0, row, at.target]
            np.testing.assert_array_equal(targets, at.segment.target_ids)
            assert (batch.view[0, row, at.target] == at.segment.view).all()
            if form:
                prompt = batch.encoder.tokens[0, row, at.prompt]
                np.testing.assert_array_equal(prompt, [*at.segment.prompt_ids, 0])
            else:
                assert at.prompt == slice(0, 0)


def test_a_soft_term_without_a_cache_is_refused():
    plan = make_plan(make_segments())
    with pytest.raises(ValueError, match="soft terms need a teacher cache"):
        loader.make_batch(plan, 0, terms=[term(0), term(0, "soft")])
    loader.make_batch(plan, 0, terms=[term(0), term(0, "soft", 0.0)])


class FakeDraws(FakeCache):
    """Two rounds of three draws; which round and temperature shows in the ids."""

    def __init__(self, segments):
        super().__init__(segments, kind="sampled")

    def read(self, key):
        target = self.segments[key].loss_ids
        ids = np.full((len(target), 2, 2, 3), -1, np.int32)
        ids[..., :2] = (10 * np.arange(2)[:, None] + np.arange(2))[..., None]
        counts = np.broadcast_to([2, 1, 0], ids.shape)
        entropy = np.tile(np.float32([0.5, 0.25]), (len(target), 1))
        fields = vars(super().read(key))
        return SimpleNamespace(
            **fields | {"ids": ids, "counts": counts, "entropy": entropy}
        )


@pytest.mark.parametrize(("temperature", "column"), [(1.0, 0), (2.0, 1)])
def test_an_epoch_takes_its_round_of_draws(temperature, column):
    segments = make_segments()
    plan = make_plan(segments)
    first_of_epoch_1 = plan.steps_per_epoch(0)
    for step, number in ((0, 0), (first_of_epoch_1, 1)):
        batch = loader.make_batch(
            plan,
            step,
            terms=[term(0, "soft"), term(1, "soft")],
            cache=FakeDraws(segments),
            temperature=temperature,
        )
        used = batch.teacher.ids[..., 0] >= 0
        assert used.any() and (used == (batch.view >= 0)).all()
        assert (batch.teacher.ids[used] == [10 * column + number] * 2 + [-1]).all()
        shares = np.exp(batch.teacher.log_probs[used])
        np.testing.assert_allclose(shares[0], [2 / 3, 1 / 3, 0], rtol=1e-6)
        assert (batch.teacher.entropy[used] == (0.5, 0.25)[column]).all()


def test_a_record_of_other_tokens_is_refused():
    segments = make_segments()
    cache = FakeCache(segments)
    broken = segments[0]
    cache.segments[broken.key] = dataclasses.replace(
        broken, target_ids=broken.target_ids + 1
    )
    plan = make_plan(segments)
    with pytest.raises(ValueError, match=r"'e0': its record is of .* not these"):
        for step in range(plan.steps_per_epoch(0)):
            loader.make_batch(plan, step, terms=[term(0, "soft")], cache=cache)


def test_an_undeclared_temperature_names_the_declared():
    segments = make_segments()
    with pytest.raises(ValueError, match=r"temperature=3\.0 .* \(1\.0, 2\.0\)"):
        loader.make_batch(
            make_plan(segments),
            0,
            terms=[term(0, "soft")],
            cache=FakeCache(segments),
            temperature=3.0,
        )


def test_a_missing_record_names_the_example():
    segments = make_segments()
    cache = FakeCache(segments[:20] + segments[21:])
    assert segments[20].view == 0
    teacher_records.check_cache(segments, cache, {1})
    with pytest.raises(ValueError, match=r"example .e10., view 0: .* no record"):
        teacher_records.check_cache(segments, cache, {0, 1})
    plan = make_plan(segments)
    with pytest.raises(ValueError, match=r"example .e10., view 0: .* no record"):
        for step in range(plan.steps_per_epoch(0)):
            loader.make_batch(plan, step, terms=[term(0, "soft")], cache=cache)


def test_a_record_of_another_length_is_refused():
    segments = make_segments()
    cache = FakeCache(segments)
    short = Segment("x", 0, segments[0].prompt_ids, np.arange(40, dtype=np.int32), b"")
    cache.segments = dict.fromkeys(cache.segments, short)
    with pytest.raises(ValueError, match="record is of 40 target tokens"):
        loader.make_batch(make_plan(segments), 0, terms=[term(0, "soft")], cache=cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5, "num_microbatches": 2}, "batch_size=5"),
        ({"row_length": 8}, r"example 'e\d+' takes \d+ positions, row_length=8"),
        ({"encoder_length": 5}, r"example 'e\d+' takes 12 positions, encoder_length=5"),
    ],
)
def test_an_impossible_plan_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(make_segments(), **changes)
    with pytest.raises(ValueError, match="segments is empty"):
        make_plan([])


@pytest.mark.parametrize(("num_threads", "prefetch"), [(0, 0), (1, 2), (4, 8)])
def test_reading_ahead_changes_nothing(num_threads, prefetch):
    plan = make_plan(make_segments())

    def make(step):
        return loader.make_batch(plan, step, terms=[term(0), term(1)])

    found = list(
        loader.iterate(make, 5, 30, num_threads=num_threads, prefetch=prefetch)
    )
    assert [step for step, _ in found] == list(range(5, 30))
    again = make_plan(make_segments())
    for step, batch in found:
        wanted = loader.make_batch(again, step, terms=[term(0), term(1)])
        jax.tree.map(np.testing.assert_array_equal, batch, wanted)
    assert list(loader.iterate(make, 3, 3)) == []


def test_an_error_in_a_thread_reaches_the_reader():
    def make(step):
        raise ValueError(f"step {step} is bad")

    with pytest.raises(ValueError, match="step 0 is bad"):
        list(loader.iterate(make, 0, 3))


@FORMS
def test_a_segments_weight_multiplies_its_tokens_alone(form):
    segments = make_segments()
    some = [
        dataclasses.replace(s, weight=0.25 if i % 3 else 1.0)
        for i, s in enumerate(segments)
    ]
    terms = [term(0, weight=0.3), term(1, weight=0.5), term(1, "soft", 0.2)]
    cache = FakeCache(segments)
    plain, plan = make_plan(segments, **form), make_plan(some, **form)
    for step in range(3):
        whole = loader.make_batch(plain, step, terms=terms, cache=cache)
        found = loader.make_batch(plan, step, terms=terms, cache=cache)
        factor = np.ones(whole.view.shape)
        for row, items in enumerate(plan.batch(step)):
            for at in loader.segment_spans(plan, items):
                factor[0, row, at.target] = 0.25 if at.item % 3 else 1.0
        for kind, weights in whole.weights.items():
            changed = found.weights[kind]
            np.testing.assert_allclose(changed, weights * factor, rtol=1e-6)
        same = dataclasses.replace(found, weights=whole.weights)
        jax.tree.map(np.testing.assert_array_equal, same, whole)
