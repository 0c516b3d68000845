"""Adapters: only they are trained, and what is exported is a plain model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax import train
from kdjax.aot import compile
from kdjax.bench import workload
from kdjax.config import DecoderConfig, LoraConfig, MeshConfig, T5Config
from kdjax.experiment import validate
from kdjax.experiment.models import make_model
from kdjax.models import decoder, flops, hf, lm, lora, t5
from kdjax.models.decoder_shape import select_layers
from kdjax.parallel import sharding
from kdjax.pipeline import distill
from kdjax.training import meter, program
from tests import helpers
from tests.helpers import TrainSteps, load_student, step_config, summary

SHAPE = DecoderConfig(
    vocab_size=67,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_width=56,
    init_std=0.1,
    qkv_bias=True,
    family="qwen2",
)
T5 = T5Config(
    vocab_size=67,
    num_decoder_layers=3,
    width=32,
    num_heads=4,
    head_dim=16,
    mlp_width=56,
    num_buckets=8,
    max_distance=16,
)
LORA = LoraConfig(rank=4, alpha=32.0)


def drawn(abstract, params):
    """All parameters, both factors of the adapters at random."""
    flat = flatten_dict(lora.beside(params, abstract, jax.random.key(1)), sep="/")
    for path in list(flat):
        if path.endswith("lora_b"):
            key = jax.random.fold_in(jax.random.key(2), len(path))
            flat[path] = 0.1 * jax.random.normal(key, flat[path].shape)
    return unflatten_dict(flat, sep="/")


def placed(abstract):
    """The shapes, each on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
    )


def tokens_of(*shape):
    return np.random.default_rng(0).integers(2, 67, shape, dtype=np.int32)


def decoder_logits(graphdef, params, tokens_BT):
    positions_BT = np.tile(
        np.arange(tokens_BT.shape[1], dtype=np.int32), (len(tokens_BT), 1)
    )
    hidden = decoder.hidden_states(
        graphdef, params, tokens_BT, positions_BT, np.ones_like(tokens_BT)
    )
    return decoder.logits(params, hidden)


def t5_logits(graphdef, params, encoder_tokens, decoder_tokens):
    rows = [t5.Rows(x, np.ones_like(x)) for x in (encoder_tokens, decoder_tokens)]
    return lm.logits(graphdef, params, t5.hidden_states(graphdef, params, *rows))


def names_of(abstract):
    flat = flatten_dict(abstract, sep="/")
    return {p.removesuffix("/lora_a") for p in flat if p.endswith("lora_a")}


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ((".*",), {*(f"attention/{n}" for n in ("query", "key", "value", "out"))}
         | {f"mlp/{n}" for n in ("gate", "up", "down")}),
        (("query", "value"), {"attention/query", "attention/value"}),
        (("mlp/.*",), {"mlp/gate", "mlp/up", "mlp/down"}),
        (("layers/attention/out",), {"attention/out"}),
    ],
)  # fmt: skip
def test_targets_name_linear_layers(targets, wanted):
    config = LoraConfig(rank=2, targets=targets)
    _, abstract = decoder.create(SHAPE, adapters=config)
    assert names_of(abstract) == {f"layers/{name}" for name in wanted}
    flat = flatten_dict(abstract, sep="/")
    for name in names_of(abstract):
        layers, in_dim, out_dim = flat[f"{name}/kernel"].shape
        assert flat[f"{name}/lora_a"].shape == (layers, in_dim, 2)
        assert flat[f"{name}/lora_b"].shape == (layers, 2, out_dim)
    assert lora.without(abstract) == decoder.create(SHAPE)[1]


def test_targets_of_t5():
    _, abstract = t5.create(T5, adapters=LoraConfig(rank=2))
    linear = {p for p in flatten_dict(t5.create(T5)[1], sep="/") if "kernel" in p}
    assert {f"{name}/kernel" for name in names_of(abstract)} == linear
    cross = LoraConfig(rank=2, targets=("decoder/.*/query",))
    found = names_of(t5.create(T5, adapters=cross)[1])
    assert found == {"decoder/layers/attention/query", "decoder/layers/cross/query"}
    with pytest.raises(ValueError, match=r"targets='q_proj' matches no linear layer"):
        t5.create(T5, adapters=LoraConfig(rank=2, targets=("query", "q_proj")))


def test_new_adapters_change_nothing_and_are_those_of_the_authors():
    """B is 0, A uniform within +-I^-1/2."""
    graphdef, abstract = decoder.create(SHAPE, adapters=LORA)
    plain = decoder.init_params(SHAPE, jax.random.key(0))
    params = lora.beside(plain, placed(abstract), jax.random.key(1))
    tokens_BT = tokens_of(2, 12)
    np.testing.assert_array_equal(
        decoder_logits(graphdef, params, tokens_BT),
        decoder_logits(decoder.create(SHAPE)[0], plain, tokens_BT),
    )
    for path, x in flatten_dict(params, sep="/").items():
        if path.endswith("lora_b"):
            assert not x.any()
        elif path.endswith("lora_a"):
            bound = x.shape[1] ** -0.5
            assert np.abs(x).max() <= bound and abs(x.mean()) < 0.2 * bound
            np.testing.assert_allclose(x.std(), bound / 3**0.5, rtol=0.15)
            assert not np.array_equal(x[0], x[1])
    assert lora.without(params) is not params
    jax.tree.map(np.testing.assert_array_equal, lora.without(params), plain)


def test_merging_is_the_formula():
    _, abstract = decoder.create(SHAPE, adapters=LORA)
    params = drawn(placed(abstract), decoder.init_params(SHAPE, jax.random.key(0)))
    merged = flatten_dict(lora.merged(params, LORA), sep="/")
    flat = {
        p: np.asarray(x, np.float64) for p, x in flatten_dict(params, sep="/").items()
    }
    assert merged.keys() == {p for p in flat if not lora.is_adapter(p)}
    for path, found in merged.items():
        wanted = flat[path]
        if path.endswith("kernel"):
            name = path.removesuffix("kernel")
            wanted = wanted + 32 / 4 * flat[f"{name}lora_a"] @ flat[f"{name}lora_b"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_product():
    """dA = s dW B^T and dB = s A^T dW, of the merged model's dense dW."""
    graphdef, abstract = decoder.create(SHAPE, adapters=LORA)
    params = drawn(placed(abstract), decoder.init_params(SHAPE, jax.random.key(0)))
    tokens_BT, plain = tokens_of(2, 12), decoder.create(SHAPE)[0]
    probe = jax.random.normal(jax.random.key(3), (2, 12, 67))

    def loss(graphdef, params):
        return (probe * decoder_logits(graphdef, params, tokens_BT)).sum()

    ours = flatten_dict(jax.grad(lambda p: loss(graphdef, p))(params), sep="/")
    merged = lora.merged(params, LORA)
    dense = flatten_dict(jax.grad(lambda p: loss(plain, p))(merged), sep="/")
    flat = flatten_dict(params, sep="/")
    for name in names_of(abstract):
        d_kernel = np.asarray(dense[f"{name}/kernel"], np.float64)
        a, b = (np.asarray(flat[f"{name}/{n}"], np.float64) for n in lora.NAMES)
        for path, wanted in (
            (f"{name}/lora_a", 8 * d_kernel @ b.swapaxes(1, 2)),
            (f"{name}/lora_b", 8 * a.swapaxes(1, 2) @ d_kernel),
        ):
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(ours[path], wanted, atol=1e-4 * scale)


def test_what_is_exported_computes_the_same(tmp_path):
    graphdef, abstract = decoder.create(SHAPE, adapters=LORA)
    params = drawn(placed(abstract), decoder.init_params(SHAPE, jax.random.key(0)))
    tokens_BT = tokens_of(2, 20)
    wanted = decoder_logits(graphdef, params, tokens_BT)
    hf.save(tmp_path / "model", SHAPE, lora.merged(params, LORA))
    assert hf.read_config(tmp_path / "model") == SHAPE
    again = hf.load_params(tmp_path / "model", SHAPE)
    found = decoder_logits(decoder.create(SHAPE)[0], again, tokens_BT)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    plain = decoder_logits(decoder.create(SHAPE)[0], lora.without(params), tokens_BT)
    assert np.abs(plain - wanted).max() > 0.1

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    with torch.no_grad():
        theirs = model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(theirs, wanted, atol=1e-4)


def test_what_is_exported_of_t5_computes_the_same(tmp_path):
    graphdef, abstract = t5.create(T5, adapters=LORA)
    params = drawn(placed(abstract), t5.init_params(T5, jax.random.key(0)))
    inputs = tokens_of(2, 15), tokens_of(2, 9)
    wanted = t5_logits(graphdef, params, *inputs)
    hf.save(tmp_path / "model", T5, lora.merged(params, LORA))
    again = hf.load_params(tmp_path / "model", T5)
    found = t5_logits(t5.create(T5)[0], again, *inputs)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    plain = t5_logits(t5.create(T5)[0], lora.without(params), *inputs)
    assert np.abs(plain - wanted).max() > 0.1

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    read, written = (torch.tensor(x, dtype=torch.long) for x in inputs)
    with torch.no_grad():
        theirs = model(input_ids=read, decoder_input_ids=written).logits.numpy()
    np.testing.assert_allclose(theirs, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["decoder", "t5"])
def test_adapters_are_split_as_their_kernels(kind):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    create, shape = (decoder.create, SHAPE) if kind == "decoder" else (t5.create, T5)
    _, abstract = create(shape, adapters=LORA)
    specs = flatten_dict(
        jax.tree.map(lambda s: s.spec, sharding.param_shardings(abstract, mesh)),
        sep="/",
    )
    for name in names_of(abstract):
        _, in_axis, out_axis = specs[f"{name}/kernel"]
        found = [tuple(specs[f"{name}/{n}"]) for n in lora.NAMES]
        assert found == [(None, in_axis), (None, None, out_axis)]


# At first B is 0, and A has no gradient: the second step moves it.
@pytest.fixture(scope="module")
def steps():
    return TrainSteps(step_config(lora=LORA), devices=jax.devices()[:1])


def test_only_adapters_are_trained(steps):
    before, after = steps.params(0), steps.params(2)
    adapters = {path for path in before if lora.is_adapter(path)}
    assert len(adapters) == 14
    for path in before:
        assert np.array_equal(before[path], after[path]) == (path not in adapters), path
    moments = flatten_dict(steps.made.abstract.opt_state[0].mu, sep="/")
    assert moments.keys() == adapters
    rows = meter.state_table(steps.made.abstract, steps.made.frozen_paths)
    found = {row["what"]: int(row["numbers"].replace(",", "")) for row in rows}
    sizes = {path: x.size for path, x in before.items()}
    trained = sum(sizes[path] for path in adapters)
    assert found == {
        "parameters": sum(sizes.values()),
        "of them trained": trained,
        "optimizer state": 2 * trained + 2,  # and two counters
    }


def test_a_mesh_and_microbatches_change_nothing(steps):
    config = step_config(lora=LORA, num_microbatches=2)
    mesh, devices = MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4]
    other = TrainSteps(config, mesh=mesh, devices=devices)
    for one, two in zip(steps.metrics, other.metrics, strict=True):
        for name in ("loss", "grad_norm", "nll", "kl"):
            np.testing.assert_allclose(one[name], two[name], rtol=1e-5, err_msg=name)
    first, second = (s.states[1].opt_state[0].mu for s in (steps, other))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, second
    )


def test_products_that_are_spared_are_counted():
    plain = step_config()
    _, params = decoder.create(SHAPE)
    nothing = {"num_frozen": 0, "num_frozen_encoder": 0, "trains_head": True}
    assert program.frozen_params_kwargs(plain, params) == nothing
    _, params = decoder.create(SHAPE, adapters=LORA)
    weights = flops.matmul_params(SHAPE) - 67 * 32
    wanted = {"num_frozen": weights, "trains_head": False}
    assert (
        program.frozen_params_kwargs(step_config(lora=LORA), params) == nothing | wanted
    )
    _, params = t5.create(T5, adapters=LORA)
    found = program.frozen_params_kwargs(step_config(lora=LORA), params)
    sizes = {"num_tokens": 8, "num_encoder_tokens": 24, "num_head_tokens": 8}
    sizes |= {"row_length": 1, "encoder_row_length": 1}
    forward = flops.forward_flops(T5, **sizes)
    pair = 4 * T5.num_heads * T5.head_dim  # of positions: scores and values
    scores = 24 * T5.num_encoder_layers + 8 * 2 * T5.num_decoder_layers
    half = forward - scores * pair
    assert flops.train_flops(T5, **sizes, **found) == 3 * forward - half


def test_neither_a_full_gradient_nor_a_merged_weight_takes_memory():
    """Temporary memory of the step, beside that of training all weights.

    It holds the kernels of a layer or two, not of all eight.
    """
    shape = dataclasses.replace(SHAPE, width=256, mlp_width=1024, num_layers=8)
    found = {}
    for rank in (0, 4):
        config = step_config(
            shape=shape,
            lora=LoraConfig(rank=rank),
            batch_size=1,
            row_length=16,
            remat="dots",
        )
        mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
        model = make_model(
            shape, mesh, dtype="float32", remat="dots", adapters=config.student.lora
        )
        made = program.Program(config, model, mesh)
        batch = program.abstract_batch(config, shape, mesh, vocab_size=67)
        compiled = made.step.lower(made.abstract, batch).compile()
        found[rank] = compiled.memory_analysis().temp_size_in_bytes
    kernels = sum(x.size * 4 for x in jax.tree.leaves(model.abstract["layers"]))
    assert found[0] > kernels > 3 * found[4]


def test_a_whole_run(lora_run, tmp_path, capsys, monkeypatch):
    """Trained with averages, resumed, evaluated unmerged, exported and evaluated."""
    config, run = lora_run
    results = summary(run)["student"]
    metrics = helpers.score(config, run, "student")
    assert metrics["nll"] == pytest.approx(results["nll"], abs=1e-6)

    helpers.export(config, run, tmp_path / "plain")
    shape = hf.read_config(tmp_path / "plain")
    assert shape == select_layers(hf.read_config(config.teacher.path), (1,))
    plain = helpers.score(config, run, str(tmp_path / "plain"))
    assert plain["nll"] == pytest.approx(metrics["nll"], abs=1e-5)

    # The base is the teacher's layer, bit for bit; what was learned is in A and B.
    _, params = load_student(config, run)
    base = hf.load_params(config.teacher.path, shape, keep_layers={"layers": (1,)})
    jax.tree.map(np.testing.assert_array_equal, lora.without(params), base)

    trained, train_loop = [], distill.train_loop

    def keep(*arguments, **keywords):
        trained.append(train_loop(*arguments, **keywords))
        return trained[-1]

    monkeypatch.setattr(distill, "train_loop", keep)
    again = helpers.copy_run(run, tmp_path / "again", unfinished=True)
    train.run(config, again)
    printed = capsys.readouterr().out
    assert "of them trained" in printed and "averages" in printed
    assert summary(again)["student"] == results
    jax.tree.map(np.testing.assert_array_equal, trained[0].params, params)


def test_plans_and_benchmarks_know_of_adapters(tmp_path):
    folder = tmp_path / "model"
    hf.save(folder, SHAPE, decoder.init_params(SHAPE, jax.random.key(0)))
    config = helpers.small_config(
        student={"init": "folder", "path": str(folder), "lora": LORA},
        optim={"ema_decay": 0.9},
    )
    validate.validate(config)
    config.train.row_length, config.train.chunk_size = 16, 16
    found = compile.compile_step(config, jax.devices()[:1])
    assert found.memory["averages"] * 2 < found.memory["optimizer state"] + 1
    assert found.memory["optimizer state"] < found.memory["parameters"] / 2
    held = compile.state_bytes(config, jax.devices()[:1])
    kinds = ("parameters", "optimizer state", "averages", "averages")
    assert held == 4 + sum(found.memory[kind] for kind in kinds)

    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    step = workload.Step(workload.make_synthetic(config, tmp_path / "cache", mesh))
    assert bool(step.prepared()["finite"])


@pytest.mark.parametrize(
    ("student", "adapters", "message"),
    [
        ({"init": "random"}, {"rank": 4}, "student.lora.rank=4 with student.init="),
        ({}, {"rank": -1}, "student.lora.rank=-1 is below 0"),
        ({}, {"rank": 4, "alpha": 0.0}, "student.lora.alpha=0.0 must be positive"),
        ({}, {"rank": 4, "targets": ()}, "student.lora.targets=() names no layer"),
        ({}, {"rank": 4, "targets": ("(",)}, "student.lora.targets='(' is no regular"),
    ],
)
def test_what_cannot_be_is_refused(student, adapters, message):
    config = helpers.small_config(
        student={"init": "teacher_layers", "keep_layers": (1,)} | student
    )
    config.student.lora = LoraConfig(**adapters)
    with pytest.raises(ValueError) as refused:
        validate.validate(config)
    assert message in str(refused.value)


def test_bfloat16_runs_as_it_is_merged():
    graphdef, abstract = decoder.create(SHAPE, dtype="bfloat16", adapters=LORA)
    params = drawn(placed(abstract), decoder.init_params(SHAPE, jax.random.key(0)))
    tokens_BT = tokens_of(2, 12)
    found = decoder_logits(graphdef, params, tokens_BT)
    merged = decoder_logits(
        decoder.create(SHAPE)[0], lora.merged(params, LORA), tokens_BT
    )
    assert found.dtype == jnp.float32
    assert np.corrcoef(np.ravel(found), np.ravel(merged))[0, 1] > 0.999
