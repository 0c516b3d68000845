"""How tests compile: most of their time is XLA's, for programs that run once.

So LLVM does not optimise them. Commands on real data have the optimisation that users
have; with it `.ci/run` also runs the head's, the decoder's and the step's tests again.
"""

QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FOR_8_DEVICES = f"{QUICKLY} --xla_force_host_platform_device_count=8"
