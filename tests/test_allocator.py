"""Memory that a step needs again is not fetched from the kernel again, if asked for."""

import os
import subprocess
import sys

import pytest

from kdjax import allocator

SCRIPT = """
import kdjax
import resource
import jax, jax.numpy as jnp

# Temporary memory of 96 MiB beside a result of 4 bytes.
step = jax.jit(lambda x: jnp.sum((jnp.cos(x) @ x) @ jnp.sin(x)))
x = jnp.ones((3072, 3072), jnp.float32)  # 36 MiB

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(sum([faults() for _ in range(9)][1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has these settings")
def test_a_step_finds_its_memory_again():
    faults = []
    for asked in ("1", "0"):
        # One device.
        flags = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | flags | {"KDJAX_KEEP_FREED_MEMORY": asked},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        faults.append(int(done.stdout))
    # A hole that is too small now and then is filled anew.
    assert 4 * faults[0] < faults[1], faults


def test_another_c_library_is_named(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    allocator.keep_freed_memory()
    monkeypatch.setenv("KDJAX_KEEP_FREED_MEMORY", "1")
    with pytest.raises(ValueError, match="glibc"):
        allocator.keep_freed_memory()
