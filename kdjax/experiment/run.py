"""Run: a config with its mesh, data and student."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from kdjax.config import Config
from kdjax.data import tokenizer as tokenizers
from kdjax.experiment.data import Data, load_data
from kdjax.experiment.models import Model, check_ids, make_model, student_shape
from kdjax.models import hf
from kdjax.parallel import sharding


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A config with its directory, devices, data and student; it holds no parameters.

    `open_run` makes one; training, labelling, scoring and export take it.
    """

    config: Config
    workdir: pathlib.Path
    mesh: Mesh
    data: Data  # the tokenizer, examples and segments of the splits that were read
    student: Model  # structure, shapes and shardings

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer of data, student and teacher."""
        return self.data.tokenizer


def open_run(
    config: Config,
    workdir: pathlib.Path,
    *,
    splits: tuple[str, ...] = ("train", "eval"),
    data: Data | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """Read the data of a config and describe its student; nothing is computed.

    Args:
      config: a valid one.
      workdir: of the run; nothing is written there, but for data that are prepared.
      splits: those whose examples are read; () = only the tokenizer.
      data: takes the place of the config's; None = read them.
      devices: of the mesh; None = all.

    Raises:
      ValueError: an error of data, mesh or student.
    """
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    data = load_data(config, workdir, splits=splits) if data is None else data
    shape = student_shape(config, data.tokenizer)
    check_ids("student", shape, data.max_id, data.tokenizer)
    student = make_model(
        shape,
        mesh,
        dtype=config.train.dtype,
        remat=config.train.remat,
        adapters=config.student.lora,
    )
    return Run(config=config, workdir=workdir, mesh=mesh, data=data, student=student)


def for_model(run: Run, path: str) -> Run:
    """Return a run whose data another model reads: its tokens end texts, too.

    Args:
      run: with its data.
      path: folder or hub name of the model.

    Raises:
      ValueError: the model has another tokenizer, or no row for a token of the data.
    """
    data = run.data
    tokenizers.check_same_tokens(data.tokenizer, hf.resolve(path), "model")
    check_ids("model", hf.read_config(path), data.max_id, data.tokenizer)
    eos_ids = tuple(sorted({*data.eos_ids, *hf.eos_ids(path)}))
    return dataclasses.replace(run, data=dataclasses.replace(data, eos_ids=eos_ids))
