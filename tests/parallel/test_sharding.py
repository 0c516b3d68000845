"""Meshes over several slices: data between them, fsdp and tensor inside."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.config import MeshConfig
from kdjax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A device of one of several nodes, as GPUs are."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "fake"


def nodes(num_slices: int, per_slice: int) -> list[FakeDevice]:
    """Devices of several slices, in an order that mixes these."""
    return [
        FakeDevice(id=i, slice_index=i % num_slices, process_index=i % num_slices)
        for i in range(num_slices * per_slice)
    ]


@pytest.mark.parametrize(
    "sizes, num_slices, inside, between",
    [
        ((8, 1, 1), 2, (4, 1, 1), (2, 1, 1)),
        ((2, 4, 2), 2, (1, 4, 2), (2, 1, 1)),
        ((4, 2, 2), 4, (1, 2, 2), (4, 1, 1)),
        ((1, 16, 1), 4, (1, 4, 1), (1, 4, 1)),
        ((2, 8, 1), 4, (1, 4, 1), (2, 2, 1)),
    ],
)
def test_slices_divide_data_first(sizes, num_slices, inside, between):
    assert sharding.split_over_slices(sizes, num_slices) == (inside, between)
    config = MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True)))
    per_slice = int(np.prod(sizes)) // num_slices
    mesh = sharding.make_mesh(config, devices=nodes(num_slices, per_slice))
    assert tuple(mesh.shape.values()) == sizes
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for block in slices.reshape(num_slices, -1) if between[1] == 1 else ():
        assert len(set(block)) == 1  # of one data index, all are in one slice
    # The tensor axis never leaves a slice.
    assert (slices == slices[:, :, :1]).all()
    assert len({device.id for device in mesh.devices.flat}) == mesh.devices.size


@pytest.mark.parametrize("sizes", [(1, 1, 16), (3, 4, 1), (6, 2, 1), (1, 2, 8)])
def test_axes_that_do_not_divide_over_slices_are_refused(sizes):
    config = MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True)))
    devices = nodes(4, int(np.prod(sizes)) // 4)
    with pytest.raises(ValueError, match=r"over 4 slices .*make mesh\.data a multiple"):
        sharding.make_mesh(config, devices=devices)


def test_rows_of_a_slice_are_contiguous_and_sums_are_right():
    """Real devices in the places of the fake ones."""
    fakes = nodes(2, 4)
    fake = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices=fakes)
    real = np.vectorize(lambda device: jax.devices()[device.id])(fake.devices)
    mesh = jax.sharding.Mesh(real, sharding.AXES)
    rows = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    placed = jax.device_put(rows, NamedSharding(mesh, P(("data", "fsdp"))))
    for shard in placed.addressable_shards:
        start = shard.index[0].start or 0
        assert start // 4 == fakes[shard.device.id].slice_index
    total = jax.jit(lambda x: x.sum(0), out_shardings=sharding.replicated(mesh))
    np.testing.assert_array_equal(total(placed), rows.sum(0))
    assert sharding.local_rows(mesh, 8) == slice(0, 8)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu]")
def test_two_tpu_slices(monkeypatch):
    """Descriptions of real slices, with the compiler for them."""
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5e-4"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        monkeypatch.setenv(name, value)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x2", num_slices=2
    )
    config = MeshConfig(data=2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(config, devices=described.devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == np.arange(2)[:, None, None]).all()
