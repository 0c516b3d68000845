"""The mesh, and the one table of partitions of parameters over it."""

import difflib
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")

# The width of the output head, and of the embedding that may be it, is split, not the
# vocabulary: any vocabulary size fits any mesh.
HEAD_SPEC = P(None, ("fsdp", "tensor"))
# path of a parameter -> its partition; each parameter matches exactly one rule.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", HEAD_SPEC),
    (r"head/weight", HEAD_SPEC),
    (r"layers/attention/(query|key|value)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/attention/(query|key|value)/bias", P(None, "tensor")),
    (r"layers/attention/out/kernel", P(None, "tensor", "fsdp")),
    (r"layers/mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/mlp/(gate|up)/bias", P(None, "tensor")),
    (r"layers/mlp/down/kernel", P(None, "tensor", "fsdp")),
    (r"layers/(attention/out|mlp/down)/bias", P()),
    (r"(layers/.*_)?norm/scale", P()),
    (r"projection/kernel", P(None, "fsdp", "tensor")),  # of the hidden-state loss
    # T5: two stacks, whose small tables of position biases are repeated.
    (
        r"(encoder|decoder)/layers/(attention|cross)/(query|key|value)/kernel",
        P(None, "fsdp", "tensor"),
    ),
    (
        r"(encoder|decoder)/layers/(attention|cross)/out/kernel",
        P(None, "tensor", "fsdp"),
    ),
    (r"(encoder|decoder)/layers/mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"(encoder|decoder)/layers/mlp/down/kernel", P(None, "tensor", "fsdp")),
    (r"(encoder|decoder)/(layers/.*_)?norm/scale", P()),
    (r"(encoder|decoder)/position_bias/table", P()),
    # Adapters: what they share with their kernel is split as that is, the rank never.
    (r"(.*/)?layers/.*/(query|key|value|gate|up)/lora_a", P(None, "fsdp")),
    (r"(.*/)?layers/.*/(query|key|value|gate|up)/lora_b", P(None, None, "tensor")),
    (r"(.*/)?layers/.*/(out|down)/lora_a", P(None, "tensor")),
    (r"(.*/)?layers/.*/(out|down)/lora_b", P(None, None, "fsdp")),
)
BATCH_SPEC = P(None, ("data", "fsdp"))  # [microbatch, row, ...]


def make_mesh(config: MeshConfig, *, devices: Any = None) -> Mesh:
    """Make a (data, fsdp, tensor) mesh over all devices.

    Devices of several slices (TPU slices; for GPUs nodes, or what NVLink joins) have a
    slow network between them: it gets the data axis, whose one collective per step is
    the sum of gradients. A fsdp axis that is larger than a slice goes over it, too, and
    then gathers parameters over it; the tensor axis never does.

    Args:
      config: devices per axis; one axis may be -1 and takes the rest.
      devices: defaults to all devices of all processes.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or do not suit the
        torus or the slices that these form.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    named = ", ".join(f"mesh.{a}={s}" for a, s in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(f"{named}: sizes are positive and at most one is -1")
    known = int(np.prod([s for s in sizes if s != -1]))
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"{named} does not fill {len(devices)} devices: make the sizes multiply to "
            f"{len(devices)}, or set one of them to -1"
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    types = (AxisType.Auto,) * len(AXES)
    try:
        if (num_slices := count_slices(devices)) > 1:
            inside, between = split_over_slices(sizes, num_slices)
            array = mesh_utils.create_hybrid_device_mesh(
                inside, between, devices, allow_split_physical_axes=True
            )
            return Mesh(array, AXES, axis_types=types)
        return jax.make_mesh(tuple(sizes), AXES, types, devices=devices)
    except NotImplementedError as error:  # of TPU slices
        raise ValueError(
            f"{named} do not suit the torus: each axis must be a product of some of "
            f"the slice's dimensions ({str(error).splitlines()[0].split('. ')[0]})"
        ) from None


def count_slices(devices: Sequence[Any]) -> int:
    """Count the slices of devices: groups with a fast network inside."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def split_over_slices(
    sizes: Sequence[int], num_slices: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split a (data, fsdp, tensor) mesh into its part inside a slice and between them.

    Args:
      sizes: devices along each axis.
      num_slices: of the devices, all of one size.

    Returns:
      Sizes inside a slice, and numbers of slices along each axis.

    Raises:
      ValueError: neither the data axis, nor it and the fsdp axis, can be divided so.
    """
    data, fsdp, tensor = sizes
    over_data = math.gcd(data, num_slices)
    over_fsdp = num_slices // over_data
    # Rows of a process must be contiguous: fsdp goes over slices where data is used up.
    if fsdp % over_fsdp or (over_fsdp > 1 and data != over_data):
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} do not divide "
            f"over {num_slices} slices (or nodes): make mesh.data a multiple of "
            f"{num_slices}; mesh.tensor has to fit into one slice"
        )
    return (data // over_data, fsdp // over_fsdp, tensor), (over_data, over_fsdp, 1)


def path_name(path: Any) -> str:
    """Format a pytree path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return the partition of one parameter, from the table.

    Raises:
      ValueError: no rule or several match, or a dimension does not divide.
    """
    specs = [spec for rule, spec in RULES if re.fullmatch(rule, path)]
    if len(specs) != 1:
        near = difflib.get_close_matches(path, [r for r, _ in RULES], n=3, cutoff=0.0)
        raise ValueError(
            f"parameter {path} of shape {shape} matches {len(specs)} sharding rules, "
            f"wanted 1; the nearest are {near}: add one to kdjax/parallel/sharding.py"
        )
    for dim, axes in enumerate(specs[0]):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        num_shards = int(np.prod([mesh.shape[a] for a in names], dtype=int))
        if shape[dim] % num_shards:
            raise ValueError(
                f"parameter {path}: dimension {dim} of shape {shape} does not divide "
                f"over {num_shards} devices of {names}: use a smaller mesh axis"
            )
    return specs[0]


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """Return NamedShardings for a nested dict of parameters or of their shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_for(path_name(path), x.shape, mesh)),
        params,
    )


def opt_shardings(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any
) -> Any:
    """Return the shardings of the optimizer state: moments go with their parameter.

    What has another shape than its parameter (Adafactor's factors, counters) is small
    and repeated on every device.
    """
    state = jax.eval_shape(optimizer.init, params)
    everywhere = NamedSharding(jax.tree.leaves(shardings)[0].mesh, P())
    return optax.tree.map_params(
        optimizer,
        lambda leaf, p, s: s if leaf.shape == p.shape else everywhere,
        state,
        params,
        shardings,
        transform_non_params=lambda _: everywhere,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def divisible_rows(num_rows: int, mesh: Mesh) -> int:
    """Return the next number of rows that divides over data * fsdp."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-num_rows // shards) * shards


def local_rows(mesh: Mesh, num_rows: int) -> slice:
    """Return the slice of a microbatch's `num_rows` rows that this process loads.

    Raises:
      ValueError: rows do not divide over the mesh, or are not contiguous here.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if num_rows % shards:
        raise ValueError(
            f"a microbatch of {num_rows} rows does not divide over data * fsdp = "
            f"{shards}: use a batch_size / num_microbatches that is a multiple of it"
        )
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    indices = sharding.addressable_devices_indices_map((num_rows,)).values()
    rows = [index[0] for index in indices if index is not None]
    ranges = sorted({(r.start or 0, r.stop or num_rows) for r in rows})
    for (_, stop), (start, _) in itertools.pairwise(ranges):
        if stop != start:
            raise ValueError(
                f"rows {ranges} of process {jax.process_index()} have gaps"
            )
    return slice(ranges[0][0], ranges[-1][1])


def global_batch(batch: Any, mesh: Mesh, num_rows: int) -> Any:
    """Make global arrays [M, num_rows, ...] of each process's rows of a batch."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(
            sharding, x, (x.shape[0], num_rows, *x.shape[2:])
        ),
        batch,
    )
