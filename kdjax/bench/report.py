"""Measurements of a workload and their tables."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

import kdjax
from kdjax.bench import components, timing, workload
from kdjax.bench.timing import Samples
from kdjax.bench.workload import Step, Workload
from kdjax.experiment.rows import flops_kwargs
from kdjax.models import flops
from kdjax.parallel import distributed
from kdjax.runtime import chips
from kdjax.runtime.console import print_table, progress
from kdjax.training import program

_PROFILED_STEPS = 3


def measure(
    load: Workload,
    *,
    steps: int,
    rounds: int,
    online: bool = True,
    profile: str | None = None,
) -> dict[str, Any]:
    """All numbers about a workload, as docs/benchmark.md describes them.

    Args:
      load: config, student, batches and cache.
      steps: of each variant, split over the rounds (at least one a round).
      rounds: in which the variants take turns.
      online: also time a live teacher.
      profile: folder for a trace, or None.
    """
    per_round = max(1, steps // rounds)
    num_steps = 1 + rounds * per_round  # of a loop, the first one untimed
    whole = Step(load)
    soft = load.cache is not None
    hard = Step(workload.hard_labels_only(load), whole.shared) if soft else whole
    matmul = timing.matmul(load.config.train.dtype)
    extra = _PROFILED_STEPS if profile else 0
    variants: dict[str, Callable[[], Any]] = {
        "matmul": matmul.call,
        "step": whole.prepared,
        "loop": whole.loop(num_steps + extra),
    }
    if soft:
        variants |= {"step_hard": hard.prepared, "loop_hard": hard.loop(num_steps)}
    variants |= components.components(load, whole)
    if online:
        variants |= components.online_teacher(load, whole)
    with progress(
        len(variants) * (1 + rounds * per_round),
        "benchmark",
        is_main=distributed.is_main(),
    ) as advance:
        for start_step in variants.values():  # compiles what is not compiled yet
            jax.block_until_ready(start_step())
            advance()
        whole.reset()
        hard.reset()
        samples = timing.alternate(
            variants, rounds=rounds, steps=per_round, advance=advance
        )
    found = _report(load, whole, hard, samples, matmul.flops)
    if profile:
        with jax.profiler.trace(profile):
            for _ in range(_PROFILED_STEPS):
                jax.block_until_ready(variants["loop"]())
    return found


def _report(
    load: Workload,
    whole: Step,
    hard: Step,
    samples: Mapping[str, Samples],
    matmul_flops: int,
) -> dict[str, Any]:
    config, shape = load.config, load.model.shape
    train = config.train
    batch = whole.host_batch
    positions = train.batch_size * train.row_length
    loop_steps = len(whole.wait_seconds)
    # A host makes its own rows of a batch; hosts have equally many.
    tokens_per_step = whole.num_tokens * jax.process_count() / loop_steps
    targets_per_step = whole.num_targets * jax.process_count() / loop_steps
    data: dict[str, Any] = {
        "source": load.source,
        "examples": len(load.plan.segments),
        "positions_per_step": positions,
        "tokens_per_step": tokens_per_step,
        "targets_per_step": targets_per_step,
    } | workload.batch_bytes(batch)
    if load.cache is not None:
        data |= {
            "cache_kind": load.cache.kind,
            "k": load.cache.k,
            "cache_bytes_per_token": workload.cache_bytes(load.cache)
            / load.cache.num_tokens,
        }
    loop, step = samples["loop"], samples["step"]
    seconds_per_step = loop.total / loop_steps
    found: dict[str, Any] = {
        "name": config.name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "dtype": train.dtype,
        "versions": {"kdjax": kdjax.__version__, "jax": jax.__version__},
        "data": data,
        "model": {"parameters": flops.params_count(shape)},
        "compile_seconds": {"step": whole.compile_seconds},
        "seconds": {
            name: {"median": s.median, "p90": s.p90, "rounds": s.round_medians}
            for name, s in samples.items()
        },
        "per_second": {
            "positions": positions / seconds_per_step,
            "tokens": tokens_per_step / seconds_per_step,
            "targets": targets_per_step / seconds_per_step,
        },
        "shares": _shares(whole, samples, train.num_microbatches),
        "rate": _rate(load, whole, samples, matmul_flops),
        "ratios": {},
        "memory": {"step": timing.memory(whole.compiled), "device": _device_memory()},
        "xla": timing.work(whole.compiled),
    }
    if load.cache is not None:
        found["compile_seconds"]["step_hard"] = hard.compile_seconds
        found["memory"]["step_hard"] = timing.memory(hard.compiled)
        found["ratios"] = {
            "soft_over_hard": timing.compare(step, samples["step_hard"]),
            "soft_over_hard_loop": timing.compare(loop, samples["loop_hard"]),
        }
    if "online" in samples:
        online = timing.compare(samples["online"], step)
        found["ratios"]["online_over_offline"] = online
        teacher = components.teacher_shape(config, shape.vocab_size)
        found["model"]["teacher_parameters"] = flops.params_count(teacher)
    return found


def _shares(
    whole: Step, samples: Mapping[str, Samples], num_microbatches: int
) -> dict[str, float]:
    """Parts of the step on a prepared batch, and of the loop for the data wait."""
    total = samples["step"].median
    shares = {
        "student": num_microbatches * samples["student"].median / total,
        "head": num_microbatches * samples["head"].median / total,
        "optimizer": samples["optimizer"].median / total,
    }
    shares["other"] = 1 - sum(shares.values())
    return shares | {"data_wait": sum(whole.wait_seconds) / samples["loop"].total}


def _rate(
    load: Workload, whole: Step, samples: Mapping[str, Samples], matmul_flops: int
) -> dict[str, float]:
    """FLOPs of the prepared step, rates of the device, and what they come to."""
    train, device = load.config.train, jax.devices()[0]
    targets = whole.host_batch.num_target_tokens * jax.process_count()
    shape = load.model.shape
    sizes = flops_kwargs(shape, train) | {"num_head_tokens": targets}
    spared = program.frozen_params_kwargs(load.config, load.model.abstract)
    per_step = flops.train_flops(shape, **sizes, **spared)
    # One CPU device computes with all cores, however many devices it is made to be.
    num_devices = 1 if device.platform == "cpu" else jax.device_count()
    rates = [matmul_flops * num_devices / s for s in samples["matmul"].round_medians]
    measured = matmul_flops * num_devices / samples["matmul"].median
    listed = None
    if device.platform != "cpu":
        listed = chips.peak_flops(device, train.dtype)
    peak = listed * num_devices if listed else measured
    step = samples["step"].median
    return {
        "flops_per_step": per_step,
        "flops_per_second": per_step / step,
        "matmul_flops_per_second": measured,
        "matmul_flops_per_second_first": rates[0],
        "matmul_flops_per_second_last": rates[-1],
        "peak_flops_per_second": peak,
        "mfu": per_step / step / peak,
        "mfu_loop": per_step / samples["loop"].median / peak,
        "bound_seconds": per_step / measured,
        "bound_ratio": step * measured / per_step,
    }


def _device_memory() -> dict[str, int]:
    """The most that was allocated on a device so far, by all variants; {} on a CPU."""
    found = jax.local_devices()[0].memory_stats() or {}
    names = {"peak_bytes_in_use": "peak_bytes", "bytes_limit": "limit_bytes"}
    return {name: found[key] for key, name in names.items() if key in found}


def print_report(found: Mapping[str, Any]) -> None:
    """The numbers as tables."""
    title = f"{found['name']}: {found['device']}, {found['dtype']}"
    print_table(
        f"{title}, {found['data']['source']} data, seconds a step",
        [
            {
                "variant": name,
                "median": f"{s['median']:.5f}",
                "p90": f"{s['p90']:.5f}",
                "compile": format_number(found["compile_seconds"].get(name, "")),
                "temporary MiB": _mib(found["memory"].get(name, {})),
            }
            for name, s in found["seconds"].items()
        ],
    )
    flat = {
        f"{part} {name}": value
        for part in ("model", "data", "per_second", "shares", "rate")
        for name, value in found[part].items()
    } | {
        f"{name}": f"{r['ratio']:.3f} ({r['lowest']:.3f} to {r['highest']:.3f})"
        for name, r in found["ratios"].items()
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
