"""Topologies to compile for: TPU slices, nodes of GPUs, and virtual CPUs."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

from kdjax.aot import gpu
from kdjax.runtime import chips

_SHAPES = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}  # dimensions of a slice
_EXAMPLES = "v5e:16x16, v6e:16x16, v5p:4x4x4, v4:2x2x1, h200:8, h100:8x4 or cpu:8"


def devices(topology: str) -> Sequence[jax.Device]:
    """Return the devices of a topology; call it before JAX lists its devices.

    Args:
      topology: "v5e:16x16" (generation and chips along each dimension of the torus),
        "h200:8" (GPUs of one node) or "h200:8x4" (of each of 4 nodes), or "cpu:8" for
        as many virtual devices of this machine.

    Raises:
      ValueError: an unknown topology, or the compiler for its devices is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if match is None:
        raise ValueError(f"--topology={topology!r} is unknown: use {_EXAMPLES}")
    # A machine that has libtpu but no TPU would look for one.
    jax.config.update("jax_platforms", "cpu")
    name, sizes = match[1], [int(n) for n in match[2].split("x")]
    if name == "cpu":
        return _cpus(topology, sizes)
    chip = chips.find_chip(name)
    if chip.per_node:
        return gpu.devices(topology, name, sizes, per_node=chip.per_node)
    if len(sizes) != _SHAPES[name] or min(sizes) < 1:
        raise ValueError(
            f"--topology={topology!r}: a {name} slice has {_SHAPES[name]} dimensions, "
            f"use for example {_EXAMPLES}"
        )
    _check_compiler(topology)
    # Without these libtpu asks the metadata server of a cloud machine for them.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{name}-{math.prod(sizes)}")
    # Nothing is claimed: another process may plan, or hold the TPUs of this machine.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name == "v4" else {}
    if math.prod(sizes) < 4:  # less than the four chips of a host
        options["chips_per_host_bounds"] = tuple([*sizes, 1, 1][:3])
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology={topology!r} is no slice ({str(error).splitlines()[0]}): use "
            f"for example {_EXAMPLES}"
        ) from None
    return described.devices


def _check_compiler(topology: str) -> None:
    """Raise ValueError without the libtpu that belongs to the installed JAX.

    With another one some programs compile and cannot be read, others mean other things.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={topology!r} needs the compiler for TPUs, which is not "
            "installed: pip install 'jax[tpu]'"
        )
    required = next(
        (
            match[1]
            for line in metadata.requires("jax") or ()
            if (match := re.match(r"libtpu==([\d.]+)\.\*", line))
        ),
        "",
    )
    try:
        version = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return  # a nightly one, whose user knows better
    if required and not version.startswith(f"{required}."):
        raise ValueError(
            f"--topology={topology!r}: libtpu {version} is not the one for jax "
            f"{jax.__version__}, which is {required}: pip install 'jax[tpu]'"
        )


def _cpus(topology: str, sizes: list[int]) -> Sequence[jax.Device]:
    number = math.prod(sizes)
    with contextlib.suppress(RuntimeError):  # one that runs may have enough devices
        jax.config.update("jax_num_cpu_devices", number)
    cpus = jax.devices("cpu")
    if len(cpus) < number:
        raise ValueError(
            f"--topology={topology!r}: this process has {len(cpus)} CPU devices: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={number}"
        )
    return cpus[:number]
