"""A real server of a study, as a process."""

import contextlib
import os
import subprocess
import sys


@contextlib.contextmanager
def serve(workdir, *flags):
    """Run `kdjax.study serve`; yields its address and process."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "kdjax.study", "serve", f"--workdir={workdir}"]
    process = subprocess.Popen(
        [*command, "--port=0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        line = process.stdout.readline().strip()
        if not line.startswith("http"):
            process.kill()
            raise AssertionError(process.stderr.read())
        yield line.rstrip("/"), process
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
        process.stderr.close()
