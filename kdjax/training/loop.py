"""The training loop: from initial parameters to the last step."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from kdjax.config import to_json
from kdjax.experiment.models import (
    Model,
    Vocabulary,
    check_ids,
    label_vocab_size,
    shared_vocab_size,
)
from kdjax.experiment.rows import make_plan
from kdjax.experiment.run import Run
from kdjax.parallel import distributed
from kdjax.runtime import interrupts, locks
from kdjax.runtime.console import print_table
from kdjax.runtime.metrics_writer import MetricsWriter
from kdjax.training import state
from kdjax.training.checkpoint import CheckpointWriter
from kdjax.training.meter import Meter, epoch_table, state_table
from kdjax.training.program import Program, frozen_params_kwargs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The result of a training loop."""

    params: Any  # nested dict of the model's parameters; averages where they are kept
    throughput: dict[str, float]  # of this process's steps; {} if none was timed
    metrics: dict[str, float]  # held-out, after the last step; {} if none was evaluated


def train_loop(
    run: Run,
    init_params: Callable[[], Any],
    *,
    cache: Any = None,
    teacher: tuple[Model, Any] | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
) -> Trained:
    """Train the student of a run to the last step, from its newest checkpoint if any.

    Args:
      run: its training segments are used; its directory gets checkpoints and metrics.
      init_params: makes the initial parameters, sharded.
      cache: the teacher's records; None without soft terms.
      teacher: with its parameters, where it runs in the step.
      evaluate: parameters -> held-out metrics, every `train.eval_every` steps and after
        the last one.

    Raises:
      ValueError: a non-finite loss with train.non_finite="stop".
    """
    config, train, student = run.config, run.config.train, run.student
    teacher_model = teacher[0] if teacher else None
    teacher_params = teacher[1:] if teacher else ()
    source = cache
    if teacher_model is not None:
        shapes = student.shape, teacher_model.shape
        check_ids("teacher", shapes[1], run.data.max_id, run.tokenizer)
        source = Vocabulary(label_vocab_size(*shapes, run.tokenizer))
    program = Program(
        config,
        student,
        run.mesh,
        num_valid=shared_vocab_size(student.shape, source),
        teacher=teacher_model,
    )
    plan = make_plan(config, student.shape, run.data.train)
    checkpoints = CheckpointWriter(
        run.workdir / "checkpoints",
        keep_last=train.keep_last,
        keep_best=train.keep_best,
        config_json=to_json(config),
    )
    start, saved = checkpoints.resume(program.abstract)
    current = program.init(init_params) if saved is None else saved
    if start and distributed.is_main():
        rest = "is trained" if start >= train.steps else "goes on"
        line = f"{config.name} {rest}: step {start} of {train.steps} is in checkpoints/"
        print(line, file=sys.stderr, flush=True)
    if distributed.is_main():
        table = state_table(program.abstract, program.frozen_paths)
        print_table(f"{config.name}: what is trained", table)
        print_table(f"{config.name}: the first epoch", epoch_table(plan))
    frozen_params = frozen_params_kwargs(config, student.abstract)
    pending: tuple[int, Any] | None = None
    held_out: dict[str, float] = {}
    batches = program.batches(plan, start, train.steps, cache=cache)
    notice = interrupts.notice("the step is finished and saved first")
    with (
        notice,
        distributed.Preemption() as preemption,
        contextlib.ExitStack() as stack,
    ):
        writer = stack.enter_context(
            MetricsWriter(
                run.workdir,
                total_steps=train.steps,
                is_main=distributed.is_main(),
                resume_step=start,
                config_json=to_json(config),
            )
        )
        stack.enter_context(checkpoints)
        meter = Meter(
            config, student.shape, plan, run.data.views, writer, frozen_params
        )
        for index, batch in meter.timed(batches):
            with writer.compiling("the step", index == start):
                current, metrics = program.run(current, index, batch, *teacher_params)
            # The device is busy with this step while the last one is written.
            if pending is not None:
                meter.report(*pending)
            pending, done = (index + 1, metrics), index + 1
            stopping = preemption.requested(done)
            last = done == train.steps
            evaluating = bool(train.eval_every) and done % train.eval_every == 0
            saving = bool(train.save_every) and done % train.save_every == 0
            checkpoints.check()
            if not (evaluating or saving or last or stopping):
                continue
            # Nothing is saved before its loss is known to be finite.
            meter.report(*pending)
            pending = None
            locks.check()
            held_out = {}
            if evaluate is not None and (evaluating or last):
                held_out = meter.held_out(done, evaluate(state.eval_params(current)))
            if saving or last or stopping:
                checkpoints.save(done, current, nll=held_out.get("nll"))
            if stopping:
                checkpoints.close()
                raise preemption.stop(_saved(run, done))
        checkpoints.close()
        writer.write_curves()
        if preemption.received:  # after the last step
            raise preemption.stop(_saved(run, train.steps))
    return Trained(
        params=state.eval_params(current),
        throughput=meter.throughput(),
        metrics=held_out,
    )


def _saved(run: Run, step: int) -> str:
    """Return what a run that was stopped has left."""
    return (
        f"step {step} of {run.config.train.steps} is saved in "
        f"{run.workdir / 'checkpoints'}: the same command goes on from it"
    )
