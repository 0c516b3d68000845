"""All that is measured on a GPU, in one go: python benchmarks/gpu.py --out=FILE.json.

Under ten minutes on one H200. Parts, each a process of its own, so that one that fails
or runs out of memory takes no other with it; FILE is written after every part:

  student  the bfloat16 1B student of configs/bench_1b.py, rows of 2,048, k = 64
  head     the fused head at 8,192 x 4,096 x 128,256: matmul rate, temporary memory
  liger    the same shape by Liger-Kernel and torch.compile (--torch_python=PATH)
  online   a 0.6B student, hard labels, offline, and online from a 4B-shaped teacher

--small runs every part in small shapes on a CPU, in a minute or so; --parts=a,b some.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

_PARTS = ("student", "head", "liger", "online")
_RUN = flags.DEFINE_list("parts", list(_PARTS), f"Of {_PARTS}.")
_SMALL = flags.DEFINE_bool("small", False, "Small shapes, on a CPU.")
_OUT = flags.DEFINE_string("out", None, "Where the numbers go.", required=True)
_SECONDS = flags.DEFINE_integer("seconds", 240, "Most for one part.", lower_bound=1)
_TORCH = flags.DEFINE_string(
    "torch_python", sys.executable, "Interpreter with torch, and perhaps liger-kernel."
)
_ONE = flags.DEFINE_enum("one", None, _PARTS, "Run this part here (used by itself).")
HERE = pathlib.Path(__file__).resolve().parent


def student() -> dict[str, Any]:
    """Return the 1B student; an online teacher is timed in "online"."""
    from configs import bench_1b

    return _measure(bench_1b.get_config("smoke" if _SMALL.value else ""), online=False)


def online() -> dict[str, Any]:
    """Return a student of the shape of Qwen3-0.6B, its teacher of that of Qwen3-4B."""
    from configs import bench_1b
    from kdjax.config import DecoderConfig

    config = bench_1b.get_config("smoke" if _SMALL.value else "")
    if not _SMALL.value:
        shared: dict[str, Any] = {
            "vocab_size": 151936,
            "num_kv_heads": 8,
            "head_dim": 128,
            "rope_theta": 1e6,
        }
        config.student.decoder = DecoderConfig(
            width=1024, num_layers=28, num_heads=16, mlp_width=3072, **shared
        )
        config.teacher.decoder = DecoderConfig(
            width=2560, num_layers=36, num_heads=32, mlp_width=9728, **shared
        )
    config.name = "qwen3_0.6b_from_4b"
    return _measure(config, online=True)


def _measure(config: Any, *, online: bool) -> dict[str, Any]:
    from kdjax.bench import report, workload
    from kdjax.parallel import sharding

    mesh = sharding.make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as folder:
        load = workload.make_synthetic(config, pathlib.Path(folder), mesh)
        return report.measure(load, steps=9, rounds=3, online=online)


def head() -> dict[str, Any]:
    """Ours beside the plain form and the matmul rate."""
    import head as head_benchmark

    shape = head_benchmark.Shape(
        num_tokens=8192,
        width=4096,
        vocab_size=128256,
        k=64,
        chunk_size=1024,
        dtype="bfloat16",
    )
    if _SMALL.value:
        shape = head_benchmark.Shape(
            num_tokens=128, width=64, vocab_size=512, k=16, chunk_size=64
        )
    return head_benchmark.measure(shape, rounds=3, steps=5)


def liger() -> dict[str, Any]:
    """Time the peers' heads, in the interpreter that has them."""
    small = ["--tokens=128", "--width=64", "--vocab=512", "--k=16", "--device=cpu"]
    command = [_TORCH.value, str(HERE / "peers" / "liger_head.py")]
    done = subprocess.run(
        command + (small if _SMALL.value else []), capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"skipped": lines[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_part(name: str) -> dict[str, Any]:
    """One part in its own process; {"failed": why} where it did not end well."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "part.json"
        flag = "--small" if _SMALL.value else "--nosmall"
        torch = f"--torch_python={_TORCH.value}"
        command = [sys.executable, __file__, f"--one={name}", f"--out={out}", flag]
        since = time.perf_counter()
        root = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": root}
        if _SMALL.value:
            environment["JAX_PLATFORMS"] = "cpu"
        try:
            done = subprocess.run(
                [*command, torch],
                timeout=_SECONDS.value,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after --seconds={_SECONDS.value}"}
        if done.returncode or not out.is_file():
            return {"failed": done.stderr.strip()[-2000:]}
        return json.loads(out.read_text()) | {
            "wall_seconds": time.perf_counter() - since
        }


def main(argv: list[str]) -> None:
    """Run one part here, or all of them in turn."""
    del argv
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "student": student,
        "head": head,
        "liger": liger,
        "online": online,
    }
    out = pathlib.Path(_OUT.value)
    if _ONE.value:
        out.write_text(json.dumps(parts[_ONE.value]()))
        return
    if unknown := set(_RUN.value) - set(parts):
        raise SystemExit(f"--parts={sorted(unknown)}: use some of {_PARTS}")
    found: dict[str, Any] = {}
    for name in _RUN.value:
        found[name] = run_part(name)
        out.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{name}: {headline(found[name])}", flush=True)


def headline(found: dict[str, Any]) -> str:
    """Return the numbers to look at first."""
    if "failed" in found or "skipped" in found:
        return str(found)
    if "per_second" in found:
        ratios = {name: round(r["ratio"], 3) for name, r in found["ratios"].items()}
        return (
            f"{found['per_second']['tokens']:,.0f} tokens/s, MFU "
            f"{found['rate']['mfu']:.3f}, {found['rate']['bound_ratio']:.2f} of the "
            f"bound, {ratios}"
        )
    if "fused" in found:
        part = found["fused"]
        return (
            f"{1e3 * part['seconds']:.1f} ms, {part['of_matmul']:.3f} of matmul, "
            f"{part['temporary_bytes'] / 2**30:.2f} GiB temporary"
        )
    return json.dumps(found.get("forms", found))


if __name__ == "__main__":
    app.run(main, argv=sys.argv)
