"""Peak rates of accelerators by their data sheets, and the measured one of a CPU."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

# Dense peak, FLOP/s of one jax device, from the makers' data sheets (no sparsity).
# Keys are looked for in `device.device_kind`, lower case, first hit. TPU v4 and v5p
# chips are one device each. float32 is the rate of XLA's default float32 matmul
# (TF32 on NVIDIA GPUs, one bfloat16 pass on TPU).
_PEAK_FLOPS = {
    "tpu v6": {"bfloat16": 918e12, "float32": 918e12},
    "tpu v5p": {"bfloat16": 459e12, "float32": 459e12},
    "tpu v5 lite": {"bfloat16": 197e12, "float32": 197e12},
    "tpu v5e": {"bfloat16": 197e12, "float32": 197e12},
    "tpu v5": {"bfloat16": 459e12, "float32": 459e12},
    "tpu v4 lite": {"bfloat16": 138e12, "float32": 138e12},
    "tpu v4": {"bfloat16": 275e12, "float32": 275e12},
    "b200": {"bfloat16": 2250e12, "float32": 1125e12},
    "h200": {"bfloat16": 989e12, "float32": 494e12},
    "h100 pcie": {"bfloat16": 756e12, "float32": 378e12},
    "h100": {"bfloat16": 989e12, "float32": 494e12},
    "a100": {"bfloat16": 312e12, "float32": 156e12},
    "l40s": {"bfloat16": 362e12, "float32": 183e12},
    "l40": {"bfloat16": 181e12, "float32": 90e12},
    "l4": {"bfloat16": 121e12, "float32": 60e12},
    "v100": {"float32": 15.7e12},
    "t4": {"float32": 8.1e12},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """Rates and capacity of one TPU chip or GPU."""

    peak: float  # bfloat16 FLOP/s
    hbm_bytes: float  # main memory available to a program
    hbm_rate: float  # bytes/s between main memory and the core
    link_rate: float  # bytes/s sent: all links of a TPU to neighbours, a GPU's NVLink
    network_rate: float = 0.0  # bytes/s sent to other nodes, per GPU; 0 = has none
    per_node: int = 0  # most GPUs that NVLink connects; 0 = the links reach all
    default_share: float = 1.0  # of `hbm_bytes` that JAX takes unless told otherwise


# Source: the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of
# cloud.google.com/tpu/docs, "Key chip specifications"; "Interchip Interconnect BW" of
# 2400, 1600, 4800 and 3584 Gbps, one way, over 8. Of a capacity of 32, 16, 95 and 32 GB
# the compiler of libtpu 0.0.42 grants programs the bytes below.
_TPUS = {
    "v4": Chip(peak=275e12, hbm_bytes=30.75 * 2**30, hbm_rate=1228e9, link_rate=300e9),
    "v5e": Chip(peak=197e12, hbm_bytes=15.75 * 2**30, hbm_rate=819e9, link_rate=200e9),
    "v5p": Chip(peak=459e12, hbm_bytes=95.74 * 2**30, hbm_rate=2765e9, link_rate=600e9),
    "v6e": Chip(peak=918e12, hbm_bytes=31.25 * 2**30, hbm_rate=1640e9, link_rate=448e9),
}


def _gpu(device_bytes: int, hbm_rate: float, nvlink_rate: float, peak: float) -> Chip:
    """Describe a GPU of a node of 8, each with an InfiniBand adapter of 400 Gbps.

    A twentieth of the memory is left to CUDA's context and to the libraries.
    """
    return Chip(
        peak=peak,
        hbm_bytes=0.95 * device_bytes,
        hbm_rate=hbm_rate,
        link_rate=nvlink_rate,
        network_rate=50e9,
        per_node=8,
        default_share=0.75 / 0.95,
    )


# Source: NVIDIA's data sheets of the H100 and H200 (SXM) and of the DGX B200; NVLink's
# 900 and 1,800 GB/s are of both directions. The bytes of the memory are those that the
# driver reports.
_GPUS = {
    "h100": _gpu(84942979072, 3.35e12, 450e9, 989e12),
    "h200": _gpu(151397597184, 4.8e12, 450e9, 989e12),
    "b200": _gpu(191514411008, 8e12, 900e9, 2250e12),
}


# By a part of `device.device_kind`, lower case, first hit.
_MEMORY_BYTES = {
    "tpu v6": _TPUS["v6e"].hbm_bytes,
    "tpu v5 lite": _TPUS["v5e"].hbm_bytes,
    "tpu v5": _TPUS["v5p"].hbm_bytes,
    "tpu v4": _TPUS["v4"].hbm_bytes,
    "b200": 191514411008,
    "h200": 151397597184,
    "h100": 84942979072,
}


def find_chip(name: str) -> Chip:
    """Return a TPU generation or a GPU by the name that its topologies begin with.

    Raises:
      ValueError: it is not in the tables.
    """
    known = _TPUS | _GPUS
    if name not in known:
        raise ValueError(f"chip {name!r} is unknown: use one of {list(known)}")
    return known[name]


def memory_bytes(device: jax.Device) -> float:
    """Return the bytes of an accelerator's memory: the table's, or what it grants.

    Raises:
      ValueError: a device that is not in the table and does not say.
    """
    kind = device.device_kind.lower()
    for name, num_bytes in _MEMORY_BYTES.items():
        if name in kind:
            return num_bytes
    granted = (device.memory_stats() or {}).get("bytes_limit")
    if not granted:
        raise ValueError(
            f"device {device.device_kind!r} does not say how much memory it has: give "
            "--config.train.memory_mib=256"
        )
    return granted


def peak_flops(device: jax.Device, dtype: str = "bfloat16") -> float | None:
    """Return the peak FLOP/s of one device: the data sheet's, or measured on a CPU.

    Args:
      device: of `jax.devices()`.
      dtype: of the operands, "float32" or "bfloat16".

    Returns:
      FLOP/s, or None for a device or dtype that is not in the table. On a CPU the
      float32 rate of all cores divided by the number of its (virtual) devices.
    """
    if device.platform == "cpu":
        return measure_cpu_flops() / jax.local_device_count("cpu")
    kind = device.device_kind.lower()
    for name, peaks in _PEAK_FLOPS.items():
        if name in kind:
            return peaks.get(dtype)
    return None


def measure_cpu_flops(*, size: int = 2048, num_trials: int = 3) -> float:
    """Measure the best FLOP/s of a float32 matrix product on the CPU in some trials."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        matrix = jnp.ones((size, size), jnp.float32)
        product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
        product(matrix, matrix).block_until_ready()
        seconds = []
        for _ in range(num_trials):
            start = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
