"""Students of finished runs: loaded, asked for texts, exported."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from kdjax.evaluation.scorer import Scorer
from kdjax.experiment import model_card, provenance, workdir
from kdjax.experiment.run import Run, open_run
from kdjax.experiment.teacher import teacher_folder
from kdjax.models import hf, lora
from kdjax.parallel import distributed
from kdjax.runtime import files
from kdjax.storage import mirror, urls
from kdjax.training import checkpoint

_SUMMARY_REMEDY = "remove it, and start the run's command again, which writes it anew"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """A run's student with its parameters."""

    run: Run
    params: Any  # nested dict of arrays, sharded over the run's mesh


def load_student(folder: str | pathlib.Path, *, step: int | None = None) -> Student:
    """Load the student of a run from a checkpoint.

    Args:
      folder: the run's directory, or its address in a store.
      step: of the checkpoint; None = the newest.

    Raises:
      ValueError: no run, or no checkpoint.
    """
    if urls.is_url(folder):
        folder = mirror.fetch(str(folder))
    folder = pathlib.Path(folder)
    run = open_run(workdir.read_config(folder), folder, splits=())
    return Student(run=run, params=checkpoint.load_student(run, step=step))


def generate(
    student: Student, prompts: Sequence[str], *, max_new_tokens: int = 0
) -> list[str]:
    """Continue prompts by greedy decoding, as the run's own evaluation does.

    Args:
      student: from `load_student`, or made of a `Distilled` one's run and params.
      prompts: texts as the student reads them.
      max_new_tokens: per answer; 0 = the config's.
    """
    run = student.run
    if max_new_tokens:
        evaluation = dataclasses.replace(
            run.config.evaluation, max_new_tokens=max_new_tokens
        )
        config = dataclasses.replace(run.config, evaluation=evaluation)
        run = dataclasses.replace(run, config=config)
    return Scorer(run).generate(student.params, prompts)


def export_student(
    run: Run, out: pathlib.Path, *, step: int | None = None, dtype: str = "float32"
) -> None:
    """Export a checkpoint as a Hugging Face folder with tokenizer and model card.

    Adapters are multiplied and added into their kernels: the result is a plain model.

    Args:
      run: opened with any splits.
      out: a new folder.
      step: of the checkpoint; None = the newest.
      dtype: of the stored weights.
    """
    with workdir.hold_output(out):
        _export(run, out, step, dtype)


def _export(run: Run, out: pathlib.Path, step: int | None, dtype: str) -> None:
    config = run.config
    checkpoints = checkpoint.Checkpoints(run.workdir / "checkpoints")
    step, params = checkpoints.restore_step(run.student.abstract, step=step)
    params = lora.merged(params, config.student.lora)
    origins = provenance.initial_params(
        config, run.student, teacher_folder(config, run.workdir)
    )
    readme = model_card.write(
        config, run.student.shape, origins, step=step, summary=_summary(run, step)
    )
    hf.save(
        out,
        run.student.shape,
        params,
        run.tokenizer,
        dtype=dtype,
        readme=readme,
        eos_ids=run.data.eos_ids,
    )
    distributed.barrier("export")


def _summary(run: Run, step: int) -> dict[str, Any] | None:
    """Read the results of a run, unless they are of another step."""
    file = run.workdir / workdir.SUMMARY
    summary = files.read_json(file, remedy=_SUMMARY_REMEDY) if file.is_file() else {}
    return summary if summary.get("steps") == step else None
