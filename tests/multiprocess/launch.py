"""A command as several processes on this machine, by launch/local.sh."""

import os
import pathlib
import subprocess
import sys

from kdjax.config import Config
from tests import helpers, xla_flags


def run(
    command: str,
    config: Config,
    workdir: pathlib.Path,
    *,
    num_processes: int,
    num_devices: int,
) -> None:
    """Run a command to its end; `num_devices` are those of each process."""
    file = workdir.parent / f"{workdir.name}_config.py"
    helpers.write_config_file(config, file)
    environment = {
        **os.environ,
        "PYTHONPATH": str(helpers.ROOT),
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "XLA_FLAGS": xla_flags.FAST_COMPILE,
        "KDJAX_DEVICES": str(num_devices),
    }
    done = subprocess.run(
        [
            helpers.ROOT / "launch" / "local.sh",
            *(str(num_processes), "-m", f"kdjax.{command}"),
            *(f"--config={file}", f"--workdir={workdir}"),
        ],
        env=environment,
        cwd=workdir.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
