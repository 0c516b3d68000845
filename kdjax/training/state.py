"""What a run carries from step to step, and how it is made in place on a mesh."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kdjax.parallel import sharding
from kdjax.training import trainable


class TrainState(NamedTuple):
    """Everything that changes. Random numbers follow from (seed, step), so no key."""

    step: Int[Array, ""] | Any  # int32, optimizer steps done
    params: Any  # nested dict of float32 arrays
    opt_state: Any  # optax state of the parameters that are trained
    ema: Any = None  # nested dict of their averages; None = none are kept


PROJECTION = "projection"  # parameters of the loss, beside those of the model


def split(params: Any) -> tuple[Any, Any]:
    """The model's parameters, and the projection [n, D, E] of the hidden-state loss."""
    model = {name: part for name, part in params.items() if name != PROJECTION}
    return model, params.get(PROJECTION, {}).get("kernel")


def in_use(current: TrainState) -> Any:
    """The model's parameters to evaluate, export and return: averages where kept."""
    params = current.params
    if current.ema is not None:
        params = trainable.merged(params, current.ema)
    return split(params)[0]


def averaged(ema: Any, params: Any, *, decay: float, step: Int[Array, ""]) -> Any:
    """Exponential moving averages after an update: d ema + (1 - d) params.

    d = min(decay, (1 + step) / (10 + step)): early averages do not cling to the
    initial parameters, and none needs a correction of its bias.

    Args:
      ema: nested dict of the averages before the update; None stays None.
      params: the same of the parameters after it.
      decay: what d grows to.
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
    frozen: Collection[str] = (),
    averages: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of the state; no memory is taken.

    Args:
      params: nested dict of arrays or ShapeDtypeStructs.
      optimizer: what makes the optimizer state.
      mesh: the devices.
      frozen: paths of parameters that are not trained, from `trainable.frozen_paths`.
      averages: averages of the others are kept.
    """
    shardings = sharding.param_shardings(params, mesh)
    trained = trainable.split(params, frozen)[0]
    trained_shardings = trainable.split(shardings, frozen)[0]
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
    make_params: Callable[[], Any],
    *,
    frozen: Collection[str] = (),
) -> TrainState:
    """A state at step 0, created with its shardings.

    Args:
      abstract: from `abstract_state`.
      optimizer: the same as there.
      make_params: returns the initial parameters, already sharded.
      frozen: the same as there.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    params = make_params()
    trained = trainable.split(params, frozen)[0]
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    ema = None
    if abstract.ema is not None:  # memory of its own: the step reuses all of it
        copy = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=shardings.ema)
        ema = copy(trained)
    return TrainState(step=step, params=params, opt_state=opt_state, ema=ema)
