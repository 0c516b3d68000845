"""All that is measured on a GPU, in one go: python benchmarks/gpu.py --out=FILE.json.

Twelve minutes on one H200, set-up included. Parts in the order of their value, each a
process of its own, so that one that fails or runs out of memory takes no other with it;
FILE is written after every part, and a part gets what is left of --minutes:

  parity      attention, head and a step in bfloat16 beside float32 by XLA, on the GPU
  student     the bfloat16 1B student of configs/bench_1b.py, rows of 2,048, k = 64
  head        the fused head at 8,192 x 4,096 x 128,256: matmul rate, temporary memory
  long_rows   the same student in rows of 8,192
  online      a 0.6B student, hard labels, offline, and online from a 4B-shaped teacher
  label       the 1B shape as a teacher: top 64 of rows of 2,048
  heads       the head at 32,768 x 4,096 x 128,256 and 32,768 x 2,560 x 262,144
  decode      64 rows decoded by the 1B shape
  liger       the first head by Liger-Kernel and torch.compile (--torch_python=PATH)

--small runs every part in small shapes on a CPU, in some minutes; --parts=a,b some.
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

# Most seconds of each part; on an H200 all of them together stay within --minutes.
_PARTS = {
    "parity": 90,
    "student": 150,
    "head": 90,
    "long_rows": 120,
    "online": 180,
    "label": 90,
    "heads": 90,
    "decode": 90,
    "liger": 120,
}
_RUN = flags.DEFINE_list("parts", list(_PARTS), f"Of {tuple(_PARTS)}.")
_SMALL = flags.DEFINE_bool("small", False, "Small shapes, on a CPU.")
_OUT = flags.DEFINE_string("out", None, "Where the numbers go.", required=True)
_MINUTES = flags.DEFINE_float(
    "minutes", 12.0, "For all parts together.", lower_bound=0.0
)
_TORCH = flags.DEFINE_string(
    "torch_python", sys.executable, "Interpreter with torch, and perhaps liger-kernel."
)
_ONE = flags.DEFINE_enum("one", None, list(_PARTS), "Run this part here (for itself).")
HERE = pathlib.Path(__file__).resolve().parent


def parity() -> dict[str, Any]:
    """Return differences from float32 by XLA: attention, the head, a step.

    Each is relative: the norm of the difference over that of the float32 result, of an
    output or of a gradient. bfloat16 has 2^-8 = 0.004; larger than 0.03 is an error.
    """
    import jax

    with jax.default_matmul_precision("highest"):
        found = _attention_parity() | _head_parity() | _step_parity()
    if wrong := {name: x for name, x in found.items() if not x < 0.03}:
        raise SystemExit(f"not equal to float32: {wrong}")
    return {"relative": found}


def _difference(x: Any, reference: Any) -> float:
    import numpy as np

    x, reference = (np.asarray(y, np.float64) for y in (x, reference))
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def _attention_parity() -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from kdjax.config import DecoderConfig, MeshConfig
    from kdjax.models import attention
    from kdjax.parallel import sharding

    rows, length = (1, 64) if _SMALL.value else (2, 2048)
    shape = DecoderConfig(num_heads=8, num_kv_heads=2, head_dim=64)
    mesh = sharding.make_mesh(MeshConfig())
    rows *= mesh.size
    kernel = attention.select_kernel(shape, mesh, dtype="bfloat16")
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    arrays = [
        jax.random.normal(key, (rows, length, n, shape.head_dim), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=False)
    ]
    # Segments of a third of a row each, and padding.
    segments = jnp.minimum(jnp.arange(length) // (length // 3) + 1, 4) % 4
    segments = jnp.broadcast_to(segments[None], (rows, length))

    def gradients(kernel: Any, *arrays: Any) -> Any:
        attend = attention.within_segments(kernel, segments)

        def loss(*arrays: Any) -> Any:
            mixed = attend(*arrays) * (segments > 0)[:, :, None, None]
            return (mixed.astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)

    reference = gradients(attention.XLA, *(x.astype(jnp.float32) for x in arrays))
    result = gradients(kernel, *arrays)
    names = ("sum of squares", "d query", "d key", "d value")
    pairs = zip(names, jax.tree.leaves(result), jax.tree.leaves(reference), strict=True)
    return {f"{kernel.name}: {n}": _difference(x, y) for n, x, y in pairs}


def _head_parity() -> dict[str, float]:
    import head as head_benchmark
    import jax.numpy as jnp

    shape = head_benchmark.Shape(
        num_tokens=128 if _SMALL.value else 2048,
        width=64 if _SMALL.value else 1024,
        vocab_size=512 if _SMALL.value else 128256,
        k=16 if _SMALL.value else 64,
        chunk_size=64 if _SMALL.value else 1024,
        dtype="bfloat16",
    )
    hidden, *others = head_benchmark.make_inputs(shape)
    results = []
    for dtype, make in (
        (jnp.bfloat16, head_benchmark.fused_loss),
        (jnp.float32, head_benchmark.plain_loss),
    ):
        inputs = (hidden.astype(dtype), *others)
        results.append(head_benchmark.compile_gradient(make(shape), inputs)(*inputs))
    (loss, (d_hidden, d_weight)), (plain, (d_plain, d_plain_weight)) = results
    return {
        "head: loss": _difference(loss, plain),
        "head: d hidden": _difference(d_hidden, d_plain),
        "head: d weight": _difference(d_weight, d_plain_weight),
    }


def _step_parity() -> dict[str, float]:
    import jax

    from configs import bench_1b
    from kdjax.bench import workload
    from kdjax.parallel import sharding

    config = bench_1b.get_config("smoke" if _SMALL.value else "")
    if not _SMALL.value:
        config.student.decoder.num_layers = 2
        config.train.batch_size = 2
    metrics = {}
    for dtype in ("bfloat16", "float32"):
        config.train.dtype = dtype
        mesh = sharding.make_mesh(config.mesh)
        with tempfile.TemporaryDirectory() as folder:
            load = workload.make_synthetic(config, pathlib.Path(folder), mesh)
            metrics[dtype] = jax.device_get(workload.Step(load).prepared())
    return {
        f"step: {name}": _difference(metrics["bfloat16"][name], value)
        for name, value in metrics["float32"].items()
        if name in ("loss", "grad_norm")
    }


def student() -> dict[str, Any]:
    """Return the 1B student; an online teacher is timed in "online"."""
    return _measure(_bench_1b(), online=False)


def long_rows() -> dict[str, Any]:
    """Return the 1B student in rows of 8,192, as many tokens per step."""
    config = _bench_1b()
    config.name += "_8k"
    if not _SMALL.value:
        config.train.batch_size, config.train.row_length = 2, 8192
    return _measure(config, online=False)


def online() -> dict[str, Any]:
    """Return a student of the shape of Qwen3-0.6B, its teacher of that of Qwen3-4B."""
    from kdjax.config import DecoderConfig

    config = _bench_1b()
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


def _bench_1b() -> Any:
    from configs import bench_1b

    return bench_1b.get_config("smoke" if _SMALL.value else "")


def _measure(config: Any, *, online: bool) -> dict[str, Any]:
    from kdjax.bench import report, workload
    from kdjax.parallel import sharding

    mesh = sharding.make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as folder:
        load = workload.make_synthetic(config, pathlib.Path(folder), mesh)
        return report.measure(load, steps=9, rounds=3, online=online)


def label() -> dict[str, Any]:
    """Return the rate of a teacher of the student's shape, top k of every token."""
    import dataclasses

    import jax

    from kdjax.bench import components, timing, workload
    from kdjax.experiment.models import make_model
    from kdjax.models import flops, lm
    from kdjax.parallel import sharding
    from kdjax.training import program

    config = _bench_1b()
    shape = config.student.decoder
    config.method = dataclasses.replace(config.method, hard_weight=1.0, soft_weight=0.0)
    mesh = sharding.make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as folder:
        load = workload.make_synthetic(config, pathlib.Path(folder), mesh)
    built = program.Program(config, load.model, mesh)
    batch = built.place(built.make_batch(load.plan, 0, None))
    teacher = make_model(shape, mesh, dtype=config.train.dtype)
    params = jax.jit(
        lambda key: lm.init_params(shape, key), out_shardings=teacher.shardings
    )(jax.random.key(0))
    labels = components.make_online_label(load, teacher, batch, k=config.cache.k)
    matmul = timing.matmul(config.train.dtype)
    variants = {"matmul": matmul.call, "label": lambda: labels(params)}
    jax.block_until_ready(labels(params))
    samples = timing.alternate(variants, rounds=3, steps=3)
    tokens = config.train.batch_size * config.train.row_length
    work = flops.forward_flops(
        shape,
        num_tokens=tokens,
        row_length=config.train.row_length,
        num_head_tokens=tokens,
    )
    seconds = samples["label"].median
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_second": work / seconds,
        "of_matmul": work / seconds * samples["matmul"].median / matmul.flops,
    }


def decode() -> dict[str, Any]:
    """Return the rate of decoding 64 rows."""
    from kdjax.bench import decode as decoding

    config = _bench_1b()
    if _SMALL.value:
        config.evaluation.max_new_tokens = 4
    return decoding.measure(config, batch_sizes=(64,), rounds=3)


def head() -> dict[str, Any]:
    """Ours beside the plain form and the matmul rate."""
    return _head(8192, 4096, 128256, dense=True)


def heads() -> dict[str, Any]:
    """Ours at the shapes for which others publish a number."""
    return {
        "gemma": _head(32768, 2560, 262144, dense=False),
        "llama": _head(32768, 4096, 128256, dense=False),
    }


def _head(num_tokens: int, width: int, vocab: int, *, dense: bool) -> dict[str, Any]:
    import head as head_benchmark
    import jax

    from kdjax.training import program

    shape = head_benchmark.Shape(
        num_tokens=num_tokens,
        width=width,
        vocab_size=vocab,
        k=64,
        chunk_size=program.head_chunk_size(0, vocab, jax.devices()[0]),
        dtype="bfloat16",
    )
    if _SMALL.value:
        shape = head_benchmark.Shape(
            num_tokens=128, width=64, vocab_size=512, k=16, chunk_size=64
        )
    return head_benchmark.measure(shape, rounds=3, steps=5, dense=dense)


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


def run_part(name: str, seconds: float) -> dict[str, Any]:
    """One part in its own process; {"failed": why} where it did not end well."""
    if seconds < 1:
        return {"skipped": f"--minutes={_MINUTES.value} are over"}
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
                timeout=seconds,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
        if done.returncode or not out.is_file():
            return {"failed": done.stderr.strip()[-2000:]}
        return json.loads(out.read_text()) | {
            "wall_seconds": time.perf_counter() - since
        }


def main(argv: list[str]) -> None:
    """Run one part here, or all of them in turn."""
    del argv
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "parity": parity,
        "student": student,
        "head": head,
        "long_rows": long_rows,
        "online": online,
        "label": label,
        "heads": heads,
        "decode": decode,
        "liger": liger,
    }
    out = pathlib.Path(_OUT.value)
    if _ONE.value:
        out.write_text(json.dumps(parts[_ONE.value]()))
        return
    if unknown := set(_RUN.value) - set(parts):
        raise SystemExit(f"--parts={sorted(unknown)}: use some of {tuple(_PARTS)}")
    end = time.perf_counter() + 60 * _MINUTES.value
    found: dict[str, Any] = {}
    for name in _RUN.value:
        left = end - time.perf_counter()
        found[name] = run_part(name, left if _SMALL.value else min(left, _PARTS[name]))
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
    if "gemma" in found:
        shapes = ("gemma", "llama")
        return "; ".join(f"{name}: {headline(found[name])}" for name in shapes)
    return json.dumps(found.get("forms", found))


if __name__ == "__main__":
    app.run(main, argv=sys.argv)
