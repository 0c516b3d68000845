"""Commands ask for huge pages; nothing else is started anew."""

import os
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
from kdjax import allocator

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4 / 1024

if sys.argv[1] == "give back":
    allocator.give_back_after_compiling()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(2**16) for _ in range(1600)]  # 100 MiB
for block in blocks:
    ctypes.memset(block, 1, 2**16)
x = jnp.ones(8)
for block in blocks[:-1]:  # below the last one what is freed stays
    libc.free(block)
before = resident()
jax.jit(lambda x: x + 1).lower(x).compile()
print(before - resident())
"""
HUGE = "glibc.malloc.hugetlb=1"
needs_huge_pages = pytest.mark.skipif(
    not malloc._available(), reason="no huge pages to be had by asking"
)


def run(*arguments: str, folder: object = ".", **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=kept | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_huge_pages
def test_a_step_has_fewer_page_faults():
    faults = [
        int(run("-c", SCRIPT, GLIBC_TUNABLES=tunables)) for tunables in (HUGE, "")
    ]
    assert 4 * faults[0] < faults[1], faults


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is not glibc's")
def test_what_compiling_has_freed_goes_back():
    kept, given = (float(run("-c", FREED, how)) for how in ("keep", "give back"))
    assert kept < 20 < 80 < given, (kept, given)


@needs_huge_pages
@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (("-m", "kdjax.shown", "-m", "x y"), {}, HUGE),
        (("-u", "-m", "kdjax.shown"), {"GLIBC_TUNABLES": "a=b"}, f"a=b:{HUGE}"),
        (("-m", "kdjax.shown"), {"KDJAX_HUGE_PAGES": "0"}, None),
        (
            ("-m", "kdjax.shown"),
            {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
            "glibc.malloc.hugetlb=0",
        ),
        (("-c", "import kdjax, os; print(os.environ.get('GLIBC_TUNABLES'))"), {}, None),
    ],
)
def test_commands_alone_are_started_anew(tmp_path, arguments, environment, expected):
    # A command that does nothing but tell: a module of the package's name, beside it.
    package = tmp_path / "kdjax"
    package.mkdir()
    source = os.path.dirname(malloc.__file__)
    for name in ("__init__.py", "allocator.py"):
        (package / name).symlink_to(os.path.join(source, name))
    (package / "shown.py").write_text(
        "import os, sys\n"
        "print(os.environ.get('GLIBC_TUNABLES'))\n"
        "print(*sys.argv[1:], sep='|')\n"
    )
    shown = run(*arguments, folder=tmp_path, **environment).splitlines()
    assert shown[0] == str(expected)
    if "x y" in arguments:
        assert shown[1] == "-m|x y"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["python", "-m", "kdjax.train", "--config=c.py"], True),
        (["python", "-X", "dev", "-m", "kdjax.train"], True),
        (["python", "-m", "pytest", "-m", "kdjax.train"], False),
        (["python", "-m"], False),
        (["python", "script.py"], False),
        (["python"], False),
    ],
)
def test_what_a_command_is(arguments, found):
    assert malloc._is_command(arguments) == found


def test_other_systems_have_none(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert not malloc._available()
