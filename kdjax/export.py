"""Writes a student as a Hugging Face folder: python -m kdjax.export --workdir=DIR.

`transformers.AutoModelForCausalLM.from_pretrained(OUT)` loads it as it is; so does
kdjax, as a teacher or a student. Tokenizer, chat template and a model card are in it.
"""

import json
import pathlib
from typing import Any

from absl import flags

from kdjax import cli
from kdjax.config import Config

_OUT = flags.DEFINE_string("out", None, "New folder; <workdir>/export by default.")
flags.declare_key_flag("step")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Of the stored weights."
)


def write(
    config: Config,
    workdir: pathlib.Path,
    out: pathlib.Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
) -> None:
    """Exports a checkpoint (None = the newest) with its tokenizer and a model card.

    Adapters are multiplied and added into their kernels: the result is a plain model.
    """
    from kdjax.experiment import model_card, provenance
    from kdjax.experiment.data import load_tokenizer
    from kdjax.experiment.teacher import teacher_folder
    from kdjax.models import hf, lora
    from kdjax.parallel import distributed, sharding
    from kdjax.training.checkpoint import load_student

    mesh = sharding.make_mesh(config.mesh)
    tokenizer = load_tokenizer(config)
    model, params = load_student(config, workdir, mesh, tokenizer, step=step)
    params = lora.merged(params, config.student.lora)
    found = provenance.find(config, model, teacher_folder(config, workdir))
    done = step or _newest(workdir)
    readme = model_card.write(
        config, model.shape, found, step=done, summary=_summary(workdir, done)
    )
    hf.save(out, model.shape, params, tokenizer, dtype=dtype, readme=readme)
    distributed.barrier("export")


def _newest(workdir: pathlib.Path) -> int:
    from kdjax.training.checkpoint import Checkpoints

    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.latest_step()
    checkpoints.close()
    return step or 0


def _summary(workdir: pathlib.Path, step: int) -> dict[str, Any] | None:
    """The results of a run, unless they are of another step."""
    file = workdir / "summary.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    return found if found.get("steps") == step else None


def run(config: Config, workdir: pathlib.Path) -> None:
    """Exports what the flags say."""
    from kdjax.parallel import distributed

    out = pathlib.Path(_OUT.value or workdir / "export")
    write(config, workdir, out, step=cli.STEP.value, dtype=_DTYPE.value)
    if distributed.is_main():
        print(f"exported to {out}")


if __name__ == "__main__":
    cli.run(run)
