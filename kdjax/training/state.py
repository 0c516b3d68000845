"""TrainState: parameters, optimizer state and averages, made in place on a mesh."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kdjax.parallel import sharding
from kdjax.training import trainable


class TrainState(NamedTuple):
    """Everything that training changes; random numbers follow from (seed, step)."""

    step: Int[Array, ""] | Any  # int32, optimizer steps done
    params: Any  # nested dict of float32 arrays
    opt_state: Any  # optax state of the parameters that are trained
    ema: Any = None  # nested dict of their averages; None = none are kept


PROJECTION = "projection"  # parameters of the loss, beside those of the model


def split_projection(params: Any) -> tuple[Any, Any]:
    """Split off the projection [n, D, E] of the hidden-state loss."""
    model = {name: part for name, part in params.items() if name != PROJECTION}
    return model, params.get(PROJECTION, {}).get("kernel")


def eval_params(current: TrainState) -> Any:
    """Return the parameters to evaluate and export: averages where they are kept."""
    params = current.params
    if current.ema is not None:
        params = trainable.merge(params, current.ema)
    return split_projection(params)[0]


def update_ema(ema: Any, params: Any, *, decay: float, step: Int[Array, ""]) -> Any:
    """Update exponential moving averages: d ema + (1 - d) params.

    d = min(decay, (1 + step) / (10 + step)): early averages do not cling to the
    initial parameters, and none needs a correction of its bias.

    Args:
      ema: nested dict of the averages before the update; None stays None.
      params: the same of the parameters after it.
      decay: limit of d.
      step: optimizer steps done before.
    """
    if ema is None:
        return None
    share: Float[Array, ""] = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda mean, x: share * mean + (1 - share) * x, ema, params)


def abstract_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    frozen_paths: Collection[str] = (),
    averages: bool = False,
) -> TrainState:
    """Describe the state: shapes, dtypes and shardings, without memory.

    Args:
      params: nested dict of arrays or ShapeDtypeStructs.
      optimizer: makes the optimizer state.
      mesh: the devices.
      frozen_paths: of parameters that are not trained, from `trainable.frozen_paths`.
      averages: averages of the others are kept.
    """
    shardings = sharding.param_shardings(params, mesh)
    trained = trainable.partition(params, frozen_paths)[0]
    trained_shardings = trainable.partition(shardings, frozen_paths)[0]
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(optimizer.init, trained),
        ema=trained if averages else None,
    )
    placed = TrainState(
        step=sharding.replicated(mesh),
        params=shardings,
        opt_state=sharding.opt_shardings(optimizer, trained, trained_shardings),
        ema=trained_shardings if averages else None,
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
    )


def init_state(
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    init_params: Callable[[], Any],
    *,
    frozen_paths: Collection[str] = (),
) -> TrainState:
    """Make a state at step 0 with its shardings.

    Args:
      abstract: from `abstract_state`.
      optimizer: the same as there.
      init_params: returns the initial parameters, already sharded.
      frozen_paths: the same as there.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    params = init_params()
    trained = trainable.partition(params, frozen_paths)[0]
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    ema = None
    if abstract.ema is not None:  # memory of its own: the step reuses all of it
        copy = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=shardings.ema)
        ema = copy(trained)
    return TrainState(step=step, params=params, opt_state=opt_state, ema=ema)
