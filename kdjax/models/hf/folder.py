"""Hugging Face folders in and out through safetensors: no torch, no pickle.

A folder holds config.json and either model.safetensors or several shards with
model.safetensors.index.json. Hugging Face stores one [out, in] matrix a layer; here
kernels are [in, out] and layers are stacked, so reading takes slices, transposes and
stacks them: a process touches only the parts that its own devices hold, and the host
holds one part, or when writing one layer's tensor, at a time.
"""

import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import errors
from jax.experimental import multihost_utils

from kdjax.config import T5Config
from kdjax.models import lm
from kdjax.models.hf import families, field_limits, safetensors_io, t5
from kdjax.models.lm import Shape
from kdjax.runtime import files
from kdjax.runtime.files import write_json


def resolve(path: str | os.PathLike) -> pathlib.Path:
    """Return the local folder of a model: `path` itself, else a hub name, downloaded.

    Raises:
      ValueError: neither a folder nor a model that the hub or its local cache has.
    """
    if os.path.isdir(path):
        return pathlib.Path(path)
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(str(path), allow_patterns=patterns)
        )
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"path={str(path)!r} is not a local folder, and the Hugging Face hub gave "
            f"no model of that name ({type(error).__name__}): check the spelling, the "
            "network and HF_TOKEN, or download it and give the folder"
        ) from error


def read_config(path: str | os.PathLike) -> Shape:
    """Read the shape of the model in a folder.

    Raises:
      ValueError: a family, a field or a value that is not implemented, or not known.
    """
    folder = resolve(path)
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: give a Hugging Face model folder")
    raw = safetensors_io.read_json(file)
    field_limits.check(raw, str(file))
    if raw.get("model_type") != "t5":
        return families.read(raw, str(file))
    return t5.read(raw, str(file), lambda: t5.HEAD in safetensors_io.names(folder))


def eos_ids(path: str | os.PathLike) -> tuple[int, ...]:
    """Return the ids that end a text of the model in a folder.

    These are eos_token_id of generation_config.json and of config.json, each a number
    or a list; a folder without either has none.

    Raises:
      ValueError: something else stands there.
    """
    folder = resolve(path)
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        value = safetensors_io.read_json(folder / name).get("eos_token_id")
        listed = value if isinstance(value, list) else [value]
        if not all(type(i) is int or i is None for i in listed):
            raise ValueError(
                f"{folder / name}: eos_token_id={value!r} is neither an id nor a list "
                "of them: repair it"
            )
        ids.update(i for i in listed if i is not None)
    return tuple(sorted(ids))


def _names(config: Shape) -> ModuleType:
    """Return the module of tensor names: functions of the same names for both kinds."""
    return t5 if isinstance(config, T5Config) else families


def load_params(
    path: str | os.PathLike,
    config: Shape,
    *,
    shardings: dict | None = None,
    dtype: str = "float32",
    keep_layers: Mapping[str, Sequence[int]] | None = None,
) -> lm.Params:
    """Read parameters, each process only the slices that its devices hold.

    Args:
      path: folder or hub name.
      config: shape of the result; a stack has as many layers as `keep_layers` names.
      shardings: nested dict of `jax.sharding.Sharding` like the parameters; None puts
        everything on the default device.
      dtype: of the result; files may be float32, float16 or bfloat16.
      keep_layers: path of a stack, of `lm.stacks` -> layers of the file to stack, in
        this order; a stack that is not named is whole.

    Raises:
      ValueError: a tensor that is missing, superfluous, or of another shape or type.
    """
    folder = resolve(path)
    stored, names_of = read_config(folder), _names(config)
    kept = keep_layers or {}
    layers = {
        name: tuple(kept.get(name, range(num)))
        for name, num in lm.stacks(stored).items()
    }
    for name, num in lm.stacks(config).items():
        num_stored = lm.stacks(stored)[name]
        if len(layers[name]) != num or not set(layers[name]) <= set(range(num_stored)):
            raise ValueError(
                f"keep_layers={layers[name]} of the {num_stored} {name} in {folder} "
                f"does not make {num}: list that many existing layers"
            )
    _, shapes = lm.create(config)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    tensors, files = safetensors_io.find(folder)
    tensors = names_of.without_copies(tensors, files, config)
    _check_tensors(folder, tensors, files, stored_shapes(config, lm.stacks(stored)))

    def load(key_path, shape, sharding):
        path = join(key_path)
        stack = _stack_of(config, path)
        names, transposed = names_of.stored_names(config, path, layers.get(stack, ()))

        def read(index):
            return _read(tensors, names, index, bool(stack), transposed, dtype)

        return _placed(shape.shape, sharding, read)

    return jax.tree_util.tree_map_with_path(load, shapes, shardings)


def save(
    path: str | os.PathLike,
    config: Shape,
    params: lm.Params,
    tokenizer: Any = None,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
    readme: str = "",
    eos_ids: Sequence[int] = (),
) -> None:
    """Write a folder that `transformers` loads as it is, by the class of its kind.

    The folder appears whole under its name or not at all. On several hosts every
    process calls this (sharded arrays are gathered) and process 0 writes.

    Args:
      path: the new folder.
      config: shape of the model.
      params: its parameters, sharded or not.
      tokenizer: saved beside it; its special ids go to config.json, except T5's, which
        are part of its shape.
      dtype: of the stored tensors, "float32", "bfloat16" or "float16".
      max_shard_bytes: above this the weights are split over several files.
      overwrite: replace an existing model folder.
      readme: the model card, README.md; "" writes none.
      eos_ids: of all tokens that end a text, for generation_config.json; () = the
        tokenizer's alone.

    Raises:
      ValueError: the folder exists and may not be replaced, or the shape is not one of
        its family.
    """
    path = pathlib.Path(path)
    replaceable = overwrite and (path / "config.json").is_file()
    if path.exists() and any(path.iterdir()) and not replaceable:
        raise ValueError(
            f"path={str(path)!r} exists and is not empty: remove it, choose another, "
            "or replace a model folder with overwrite=True"
        )
    described, stored = _names(config).write(config), _stored(config, params)

    def fetch(name):
        leaf, layer, transposed = stored[name]
        part = _to_host(leaf, layer)
        return part.T if transposed else part

    if jax.process_index() != 0:
        for name in stored:  # in the order in which process 0 does
            fetch(name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = files.temporary(path)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None)
        for name in ("bos", "eos", "pad")
    } | {name: value for name, value in described.items() if name.endswith("_token_id")}
    # Both spellings: transformers 4 reads the first, transformers 5 the second.
    stored_as = {"torch_dtype": dtype, "dtype": dtype}
    write_json(scratch / "config.json", described | stored_as | ids)
    if len(eos_ids) > 1:  # config.json has the one of the tokenizer
        generation = ids | {"eos_token_id": list(eos_ids)}
    else:
        generation = {"_from_model_config": True} | ids
    write_json(scratch / "generation_config.json", generation)
    shapes = stored_shapes(config, lm.stacks(config))
    safetensors_io.write(
        scratch,
        {name: shapes[name] for name in stored},
        fetch,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch)
    if readme:
        (scratch / "README.md").write_text(readme, encoding="utf-8")
    if path.exists():
        shutil.rmtree(path)
    os.replace(scratch, path)


def fingerprint(path: str | os.PathLike) -> str:
    """Compute the hex sha256 of config.json and of every weight file, with its name.

    These are the files beside config.json and those that the weights' index names.
    """
    folder = resolve(path)
    digest = hashlib.sha256()
    beside = sorted(folder.glob("*.safetensors"))
    below = sorted(safetensors_io.indexed_files(folder) - set(beside))
    for file in [folder / "config.json", *beside, *below]:
        with open(file, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def has_weights(path: str | os.PathLike) -> bool:
    """Return True if a folder, or a model of the hub, has files of weights.

    Raises:
      ValueError: its index names some files that are there and some that are not.
    """
    folder = resolve(path)
    files = sorted(safetensors_io.indexed_files(folder))
    missing = [file for file in files if not file.is_file()]
    if missing and len(missing) < len(files):
        raise ValueError(f"{missing[0]} is missing: download the folder again")
    patterns = ("*.safetensors", "pytorch_model*.bin")
    beside = any(any(folder.glob(pattern)) for pattern in patterns)
    return beside or (bool(files) and not missing)


def join(key_path) -> str:
    """Join a path of `jax.tree_util` in a nested dict, as "layers/mlp/up/kernel"."""
    return "/".join(key.key for key in key_path)


def _stack_of(config: Shape, path: str) -> str:
    """Return the stack of layers that a parameter belongs to; "" for none."""
    return next((s for s in lm.stacks(config) if path.startswith(s)), "")


def _tensors_of(
    config: Shape, path: str, stacks: Mapping[str, int]
) -> tuple[list[str], bool, bool]:
    """Tensors behind a parameter, whether transposed, whether one a layer."""
    stack = _stack_of(config, path)
    layers = range(stacks.get(stack, 0))
    return *_names(config).stored_names(config, path, layers), bool(stack)


def stored_shapes(
    config: Shape, stacks: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the files of a model of so many layers."""
    _, params = lm.create(config)
    result: dict[str, tuple[int, ...]] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names, transposed, stacked = _tensors_of(config, join(key_path), stacks)
        shape = leaf.shape[1:] if stacked else leaf.shape
        result |= dict.fromkeys(names, shape[::-1] if transposed else shape)
    return result


def _check_tensors(
    folder: pathlib.Path, tensors: dict, files: dict, wanted: dict
) -> None:
    several = (folder / safetensors_io.INDEX).is_file()
    whole = folder / (safetensors_io.INDEX if several else "model.safetensors")
    for kind, names in (
        ("lacks", wanted.keys() - tensors.keys()),
        ("also has", tensors.keys() - wanted.keys()),
    ):
        if names:
            raise ValueError(
                f"{files.get(min(names), whole)} {kind} tensor {min(names)} "
                f"({len(names)} such): config.json and weights do not belong together"
            )
    for name, shape in wanted.items():
        found = tensors[name]
        if found.shape != shape or found.dtype not in safetensors_io.FLOATS:
            raise ValueError(
                f"{files[name]}: tensor {name} is {found.dtype}{list(found.shape)}, "
                f"wanted shape {list(shape)} in one of {safetensors_io.FLOATS}: check "
                "config.json"
            )


def _read(
    tensors: dict,
    names: list[str],
    index: tuple[slice, ...],
    stacked: bool,
    transposed: bool,
    dtype: str,
) -> np.ndarray:
    """Read the slice `index` of a parameter from the tensors behind it."""
    if not stacked:
        return tensors[names[0]][index].astype(jnp.dtype(dtype), copy=False)
    layers, *rest = index
    stored = tuple(rest[::-1] if transposed else rest)
    sizes = [part.stop - part.start for part in index]
    found = np.empty(sizes, jnp.dtype(dtype))
    for layer, name in zip(found, names[layers], strict=True):
        layer[...] = tensors[name][stored].T if transposed else tensors[name][stored]
    return found


def _placed(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """Make an array of slices that `read` returns, one at a time on the host.

    Devices that hold the same part share one read of it.
    """
    holders: dict[tuple[tuple[int, int], ...], list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        sized = zip(index or (), shape, strict=True)
        bounds = tuple(part.indices(size)[:2] for part, size in sized)
        holders.setdefault(bounds, []).append(device)
    placed = []
    for bounds, devices in holders.items():
        part = read(tuple(slice(*ends) for ends in bounds))
        placed += jax.block_until_ready([jax.device_put(part, d) for d in devices])
        del part  # before the next one is read
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _stored(
    config: Shape, params: lm.Params
) -> dict[str, tuple[Any, int | None, bool]]:
    """By Hugging Face name: a parameter, which of its layers, whether transposed."""
    result, stacks = {}, lm.stacks(config)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names, transposed, stacked = _tensors_of(config, join(key_path), stacks)
        for layer, name in enumerate(names):
            result[name] = leaf, layer if stacked else None, transposed
    return dict(sorted(result.items()))


def _to_host(leaf: Any, layer: int | None) -> np.ndarray:
    """Fetch a parameter, or one layer of it; every process must call this."""
    # An array remembers its copy on the host: this one is gone with it.
    array = leaf.copy() if layer is None else leaf[layer]
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
