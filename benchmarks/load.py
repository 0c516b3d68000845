"""Peak host memory while a folder is loaded, sharded, and saved again.

    python benchmarks/load.py [--mib=2048] [--stored=float32] [--dtype=float32]
        [--devices=8] [--out=DIR] [--json=FILE]

Makes a folder of several safetensors files without ever holding it, and loads it in a
process of its own onto virtual CPU devices, an fsdp mesh over all of them. Reported:
the largest resident memory (VmHWM: Linux) less what was resident before, of loading and
of saving what was loaded, and its share of the parameters' size.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from kdjax.config import DTYPES, DecoderConfig, MeshConfig
from kdjax.models import hf, lm
from kdjax.models.hf import families, safetensors_io
from kdjax.parallel import sharding
from kdjax.runtime import files
from kdjax.runtime.console import print_table

_MIB = flags.DEFINE_integer("mib", 2048, "Size of the files, about.", lower_bound=1)
_STORED = flags.DEFINE_enum("stored", "float32", DTYPES, "Of the files.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the parameters.")
_DEVICES = flags.DEFINE_integer("devices", 8, "Virtual ones.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "New folder, kept; else one that is removed.")
_JSON = flags.DEFINE_string("json", None, "Where to write what is printed.")
_LOAD = flags.DEFINE_string("load", None, "Only measure: a folder made before.")
_NUM_SHARDS = 5
_SHAPE = DecoderConfig(
    vocab_size=32000,
    width=1024,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    mlp_width=2816,
)


def make(folder: pathlib.Path, num_bytes: int, dtype: str) -> None:
    """Write a model of about so many bytes, at least of a layer."""
    itemsize = 2 if dtype == "bfloat16" else 4
    sizes = [
        sum(map(math.prod, hf.stored_shapes(_SHAPE, {"layers": n}).values()))
        for n in (0, 1)
    ]
    num_layers = (num_bytes // itemsize - sizes[0]) // (sizes[1] - sizes[0])
    shape = dataclasses.replace(_SHAPE, num_layers=max(1, num_layers))
    shapes = hf.stored_shapes(shape, {"layers": shape.num_layers})
    files.write_json(folder / "config.json", families.write(shape))
    safetensors_io.write(
        folder,
        shapes,
        lambda name: np.ones(shapes[name], np.float32),
        dtype=dtype,
        max_shard_bytes=num_bytes // _NUM_SHARDS,
    )


def memory(name: str) -> int:
    """Bytes of this process, of a line of /proc/self/status."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}: measured on Linux only")


def measure(folder: pathlib.Path, dtype: str) -> dict[str, Any]:
    """Load and save a folder in this process."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
    shape = hf.read_config(folder)
    shardings = sharding.param_shardings(lm.create(shape)[1], mesh)
    jax.device_put(np.zeros(8), mesh.devices.flat[0]).block_until_ready()
    files = folder.glob("*.safetensors")
    found: dict[str, Any] = {
        "files_mib": sum(file.stat().st_size for file in files) / 2**20
    }
    with tempfile.TemporaryDirectory(dir=folder) as out:
        for verb in ("load", "save"):
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
            before, start = memory("VmRSS"), time.perf_counter()
            if verb == "load":
                params = hf.load_params(folder, shape, shardings=shardings, dtype=dtype)
                size = sum(x.nbytes for x in jax.tree.leaves(params))
                found["parameters_mib"] = size / 2**20
            else:
                hf.save(pathlib.Path(out) / "new", shape, params, dtype=dtype)
            peak = memory("VmHWM") - before
            found[verb] = {
                "seconds": time.perf_counter() - start,
                "peak_mib": peak / 2**20,
                "peak_share": peak / size,
            }
    return found


def main(argv: list[str]) -> None:
    """Make a folder, start the process that loads it, print and write."""
    del argv
    if _LOAD.value:
        print(json.dumps(measure(pathlib.Path(_LOAD.value), _DTYPE.value)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(_OUT.value or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").is_file():
            make(folder, _MIB.value * 2**20, _STORED.value)
        devices = f"--xla_force_host_platform_device_count={_DEVICES.value}"
        done = subprocess.run(
            [sys.executable, __file__, f"--load={folder}", f"--dtype={_DTYPE.value}"],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ValueError(f"loading failed: {done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
    rows = [{"what": verb} | found[verb] for verb in ("load", "save")]
    print_table(
        f"{found['files_mib']:.0f} MiB of {_STORED.value} as "
        f"{found['parameters_mib']:.0f} MiB of {_DTYPE.value}, "
        f"{_DEVICES.value} devices",
        rows,
    )
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
