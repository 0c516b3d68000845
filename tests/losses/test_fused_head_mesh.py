"""The fused head on meshes equals the head on one device, without loop collectives."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax.losses import (
    LabelOptions,
    LossOptions,
    Placement,
    fused_loss,
    label,
    score,
)
from tests.losses.head_cases import as_jax, assert_close, make, value_and_grads

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]
SPECS = [
    PartitionSpec(None, "fsdp"),
    PartitionSpec("tensor", "fsdp"),
    PartitionSpec(("fsdp", "tensor"), None),
]


def make_mesh(shape):
    """Return a mesh over as many devices as `shape` needs."""
    devices = jax.devices()[: int(np.prod(shape))]
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh(shape, axes, (AxisType.Auto,) * 3, devices=devices)


@pytest.mark.parametrize("shape", MESHES)
def test_meshes(shape):
    arrays, _, teacher = make(temperature=2.0, vocab_size=40)  # N = 21: uneven
    options = {"temperature": 2.0, "chunk_size": 2}
    expected = value_and_grads(as_jax(arrays), teacher, **options)
    mesh = make_mesh(shape)
    specs = SPECS if shape == (2, 2, 2) else SPECS[:1]
    for spec in specs:
        hidden, weight, *rest = as_jax(arrays)
        weight = jax.device_put(weight, NamedSharding(mesh, spec))

        loss = functools.partial(fused_loss, placement=Placement(mesh, spec))

        actual = value_and_grads((hidden, weight, *rest), teacher, loss=loss, **options)
        assert_close(actual, expected, 1e-6)


def test_sharded_score_and_label():
    arrays, _, teacher = make(vocab_size=40)
    hidden, weight, targets, *_ = as_jax(arrays)
    placement = Placement(make_mesh((2, 2, 2)), SPECS[1])
    arrays = hidden, weight, targets, teacher
    actual = score(*arrays, LossOptions(chunk_size=2), placement=placement)
    assert_close(actual, score(*arrays, LossOptions(chunk_size=8)))
    options = LabelOptions(k=4, temperatures=(1.0, 2.0), chunk_size=2)
    actual = label(hidden, weight, targets, options, placement=placement)
    assert_close(actual, label(hidden, weight, targets, options))


def test_one_device_exchanges_nothing():
    """Each would copy the head, on a CPU."""
    arrays, _, teacher = make(temperature=2.0)
    hidden, weight, *rest = as_jax(arrays)
    mesh = make_mesh((1, 1, 1))

    def loss(hidden, weight):
        return fused_loss(
            hidden,
            weight,
            *rest,
            teacher,
            LossOptions(chunk_size=8),
            placement=Placement(mesh, SPECS[0]),
        )[0]

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text = step.lower(hidden, weight).compile().as_text()
    assert not re.search(r"all-gather|all-reduce|reduce-scatter", text)


def test_no_collective_inside_the_loop():
    arrays, _, teacher = make(num_tokens=64, vocab_size=64)
    hidden, weight, *rest = as_jax(arrays)
    mesh, spec = make_mesh((2, 2, 2)), PartitionSpec(None, "fsdp")
    weight = jax.device_put(weight, NamedSharding(mesh, spec))

    def total(hidden, weight):
        return fused_loss(
            hidden,
            weight,
            *rest,
            teacher,
            LossOptions(chunk_size=4),
            placement=Placement(mesh, spec),
        )[0]

    step = jax.jit(jax.value_and_grad(total, (0, 1)))
    text = step.lower(hidden, weight).compile().as_text()
    collective = re.compile(
        r"= .*\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    )
    computations = re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ \(.*\{\n)", text)
    entry = [c for c in computations if c.startswith("ENTRY")]
    others = [c for c in computations if not c.startswith(("ENTRY", "HloModule"))]
    assert len(entry) == 1 and any("body=" in c for c in computations)
    assert collective.search(entry[0])
    assert not [c for c in others if collective.search(c)]
