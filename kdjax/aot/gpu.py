"""NVIDIA GPUs as the compiler knows them: descriptions of devices that are not here."""

import os
from collections.abc import Sequence
from importlib import metadata

import jax
from jax.experimental import topologies

EXTRA = "kdjax[plan-gpu]"
_PLUGINS = ("jax-cuda12-pjrt", "jax-cuda13-pjrt")

# What the kernels of a generation are compiled for: its compute capability (with the
# instructions of this generation alone), multiprocessors, memory's rate and size, L2
# cache and clock. Source: what CUDA's device queries return for the SXM forms.
_DEVICES = {
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 3352320000000, 84942979072, 52428800),
    "h200": ("NVIDIA H200 141GB HBM3e", 9, 132, 4800000000000, 151397597184, 52428800),
    "b200": ("NVIDIA B200", 10, 148, 7672320000000, 191514411008, 132644864),
}
# A GpuTargetConfigProto; what the two generations have in common is written out.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: {rate} device_memory_size: {memory} l2_cache_size: {cache}
  cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


def devices(
    topology: str, chip: str, sizes: Sequence[int], *, per_node: int
) -> Sequence[jax.Device]:
    """Return the devices of some nodes.

    Args:
      topology: the name, for errors.
      chip: "h100", "h200" or "b200".
      sizes: GPUs of a node, and the number of nodes (1 if it is left out).
      per_node: most GPUs of a node.

    Raises:
      ValueError: no such nodes, or the compiler for GPUs is not installed.
    """
    num_gpus, num_nodes = [*sizes, 1][:2]
    if len(sizes) > 2 or min(sizes) < 1 or num_gpus > per_node:
        raise ValueError(
            f"--topology={topology!r}: give the GPUs of a node, at most {per_node}, "
            f"and the nodes, for example {chip}:1, {chip}:8 or {chip}:8x4"
        )
    check_compiler(topology)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the plugin's notes
    described = topologies.get_topology_desc(
        chip,
        "cuda",
        target_config=target(chip),
        topology=f"1x{num_nodes}x{num_gpus}",
    )
    return described.devices


def target(chip: str) -> str:
    """Return the text of the compiler's description of a GPU."""
    name, major, cores, rate, memory, cache = _DEVICES[chip]
    return _TARGET.format(
        name=name, major=major, cores=cores, rate=rate, memory=memory, cache=cache
    )


def check_compiler(topology: str) -> None:
    """Raise ValueError without the compiler for GPUs that belongs to this jaxlib."""
    versions = {}
    for plugin in _PLUGINS:
        try:
            versions[plugin] = metadata.version(plugin)
        except metadata.PackageNotFoundError:
            continue
    if not versions:
        raise ValueError(
            f"--topology={topology!r} needs the compiler for NVIDIA GPUs, which is not "
            f"installed: pip install '{EXTRA}' (jax[cuda12], 5.5 GB)"
        )
    jaxlib = metadata.version("jaxlib")
    for plugin, version in versions.items():
        if not (version == jaxlib or version.startswith(f"{jaxlib}.")):
            raise ValueError(
                f"--topology={topology!r}: {plugin} {version} is not the one for "
                f"jaxlib {jaxlib}: pip install '{EXTRA}'"
            )
