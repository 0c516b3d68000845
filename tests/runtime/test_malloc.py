"""Commands ask for huge pages; no other process is replaced."""

import importlib.machinery
import os
import pathlib
import subprocess
import sys

import pytest

from kdjax.runtime import malloc

SCRIPT = """
import resource
import jax, jax.numpy as jnp

# Temporary memory of 108 MiB beside a result of 4 bytes.
step = jax.jit(lambda x: jnp.sum((jnp.cos(x) @ x) @ jnp.sin(x)))
x = jnp.ones((3072, 3072), jnp.float32)  # 36 MiB

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(sum([faults() for _ in range(4)][1:]))
"""
FREED = """
import ctypes, sys
import jax, jax.numpy as jnp
from kdjax.runtime import malloc

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4 / 1024

if sys.argv[1] == "trim":
    malloc.trim_after_compile()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(2**16) for _ in range(1600)]  # 100 MiB
for block in blocks:
    ctypes.memset(block, 1, 2**16)
x = jnp.ones(8)
for block in blocks[:-1]:  # below the last one what is freed stays
    libc.free(block)
before = resident()
if sys.argv[1] == "now":
    malloc.trim()
else:
    jax.jit(lambda x: x + 1).lower(x).compile()
print(before - resident())
"""
HUGE = "glibc.malloc.hugetlb=1"
needs_huge_pages = pytest.mark.skipif(
    not malloc._available(), reason="no huge pages to be had by asking"
)


def run(*arguments: str, folder: object = ".", **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    process = subprocess.run(
        [sys.executable, *arguments],
        env=inherited | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@needs_huge_pages
def test_a_step_has_fewer_page_faults():
    faults = [
        int(run("-c", SCRIPT, GLIBC_TUNABLES=tunables)) for tunables in (HUGE, "")
    ]
    assert 4 * faults[0] < faults[1], faults


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is not glibc's")
def test_freed_memory_is_trimmed_after_compiling_and_when_asked():
    kept, trimmed, now = (
        float(run("-c", FREED, how)) for how in ("keep", "trim", "now")
    )
    # What compiling itself takes, 10 to 25 MiB, is in both.
    assert kept < 20 and trimmed - kept > 80 and now > 80, (kept, trimmed, now)


COMMAND = """
import os, sys
from kdjax.runtime import malloc
print("started", os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:], sep="|", flush=True)
malloc.reexec_with_huge_pages()
"""


@needs_huge_pages
@pytest.mark.parametrize(
    ("arguments", "environment", "tunables"),
    [
        (("-m", "kdjax.command", "-m", "x y"), {}, [None, HUGE]),
        (("-u", "-m", "kdjax.command"), {"GLIBC_TUNABLES": "a"}, ["a", f"a:{HUGE}"]),
        (("-m", "kdjax.command"), {"KDJAX_HUGE_PAGES": "0"}, [None]),
        (
            ("-m", "kdjax.command"),
            {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
            ["glibc.malloc.hugetlb=0"],
        ),
        (("kdjax/command.py",), {}, [None]),
    ],
)
def test_only_commands_are_replaced(tmp_path, arguments, environment, tunables):
    # A command that only says how it was started, in a package of the same name.
    package = tmp_path / "kdjax"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "command.py").write_text(COMMAND)
    source = pathlib.Path(malloc.__file__).parent
    (package / "runtime").symlink_to(source, target_is_directory=True)
    environment = {"PYTHONPATH": str(tmp_path), **environment}
    lines = run(*arguments, folder=tmp_path, **environment).splitlines()
    assert [line.split("|")[1] for line in lines] == [str(t) for t in tunables]
    if "x y" in arguments:
        assert lines[1].endswith("|-m|x y")


@pytest.mark.parametrize(
    ("arguments", "main", "expected"),
    [
        (["python", "-m", "kdjax.train", "--config=c.py"], "kdjax.train", True),
        (["python", "-X", "dev", "-m", "kdjax.train"], "kdjax.train", True),
        (["python", "-m", "kdjax", "train"], "kdjax.train", True),
        (["python", "/venv/bin/kdjax", "train"], "kdjax.train", True),
        # A fork that has become a command, and commands called within a test.
        (["python", "-c", "main()"], "kdjax.train", False),
        (["python", "-m", "pytest", "-m", "kdjax.train"], "pytest.__main__", False),
        (["python", "-m", "pytest", "-m", "kdjax.train"], "kdjax.train", False),
        (["python", "-m"], None, False),
        (["python", "script.py"], None, False),
        (["python"], None, False),
    ],
)
def test_a_command_is_the_module_that_was_started(
    monkeypatch, arguments, main, expected
):
    spec = main and importlib.machinery.ModuleSpec(main, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert malloc._is_command(arguments) == expected


def test_other_systems_have_none(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert not malloc._available()
