"""Ahead-of-time plan of a training step: memory, collectives, least time.

    python -m kdjax.plan --config=configs/plan_llama_1b.py --topology=v5e:16x16
    python -m kdjax.plan --config=configs/bench_1b.py --topology=h200:1

Neither data nor a teacher is read: the config gives the shapes. docs/plan.md explains
every number.
"""

import pathlib

from absl import flags

from kdjax import cli
from kdjax.config import Config

_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    'What to compile for: a TPU slice, "v5e:16x16" (v4, v5e, v5p, v6e), GPUs of a '
    'node, "h200:8" (h100, h200, b200), or of several, "h200:8x4", or "cpu:8".',
)
flags.declare_key_flag("json")
_SEARCH = flags.DEFINE_boolean(
    "search", True, "Look for the largest batch (one more compilation)."
)
_EFFORT = flags.DEFINE_float(
    "effort",
    -1.0,
    "Of the TPU compiler: 0 compiles as a run does, -1 answers sooner.",
    lower_bound=-1.0,
    upper_bound=0.0,
)


def run(config: Config, workdir: pathlib.Path) -> None:
    """Print the report and write it to --json."""
    from kdjax.aot import report

    del workdir  # nothing is run
    if _TOPOLOGY.value is None:
        raise ValueError("--topology is missing: give for example --topology=v5e:16x16")
    plan = report.plan(
        config, _TOPOLOGY.value, search=_SEARCH.value, effort=_EFFORT.value
    )
    report.show(plan)
    cli.write_json(plan)


if __name__ == "__main__":
    cli.run(run, keep_compiled=False)
