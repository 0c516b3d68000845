"""What a run carries from step to step, and how it is made in place on a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from kdjax import sharding


class TrainState(NamedTuple):
    """Everything that changes. Random numbers follow from (seed, step), so no key."""

    step: Int[Array, ""] | Any  # int32, optimizer steps done
    params: Any  # nested dict of float32 arrays
    opt_state: Any  # optax state


PROJECTION = "projection"  # parameters of the loss, beside those of the model


def split(params: Any) -> tuple[Any, Any]:
    """The model's parameters, and the projection [n, D, E] of the hidden-state loss."""
    model = {name: part for name, part in params.items() if name != PROJECTION}
    return model, params.get(PROJECTION, {}).get("kernel")


def abstract_state(
    params: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state; no memory is taken.

    Args:
      params: nested dict of arrays or ShapeDtypeStructs.
      optimizer: what makes the optimizer state.
      mesh: the devices.
    """
    shardings = sharding.param_shardings(params, mesh)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
    )
    placed = TrainState(
        step=sharding.replicated(mesh),
        params=shardings,
        opt_state=sharding.opt_shardings(optimizer, params, shardings),
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
    )


def init_state(
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    make_params: Callable[[], Any],
) -> TrainState:
    """A state at step 0, created with its shardings.

    Args:
      abstract: from `abstract_state`.
      optimizer: the same as there.
      make_params: returns the initial parameters, already sharded.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    params = make_params()
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step=step, params=params, opt_state=opt_state)
