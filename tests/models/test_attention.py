"""Every kernel attends alike, and each mesh and model gets the kernel it can run."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from kdjax.config import DecoderConfig, MeshConfig
from kdjax.experiment.models import make_model
from kdjax.models import attention, decoder, layers
from kdjax.models.attention import Kernel, ScoreOptions
from kdjax.parallel import sharding

SHAPE = DecoderConfig(
    vocab_size=61,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=48,
    init_std=0.2,
)


def mesh_of(data, fsdp, tensor):
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return sharding.make_mesh(config, devices=jax.devices()[: data * fsdp * tensor])


def fake_mesh(platform, *, tensor=1, capability="9.0"):
    """A mesh of devices that are not here."""
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    devices = np.empty((1, 1, tensor), object)
    devices.fill(device)
    return types.SimpleNamespace(
        devices=devices, shape={"data": 1, "fsdp": 1, "tensor": tensor}
    )


def packed(rows, length, seed=0):
    """Segments of uneven lengths that cross the blocks of 128, then padding."""
    rng = np.random.default_rng(seed)
    segments_BT = np.zeros((rows, length), np.int32)
    for row in segments_BT:
        ends = np.sort(rng.choice(np.arange(1, length), 4, replace=False))
        for number, (start, stop) in enumerate(itertools.pairwise(ends), 1):
            row[start:stop] = number
        row[: ends[0]] = 4
    return jnp.asarray(segments_BT)


def values_and_grads(attend, query, key, value):
    def total(*arrays):
        mixed = attend(*arrays)
        weights = jnp.cos(jnp.arange(mixed.size, dtype=mixed.dtype))
        return (mixed * weights.reshape(mixed.shape)).sum(), mixed

    run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (_, mixed), grads = run(query, key, value)
    return mixed, *grads


@pytest.mark.parametrize(
    ("length", "num_blocks"), [(100, 1), (256, 2), (300, 3), (520, 4)]
)
@pytest.mark.parametrize("window", [None, 150])
def test_blocks_of_queries_are_whole_rows(length, num_blocks, window):
    options = ScoreOptions(windows=(0,) if window is None else (0, 150))
    arrays = [
        jax.random.normal(key, (2, length, heads, 8))
        for key, heads in zip(
            jax.random.split(jax.random.key(0), 3), (4, 2, 2), strict=True
        )
    ]
    segments_BT = packed(2, length)
    assert len(attention.xla_blocks(length)) == num_blocks
    whole = attention.masked(*attention._causal(segments_BT), options)
    blocks = attention.within_segments(attention.XLA, segments_BT, options)
    size = None if window is None else jnp.int32(window)
    expected, actual = (
        values_and_grads(lambda *x, f=f: f(*x, size), *arrays) for f in (whole, blocks)
    )
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("length", [256, 384])
def test_splash_is_attend_on_packed_rows(shape, length):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (4, 2, 2)
    arrays = [
        jax.random.normal(key, (4, length, h, 64))
        for key, h in zip(keys, heads, strict=True)
    ]
    segments_BT = packed(4, length)
    kernel = attention.select_kernel(
        SHAPE, mesh_of(*shape), dtype="float32", name="splash"
    )
    assert attention.kernel_name(kernel, length) == "splash" and kernel.interpret
    splash = attention.within_segments(kernel, segments_BT)
    plain = attention.within_segments(attention.XLA, segments_BT)
    actual = values_and_grads(splash, *arrays)
    expected = values_and_grads(plain, *arrays)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "rule", "window"),
    [
        ("splash", ScoreOptions(windows=(100,), softcap=2.0, scalar=20), None),
        ("splash", ScoreOptions(windows=(0, 100), softcap=2.0), 100),
        ("splash", ScoreOptions(windows=(0, 100)), 0),
        ("splash", ScoreOptions(windows=(60, 100)), 60),
        ("cudnn", ScoreOptions(windows=(100,), scalar=20), None),
        ("cudnn", ScoreOptions(windows=(0, 100)), 100),
        ("cudnn", ScoreOptions(windows=(0, 100)), 0),
    ],
)
def test_windows_caps_and_scales_are_those_of_attend(name, rule, window, monkeypatch):
    """Against a mask of our own; cuDNN's call is computed by XLA."""
    theirs = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *arrays, **options: theirs(
            *arrays, **options | {"implementation": "xla"}
        ),
    )
    length = 256
    arrays = [
        jax.random.normal(jax.random.key(n), (1, length, heads, 64))
        for n, heads in enumerate((4, 2, 2))
    ]
    segments_BT = packed(1, length)
    size = window if window is not None else rule.windows[0]
    time = np.arange(length)
    distance = time[:, None] - time[None, :]
    mask = (distance >= 0) & ((distance < size) | (size == 0))
    mask &= np.asarray(segments_BT[0][:, None] == segments_BT[0][None, :])
    expected = values_and_grads(
        lambda *x: attention.attend(*x, jnp.asarray(mask)[None, None], rule), *arrays
    )
    kernel = Kernel(name=name, mesh=mesh_of(1, 1, 1), interpret=True)
    traced = None if window is None else jnp.int32(window)
    for chosen in (kernel, attention.XLA):
        attend = attention.within_segments(chosen, segments_BT, rule)
        actual = values_and_grads(lambda *x: attend(*x, window=traced), *arrays)  # noqa: B023
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5)


def test_segments_are_kept_apart():
    """The comparison above can fail: without segments the rows differ."""
    arrays = [jax.random.normal(jax.random.key(n), (1, 128, 2, 64)) for n in range(3)]
    attend = attention.within_segments(attention.XLA, packed(1, 128))
    merged = attention.within_segments(attention.XLA, jnp.ones((1, 128), jnp.int32))
    assert not np.allclose(attend(*arrays), merged(*arrays), atol=1e-2)


@pytest.mark.parametrize(
    ("remat", "windows"),
    [("none", ()), ("dots", ()), ("full", ()), ("full", (100, 0))],
)
def test_a_model_on_a_mesh_learns_alike(remat, windows):
    mesh = mesh_of(2, 2, 2)
    shape = dataclasses.replace(SHAPE, windows=windows)
    params = decoder.init_params(shape, jax.random.key(0))
    segments_BT = packed(4, 128)
    tokens_BT = jax.random.randint(jax.random.key(1), (4, 128), 0, SHAPE.vocab_size)
    positions_BT = jnp.tile(jnp.arange(128)[None], (4, 1))

    def grads(kernel, dtype):
        model = make_model(shape, mesh, dtype=dtype, remat=remat, kernel=kernel)

        def total(params):
            hidden_BTD = decoder.hidden_states(
                model.graphdef, params, tokens_BT, positions_BT, segments_BT
            )
            return (hidden_BTD.astype(jnp.float32) ** 3).sum()

        placed = jax.device_put(params, model.shardings)
        return jax.jit(jax.grad(total))(placed)

    actual, expected = grads("splash", "float32"), grads("xla", "float32")
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            a, e, rtol=1e-3, atol=1e-4 * np.abs(e).max()
        ),
        actual,
        expected,
    )


def test_rows_that_do_not_fill_blocks_take_xla():
    kernel = Kernel(name="splash", mesh=mesh_of(1, 1, 1), interpret=True)
    assert attention.kernel_name(kernel, 128) == "splash"
    assert attention.kernel_name(kernel, 200) == "xla"
    assert attention.kernel_name(Kernel(name="cudnn"), 129) == "xla"
    arrays = [jax.random.normal(jax.random.key(n), (1, 200, 2, 64)) for n in range(3)]
    segments_BT = packed(1, 200)
    np.testing.assert_array_equal(
        attention.within_segments(kernel, segments_BT)(*arrays),
        attention.within_segments(attention.XLA, segments_BT)(*arrays),
    )


@pytest.mark.parametrize(
    ("platform", "changes", "name"),
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "splash"),
        ("tpu", {"head_dim": 128}, "splash"),
        ("tpu", {"head_dim": 80}, "xla"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"dtype": "float32"}, "xla"),
        ("gpu", {"head_dim": 256}, "xla"),
        ("gpu", {"head_dim": 12}, "xla"),
        ("gpu", {"capability": "7.0"}, "xla"),
        ("gpu", {"capability": "gfx90a"}, "xla"),
        ("tpu", {"tensor": 2}, "splash"),
        ("tpu", {"tensor": 4}, "xla"),  # 2 key heads
        ("gpu", {"tensor": 4}, "xla"),
        ("tpu", {"windows": (8, 0), "attention_softcap": 50.0}, "splash"),
        ("tpu", {"windows": (8, 0, 16)}, "xla"),
        ("gpu", {"windows": (8, 0, 16)}, "cudnn"),
        ("gpu", {"attention_softcap": 50.0}, "xla"),
    ],
)
def test_auto_takes_what_devices_and_model_allow(platform, changes, name):
    changes = dict(changes)
    mesh = fake_mesh(
        platform,
        tensor=changes.pop("tensor", 1),
        capability=changes.pop("capability", "9.0"),
    )
    dtype = changes.pop("dtype", "bfloat16")
    shape = dataclasses.replace(SHAPE, **changes)
    kernel = attention.select_kernel(shape, mesh, dtype=dtype)
    assert (kernel.name, kernel.interpret) == (name, False)
    if name == "xla" and platform != "cpu":
        insisted = {"tpu": "splash", "gpu": "cudnn"}[platform]
        with pytest.raises(ValueError, match=f"attention='{insisted}': .*use"):
            attention.select_kernel(shape, mesh, dtype=dtype, name=insisted)


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="attention='flash' is unknown: use one of"):
        attention.select_kernel(SHAPE, mesh_of(1, 1, 1), dtype="float32", name="flash")


def test_the_kernel_is_part_of_the_graph():
    mesh = mesh_of(1, 2, 2)
    assert isinstance(mesh, Mesh)
    graphs = [
        make_model(SHAPE, mesh, dtype="float32", kernel=name).graphdef
        for name in ("xla", "splash", "splash")
    ]
    assert graphs[0] != graphs[1] and graphs[1] == graphs[2]
    assert hash(graphs[1]) == hash(graphs[2])


def test_dots_keep_what_cudnn_makes(monkeypatch):
    """The backward pass of a layer has no second forward pass of attention."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    attend = attention.within_segments(
        Kernel(name="cudnn", mesh=mesh_of(2, 2, 2)), packed(4, 256)
    )
    x = jax.ShapeDtypeStruct((4, 256, 2, 64), jnp.bfloat16)
    times = {}
    for remat in ("none", "dots", "full"):
        layer = layers.recomputing(lambda x, _: (attend(x, x, x), None), remat)

        def total(x):
            mixed, _ = jax.lax.scan(layer, x, None, length=3)  # noqa: B023
            return mixed.astype(jnp.float32).sum()

        program = str(jax.make_jaxpr(jax.grad(total))(x))
        times[remat] = program.count("dot_product_attention_fwd_wrapper[")
    assert times == {"none": 1, "dots": 1, "full": 2}


def test_cudnn_lowers_for_cuda(monkeypatch):
    """CuDNN's calls, in the forward and the backward pass, without a device."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    kernel = Kernel(name="cudnn", mesh=mesh_of(2, 2, 2))
    arrays = [
        jax.ShapeDtypeStruct((4, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)
    ]

    def total(query, key, value, segments_BT):
        attend = attention.within_segments(kernel, segments_BT)
        return attend(query, key, value).astype(jnp.float32).sum()

    lowered = (
        jax.jit(jax.grad(total, (0, 1, 2)))
        .trace(*arrays, jax.ShapeDtypeStruct((4, 256), jnp.int32))
        .lower(lowering_platforms=("cuda",))
    )
    text = lowered.as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    assert "CAUSAL" in text
    assert "stablehlo.all_gather" not in text
