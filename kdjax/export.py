"""Writes a student as a Hugging Face folder: python -m kdjax.export --workdir=DIR.

`transformers.AutoModelForCausalLM.from_pretrained(OUT)` loads it as it is; so does
kdjax, as a teacher or a student.
"""

import pathlib

from absl import flags

from kdjax import cli, distributed, experiment, sharding
from kdjax.config import Config
from kdjax.models import hf

_OUT = flags.DEFINE_string("out", None, "New folder; <workdir>/export by default.")
_STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint to export; the newest by default.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Of the stored weights."
)


def run(config: Config, workdir: pathlib.Path) -> None:
    """Exports a checkpoint with its tokenizer."""
    mesh = sharding.make_mesh(config.mesh)
    tokenizer = experiment.load_tokenizer(config)
    model, params = experiment.load_student(
        config, workdir, mesh, tokenizer, step=_STEP.value
    )
    out = pathlib.Path(_OUT.value or workdir / "export")
    hf.save(out, model.shape, params, tokenizer, dtype=_DTYPE.value)
    if distributed.is_main():
        print(f"exported to {out}")


if __name__ == "__main__":
    cli.run(run)
