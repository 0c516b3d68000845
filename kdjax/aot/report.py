"""Reports of a planned step: memory, collectives, least time, remedies."""

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax

from kdjax.aot import bound, compile, hlo, topology, traffic
from kdjax.aot.compile import StepReport
from kdjax.config import Config
from kdjax.models import flops
from kdjax.parallel import sharding
from kdjax.runtime import chips
from kdjax.runtime.console import print_table

_MORE_MEMORY = (
    "JAX takes three quarters of a GPU's memory unless told otherwise, and the step "
    "needs more: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
)


def plan(
    config: Config,
    name: str,
    *,
    search: bool = True,
    effort: float = -1.0,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
    """Plan one config on one topology; return the report as plain values.

    Args:
      config: the run.
      name: of the topology.
      search: also look for the largest batch, or for changes that make it fit.
      effort: of the TPU compiler.
      devices: those of the topology, if they are known already.
    """
    devices = topology.devices(name) if devices is None else devices
    generation = name.split(":")[0]
    chip = None if generation == "cpu" else chips.find_chip(generation)
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    shape = compile.plannable_shape(config)
    useful, repeated = bound.model_flops(config, shape)
    report: dict[str, Any] = {
        "config": config.name,
        "topology": name,
        "num_devices": len(devices),
        "mesh": dict(mesh.shape),
        "parameters": flops.params_count(shape),
        "batch_size": config.train.batch_size,
        "row_length": config.train.row_length,
        "num_microbatches": config.train.num_microbatches,
        "model_flops": useful,
        "recomputed_flops": repeated,
    }
    try:
        step = compile.compile_step(config, devices, effort=effort)
    except compile.DoesNotFit as error:
        needs = {"needed_bytes": error.used, "compile_seconds": error.seconds}
        report |= {"fits": False} | needs
        if search and chip:
            report["remedies"] = _remedies(config, mesh, devices, chip, effort)
        return report
    report |= {
        "fits": None if chip is None else step.memory["peak"] <= chip.hbm_bytes,
        "compile_seconds": step.seconds,
        "attention": step.attention,
        "memory_bytes": step.memory,
        "collectives": _collectives(step),
        "warnings": _warnings(step),
        "compiler_flops_loops_once": step.compiler_flops,
        "written_bytes": step.written_bytes,
        "read_bytes": step.read_bytes,
        "written": _written(step),
    }
    if chip is None:
        return report
    if not report["fits"]:  # a compiler for GPUs does not refuse it
        report["needed_bytes"] = step.memory["peak"]
        if search:
            report["remedies"] = _remedies(config, mesh, devices, chip, effort)
    if chip.default_share * chip.hbm_bytes < step.memory["peak"] <= chip.hbm_bytes:
        report["warnings"].append(_MORE_MEMORY)
    least = bound.time_bound(step, chip)
    tokens = config.train.batch_size * config.train.row_length
    report["hbm_bytes"] = chip.hbm_bytes
    report["bound"] = {
        "compute_seconds": least.compute,
        "hbm_seconds": least.hbm,
        "hbm_seconds_all_reads": (step.written_bytes + step.read_bytes) / chip.hbm_rate,
        "link_seconds": least.links,
        "network_seconds": least.network,
        "seconds": least.seconds,
        "tokens_per_second": tokens / least.seconds,
        "mfu": useful / (least.seconds * chip.peak * len(devices)),
    }
    if search and report["fits"]:
        report["largest_batch_size"] = compile.largest_batch(
            step, devices, chip.hbm_bytes, effort=effort
        )
    return report


def _written(step: StepReport) -> list[dict[str, Any]]:
    """Group equal results of kernels into rows, the most bytes written first."""
    rows: dict[tuple, dict[str, Any]] = {}
    for kernel in step.kernels:
        arrays = _arrays(kernel.shapes)
        where = _where(kernel.loops)
        part = traffic.part(kernel)
        row = rows.setdefault(
            (part, arrays, where),
            {"part": part, "arrays": arrays, "where": where, "count": 0, "bytes": 0},
        )
        row["count"] += kernel.trips
        row["bytes"] += kernel.trips * kernel.written
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def _arrays(shapes: Sequence[hlo.Shape]) -> str:
    arrays = [f"{dtype}{list(dims)}" for dtype, dims in shapes]
    return ", ".join(arrays[:2]) + (f" +{len(arrays) - 2}" if arrays[2:] else "")


def _where(loops: Sequence[hlo.Loop]) -> str:
    if compile.in_head_loop(loops):
        return "head's loop"
    if not loops:
        return "outside loops"
    return "loop" + "".join(f" x {loop.trips or '?'}" for loop in loops)


def _collectives(step: StepReport) -> list[dict[str, Any]]:
    """Group equal collectives into rows, the most bytes sent first."""
    rows: dict[tuple, dict[str, Any]] = {}
    sent: dict[tuple, float] = defaultdict(float)
    for c in step.collectives:
        trips = compile.num_trips(c, step)
        what, where = _arrays(c.shapes), _where(c.loops)
        key = (c.kind, what, where, c.group_size)
        row = rows.setdefault(
            key,
            {
                "kind": c.kind,
                "arrays": what,
                "where": where,
                "devices": c.group_size,
                "count": 0,
                "bytes": c.num_bytes,
                "sent_bytes_per_step": 0.0,
                "logits": compile.is_logits(c, step),
            },
        )
        row["count"] += trips
        sent[key] += c.wire_bytes * trips
        row["sent_bytes_per_step"] = sent[key]
    return sorted(rows.values(), key=lambda row: -row["sent_bytes_per_step"])


def _warnings(step: StepReport) -> list[str]:
    warnings = []
    for c in step.collectives:
        if compile.is_logits(c, step):
            warnings.append(f"{c.kind} {c.name} communicates logits: {c.shapes}")
        elif compile.in_head_loop(c.loops) and not compile.is_per_token(c):
            warnings.append(f"{c.kind} {c.name} runs once per chunk of the head")
    for kernel in compile.logits_outside_chunks(step):
        warnings.append(
            f"{kernel.opcode} {kernel.name} writes logits of more than the "
            f"{step.chunk_tokens} tokens of a chunk: {kernel.shapes}"
        )
    return warnings


def _remedies(
    config: Config,
    mesh: jax.sharding.Mesh,
    devices: Sequence[jax.Device],
    chip: chips.Chip,
    effort: float,
) -> list[dict[str, Any]]:
    """Compile changes in turn, each on top of those before, until one fits."""
    tried: list[dict[str, Any]] = []
    for change, changed in compile.memory_remedies(config, mesh):
        state = compile.state_bytes(changed, devices)
        row: dict[str, Any] = {"change": change, "state_bytes": state, "fits": False}
        tried.append(row)
        if state > chip.hbm_bytes:  # whatever the activations take
            row["needed_bytes"] = state
            continue
        try:
            step = compile.compile_step(changed, devices, effort=effort)
        except compile.DoesNotFit as error:
            row["needed_bytes"] = error.used
            continue
        peak = step.memory["peak"]
        row |= {"fits": peak <= chip.hbm_bytes, "needed_bytes": peak}
        if row["fits"]:
            break
    return tried


def show(report: dict[str, Any]) -> None:
    """Print the report."""
    title = f"{report['config']} on {report['topology']}"
    mesh = " ".join(f"{axis}={n}" for axis, n in report["mesh"].items())
    rows = [
        ("mesh", mesh),
        ("parameters", f"{report['parameters']:,}"),
        (
            "batch",
            f"{report['batch_size']} rows of {report['row_length']} tokens in "
            f"{report['num_microbatches']} microbatch(es)",
        ),
        ("attention", report.get("attention", "")),
        ("fits", {True: "yes", False: "NO", None: "-"}[report["fits"]]),
    ]
    if "bound" in report:
        least = report["bound"]
        rows += [
            ("least seconds, products", f"{least['compute_seconds']:.4f}"),
            ("least seconds, memory", f"{least['hbm_seconds']:.4f}"),
            ("least seconds, links", f"{least['link_seconds']:.4f}"),
        ]
        if least["network_seconds"]:
            rows.append(("least seconds, network", f"{least['network_seconds']:.4f}"))
        rows += [
            ("least seconds per step", f"{least['seconds']:.4f}"),
            ("tokens/s at most", f"{least['tokens_per_second']:,.0f}"),
            ("MFU at most", f"{least['mfu']:.1%}"),
        ]
    if "largest_batch_size" in report:
        rows.append(("largest batch (line)", f"{report['largest_batch_size']} rows"))
    if "needed_bytes" in report:
        rows.append(("needs", f"{_size(report['needed_bytes'])} per device"))
    rows.append(("compiled in", f"{report['compile_seconds']:.0f} s"))
    print_table(title, [{"what": what, "value": value} for what, value in rows])
    if "memory_bytes" in report:
        memory = report["memory_bytes"] | {"available": report.get("hbm_bytes", 0)}
        print_table(
            "memory of a device",
            [{"kind": kind, "bytes": _size(n)} for kind, n in memory.items() if n],
        )
        print_table(
            f"written in a step: {_size(report['written_bytes'])} (read: "
            f"{_size(report['read_bytes'])})",
            [row | {"bytes": _size(row["bytes"])} for row in report["written"][:12]],
        )
        print_table(
            "collectives of a step", [_readable(c) for c in report["collectives"]]
        )
    if "remedies" in report:
        print_table(
            "changes, each on top of those before",
            [
                {
                    "change": row["change"],
                    "fits": "yes" if row["fits"] else "no",
                    "needs": _size(row["needed_bytes"]),
                }
                for row in report["remedies"]
            ],
        )
    for warning in report.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": row["kind"] + (" LOGITS" if row["logits"] else ""),
        "arrays": row["arrays"],
        "where": row["where"],
        "devices": row["devices"],
        "per step": row["count"],
        "bytes": _size(row["bytes"]),
        "sent per step": _size(row["sent_bytes_per_step"]),
    }


def _size(num_bytes: float) -> str:
    """Format a number of bytes."""
    power = min(3, max(0, int(math.log2(max(num_bytes, 1)) // 10)))
    return f"{num_bytes / 2 ** (10 * power):.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
