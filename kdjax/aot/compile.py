"""Ahead-of-time compilation of the training step: memory, collectives, least time."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from kdjax.aot import hlo
from kdjax.config import Config, DecoderConfig, replace
from kdjax.experiment.models import make_model, student_shape
from kdjax.experiment.rows import flops_kwargs
from kdjax.models import attention, flops, lm
from kdjax.models.lm import Shape
from kdjax.parallel import sharding
from kdjax.runtime import chips
from kdjax.training import program, trainable

_HEAD_LOOP = "shard_map/while"  # the fused head's scan, as JAX names it
_NUMBER = r"([\d.]+)([KMGT]?)"
_DOES_NOT_FIT = (
    rf"Used {_NUMBER}B? of [\d.]+\w* hbm",
    rf"\({_NUMBER}B?\) exceeds available HBM",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """Measures of one compiled training step; bytes are per device."""

    config: Config
    shape: Shape
    num_devices: int
    mesh: dict[str, int]  # devices along each axis
    attention: str  # the kernel that attends
    memory: dict[str, int]  # bytes by kind
    collectives: tuple[hlo.Collective, ...]
    head_chunks: int  # trips of the head's loop where no token is padding
    written_bytes: int  # bytes written to main memory
    compiler_flops: float  # of cost_analysis: bodies of loops are counted once
    seconds: float  # of compiling


class DoesNotFit(ValueError):
    """The program needs more memory than the device has, says the compiler."""

    def __init__(self, used: float, seconds: float):
        """Set the bytes needed at least, and the seconds that compiling took."""
        super().__init__(f"needs {used / 2**30:.2f} GiB per device")
        self.used, self.seconds = used, seconds


def plannable_shape(config: Config) -> Shape:
    """Return the student's shape without data or tokenizer.

    Raises:
      ValueError: the config leaves the vocabulary to the tokenizer, or the teacher runs
        in the step.
    """
    student = config.student
    if config.teacher.online:
        raise ValueError(
            "teacher.online=True: planning covers runs from a cache, use "
            "--config.teacher.online=False"
        )
    part = "t5" if student.architecture == "t5" else "decoder"
    if student.init == "random" and not getattr(student, part).vocab_size:
        raise ValueError(
            f"student.{part}.vocab_size=0 takes the tokenizer's, which planning does "
            f"not read: give --config.student.{part}.vocab_size=NUMBER"
        )
    return student_shape(config, range(0))


def compile_step(
    config: Config, devices: Sequence[jax.Device], *, effort: float = 0.0
) -> StepReport:
    """Compile the training step of a config for some devices.

    The teacher is taken to have the student's vocabulary.

    Args:
      config: the run.
      devices: real ones, or those of a topology.
      effort: of the TPU compiler, 0 as in a run, down to -1 for a quick answer.

    Raises:
      DoesNotFit: it does not fit.
      ValueError: the mesh does not suit the devices, or the batch the mesh.
    """
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    shape, train = plannable_shape(config), config.train
    check_batch(config, mesh)
    model = make_model(
        shape,
        mesh,
        dtype=train.dtype,
        remat=train.remat,
        adapters=config.student.lora,
    )
    built = program.Program(config, model, mesh)
    batch = program.abstract_batch(config, shape, mesh, vocab_size=shape.vocab_size)
    step: Any = built.step  # a jitted function
    tpu = devices[0].platform == "tpu"
    start = time.perf_counter()
    try:
        compiled = step.lower(built.abstract, batch).compile(
            compiler_options={"exec_time_optimization_effort": effort} if tpu else {}
        )
    except jax.errors.JaxRuntimeError as error:
        used = _needed_bytes(str(error))
        if used is None:
            raise
        raise DoesNotFit(used, time.perf_counter() - start) from None
    seconds = time.perf_counter() - start
    module = hlo.parse(compiled.as_text())
    rows = built.num_rows
    chunk = program.chunk_size(config, model)
    # A tensor axis splits the head's vocabulary, not its tokens.
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    chunks = math.ceil(math.ceil(rows * train.row_length / shares) / chunk)
    stats = compiled.memory_analysis()
    # Peaks count what is alive at once; older compilers give the sum of their parts.
    parts = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    peak = getattr(stats, "peak_memory_in_bytes", 0) or parts
    kernel = attention.XLA
    if isinstance(shape, DecoderConfig):
        kernel = attention.select_kernel(shape, mesh, dtype=train.dtype)
    return StepReport(
        config=config,
        shape=shape,
        num_devices=mesh.size,
        mesh=dict(mesh.shape),
        attention=attention.kernel_name(kernel, train.row_length),
        memory={
            "parameters": bytes_of(built.abstract.params),
            "optimizer state": bytes_of(built.abstract.opt_state),
            "averages": bytes_of(built.abstract.ema),
            "batch": bytes_of(batch),
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes,
            "aliased": stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "generated code": stats.generated_code_size_in_bytes,
            "peak": peak,
        },
        collectives=tuple(hlo.collectives(module)),
        head_chunks=chunks,
        written_bytes=hlo.written_bytes(module, unknown_trips=chunks),
        compiler_flops=float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        seconds=seconds,
    )


def check_batch(config: Config, mesh: Mesh) -> None:
    """Check that the rows of a batch split evenly over mesh and microbatches.

    Raises:
      ValueError: they do not; names a batch size that does.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    step = parts * config.train.num_microbatches
    if config.train.batch_size % step:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} in num_microbatches="
            f"{config.train.num_microbatches} does not divide over mesh data * fsdp = "
            f"{parts}: use a multiple of {step}"
        )


def bytes_of(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of abstract arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _needed_bytes(message: str) -> float | None:
    """Parse the bytes needed from an out-of-memory message; None for another one."""
    for pattern in _DOES_NOT_FIT:
        if match := re.search(pattern, message):
            return float(match[1]) * 2.0 ** (10 * "_KMGT".index(match[2] or "_"))
    return None


def is_logits(collective: hlo.Collective, report: StepReport) -> bool:
    """Return True if an array with a vocabulary and a token dimension is communicated.

    The head's weight and its gradient are not: [V, D], a part of the width, or [D, V].
    A part of the vocabulary, as a tensor axis may hold it, counts as one.
    """
    width, vocab_size = report.shape.width, report.shape.vocab_size
    vocabularies = {vocab_size, math.ceil(vocab_size / report.mesh["tensor"])}
    parts = {width // n for n in range(1, report.num_devices + 1) if width % n == 0}
    for _, dims in collective.shapes:
        for axis in (i for i, dim in enumerate(dims) if dim in vocabularies):
            before, after = math.prod(dims[:axis]), math.prod(dims[axis + 1 :])
            weight = after in parts if before == 1 else (before, after) == (width, 1)
            if before * after > 1 and (in_head_loop(collective) or not weight):
                return True
    return False


def in_head_loop(collective: hlo.Collective) -> bool:
    """Return True if it runs once per chunk of the fused head."""
    return any(_HEAD_LOOP in loop.op_name for loop in collective.loops)


def is_per_token(collective: hlo.Collective) -> bool:
    """Return True if all arrays communicated are vectors: per-token scalars."""
    return all(sum(dim > 1 for dim in dims) <= 1 for _, dims in collective.shapes)


def num_trips(collective: hlo.Collective, report: StepReport) -> int:
    """Return how often it runs per step, if no token is padding."""
    return math.prod(
        report.head_chunks if loop.trips is None else loop.trips
        for loop in collective.loops
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeBound:
    """Lower bounds on the time of a step, in seconds, one per resource."""

    compute: float  # FLOPs, recomputed ones included, at the peak rate
    hbm: float  # bytes written, each once written and once read
    ici: float  # bytes sent, over all links of a chip at once

    @property
    def seconds(self) -> float:
        """The bound if all three overlap perfectly."""
        return max(self.compute, self.hbm, self.ici)


def model_flops(config: Config, shape: Shape) -> tuple[int, int]:
    """Return the useful and the recomputed FLOPs of a step, on all devices.

    Recomputing whole layers (remat="full") repeats their forward pass.
    """
    sizes = flops_kwargs(shape, config.train)
    _, params = lm.create(shape, adapters=config.student.lora)
    frozen_kwargs = program.frozen_params_kwargs(config, params)
    useful = flops.train_flops(shape, **sizes | frozen_kwargs)
    if config.train.remat != "full":
        return useful, 0
    return useful, flops.forward_flops(shape, **sizes | {"num_head_tokens": 0})


def time_bound(report: StepReport, chip: chips.Chip) -> TimeBound:
    """Return lower bounds on the time of a step on TPU chips."""
    work = sum(model_flops(report.config, report.shape))
    sent = sum(c.wire_bytes * num_trips(c, report) for c in report.collectives)
    return TimeBound(
        compute=work / report.num_devices / chip.peak,
        hbm=2 * report.written_bytes / chip.hbm_rate,
        ici=sent / chip.ici_rate,
    )


def largest_batch(
    first: StepReport, devices: Sequence[jax.Device], limit: float, *, effort: float
) -> int:
    """Extrapolate the largest batch_size that fits from two compilations.

    The second has twice the rows. Where it does not fit, the bytes that the compiler
    says it needs are the second point of the line.

    Args:
      first: the step as configured, which fits.
      devices: those it was compiled for.
      limit: memory of a device, bytes.
      effort: of the compiler.
    """
    config = first.config
    twice = replace(config, "train.batch_size", 2 * config.train.batch_size)
    try:
        peak = float(compile_step(twice, devices, effort=effort).memory["peak"])
    except DoesNotFit as error:
        peak = max(error.used, limit + 1)
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    step = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.num_microbatches
    rows = config.train.batch_size // step  # of a device's microbatch
    slope = max((peak - first.memory["peak"]) / rows, 1.0)
    return step * (rows + int((limit - first.memory["peak"]) // slope))


def memory_remedies(config: Config, mesh: Mesh) -> list[tuple[str, Config]]:
    """List changes that save memory and keep the numbers, each on top of the last.

    The last, Adafactor, is another optimizer and changes what is learned.
    """
    train, parts = config.train, mesh.shape["data"] * mesh.shape["fsdp"]
    changes: list[tuple[str, dict[str, Any]]] = [
        ("train.remat=full", {"train.remat": "full"}),
        (
            f"train.num_microbatches={train.batch_size // parts}",
            {"train.num_microbatches": train.batch_size // parts},
        ),
        (f"mesh.data=1 mesh.fsdp={parts}", {"mesh.data": 1, "mesh.fsdp": parts}),
        ("optim.name=adafactor", {"optim.name": "adafactor"}),
    ]
    remedies: list[tuple[str, Config]] = []
    for name, change in changes:
        before = remedies[-1][1] if remedies else config
        after = before
        for path, value in change.items():
            after = replace(after, path, value)
        if after != before and not ("mesh.data" in change and mesh.shape["data"] == 1):
            remedies.append((name, after))
    return remedies


def state_bytes(config: Config, devices: Sequence[jax.Device]) -> int:
    """Return the bytes of state and gradients on one device, without compiling."""
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    model = make_model(
        plannable_shape(config),
        mesh,
        dtype=config.train.dtype,
        adapters=config.student.lora,
    )
    built = program.Program(config, model, mesh)
    trained, _ = trainable.partition(built.abstract.params, built.frozen_paths)
    return bytes_of(built.abstract) + bytes_of(trained)
