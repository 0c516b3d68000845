"""What the processes of a run must have in common, as named fields.

Compared before anything is compiled or written:

- the command, its flags and the working directory's absolute path;
- every field of the config, paths included;
- the content of the files and folders that fields of the config name;
- kdjax (its source, too), Python and the libraries;
- variables of the environment that change what is compiled or computed.

Left out, since hosts may rightly differ in it: variables that number a process or name
its own devices, where compiled programs are kept, and where debugging output goes.
Nothing of the config is left out. Folders on the hosts' own disks are fine if they have
the same name and the same content everywhere; a symbolic link makes the names equal.
"""

import glob
import hashlib
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import kdjax
from kdjax import config as config_lib
from kdjax.data.segments import Segments
from kdjax.data.views import Segment

_LIBRARIES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "grain",
    "array-record",
    "datasets",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
)
_PREFIXES = ("JAX_", "KDJAX_", "XLA_", "TF_XLA_", "HF_DATASETS_", "NVIDIA_TF32")
_VARIABLES = ("LIBTPU_INIT_ARGS",)
# Variables that differ between processes, or change nothing of what is computed.
_OWN_VARIABLES = (
    "KDJAX_COORDINATOR",
    "KDJAX_PROCESS_ID",
    "KDJAX_NUM_PROCESSES",  # compared when the ranks meet
    "KDJAX_PORT",
    "KDJAX_TRACEBACK",
    "JAX_COORDINATOR",  # and _ADDRESS, _PORT, _BIND_ADDRESS
    "JAX_PROCESS_ID",
    "JAX_LOCAL_DEVICE_IDS",
    "JAX_PARTITION_INDEX",
    "JAX_SLICE_INDEX",
    "JAX_CUDA_VISIBLE_DEVICES",
    "JAX_ROCM_VISIBLE_DEVICES",
    "JAX_COMPILATION_CACHE",
    "JAX_PERSISTENT_CACHE",
    "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_RAISE_PERSISTENT_CACHE",
    "JAX_DUMP",
    "JAX_LOG",
    "JAX_TRACEBACK",
    "JAX_MTLS",
    "XLA_PYTHON_CLIENT",  # memory of a device's own
)
_DEBUG_FLAGS = ("--xla_dump", "--xla_gpu_dump", "--xla_hlo_profile")  # of XLA_FLAGS
# Fields of text that name no input: what they name is written, or is no file.
_NO_INPUTS = (
    "name",
    "data.columns",
    "data.train_split",
    "data.eval_split",
    "data.rationale_end",
    "data.template_",
    "data.prepared",
    "data.prefixes.",
    "mixture.names",
    "mixture.columns",
    "mixture.caches",
    "cache.path",
    "annotate.path",
    "annotate.stop",
    "annotate.url",
    "annotate.key_variable",
)
_SECRETS = {"annotate.url"}  # may have a password before it is refused: not shown
_WHOLE_BYTES = 64 * 2**20  # of files that are read in whole
_BLOCK, _NUM_BLOCKS = 2**16, 256  # of larger ones, evenly spaced, the ends included
_MOST_FILES = 20_000  # of a folder


def of_command(
    command: str, settings: Mapping[str, Any], config: Any
) -> dict[str, str]:
    """Return the fields of a process that is about to start.

    Args:
      command: its name.
      settings: its flags.
      config: a dataclass, such as `Config`.
    """
    fields = {"command": command}
    fields |= {f"--{name}": _text(settings[name]) for name in sorted(settings)}
    leaves = [*config_lib.leaves(config)]
    fields |= {leaf.path: _text(leaf.value) for leaf in leaves}
    for name in _SECRETS & fields.keys():
        fields[name] = _digest(fields[name])
    fields |= _versions() | _environment(os.environ)
    return fields | {
        f"content of {leaf.path}={path}": digest
        for leaf in leaves
        if leaf.limit is None and not leaf.path.startswith(_NO_INPUTS)
        for path in _paths(leaf.value)
        if (digest := of_path(path))
    }


def _digest(text: str) -> str:
    return f"digest {hashlib.sha256(text.encode()).hexdigest()[:12]}" if text else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _versions() -> dict[str, str]:
    """Return the versions of kdjax, Python and the libraries."""
    package = pathlib.Path(kdjax.__file__).parent
    source = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        source.update(file.relative_to(package).as_posix().encode())
        source.update(file.read_bytes())
    versions = {
        "version of kdjax": f"{kdjax.__version__} (source {source.hexdigest()[:12]})",
        "version of python": platform.python_version(),
        "version of machine": f"{platform.system()} {platform.machine()}",
    }
    for name in _LIBRARIES:
        try:
            versions[f"version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that change what is compiled or computed."""
    fields = {}
    for name, value in sorted(variables.items()):
        if name.startswith(_OWN_VARIABLES):
            continue
        if name.startswith(_PREFIXES) or name in _VARIABLES:
            words = [w for w in value.split() if not w.startswith(_DEBUG_FLAGS)]
            fields[f"variable {name}"] = " ".join(words)
    return fields


def _paths(value: Any) -> Iterator[str]:
    """Yield the paths, or patterns of paths, that a field may name."""
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, str) and item and "\0" not in item and "\n" not in item:
            yield item


def of_path(path: str) -> str:
    """Return a digest of a file, a folder or the files of a pattern; "" without any.

    It covers names and sizes of all files, and their content: all of it up to 64 MiB,
    else 256 blocks of 64 KiB that are evenly spaced. Bytes that differ elsewhere are
    found when the data have been read (`of_segments`), or by a cache's checksums.
    """
    try:
        files = _files(path)
    except OSError:
        return ""
    if not files:
        return ""
    sizes = [os.stat(file).st_size for _, file in files]
    digest = hashlib.blake2b(digest_size=16)
    for (name, _), size in zip(files, sizes, strict=True):
        digest.update(f"{name} {size}\n".encode())
    total = sum(sizes)
    for start, length in _blocks(total):
        digest.update(_read(files, sizes, start, length))
    return f"{len(files)} files, {total} bytes, digest {digest.hexdigest()[:16]}"


def _files(path: str) -> list[tuple[str, str]]:
    """Return (name, path) of the files that a path stands for, by name."""
    if os.path.isfile(path):
        return [(os.path.basename(path), path)]
    if not os.path.isdir(path):
        found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
        return [(file, file) for file in found if os.path.isfile(file)][:_MOST_FILES]
    files: list[tuple[str, str]] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or len(files) >= _MOST_FILES:
                continue
            file = os.path.join(folder, name)
            files.append((os.path.relpath(file, path), file))
    return files


def _blocks(total: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of what is read of so many bytes."""
    if total <= _WHOLE_BYTES:
        yield 0, total
        return
    for index in range(_NUM_BLOCKS):
        yield (total - _BLOCK) * index // (_NUM_BLOCKS - 1), _BLOCK


def _read(
    files: Sequence[tuple[str, str]], sizes: Sequence[int], start: int, length: int
) -> bytes:
    """Read bytes of files as if they were one."""
    content, offset = bytearray(), 0
    for (_, file), size in zip(files, sizes, strict=True):
        low, high = max(start - offset, 0), min(start + length - offset, size)
        if low < high:
            with open(file, "rb") as stream:
                stream.seek(low)
                content += stream.read(high - low)
        offset += size
    return bytes(content)


def of_segments(segments: Sequence[Segment]) -> str:
    """Return a digest of the tokens and weights that are trained on, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(segments, Segments):
        for column in (segments.keys, segments.views, segments.loss_lengths):
            digest.update(column.tobytes())
    else:
        for segment in segments:
            digest.update(segment.key)
            digest.update(f"{segment.view} {segment.weight}".encode())
            if segment.loss_mask is not None:
                digest.update(segment.loss_mask.tobytes())
    return f"{len(segments)} segments, digest {digest.hexdigest()[:16]}"
