"""google-tunix on a prepared case, in its own environment (pip install google-tunix).

    python tunix_peer.py --folder=FOLDER [--steps=10]

Its DistillationTrainer with the logit strategy, as its users write it: the teacher runs
in every step, whole logits of both. Student and teacher are read from the folder by its
own loader. Prints one line of JSON.
"""

import argparse
import contextlib
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import peak_rss, read, report
from flax import nnx
from tunix.distillation import distillation_trainer, strategies
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params

_WARM = 3  # steps that are not timed: compilation, and the first ones after it


def load(case: dict, folder: pathlib.Path, part: str, mesh: jax.sharding.Mesh):
    """Return the "student" or "teacher" as its own model."""
    shape = case[part]
    config = llama.ModelConfig(
        num_layers=shape["num_layers"],
        vocab_size=case["vocab_size"],
        embed_dim=shape["width"],
        hidden_dim=shape["mlp_width"],
        num_heads=shape["num_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_kv_heads"],
        rope_theta=int(shape["rope_theta"]),
        norm_eps=1e-5,
        weight_tying=True,
    )
    return llama_params.create_model_from_safe_tensors(
        str(folder / part), config, mesh, dtype=jnp.float32
    )


def forward(model, input_tokens, input_mask):
    """Logits of every position that has a next token."""
    del input_mask
    tokens = input_tokens[:, :-1]
    length = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = jnp.broadcast_to(causal, (tokens.shape[0], length, length))
    return model(tokens, positions, None, mask)[0]


class Timed:
    """The batches, over and over; notes when the trainer asks for one."""

    def __init__(self, tokens: np.ndarray, num_steps: int) -> None:
        self._tokens, self._num_steps = tokens, num_steps
        self.times: list[float] = []

    def __iter__(self):
        for step in range(self._num_steps):
            self.times.append(time.perf_counter())
            tokens = self._tokens[step % len(self._tokens)]
            yield distillation_trainer.TrainingInput(
                input_tokens=tokens, input_mask=np.ones_like(tokens)
            )


class Trainer(distillation_trainer.DistillationTrainer):
    """The same, keeping the first loss."""

    first_loss = None

    def _buffer_metrics(self, buffer, loss, *args, **keywords):
        if self.first_loss is None:
            self.first_loss = loss
        return super()._buffer_metrics(buffer, loss, *args, **keywords)


def temporary_bytes(trainer: Trainer, batch) -> int | None:
    """Return the planned bytes of the training step, without the teacher's forward."""
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        step = nnx.jit(trainer.create_train_step_fn(), donate_argnames=("optimizer",))
        inputs = trainer._prepare_inputs(batch)
        lowered = step.lower(trainer.model, trainer.optimizer, inputs)
        return lowered.compile().memory_analysis().temp_size_in_bytes
    return None


def run(folder: pathlib.Path, steps: int) -> None:
    """Trains, and prints the line."""
    before = peak_rss()
    case = read(str(folder))
    mesh = jax.make_mesh(
        (1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    with mesh:
        student, teacher = (load(case, folder, p, mesh) for p in ("student", "teacher"))
        parameters = sum(x.size for x in jax.tree.leaves(nnx.state(student, nnx.Param)))
        strategy = strategies.LogitStrategy(
            student_forward_fn=forward,
            teacher_forward_fn=forward,
            labels_fn=lambda input_tokens, input_mask: jax.nn.one_hot(
                input_tokens[:, 1:], case["vocab_size"]
            ),
            temperature=case["temperature"],
            alpha=case["alpha"],
        )
        optimizer = optax.adamw(case["learning_rate"], b2=0.999, weight_decay=0.0)
        settings = distillation_trainer.TrainingConfig(
            eval_every_n_steps=10**9, max_steps=_WARM + steps
        )
        trainer = Trainer(student, teacher, strategy, optimizer, settings)
        batches = Timed(np.load(folder / "tokens.npy"), _WARM + steps)
        trainer.train(batches)
        # The trainer has waited for the last step.
        times = [*batches.times, time.perf_counter()][_WARM:]
        report(
            case,
            seconds=list(np.diff(times)),
            loss=float(trainer.first_loss),
            parameters=parameters,
            rss_before_bytes=before,
            temporary_bytes=temporary_bytes(trainer, next(iter(batches))),
            versions={"jax": jax.__version__},
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args(sys.argv[1:])
    run(arguments.folder, arguments.steps)
