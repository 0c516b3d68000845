"""XLA flags of the tests: most of their time is compiling programs that run once.

So LLVM does not optimise them, a program is one LLVM module, and, in a jaxlib that
still can, loops are emitted without MLIR, which registers its dialects anew for each of
them (half of the time to compile). Commands on real data have what users have; with it
`.ci/run` also runs the head's, the decoder's and the step's tests again.
"""

import importlib.metadata

_KNOWN_UNTIL = (0, 10)  # xla_cpu_use_fusion_emitters: jaxlib 0.12 refuses it

FAST_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
_version = importlib.metadata.version("jaxlib").split(".")[:2]
if tuple(map(int, _version)) <= _KNOWN_UNTIL:
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
EIGHT_DEVICES = f"{FAST_COMPILE} --xla_force_host_platform_device_count=8"
