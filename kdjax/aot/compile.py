"""What a training step needs on devices nobody has to own, from its compilation."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from kdjax.aot import hlo
from kdjax.config import Config, DecoderConfig
from kdjax.experiment.models import make_model, student_shape
from kdjax.experiment.rows import flops_kwargs
from kdjax.models import attention, flops, lm
from kdjax.models.lm import Shape
from kdjax.parallel import sharding
from kdjax.training import program, trainable

_HEAD_LOOP = "shard_map/while"  # the fused head's scan, as JAX names it
_NUMBER = r"([\d.]+)([KMGT]?)"
_TOO_BIG = (
    rf"Used {_NUMBER}B? of [\d.]+\w* hbm",
    rf"\({_NUMBER}B?\) exceeds available HBM",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """One compiled training step; bytes are of one device."""

    config: Config
    shape: Shape
    num_devices: int
    mesh: dict[str, int]  # devices along each axis
    attention: str  # the kernel that attends
    memory: dict[str, int]  # bytes by kind
    collectives: tuple[hlo.Collective, ...]
    head_chunks: int  # trips of the head's loop where no token is padding
    written: int  # bytes written to main memory
    compiler_flops: float  # of cost_analysis: bodies of loops are counted once
    seconds: float  # of compiling


class TooBig(ValueError):
    """The compiler found no way to fit the program into the device's memory."""

    def __init__(self, used: float, seconds: float):
        """Bytes that it would need at least, and how long finding out took."""
        super().__init__(f"needs {used / 2**30:.2f} GiB a device")
        self.used, self.seconds = used, seconds


def plannable_shape(config: Config) -> Shape:
    """The student's shape without data or tokenizer.

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
) -> Forecast:
    """Compiles the training step of a config for some devices.

    The teacher is taken to have the student's vocabulary.

    Args:
      config: the run.
      devices: real or described.
      effort: of the TPU compiler, 0 as in a run, down to -1 for a quick answer.

    Raises:
      TooBig: it does not fit.
      ValueError: the mesh does not suit the devices, or the batch the mesh.
    """
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    shape, train = plannable_shape(config), config.train
    check_rows(config, mesh)
    model = make_model(
        shape,
        mesh,
        dtype=train.dtype,
        remat=train.remat,
        adapters=config.student.lora,
    )
    made = program.Program(config, model, mesh)
    batch = program.abstract_batch(config, shape, mesh, vocab_size=shape.vocab_size)
    step: Any = made.step  # a jitted function
    tpu = devices[0].platform == "tpu"
    start = time.perf_counter()
    try:
        compiled = step.lower(made.abstract, batch).compile(
            compiler_options={"exec_time_optimization_effort": effort} if tpu else {}
        )
    except jax.errors.JaxRuntimeError as error:
        used = _needed(str(error))
        if used is None:
            raise
        raise TooBig(used, time.perf_counter() - start) from None
    seconds = time.perf_counter() - start
    module = hlo.parse(compiled.as_text())
    rows = made.num_rows
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
        kernel = attention.choose(shape, mesh, dtype=train.dtype)
    return Forecast(
        config=config,
        shape=shape,
        num_devices=mesh.size,
        mesh=dict(mesh.shape),
        attention=attention.used(kernel, train.row_length),
        memory={
            "parameters": bytes_of(made.abstract.params),
            "optimizer state": bytes_of(made.abstract.opt_state),
            "averages": bytes_of(made.abstract.ema),
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
        written=hlo.written_bytes(module, unknown_trips=chunks),
        compiler_flops=float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        seconds=seconds,
    )


def check_rows(config: Config, mesh: Mesh) -> None:
    """Refuses a batch whose rows cannot be split over the mesh.

    Raises:
      ValueError: with a batch size that can.
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
    """Bytes that one device holds of a tree of described arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _needed(message: str) -> float | None:
    """Bytes a compiler says a program needs, None if that is not its complaint."""
    for pattern in _TOO_BIG:
        if found := re.search(pattern, message):
            return float(found[1]) * 2.0 ** (10 * "_KMGT".index(found[2] or "_"))
    return None


def is_logits(collective: hlo.Collective, forecast: Forecast) -> bool:
    """Whether an array with a vocabulary and a token dimension is communicated.

    The head's weight and its gradient are not: [V, D], a part of the width, or [D, V].
    A part of the vocabulary, as a tensor axis may hold it, counts as one.
    """
    width, vocab_size = forecast.shape.width, forecast.shape.vocab_size
    vocabularies = {vocab_size, math.ceil(vocab_size / forecast.mesh["tensor"])}
    parts = {width // n for n in range(1, forecast.num_devices + 1) if width % n == 0}
    for _, dims in collective.shapes:
        for axis in (i for i, dim in enumerate(dims) if dim in vocabularies):
            before, after = math.prod(dims[:axis]), math.prod(dims[axis + 1 :])
            weight = after in parts if before == 1 else (before, after) == (width, 1)
            if before * after > 1 and (in_head_loop(collective) or not weight):
                return True
    return False


def in_head_loop(collective: hlo.Collective) -> bool:
    """Whether it runs once a chunk of the fused head."""
    return any(_HEAD_LOOP in loop.op_name for loop in collective.loops)


def is_per_token(collective: hlo.Collective) -> bool:
    """Whether nothing but numbers of tokens is exchanged: vectors, no matrices."""
    return all(sum(dim > 1 for dim in dims) <= 1 for _, dims in collective.shapes)


def trips(collective: hlo.Collective, forecast: Forecast) -> int:
    """How often it runs a step, where no token is padding."""
    return math.prod(
        forecast.head_chunks if loop.trips is None else loop.trips
        for loop in collective.loops
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """The least time of a step; each resource alone, in seconds."""

    compute: float  # products, recomputed ones included, at the peak rate
    hbm: float  # what the step writes, once written and once read
    ici: float  # what it sends, over all links of a chip at once

    @property
    def seconds(self) -> float:
        """All three overlap perfectly."""
        return max(self.compute, self.hbm, self.ici)


def model_flops(config: Config, shape: Shape) -> tuple[int, int]:
    """FLOPs of a step that are useful, and those that only recompute, on all devices.

    Recomputing whole layers (remat="full") repeats their forward pass.
    """
    sizes = flops_kwargs(shape, config.train)
    _, params = lm.create(shape, adapters=config.student.lora)
    spared = program.untrained(config, params)
    useful = flops.train_flops(shape, **sizes | spared)
    if config.train.remat != "full":
        return useful, 0
    return useful, flops.forward_flops(shape, **sizes | {"num_head_tokens": 0})


def bound(forecast: Forecast, chip: flops.Chip) -> Bound:
    """Lower bound on the time of a step on TPU chips."""
    work = sum(model_flops(forecast.config, forecast.shape))
    sent = sum(c.wire_bytes * trips(c, forecast) for c in forecast.collectives)
    return Bound(
        compute=work / forecast.num_devices / chip.peak,
        hbm=2 * forecast.written / chip.hbm_rate,
        ici=sent / chip.ici_rate,
    )


def largest_batch(
    first: Forecast, devices: Sequence[jax.Device], limit: float, *, effort: float
) -> int:
    """The largest batch_size that fits, by a line through two compilations.

    The second has twice the rows; that it does not fit is a point of the line as well.

    Args:
      first: the step as configured, which fits.
      devices: those it was compiled for.
      limit: bytes of a device.
      effort: of the compiler.
    """
    config = first.config
    twice = replace(config, train={"batch_size": 2 * config.train.batch_size})
    try:
        peak = float(compile_step(twice, devices, effort=effort).memory["peak"])
    except TooBig as error:
        peak = max(error.used, limit + 1)
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    step = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.num_microbatches
    rows = config.train.batch_size // step  # of a device's microbatch
    slope = max((peak - first.memory["peak"]) / rows, 1.0)
    return step * (rows + int((limit - first.memory["peak"]) // slope))


def remedies(config: Config, mesh: Mesh) -> list[tuple[str, Config]]:
    """Changes that save memory and keep the numbers, each on top of those before it.

    The last, Adafactor, is another optimizer and changes what is learned.
    """
    train, parts = config.train, mesh.shape["data"] * mesh.shape["fsdp"]
    changes: list[tuple[str, dict[str, Any]]] = [
        ("train.remat=full", {"train": {"remat": "full"}}),
        (
            f"train.num_microbatches={train.batch_size // parts}",
            {"train": {"num_microbatches": train.batch_size // parts}},
        ),
        (f"mesh.data=1 mesh.fsdp={parts}", {"mesh": {"data": 1, "fsdp": parts}}),
        ("optim.name=adafactor", {"optim": {"name": "adafactor"}}),
    ]
    found: list[tuple[str, Config]] = []
    for name, change in changes:
        before = found[-1][1] if found else config
        after = replace(before, **change)
        if after != before and not ("mesh" in change and mesh.shape["data"] == 1):
            found.append((name, after))
    return found


def replace(config: Config, **parts: dict[str, Any]) -> Config:
    """A config with some fields of some parts changed."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **fields)
            for name, fields in parts.items()
        },
    )


def state_bytes(config: Config, devices: Sequence[jax.Device]) -> int:
    """Parameters, optimizer state and gradients of one device; nothing is compiled."""
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    model = make_model(
        plannable_shape(config),
        mesh,
        dtype=config.train.dtype,
        adapters=config.student.lora,
    )
    made = program.Program(config, model, mesh)
    trained, _ = trainable.split(made.abstract.params, made.frozen)
    return bytes_of(made.abstract) + bytes_of(trained)
