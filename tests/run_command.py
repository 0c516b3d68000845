"""A command with Ctrl-C as in a terminal: python -m tests.run_command MODULE FLAGS."""

import runpy
import signal
import sys

if __name__ == "__main__":
    # Forks of `kdjax.runtime.processes` ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
