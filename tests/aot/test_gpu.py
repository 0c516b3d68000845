"""GPUs that nobody has: their names, their rates, a step compiled for one."""

import dataclasses
from importlib import metadata

import pytest

from kdjax.aot import bound, gpu, hlo, topology
from kdjax.aot import report as reports
from kdjax.config import DecoderConfig, MeshConfig, StudentConfig
from kdjax.runtime import chips
from tests import helpers

H200 = chips.find_chip("h200")
TWO_NODES = (0,) * 4 + (1,) * 4


@pytest.mark.parametrize(
    ("name", "shape"), [("h200:1", "1x1x1"), ("h100:8x4", "1x4x8"), ("b200:4", "1x1x4")]
)
def test_names_of_nodes(monkeypatch, name, shape):
    described = {}

    def describe(chip, platform, **options):
        described.update(options, chip=chip, platform=platform)
        return type("Described", (), {"devices": ["a GPU"]})

    monkeypatch.setattr(gpu, "check_compiler", lambda topology: None)
    monkeypatch.setattr(gpu.topologies, "get_topology_desc", describe)
    assert topology.devices(name) == ["a GPU"]
    assert described["topology"] == shape and described["platform"] == "cuda"
    memory = round(chips.find_chip(described["chip"]).hbm_bytes / 0.95)
    assert f"device_memory_size: {memory} " in described["target_config"]


@pytest.mark.parametrize("name", ["h200:16", "h100:8x2x2", "b200:0", "h200:8x0"])
def test_nodes_that_nobody_has(name):
    with pytest.raises(ValueError, match="give the GPUs of a node, at most 8"):
        topology.devices(name)


def test_the_extra_is_named_when_it_is_missing(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gpu.metadata, "version", missing)
    message = r"pip install 'kdjax\[plan-gpu\]' \(jax\[cuda12\], 5.5 GB\)"
    with pytest.raises(ValueError, match=message):
        topology.devices("h200:8")


def test_a_compiler_of_another_jax(monkeypatch):
    versions = {"jax-cuda12-pjrt": "0.12.0.1", "jax-cuda13-pjrt": "0.12.1"}
    monkeypatch.setattr(
        gpu.metadata, "version", lambda name: versions.get(name, "0.12.0.1")
    )
    with pytest.raises(ValueError, match=r"pjrt 0\.12\.1 is not the one for jaxlib"):
        topology.devices("h200:8")


def collective(kind, group, num_bytes=8_000):
    return hlo.Collective(kind, "x", "", (("u8", (num_bytes,)),), num_bytes, group, ())


@pytest.mark.parametrize(
    ("kind", "group", "links", "network"),
    [
        ("all-gather", (0, 1, 2, 3), 6_000, 0),  # within a node
        ("all-gather", (0, 4), 0, 4_000),  # one of each: every adapter by itself
        ("all-gather", (0, 1, 4, 5), 3_000, 2_000),  # two adapters share a half
        ("all-reduce", tuple(range(8)), 2 * 7_000 * 3 / 4, 2 * 4_000 / 4),
        ("collective-permute", (0, 1), 8_000, 0),
        ("collective-permute", (0, 4), 0, 8_000),
    ],
)
def test_rates_of_nvlink_and_network(kind, group, links, network):
    seconds = bound.link_seconds(collective(kind, group), H200, TWO_NODES)
    assert seconds == pytest.approx((links / 450e9, network / 50e9))


def test_a_tpu_has_no_network():
    sent = collective("all-gather", (0, 1, 4, 5))
    seconds = bound.link_seconds(sent, chips.find_chip("v5e"), TWO_NODES)
    assert seconds == (6_000 / 200e9, 0.0)


def test_the_slowest_resource_bounds_the_step():
    least = bound.TimeBound(compute=1.0, hbm=2.0, links=3.0, network=4.0)
    assert least.seconds == 4.0
    assert dataclasses.replace(least, network=0.0).seconds == 3.0


def installed():
    try:
        gpu.check_compiler("h200:1")
    except ValueError:
        return False
    return True


@pytest.mark.skipif(not installed(), reason="needs kdjax[plan-gpu], jax[cuda12]")
def test_a_gpu_nobody_owns(compiled_anew):
    planned = helpers.small_config(
        student=StudentConfig(
            decoder=DecoderConfig(
                vocab_size=1280,
                width=256,
                num_layers=2,
                num_heads=4,
                num_kv_heads=2,
                head_dim=64,
                mlp_width=512,
            )
        ),
        mesh=MeshConfig(data=1, fsdp=2),
        train={
            "batch_size": 4,
            "row_length": 256,
            "dtype": "bfloat16",
            "remat": "dots",
            "chunk_size": 128,
        },
    )
    report = reports.plan(planned, "h200:2", search=False)
    assert report["fits"] is True and report["attention"] == "cudnn"
    assert report["warnings"] == []
    assert report["bound"]["link_seconds"] > 0
    assert report["bound"]["network_seconds"] == 0
    parts = {row["part"] for row in report["written"] if row["bytes"]}
    assert parts >= {"forward", "backward", "head", "update"}
    reports.show(report)
