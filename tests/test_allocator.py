"""Memory that a step needs again is not fetched from the kernel again."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from kdjax import allocator

SCRIPT = """
import resource
import jax, jax.numpy as jnp
from kdjax import allocator

assert allocator.keep_freed_memory()
# Temporary memory of 96 MiB beside a result of 4 bytes.
step = jax.jit(lambda x: jnp.sum((jnp.cos(x) @ x) @ jnp.sin(x)))
x = jnp.ones((3072, 3072), jnp.float32)  # 36 MiB

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = sorted(faults() for _ in range(9))
assert found[4] < 1024, found  # pages of 4 KiB: 4 MiB in the median call
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has these settings")
def test_a_step_finds_its_memory_again():
    run = [sys.executable, "-c", SCRIPT]
    flags = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}  # one device
    done = subprocess.run(run, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("platforms", "plugins", "done"),
    [
        ("cuda,cpu", [], False),
        ("cpu", ["a plugin"], True),
        ("", ["a plugin"], False),
    ],
)
def test_with_accelerators_nothing_is_done(platforms, plugins, done, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: FakeLibrary)
    assert allocator.keep_freed_memory() == done
    monkeypatch.setenv("KDJAX_KEEP_FREED_MEMORY", "0")
    assert not allocator.keep_freed_memory()


class FakeLibrary:
    @staticmethod
    def mallopt(name, value):
        return 1
