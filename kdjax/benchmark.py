"""Benchmark of the training step: python -m kdjax.benchmark --config=FILE.py.

The same compiled step, loader and cache as in training, with random weights. What is
compared takes turns in one process. Without a labelled cache in --workdir, or with
--synthetic, tokens and cache are random (on disk, in a temporary folder). docs/
benchmark.md says what each number is.
"""

import pathlib
import sys
import tempfile

from absl import flags

from kdjax import cli
from kdjax.config import Config
from kdjax.runtime import files
from kdjax.runtime.console import print_table, progress

_STEPS = flags.DEFINE_integer(
    "steps", 20, "Timed steps of each variant.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "Rounds that the steps are split into; variants take turns.", 1
)
_SYNTHETIC = flags.DEFINE_bool(
    "synthetic", False, "Random tokens and cache, though there may be real ones."
)
_ONLINE = flags.DEFINE_bool(
    "online", True, "Also time an online teacher of the config's shape, random weights."
)
flags.declare_key_flag("json")
_PROFILE = flags.DEFINE_string(
    "profile", None, "Write a jax.profiler trace of three steps to this folder."
)
_DECODE = flags.DEFINE_bool(
    "decode",
    False,
    "Time the student's decoding; also in <workdir>/latency.json.",
)


def run(config: Config, workdir: pathlib.Path) -> None:
    """Measure one config, print tables and write the result where --json says."""
    from kdjax.bench import report, workload
    from kdjax.parallel import distributed, sharding
    from kdjax.teacher import build as build_lib

    if _DECODE.value:
        _decode(config, workdir)
        return
    with tempfile.TemporaryDirectory(prefix="kdjax-benchmark-") as folder:
        measured = None
        if not _SYNTHETIC.value:
            measured = workload.open_real(config, workdir)
        if measured is None:
            if not _SYNTHETIC.value and distributed.is_main():
                where = build_lib.folder(config, workdir, "train")
                print(f"{where} is not labelled: random tokens", file=sys.stderr)
            mesh = sharding.make_mesh(config.mesh)
            measured = workload.make_synthetic(config, pathlib.Path(folder), mesh)
        results = report.measure(
            measured,
            steps=_STEPS.value,
            rounds=_ROUNDS.value,
            online=_ONLINE.value,
            profile=_PROFILE.value,
        )
    if distributed.is_main():
        report.print_report(results)
        cli.write_json(results)


def _decode(config: Config, workdir: pathlib.Path) -> None:
    from kdjax.bench import decode, report
    from kdjax.parallel import distributed

    rounds = _ROUNDS.value
    calls = len(decode.BATCH_SIZES) * (1 + rounds)
    with progress(calls, "decode", is_main=distributed.is_main()) as advance:
        metrics = decode.measure(config, rounds=rounds, advance=advance)
    if distributed.is_main():
        title = f"{config.name}: decoding, random weights"
        print_table(
            title,
            [{"what": k, "value": report.format_number(v)} for k, v in metrics.items()],
        )
        files.write_json(workdir / "latency.json", metrics)
        cli.write_json(metrics)


if __name__ == "__main__":
    cli.run(run, keep_compiled=False)
