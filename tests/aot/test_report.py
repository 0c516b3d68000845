"""Plans: what is reported, what is flagged, what is refused."""

import dataclasses
import importlib.util
import json
import runpy

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import config as config_lib
from kdjax.aot import bound, compile, hlo, topology, traffic
from kdjax.aot import report as reports
from kdjax.config import DecoderConfig, MeshConfig, StudentConfig
from kdjax.models import flops
from kdjax.parallel import sharding
from kdjax.runtime import chips
from tests import helpers

SHAPE = DecoderConfig(
    vocab_size=320,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=64,
)
GIB = 2**30


def config(**changes):
    parts = {
        "student": StudentConfig(decoder=SHAPE),
        "mesh": MeshConfig(data=2, fsdp=4),
        "train": {"batch_size": 16, "row_length": 64, "chunk_size": 16},
    }
    return helpers.small_config(**parts | changes)


@pytest.fixture(scope="module")
def step():
    return compile.compile_step(config(), jax.devices())


def fake(step, gib, **changes):
    """A report that needs `gib` GiB."""
    return dataclasses.replace(step, memory={"peak": int(gib * GIB)}, **changes)


def test_memory_by_kind(step):
    params = flops.params_count(SHAPE)
    norms = (2 * SHAPE.num_layers + 1) * SHAPE.width
    held = 4 * ((params - norms) // 4 + norms)  # split over fsdp, norms everywhere
    assert step.memory["parameters"] == held
    assert step.memory["optimizer state"] == 2 * held + 2 * 4  # and two counters
    pairs = 8 * (4 + 4)  # k ids and log-probabilities
    assert step.memory["batch"] == 2 * 64 * (5 * 4 + 2 * 4 + 4 + pairs)
    arguments = ("parameters", "optimizer state", "batch")
    counter = 4
    assert step.memory["arguments"] == counter + sum(step.memory[k] for k in arguments)
    assert step.memory["aliased"] <= step.memory["outputs"]
    assert step.memory["peak"] > step.memory["arguments"] / 2
    assert step.written_bytes > 0 and step.compiler_flops > 0


def test_the_fused_head_communicates_no_logits(step):
    assert step.head_chunks == 128 // 16
    assert step.collectives and {c.kind for c in step.collectives} >= {"all-gather"}
    assert not [c for c in step.collectives if compile.is_logits(c, step)]
    assert not [c for c in step.collectives if compile.in_head_loop(c.loops)]
    gathers = [c for c in step.collectives if ("f32", (320, 32)) in c.shapes]
    assert gathers  # of the head's weight: [V, D] is not logits


def test_a_split_vocabulary_exchanges_numbers_of_tokens_alone():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    step = compile.compile_step(config(mesh=mesh), jax.devices())
    assert step.head_chunks == 256 // 16
    inside = [c for c in step.collectives if compile.in_head_loop(c.loops)]
    assert inside and all(compile.is_per_token(c) for c in inside)
    assert not [c for c in step.collectives if compile.is_logits(c, step)]
    assert not reports._warnings(step)


def test_logits_of_an_unfused_head_are_flagged(step):
    """The check can fail: here the width is split, so logits are summed whole."""
    mesh = sharding.make_mesh(config().mesh, devices=jax.devices())

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec))
        )

    def scan(chunks, weight):
        return jax.lax.map(lambda x: jax.nn.logsumexp(x @ weight.T, axis=-1), chunks)

    arguments = array((3, 16, 32), None, None, "fsdp"), array((320, 32), None, "fsdp")
    text = jax.jit(scan).lower(*arguments).compile().as_text()
    collectives = hlo.collectives(hlo.parse(text))
    flagged = [c for c in collectives if compile.is_logits(c, step)]
    assert [(c.kind, c.trips) for c in flagged] == [("all-reduce", 3)]
    report = reports._warnings(dataclasses.replace(step, collectives=tuple(flagged)))
    assert len(report) == 1 and "communicates logits" in report[0]


@pytest.mark.parametrize(
    ("dims", "in_loop", "expected"),
    [
        ((320, 32), False, False),  # the head
        ((320, 8), False, False),  # its part
        ((320,), False, False),
        ((32, 320), False, False),  # transposed
        ((16, 320), False, True),
        ((1, 16, 320), False, True),
        ((320, 24), False, True),
        ((16, 160), False, True),  # a part of the vocabulary
        ((320, 32), True, True),  # as many tokens as the width, or a head each chunk
        ((16, 32), True, False),
    ],
)
def test_what_counts_as_logits(step, dims, in_loop, expected):
    loop = hlo.Loop("while", "jit(step)/shard_map/while", None)
    loops = (loop,) if in_loop else ()
    collective = hlo.Collective(
        "all-reduce", "x", "", (("f32", dims),), 0, (0, 1), loops
    )
    step = dataclasses.replace(step, mesh={"data": 1, "fsdp": 4, "tensor": 2})
    assert compile.is_logits(collective, step) is expected
    assert compile.num_trips(collective, step) == (8 if in_loop else 1)


@pytest.mark.parametrize(
    ("dtype", "dims", "in_loop", "expected"),
    [
        ("f32", (128, 320), False, True),  # all tokens of a device at once
        ("f32", (2, 64, 320), False, True),
        ("bf16", (128, 320), False, False),
        ("f32", (16, 320), False, False),  # one chunk
        ("f32", (320, 32), False, False),  # the head
        ("f32", (4, 16, 320), True, False),  # parts of the sums of a chunk
    ],
)
def test_logits_written_outside_a_chunk(step, dtype, dims, in_loop, expected):
    assert step.chunk_tokens == 16 and not compile.logits_outside_chunks(step)
    loop = hlo.Loop("while", "jit(train_step)/jvp(head_loss)/while", None)
    loops = (loop,) if in_loop else ()
    kernel = traffic.Kernel("x", "fusion", "", ((dtype, dims),), 4, 0, loops, 1)
    written = dataclasses.replace(step, kernels=(*step.kernels, kernel))
    assert bool(compile.logits_outside_chunks(written)) is expected
    warnings = [w for w in reports._warnings(written) if "writes logits of more" in w]
    assert len(warnings) == expected


def test_bound_by_hand(step):
    chip = chips.Chip(peak=1e12, hbm_bytes=GIB, hbm_rate=1e9, link_rate=1e8)
    loop = hlo.Loop("while", "", 3)
    shapes = (("f32", (1000,)),)
    sent = hlo.Collective("all-gather", "x", "", shapes, 4000, (0, 1, 2, 3), (loop,))
    known = dataclasses.replace(step, written_bytes=500, collectives=(sent,))
    useful, repeated = bound.model_flops(known.config, SHAPE)
    tokens = {"num_tokens": 16 * 64, "row_length": 64}
    forward = flops.forward_flops(SHAPE, **tokens, num_head_tokens=0)
    assert useful == 3 * flops.forward_flops(SHAPE, **tokens, num_head_tokens=1024)
    assert repeated == 0
    least = bound.time_bound(known, chip)
    assert least.compute == pytest.approx(useful / 8 / 1e12)
    assert least.hbm == pytest.approx(2 * 500 / 1e9)
    assert least.links == pytest.approx(3 * 3000 / 1e8)
    assert least.seconds == least.links and least.network == 0
    full = config_lib.replace(known.config, "train.remat", "full")
    assert bound.model_flops(full, SHAPE) == (useful, forward)


@pytest.mark.parametrize(
    ("limit", "needed", "expected"),
    [
        (16.0, 6.0, 16 * 7),  # 4 GiB, and 2 more for each 16 rows: 6 times as many
        (16.0, 15.0, 16 * 2),
        (10.0, None, 16),  # twice as many need 12
        (4.5, 6.0, 16),
    ],
)
def test_largest_batch_is_on_a_line(step, monkeypatch, limit, needed, expected):
    def compiled(config, devices, *, effort):
        assert config.train.batch_size == 32 and effort == -1.0
        if needed is None:
            raise compile.DoesNotFit(12.0 * GIB, 1.0)
        return fake(step, needed)

    one_row = config(
        train={"batch_size": 16, "num_microbatches": 2, "row_length": 64}
    )  # 16 rows are one row of each of 8 devices in each of 2 microbatches
    monkeypatch.setattr(compile, "compile_step", compiled)
    first = fake(step, 4.0, config=one_row)
    best = compile.largest_batch(first, jax.devices(), limit * GIB, effort=-1.0)
    assert best == expected


@pytest.mark.parametrize("refuses", [True, False])  # as for TPUs, as for GPUs
def test_remedies_stack_up_until_one_fits(step, monkeypatch, refuses):
    tried = []

    def compiled(config, devices, *, effort):
        tried.append(config)
        if config.train.num_microbatches == 1:
            if not refuses:
                return fake(step, 20.0)
            raise compile.DoesNotFit(20.0 * GIB, 1.0)
        return fake(step, 9.0)

    monkeypatch.setattr(compile, "compile_step", compiled)
    report = reports.plan(config(), "v5e:2x4", devices=jax.devices())
    assert report["fits"] is False and report["needed_bytes"] == 20 * GIB
    assert [(r["change"], r["fits"]) for r in report["remedies"]] == [
        ("train.remat=full", False),
        ("train.num_microbatches=2", True),
    ]
    assert tried[-1].train.remat == "full"  # on top of the change before
    assert "largest_batch_size" not in report
    reports.show(report)


def test_every_remedy_changes_something():
    mesh = sharding.make_mesh(config().mesh, devices=jax.devices())
    names = [name for name, _ in compile.memory_remedies(config(), mesh)]
    assert names == [
        "train.remat=full",
        "train.num_microbatches=2",
        "mesh.data=1 mesh.fsdp=8",
        "optim.name=adafactor",
    ]
    last = compile.memory_remedies(config(), mesh)[-1][1]
    mesh = sharding.make_mesh(last.mesh, devices=jax.devices())
    assert compile.memory_remedies(last, mesh) == []
    devices = jax.devices()
    assert compile.state_bytes(last, devices) < compile.state_bytes(config(), devices)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm.", 17.5),
        ("required for HLO temporaries (298.12G) exceeds available HBM (15.75G).", 298),
        ("Used 512.00M of 15.75G hbm", 0.5),
    ],
)
def test_what_the_compiler_says_is_too_big(message, gib):
    assert compile._needed_bytes(message) == pytest.approx(gib * GIB, rel=1e-3)
    assert compile._needed_bytes("INTERNAL: something else") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "is unknown: use v5e:16x16"),
        ("v9:2x2", "chip 'v9' is unknown: use one of"),
        ("v5e:2x2x2", "a v5e slice has 2 dimensions"),
        ("v5p:4x4", "a v5p slice has 3 dimensions"),
        ("cpu:64", "this process has 8 CPU devices: set XLA_FLAGS"),
    ],
)
def test_unknown_topologies(name, message):
    jax.devices()  # JAX has started: its devices are counted
    with pytest.raises(ValueError, match=message):
        topology.devices(name)


def test_libtpu_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jax\[tpu\]'"):
        topology.devices("v5e:2x2")


def test_a_libtpu_of_another_jax(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        topology.metadata, "requires", lambda name: ['libtpu==0.0.4.*; extra == "tpu"']
    )
    monkeypatch.setattr(topology.metadata, "version", lambda name: "0.0.42.1")
    message = r"libtpu 0\.0\.42\.1 is not .* which is 0\.0\.4: pip install 'jax\[tpu\]'"
    with pytest.raises(ValueError, match=message):
        topology.devices("v5e:2x2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(data=3, fsdp=2)}, "does not fill 8 devices"),
        ({"train": {"batch_size": 12}}, "batch_size=12 .*use a multiple of 8"),
        ({"student": StudentConfig()}, "student.decoder.vocab_size=0 takes"),
    ],
)
def test_configs_that_cannot_be_planned(changes, message):
    with pytest.raises(ValueError, match=message):
        reports.plan(config(**changes), "cpu:8")


def test_the_report_of_a_config(capsys):
    get_config = runpy.run_path(helpers.ROOT / "configs" / "plan_llama_1b.py")[
        "get_config"
    ]
    report = json.loads(json.dumps(reports.plan(get_config("smoke"), "cpu:8")))
    reports.show(report)
    printed = capsys.readouterr().out
    assert "collectives of a step" in printed and "data=2 fsdp=4" in printed
    assert report["num_devices"] == 8 and report["warnings"] == []
    assert report["attention"] == "xla" and report["fits"] is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu]")
def test_a_slice_nobody_owns(compiled_anew):
    shape = dataclasses.replace(SHAPE, width=256, head_dim=64, vocab_size=1024)
    planned = config(
        student=StudentConfig(decoder=shape),
        mesh=MeshConfig(data=2, fsdp=2),
        train={"batch_size": 8, "row_length": 256, "dtype": "bfloat16"},
    )
    report = reports.plan(planned, "v5e:2x2")
    assert report["fits"] is True and report["attention"] == "splash"
    assert report["warnings"] == [] and report["collectives"]
    assert report["largest_batch_size"] > 8
    assert report["bound"]["seconds"] > 0
    reports.show(report)
