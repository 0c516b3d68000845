"""A command as several processes on this machine, by launch/local.sh."""

import os
import pathlib
import socket
import subprocess
import sys

from kdjax.config import Config
from tests import helpers, xla_flags


class Gang:
    """Processes of one run, each with its own config, that a test may disturb.

    Args:
      command: of kdjax.
      configs: of each rank; None = a process that does not come.
      workdirs: of each rank.
      variables: of the environment, of all.
    """

    def __init__(
        self,
        command: str,
        configs: list[Config | None],
        workdirs: list[pathlib.Path],
        **variables: str,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.processes: dict[int, subprocess.Popen] = {}
        for index, (config, workdir) in enumerate(zip(configs, workdirs, strict=True)):
            if config is None:
                continue
            file = workdir.parent / f"{workdir.name}_{index}.py"
            helpers.write_config_file(config, file)
            environment = {
                **os.environ,
                "PYTHONPATH": str(helpers.ROOT),
                "XLA_FLAGS": f"{xla_flags.FAST_COMPILE} {_ONE_DEVICE}",
                "KDJAX_COORDINATOR": f"127.0.0.1:{port}",
                "KDJAX_NUM_PROCESSES": str(len(configs)),
                "KDJAX_PROCESS_ID": str(index),
                **variables,
            }
            self.processes[index] = subprocess.Popen(
                [
                    *(sys.executable, "-m", f"kdjax.{command}"),
                    *(f"--config={file}", f"--workdir={workdir}"),
                ],
                env=environment,
                cwd=workdir.parent,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )

    def ends(self, *, but: int | None = None) -> dict[int, tuple[int, str]]:
        """Wait for the processes, return exit code and stderr of each.

        Args:
          but: a process that is not waited for.
        """
        waited = {i: p for i, p in self.processes.items() if i != but}
        try:
            texts = {i: p.communicate(timeout=600)[1] for i, p in waited.items()}
        finally:
            self.kill()
        return {i: (p.returncode, texts[i]) for i, p in waited.items()}

    def kill(self) -> None:
        """End what is left."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stderr.close()


_ONE_DEVICE = "--xla_force_host_platform_device_count=1"


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
