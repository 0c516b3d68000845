"""Export of a student as a Hugging Face folder: python -m kdjax.export --workdir=DIR.

`transformers.AutoModelForCausalLM.from_pretrained(OUT)` loads it as it is; so does
kdjax, as a teacher or a student. Tokenizer, chat template and a model card are in it.
"""

import contextlib
import pathlib

from absl import flags

from kdjax import cli
from kdjax.config import Config

_OUT = flags.DEFINE_string(
    "out",
    None,
    "New folder, or address in a store; <workdir>/export by default.",
)
flags.declare_key_flag("step")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Of the stored weights."
)


def run(config: Config, workdir: pathlib.Path) -> None:
    """Export the student of a run."""
    from kdjax.experiment.run import open_run
    from kdjax.parallel import distributed
    from kdjax.pipeline.student import export_student
    from kdjax.storage import mirror, urls

    named = flags.FLAGS.workdir if cli.is_in_store() else workdir
    out = _OUT.value or f"{named}/export"
    student_run = open_run(config, workdir, splits=())
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(out)
        if urls.is_url(out):
            folder = stack.enter_context(mirror.new_output(out))
        export_student(student_run, folder, step=cli.STEP.value, dtype=_DTYPE.value)
    if distributed.is_main():
        print(f"exported to {out}")


if __name__ == "__main__":
    cli.run(run, store="read")
