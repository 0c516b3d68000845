"""How tests compile: most of their time is XLA's, for programs that run once.

So LLVM does not optimise them. `.ci/run` runs the head's, the decoder's and the step's
tests once more with the optimisation that users have, and so are all runs on real data.
"""

QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FOR_8_DEVICES = f"{QUICKLY} --xla_force_host_platform_device_count=8"
