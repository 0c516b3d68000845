"""A folder's safetensors files, read and written one tensor at a time.

A file is mapped into memory only while a tensor is read from it: pages of a mapping
count as the process's own for as long as it lasts, which would double the memory that
loading takes. Writing holds one tensor, not one file.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp  # its import lets NumPy know bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from kdjax.runtime import untrusted
from kdjax.runtime.files import write_json

INDEX = "model.safetensors.index.json"
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FLOATS = tuple(_CODES.values())
_MAX_NAME = 255  # bytes; file systems take no longer ones


class Tensor:
    """A tensor in a file; `tensor[index]` reads a part of it.

    Attributes:
      file: where it is.
      name: as it is called there.
      dtype: the format's name of its type, as "F32".
      shape: as it is stored.
    """

    def __init__(self, file: pathlib.Path, name: str, found: Any) -> None:
        self.file, self.name = file, name
        self.dtype, self.shape = found.get_dtype(), tuple(found.get_shape())

    def __getitem__(self, index: Any) -> np.ndarray:
        with _opened(self.file) as tensors:
            return tensors.get_slice(self.name)[index]


def find(folder: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, pathlib.Path]]:
    """Find the tensors of a folder, and the file of each, by name.

    The files are also those of tensors that an index names and no file holds.

    Raises:
      ValueError: a file that is missing, cut short or damaged.
    """
    origins = _read_index(folder)
    if not origins and not (folder / "model.safetensors").is_file():
        _refuse_pickles(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(origins.values())) or [folder / "model.safetensors"]:
        of_file = sorted(name for name, found in origins.items() if found == file)
        holds = (
            f", with {len(of_file)} tensors, {of_file[0][:60]} ..." if of_file else ""
        )
        if not file.is_file():
            raise ValueError(f"{file} is missing{holds}: download the folder again")
        try:
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    tensors[name] = Tensor(file, name, opened.get_slice(name))
                    origins[name] = file
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged ({error}){holds}: download the folder again"
            ) from error
    return tensors, origins


def indexed_files(folder: pathlib.Path) -> set[pathlib.Path]:
    """Return the files that the index of a folder names; none without an index."""
    return set(_read_index(folder).values())


def _read_index(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Read the file of each tensor, by name; {} where the folder has no index.

    Raises:
      ValueError: the index has no names, or leads out of the folder.
    """
    if not (folder / INDEX).is_file():
        return {}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} lacks weight_map: download it again")
    for file in weight_map.values():
        if isinstance(file, str) and len(file.encode(errors="replace")) > _MAX_NAME:
            raise ValueError(
                f"{folder / INDEX} names {file[:60]!r}... as a file, of "
                f"{len(file):,} characters: download it again"
            )
        # Links may lead elsewhere, as those of the hub's cache do; names may not.
        if not isinstance(file, str) or not file or "\0" in file:
            raise ValueError(
                f"{folder / INDEX} names {file!r} as a file: download it again"
            )
        if pathlib.PurePath(file).is_absolute() or ".." in pathlib.PurePath(file).parts:
            raise ValueError(
                f"{folder / INDEX} names {file!r}, which leads out of the folder: do "
                "not use this model"
            )
    return {name: folder / file for name, file in weight_map.items()}


def _refuse_pickles(folder: pathlib.Path) -> None:
    """Raise ValueError for a folder whose weights only unpickling could read."""
    if files := sorted(folder.glob("pytorch_model*.bin")):
        name = _auto_class(folder)
        code = f"import sys, transformers; a, b = sys.argv[1:]; transformers.{name}"
        code += ".from_pretrained(a).save_pretrained(b)"
        raise ValueError(
            f"{files[0]} is a pickle, which may run any code and is not read here: "
            f"convert it where PyTorch is installed, python -c '{code}' {folder} "
            "NEW_FOLDER, and copy the tokenizer's files there"
        )


def _auto_class(folder: pathlib.Path) -> str:
    """Return the class of Transformers that loads a folder with its head."""
    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else ""
    return f"AutoModelFor{'Seq2SeqLM' if kind == 't5' else 'CausalLM'}"


def names(folder: pathlib.Path) -> set[str]:
    """Return the names of the tensors of a folder; none if it has no weights."""
    return set(find(folder)[0]) if any(folder.glob("*.safetensors")) else set()


def write(
    folder: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    fetch: Callable[[str], np.ndarray],
    *,
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Write tensors to one file, or to several with an index.

    Args:
      folder: where, made before.
      shapes: of each tensor by name, in the order in which they are written.
      fetch: gives a tensor by its name; called once for each, in this order.
      dtype: they are cast to it: "float32", "bfloat16" or "float16".
      max_shard_bytes: tensors of one file; a larger tensor has a file for itself.

    Raises:
      ValueError: a tensor of another shape, or with a number too large for the dtype.
    """
    itemsize = jnp.dtype(dtype).itemsize
    sizes = {name: itemsize * math.prod(shape) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    available = max_shard_bytes
    for name, size in sizes.items():
        if size > available and shards[-1]:
            shards.append([])
            available = max_shard_bytes
        shards[-1].append(name)
        available -= size
    files = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        files = [
            f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
        ]
        weight_map = {
            n: f for f, names in zip(files, shards, strict=True) for n in names
        }
        total = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})
    for file, found in zip(files, shards, strict=True):
        with open(folder / file, "wb") as stream:
            stream.write(_header({name: shapes[name] for name in found}, dtype))
            for name in found:
                part = _cast(name, fetch(name), dtype)
                if part.shape != shapes[name]:
                    raise ValueError(
                        f"tensor {name} has shape {part.shape}, wanted {shapes[name]}: "
                        "the parameters are not of this config"
                    )
                stream.write(part.view(np.uint8))


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """Cast a tensor; its finite numbers must stay finite.

    Raises:
      ValueError: one is too large for the dtype.
    """
    with np.errstate(over="ignore"):
        part = np.ascontiguousarray(tensor, jnp.dtype(dtype))
    if not np.isfinite(part).all() and np.isfinite(tensor).all():
        largest = float(np.abs(tensor).max())
        raise ValueError(
            f"dtype={dtype}: tensor {name} has numbers of up to {largest:.3g}, which "
            "become infinite: use bfloat16 or float32"
        )
    return part


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """Encode the header of a file: offset, type and shape of each of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + jnp.dtype(dtype).itemsize * math.prod(shape)
        described = {"dtype": _CODES[dtype], "shape": shape}
        header[name] = described | {"data_offsets": (start, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # what follows is aligned
    return struct.pack("<Q", len(encoded)) + encoded


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
      ValueError: the file holds none.
    """
    try:
        content = untrusted.read_json(file)
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no object: download it again")
    return content


def _opened(file: str | os.PathLike) -> Any:
    with open(file, "rb"):  # safetensors says of any reason that there is no file
        return safe_open(file, framework="np")
