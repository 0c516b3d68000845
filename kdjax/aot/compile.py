"""Ahead-of-time compilation of the training step: memory, collectives, traffic."""

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from kdjax.aot import hlo, traffic
from kdjax.config import Config, DecoderConfig, replace
from kdjax.experiment.models import make_model, student_shape
from kdjax.models import attention
from kdjax.models.lm import Shape
from kdjax.parallel import sharding
from kdjax.training import program, trainable

# The fused head's scan, as JAX names it; one device has no shard_map.
_HEAD_LOOP = re.compile(r"shard_map/while|head_loss\)?/while")
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
    nodes: tuple[int, ...]  # of each device, in the order of the mesh
    attention: str  # the kernel that attends
    memory: dict[str, int]  # bytes by kind
    collectives: tuple[hlo.Collective, ...]
    head_chunks: int  # trips of the head's loop where no token is padding
    chunk_tokens: int  # tokens of a chunk of the head, at most
    kernels: tuple[traffic.Kernel, ...]
    written_bytes: int  # bytes written to main memory
    read_bytes: int  # bytes that kernels read from main memory
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
    kernels = traffic.kernels(module, unknown_trips=chunks)
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
        nodes=tuple(device.process_index for device in mesh.devices.flat),
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
        collectives=tuple(hlo.collectives(module, num_devices=mesh.size)),
        head_chunks=chunks,
        chunk_tokens=chunk,
        kernels=tuple(kernels),
        written_bytes=traffic.written_bytes(kernels),
        read_bytes=traffic.read_bytes(kernels),
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
    in_loop = in_head_loop(collective.loops)
    return any(
        num_tokens > 1 and (in_loop or not is_weight)
        for _, dims in collective.shapes
        for num_tokens, is_weight in _vocabulary_axes(dims, report)
    )


def logits_outside_chunks(report: StepReport) -> list[traffic.Kernel]:
    """Return the kernels that write float32 logits of more tokens than a chunk has.

    In the head's loop an array is of one chunk: a GPU's product may write partial sums
    over the width, [parts, tokens, vocabulary].
    """
    return [
        kernel
        for kernel in report.kernels
        if kernel.written
        and not in_head_loop(kernel.loops)
        and any(
            dtype == "f32" and num_tokens > report.chunk_tokens and not is_weight
            for dtype, dims in kernel.shapes
            for num_tokens, is_weight in _vocabulary_axes(dims, report)
        )
    ]


def _vocabulary_axes(
    dims: tuple[int, ...], report: StepReport
) -> Iterator[tuple[int, bool]]:
    """Yield the number of tokens for each dimension that may be a vocabulary.

    That is the product of the other dimensions, and whether these may be a weight's.
    """
    width, vocab_size = report.shape.width, report.shape.vocab_size
    vocabularies = {vocab_size, math.ceil(vocab_size / report.mesh["tensor"])}
    parts = {width // n for n in range(1, report.num_devices + 1) if width % n == 0}
    for axis in (i for i, dim in enumerate(dims) if dim in vocabularies):
        before, after = math.prod(dims[:axis]), math.prod(dims[axis + 1 :])
        is_weight = after in parts if before == 1 else (before, after) == (width, 1)
        yield before * after, is_weight


def in_head_loop(loops: Sequence[hlo.Loop]) -> bool:
    """Return True for what runs once per chunk of the fused head."""
    return any(_HEAD_LOOP.search(loop.op_name) for loop in loops)


def is_per_token(collective: hlo.Collective) -> bool:
    """Return True if all arrays communicated are vectors: per-token scalars."""
    return all(sum(dim > 1 for dim in dims) <= 1 for _, dims in collective.shapes)


def num_trips(collective: hlo.Collective, report: StepReport) -> int:
    """Return how often it runs per step, if no token is padding."""
    return math.prod(
        report.head_chunks if loop.trips is None else loop.trips
        for loop in collective.loops
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
