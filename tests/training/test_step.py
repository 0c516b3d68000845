"""The step: what the batch is cut into changes nothing."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from kdjax import losses
from kdjax.config import MeshConfig
from kdjax.data import loader
from kdjax.data.batch import TeacherRecords
from kdjax.experiment import methods, validate
from kdjax.experiment.data import load_data
from kdjax.experiment.models import make_model, student_params, student_shape
from kdjax.experiment.rows import make_plan
from kdjax.experiment.teacher import teacher_shape
from kdjax.models import decoder
from kdjax.parallel import sharding
from kdjax.training import optimizer as optimizer_lib
from kdjax.training import program, state, step
from tests import helpers
from tests.helpers import FakeCache


def run(config, *, steps=2, mesh_config=None, devices=None, poison=False):
    """Losses, metrics and final parameters of a few steps."""
    mesh = sharding.make_mesh(mesh_config or MeshConfig(), devices=devices)
    data = load_data(config, splits=("train",))
    shape = student_shape(config, data.tokenizer)
    model = make_model(shape, mesh, dtype="float32")
    optimizer = optimizer_lib.make_optimizer(config.optim, steps=10)
    abstract = state.abstract_state(model.abstract, optimizer, mesh)
    plan = make_plan(config, shape, data.train)
    cache = FakeCache(data.train, shape.vocab_size)
    train_step = step.make_train_step(
        model.graphdef,
        optimizer,
        optimizer_lib.make_schedule(config.optim, steps=10),
        mesh,
        abstract,
        num_views=2,
        loss_options=losses.LossOptions(temperature=2.0, chunk_size=32),
    )
    current = state.init_state(abstract, optimizer, student_params(config, model, ""))
    if poison:
        params = current.params
        params["norm"]["scale"] = params["norm"]["scale"] * np.float32(np.nan)
    num_rows = config.train.batch_size // config.train.num_microbatches
    found = []
    for index in range(steps):
        batch = loader.make_batch(
            plan,
            index,
            terms=methods.terms(config.method),
            cache=cache,
            temperature=2.0,
            rows=sharding.local_rows(mesh, num_rows),
        )
        current, metrics = train_step(
            current, sharding.global_batch(batch, mesh, num_rows)
        )
        found.append(jax.tree.map(np.asarray, metrics))
    assert train_step._cache_size() == 1
    return found, jax.tree.map(np.asarray, current)


def assert_same(first, second, tolerance=1e-5):
    for a, b in zip(first[0], second[0], strict=True):
        for name in ("loss", "grad_norm", "nll", "kl", "count", "num_tokens"):
            np.testing.assert_allclose(
                a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name
            )


def gradient_config(**train):
    # SGD-like: Adam's first step is the gradient's sign, blind to its size.
    return helpers.small_config(
        train={"num_threads": 1, "batch_size": 8, "row_length": 128} | train
    )


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_microbatches_do_not_change_the_step(num_microbatches):
    devices = jax.devices()[:1]
    whole = run(gradient_config(), devices=devices)
    cut = run(gradient_config(num_microbatches=num_microbatches), devices=devices)
    assert_same(whole, cut)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        whole[1].params,
        cut[1].params,
    )


def test_a_microbatch_without_any_valid_token_is_harmless():
    # 24 examples fill fewer than 64 rows: most microbatches are empty.
    config = gradient_config(batch_size=64, num_microbatches=8)
    devices = jax.devices()[:1]
    cut = run(config, devices=devices)
    whole = run(gradient_config(batch_size=64), devices=devices)
    assert (cut[0][0]["count"] > 0).all() and np.isfinite(cut[0][0]["loss"])
    assert_same(whole, cut)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_meshes_agree(shape):
    config = gradient_config()
    one = run(config, devices=jax.devices()[:1])
    mesh = MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])
    assert_same(one, run(config, mesh_config=mesh))


def test_loss_is_the_dense_formula():
    """hard and soft of both views, by NumPy from the model's own logits."""
    config = gradient_config()
    found, _ = run(config, steps=1, devices=jax.devices()[:1])
    data = load_data(config, splits=("train",))
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    model = make_model(student_shape(config, data.tokenizer), mesh, dtype="float32")
    params = student_params(config, model, "")()
    plan = make_plan(config, model.shape, data.train)
    cache = FakeCache(data.train, model.shape.vocab_size)
    total = np.zeros((2, 2))
    counts = np.zeros(2)
    for item in np.concatenate(plan.batch(0)):
        segment = data.train[item]
        ids = np.concatenate([segment.prompt_ids, segment.target_ids])[None, :-1]
        hidden = decoder.hidden_states(
            model.graphdef,
            params,
            ids,
            np.arange(ids.shape[1], dtype=np.int32)[None],
            np.ones_like(ids),
        )
        logits = np.asarray(decoder.logits(params, hidden), np.float64)[0]
        logits = logits[len(segment.prompt_ids) - 1 :]
        logq = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = -logq[np.arange(len(logits)), segment.target_ids]
        logq_t = logits / 2 - np.log(np.exp(logits / 2).sum(-1, keepdims=True))
        record = cache.read(segment.key)
        p = np.exp(record.log_probs.astype(np.float64) / 2 - record.log_z[:, 1:])
        q = np.exp(np.take_along_axis(logq_t, record.ids, -1))
        p_tail, q_tail = 1 - p.sum(-1), 1 - q.sum(-1)
        kl = (p * np.log(p / q)).sum(-1) + p_tail * np.log(p_tail / q_tail)
        total[segment.view] += nll.sum(), kl.sum()
        counts[segment.view] += len(segment.target_ids)
    wanted = (0.5 * (0.5 * total[:, 0] + 0.5 * 4 * total[:, 1]) / counts).sum()
    np.testing.assert_allclose(found[0]["loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(found[0]["nll"], total[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found[0]["kl"], total[:, 1], rtol=1e-4)


def test_a_non_finite_update_is_not_applied():
    config = gradient_config()
    found, final = run(config, steps=1, devices=jax.devices()[:1], poison=True)
    assert found[0]["finite"] == 0
    assert np.isfinite(final.params["embed"]["embedding"]).all()
    assert (final.opt_state[1][0].mu["embed"]["embedding"] == 0).all()


def test_soft_weight_zero_is_cross_entropy():
    config = dataclasses.replace(
        gradient_config(),
        method=dataclasses.replace(
            helpers.small_config().method, soft_weight=0.0, hard_weight=1.0
        ),
    )
    found, _ = run(config, steps=1, devices=jax.devices()[:1])
    wanted = 0.5 * (found[0]["nll"] / found[0]["count"]).sum()
    np.testing.assert_allclose(found[0]["loss"], wanted, rtol=1e-6)


def test_chunk_size_from_memory():
    assert losses.chunk_size(16, 32000) == 128


@pytest.mark.parametrize(
    ("platform", "kind", "memory_mib", "vocab_size", "expected"),
    [
        ("cpu", "cpu", 0, 32000, 256),  # 32 MiB
        ("cpu", "cpu", 4096, 32000, 1024),
        ("gpu", "NVIDIA H200 141GB HBM3e", 0, 128256, 4096),  # a 64th: 2,256 MiB
        ("gpu", "NVIDIA H100 80GB HBM3", 0, 128256, 2048),
        ("gpu", "NVIDIA H200 141GB HBM3e", 0, 32000, 8192),
        ("gpu", "NVIDIA H200 141GB HBM3e", 256, 128256, 512),
        ("tpu", "TPU v5 lite", 0, 128256, 512),
        ("gpu", "a GPU of 64 GiB", 0, 128256, 2048),  # it says so itself
    ],
)
def test_chunks_of_the_head_follow_the_device(
    platform, kind, memory_mib, vocab_size, expected
):
    device = types.SimpleNamespace(
        platform=platform,
        device_kind=kind,
        memory_stats=lambda: {"bytes_limit": 64 * 2**30},
    )
    assert program.head_chunk_size(memory_mib, vocab_size, device) == expected


def test_a_device_that_does_not_say_its_memory():
    device = types.SimpleNamespace(
        platform="gpu", device_kind="another", memory_stats=lambda: None
    )
    with pytest.raises(ValueError, match=r"--config\.train\.memory_mib=256"):
        program.head_chunk_size(0, 32000, device)


def online(config, *, whole=False, mesh_config=None, devices=None):
    """Loss and gradient norm of a first step, with the teacher in it or in a cache."""
    mesh = sharding.make_mesh(mesh_config or MeshConfig(), devices=devices)
    data = load_data(config, splits=("train",))
    shape = student_shape(config, data.tokenizer)
    model = make_model(shape, mesh, dtype="float32")
    shape_of_teacher = teacher_shape(config, data.tokenizer)
    teacher = make_model(shape_of_teacher, mesh, dtype="float32")
    frozen = jax.jit(
        lambda key: decoder.init_params(shape_of_teacher, key),
        out_shardings=teacher.shardings,
    )(jax.random.key(7))
    # Random weights of the usual size make nearly uniform rows.
    frozen["embed"]["embedding"] *= np.float32(30.0)
    plan = make_plan(config, shape, data.train)
    results = []
    for live in (True, False):
        made = program.Program(config, model, mesh, teacher=teacher if live else None)
        batch = loader.make_batch(
            plan,
            0,
            terms=made.terms(0),
            rows=sharding.local_rows(mesh, made.num_rows),
            online=True,
        )
        batch = sharding.global_batch(batch, mesh, made.num_rows)
        current = state.init_state(
            made.abstract, made.optimizer, student_params(config, model, "")
        )
        if live:
            _, metrics = made.step(current, batch, frozen)
        else:
            label = step.make_label_step(
                teacher.graphdef,
                mesh,
                teacher.abstract,
                k=None if whole else config.cache.k,
                temperatures=(config.method.temperature,),
                chunk_size=16,
            )(frozen, batch, None)
            lead = batch.tokens.shape
            records = TeacherRecords(
                log_probs=label["log_probs_NK"].reshape(*lead, -1),
                log_z=label["log_z_NS"].reshape(lead),
                ids=None if whole else label["ids_NK"].reshape(*lead, -1),
            )
            batch = dataclasses.replace(batch, teacher=records)
            batch = jax.device_put(batch, NamedSharding(mesh, sharding.BATCH_SPEC))
            _, metrics = made.step(current, batch)
        results.append(jax.tree.map(np.asarray, metrics))
    return results


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("kind", ["top_k", "dense"])
def test_online_is_offline(kind, shape):
    """A teacher in the step gives what its labels in the batch give."""
    config = gradient_config(num_microbatches=2)
    config.teacher.online, config.cache.kind = True, kind
    mesh = MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])
    devices = jax.devices()[: int(np.prod(shape))]
    live, stored = online(
        config, whole=kind == "dense", mesh_config=mesh, devices=devices
    )
    assert live["kl"].sum() / live["count"].sum() > 0.1
    assert_same(([live],), ([stored],))


def test_schedules_reach_the_batch_and_the_step():
    config = gradient_config(steps=5)
    config.method = dataclasses.replace(
        config.method,
        hard_weight=0.0,
        soft_weight=1.0,
        weight_schedule="linear",
        final_hard_weight=1.0,
        final_soft_weight=0.0,
        temperature=2.0,
        temperature_schedule="cosine",
        final_temperature=1.0,
    )
    validate.validate(config)
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    data = load_data(config, splits=("train",))
    shape = student_shape(config, data.tokenizer)
    model = make_model(shape, mesh, dtype="float32")
    made = program.Program(config, model, mesh)
    found = [
        {t.kind: t.weight for t in made.terms(index) if t.view == 0}
        for index in range(5)
    ]
    assert [w["hard"] for w in found] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert [w["soft"] for w in found] == pytest.approx([0.5, 0.375, 0.25, 0.125, 0])
    assert [made.temperature(i) for i in range(5)] == [2.0, 2.0, 2.0, 1.0, 1.0]
    assert made.step_at(2.0) is made.step and made.step_at(1.0) is not made.step
    plan = make_plan(config, shape, data.train)
    cache = FakeCache(data.train, shape.vocab_size)
    current = state.init_state(
        made.abstract, made.optimizer, student_params(config, model, "")
    )
    for index in (0, 4):
        batch = loader.make_batch(
            plan,
            index,
            terms=made.terms(index),
            cache=cache,
            temperature=made.temperature(index),
        )
        assert batch.weights["hard"].any() == (index == 4)
        assert batch.weights["soft"].any() == (index == 0)
        train_step = made.step_at(made.temperature(index))
        current, metrics = train_step(
            current, sharding.global_batch(batch, mesh, made.num_rows)
        )
        assert bool(metrics["finite"]) and (metrics["kl"].sum() > 0) == (index == 0)


def test_a_step_moves_nothing_but_its_batch_and_its_metrics():
    """What crosses between host and devices is asked for by name, or refused."""
    config = gradient_config()
    mesh = sharding.make_mesh(MeshConfig())
    data = load_data(config, splits=("train",))
    shape = student_shape(config, data.tokenizer)
    made = program.Program(config, make_model(shape, mesh, dtype="float32"), mesh)
    make_params = student_params(config, make_model(shape, mesh, dtype="float32"), "")
    plan = make_plan(config, shape, data.train)
    cache = FakeCache(data.train, shape.vocab_size)
    current = made.init(make_params)
    for index in range(3):
        batch = loader.make_batch(
            plan,
            index,
            terms=made.terms(index),
            cache=cache,
            temperature=2.0,
            rows=sharding.local_rows(mesh, made.num_rows),
        )
        # The first call compiles, which moves constants.
        guard = "disallow" if index else "allow"
        with jax.transfer_guard(guard):
            placed = sharding.global_batch(batch, mesh, made.num_rows)
            current, metrics = made.step(current, placed)
            jax.device_get(metrics)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="ransfer"):
        made.step(current, batch)  # rows of the host are not placed in silence
