"""Measurements of a workload and their tables."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

import kdjax
from kdjax.bench import components, timing
from kdjax.bench.timing import Samples
from kdjax.bench.workload import (
    Step,
    Workload,
    batch_bytes,
    cache_bytes,
    hard_labels_only,
)
from kdjax.experiment.rows import flops_kwargs
from kdjax.models import flops
from kdjax.parallel import distributed
from kdjax.runtime import chips
from kdjax.runtime.console import print_table, progress
from kdjax.training import program

_PROFILED_STEPS = 3


def measure(
    workload: Workload,
    *,
    steps: int,
    rounds: int,
    online: bool = True,
    profile: str | None = None,
) -> dict[str, Any]:
    """Measure a workload: the numbers that docs/benchmark.md describes.

    Args:
      workload: config, student, batches and cache.
      steps: of each variant, split over the rounds (at least one per round).
      rounds: in which the variants take turns.
      online: also time an online teacher.
      profile: folder for a trace, or None.
    """
    per_round = max(1, steps // rounds)
    num_steps = 1 + rounds * per_round  # of a loop, the first one untimed
    step = Step(workload)
    soft = workload.cache is not None
    hard_step = Step(hard_labels_only(workload), step.shared) if soft else step
    matmul = timing.matmul(workload.config.train.dtype)
    extra = _PROFILED_STEPS if profile else 0
    variants: dict[str, Callable[[], Any]] = {
        "matmul": matmul.call,
        "step": step.prepared,
        "loop": step.loop(num_steps + extra),
    }
    if soft:
        variants |= {
            "step_hard": hard_step.prepared,
            "loop_hard": hard_step.loop(num_steps),
        }
    variants |= components.components(workload, step)
    if online:
        variants |= components.online_teacher(workload, step)
    with progress(
        len(variants) * (1 + rounds * per_round),
        "benchmark",
        is_main=distributed.is_main(),
    ) as advance:
        for start_step in variants.values():  # compiles what is not compiled yet
            jax.block_until_ready(start_step())
            advance()
        step.reset()
        hard_step.reset()
        samples = timing.alternate(
            variants, rounds=rounds, steps=per_round, advance=advance
        )
    results = _report(workload, step, hard_step, samples, matmul.flops)
    if profile:
        with jax.profiler.trace(profile):
            for _ in range(_PROFILED_STEPS):
                jax.block_until_ready(variants["loop"]())
    return results


def _report(
    workload: Workload,
    step: Step,
    hard_step: Step,
    samples: Mapping[str, Samples],
    matmul_flops: int,
) -> dict[str, Any]:
    config, shape = workload.config, workload.model.shape
    train = config.train
    batch = step.host_batch
    positions = train.batch_size * train.row_length
    loop_steps = len(step.wait_seconds)
    # A host makes its own rows of a batch; hosts have equally many.
    tokens_per_step = step.num_tokens * jax.process_count() / loop_steps
    targets_per_step = step.num_targets * jax.process_count() / loop_steps
    data: dict[str, Any] = {
        "source": workload.source,
        "examples": len(workload.plan.segments),
        "positions_per_step": positions,
        "tokens_per_step": tokens_per_step,
        "targets_per_step": targets_per_step,
    } | batch_bytes(batch)
    if workload.cache is not None:
        data |= {
            "cache_kind": workload.cache.kind,
            "k": workload.cache.k,
            "cache_bytes_per_token": cache_bytes(workload.cache)
            / workload.cache.num_tokens,
        }
    seconds_per_step = samples["loop"].total / loop_steps
    results: dict[str, Any] = {
        "name": config.name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "dtype": train.dtype,
        "versions": {"kdjax": kdjax.__version__, "jax": jax.__version__},
        "data": data,
        "model": {"parameters": flops.params_count(shape)},
        "compile_seconds": {"step": step.compile_seconds},
        "seconds": {
            name: {"median": s.median, "p90": s.p90, "rounds": s.round_medians}
            for name, s in samples.items()
        },
        "per_second": {
            "positions": positions / seconds_per_step,
            "tokens": tokens_per_step / seconds_per_step,
            "targets": targets_per_step / seconds_per_step,
        },
        "shares": _shares(step, samples, train.num_microbatches),
        "rate": _rate(workload, step, samples, matmul_flops),
        "ratios": {},
        "memory": {"step": timing.memory(step.compiled), "device": _device_memory()},
        "xla": timing.work(step.compiled),
    }
    if workload.cache is not None:
        results["compile_seconds"]["step_hard"] = hard_step.compile_seconds
        results["memory"]["step_hard"] = timing.memory(hard_step.compiled)
        results["ratios"] = {
            "soft_over_hard": timing.compare(samples["step"], samples["step_hard"]),
            "soft_over_hard_loop": timing.compare(
                samples["loop"], samples["loop_hard"]
            ),
        }
    if "online" in samples:
        online = timing.compare(samples["online"], samples["step"])
        results["ratios"]["online_over_offline"] = online
        teacher = components.teacher_shape(config, shape.vocab_size)
        results["model"]["teacher_parameters"] = flops.params_count(teacher)
    return results


def _shares(
    step: Step, samples: Mapping[str, Samples], num_microbatches: int
) -> dict[str, float]:
    """Compute shares of the prepared step, and of the loop for the data wait."""
    total = samples["step"].median
    shares = {
        "student": num_microbatches * samples["student"].median / total,
        "head": num_microbatches * samples["head"].median / total,
        "optimizer": samples["optimizer"].median / total,
    }
    shares["other"] = 1 - sum(shares.values())
    return shares | {"data_wait": sum(step.wait_seconds) / samples["loop"].total}


def _rate(
    workload: Workload, step: Step, samples: Mapping[str, Samples], matmul_flops: int
) -> dict[str, float]:
    """Compute FLOPs of the prepared step, rates of the device, MFU and bounds."""
    train, device = workload.config.train, jax.devices()[0]
    targets = step.host_batch.num_target_tokens * jax.process_count()
    shape = workload.model.shape
    sizes = flops_kwargs(shape, train) | {"num_head_tokens": targets}
    frozen_params = program.frozen_params_kwargs(
        workload.config, workload.model.abstract
    )
    per_step = flops.train_flops(shape, **sizes, **frozen_params)
    # One CPU device computes with all cores, however many devices it is made to be.
    num_devices = 1 if device.platform == "cpu" else jax.device_count()
    rates = [matmul_flops * num_devices / s for s in samples["matmul"].round_medians]
    measured = matmul_flops * num_devices / samples["matmul"].median
    listed = None
    if device.platform != "cpu":
        listed = chips.peak_flops(device, train.dtype)
    peak = listed * num_devices if listed else measured
    seconds = samples["step"].median
    return {
        "flops_per_step": per_step,
        "flops_per_second": per_step / seconds,
        "matmul_flops_per_second": measured,
        "matmul_flops_per_second_first": rates[0],
        "matmul_flops_per_second_last": rates[-1],
        "peak_flops_per_second": peak,
        "mfu": per_step / seconds / peak,
        "mfu_loop": per_step / samples["loop"].median / peak,
        "bound_seconds": per_step / measured,
        "bound_ratio": seconds * measured / per_step,
    }


def _device_memory() -> dict[str, int]:
    """Return the peak of allocated memory over all variants; {} on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"peak_bytes_in_use": "peak_bytes", "bytes_limit": "limit_bytes"}
    return {name: stats[key] for key, name in names.items() if key in stats}


def print_report(results: Mapping[str, Any]) -> None:
    """Print the results of `measure` as tables."""
    title = f"{results['name']}: {results['device']}, {results['dtype']}"
    print_table(
        f"{title}, {results['data']['source']} data, seconds per step",
        [
            {
                "variant": name,
                "median": f"{s['median']:.5f}",
                "p90": f"{s['p90']:.5f}",
                "compile": format_number(results["compile_seconds"].get(name, "")),
                "temporary MiB": _mib(results["memory"].get(name, {})),
            }
            for name, s in results["seconds"].items()
        ],
    )
    flat = {
        f"{part} {name}": value
        for part in ("model", "data", "per_second", "shares", "rate")
        for name, value in results[part].items()
    } | {
        f"{name}": f"{r['ratio']:.3f} ({r['lowest']:.3f} to {r['highest']:.3f})"
        for name, r in results["ratios"].items()
    }
    print_table(
        title,
        [{"what": key, "value": format_number(flat[key])} for key in sorted(flat)],
    )


def format_number(value: Any) -> str:
    """Return a number as the tables print it."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _mib(memory: Mapping[str, int]) -> str:
    return f"{memory['temporary_bytes'] / 2**20:.1f}" if memory else ""
