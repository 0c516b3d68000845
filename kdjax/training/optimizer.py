"""Learning-rate schedules and optimizers, from optax."""

from typing import Any

import jax
import optax

from kdjax.config import OptimConfig


def make_schedule(config: OptimConfig, *, steps: int) -> optax.Schedule:
    """Make a schedule: linear warm-up, then constant, linear or cosine decay.

    It decays to `final_fraction` of the peak.

    Args:
      config: optimizer settings.
      steps: optimizer steps of the whole run, warm-up included.

    Returns:
      A function from step (0-based) to learning rate.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(1, steps - config.warmup_steps)
    decays = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, end, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_fraction),
    }
    decay = decays[config.schedule]
    if config.warmup_steps == 0:
        return decay
    # Starts at peak / warmup_steps: a first step with learning rate 0 would be lost.
    warmup = optax.linear_schedule(
        peak / config.warmup_steps, peak, max(1, config.warmup_steps - 1)
    )
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def _decays(params: Any) -> Any:
    """Mask weight decay: True for matrices and embeddings, not norm scales and biases.

    T5's table of position biases is one of these.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("scale", "bias", "table"), params
    )


def make_optimizer(config: OptimConfig, *, steps: int) -> optax.GradientTransformation:
    """Make an optimizer: clipping by global norm, then the update with its schedule.

    AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101. Adafactor: Shazeer and Stern
    2018, arXiv 1804.04235 (no parameter scaling, so the learning rate is absolute).
    """
    schedule = make_schedule(config, steps=steps)
    if config.name == "adamw":
        update = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decays,
        )
    else:
        update = optax.adafactor(
            schedule,
            multiply_by_parameter_scale=False,
            clipping_threshold=None,
            weight_decay_rate=config.weight_decay or None,
            weight_decay_mask=_decays,
        )
    if config.clip_norm > 0:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return update
