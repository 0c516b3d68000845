"""The training loop: from initial parameters to the last step."""

import pathlib
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from kdjax.config import Config, to_json
from kdjax.data import loader
from kdjax.evaluation.scorer import Scorer
from kdjax.experiment.data import Data
from kdjax.experiment.models import Model, shared_vocab_size
from kdjax.experiment.rows import make_plan
from kdjax.parallel import distributed, sharding
from kdjax.runtime.console import print_table
from kdjax.runtime.metrics_writer import MetricsWriter
from kdjax.training import state
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.meter import Meter, epoch_rows, state_rows
from kdjax.training.program import Program, untrained


def fit(
    config: Config,
    *,
    workdir: pathlib.Path,
    mesh: Mesh,
    data: Data,
    model: Model,
    make_params: Callable[[], Any],
    cache: Any = None,
    teacher: tuple[Model, Any] | None = None,
    scorer: Scorer | None = None,
) -> tuple[Any, dict[str, float], dict[str, float]]:
    """Trains a model to the last step, from its newest checkpoint if it has one.

    Args:
      config: the run.
      workdir: for checkpoints and metrics.
      mesh: devices.
      data: its training segments are used.
      model: structure and shardings.
      make_params: makes the initial parameters, sharded.
      cache: the teacher's records; None without soft terms.
      teacher: with its parameters, where it runs beside the student.
      scorer: held-out evaluation every `train.eval_every` steps.

    Returns:
      The parameters (averages where they are kept), the throughput of this process's
      steps, and the held-out metrics after the last step ({} without a scorer, or if no
      step was left to do).

    Raises:
      ValueError: a non-finite loss with train.non_finite="stop".
    """
    train = config.train
    frozen = () if teacher is None else (teacher[1],)
    source = cache if teacher is None else teacher[0].shape
    program = Program(
        config,
        model,
        mesh,
        num_valid=shared_vocab_size(model.shape, source),
        teacher=teacher[0] if teacher is not None else None,
    )
    abstract, num_rows = program.abstract, program.num_rows
    plan = make_plan(config, model.shape, data.train)
    rows = sharding.local_rows(mesh, num_rows)

    def make_batch(index: int) -> loader.Batch:
        return loader.make_batch(
            plan,
            index,
            terms=program.terms(index),
            cache=cache,
            temperature=program.temperature(index),
            rows=rows,
            online=bool(frozen),
            dropout=program.dropout,
        )

    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep_last=train.keep_last,
        keep_best=train.keep_best,
        config_json=to_json(config),
    )
    start = checkpoints.latest_step() or 0
    current = checkpoints.restore(abstract) if start else program.init(make_params)
    if distributed.is_main():
        rows_held = state_rows(abstract, program.frozen)
        print_table(f"{config.name}: what is trained", rows_held)
        print_table(f"{config.name}: the first epoch", epoch_rows(plan))
    preemption = distributed.Preemption()
    writer = MetricsWriter(
        workdir,
        total_steps=train.steps,
        is_main=distributed.is_main(),
        resume_step=start,
    )
    spared = untrained(config, model.abstract)
    meter = Meter(config, model.shape, plan, data.views, writer, spared)
    pending: tuple[int, Any] | None = None
    held_out: dict[str, float] = {}
    batches = loader.iterate(
        make_batch,
        start,
        train.steps,
        num_threads=train.num_threads,
        prefetch=train.prefetch,
    )
    with writer, checkpoints:
        for index, batch in meter.timed(batches):
            step = program.step_at(program.temperature(index))
            current, found = step(
                current, sharding.global_batch(batch, mesh, num_rows), *frozen
            )
            # The device is busy with this step while the last one is written.
            if pending is not None:
                meter.report(*pending)
            pending, done = (index + 1, found), index + 1
            stopping = preemption.requested(done)
            last = done == train.steps
            evaluate = bool(train.eval_every) and done % train.eval_every == 0
            save = bool(train.save_every) and done % train.save_every == 0
            if not (evaluate or save or last or stopping):
                continue
            # Nothing is saved before its loss is known to be finite.
            meter.report(*pending)
            pending = None
            held_out = (
                {}
                if scorer is None or not (evaluate or last)
                else meter.held_out(done, scorer(state.in_use(current)))
            )
            if save or last or stopping:
                checkpoints.save(done, current, nll=held_out.get("nll"))
            if stopping and not last:
                checkpoints.close()
                raise SystemExit(143)  # 128 + SIGTERM: saved, not finished
        checkpoints.close()
        preemption.close()
        writer.write_curves()
    return state.in_use(current), meter.throughput(), held_out
