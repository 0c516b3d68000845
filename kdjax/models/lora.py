"""Low-rank adapters beside the kernels of linear layers, which stay as they are.

    y = x W + (alpha / rank) (x A) B,  W [I, O], A [I, rank], B [rank, O]

A model is described with its adapters by `create` of its module; they are parameters
"lora_a" and "lora_b" beside "kernel", stacked over the layers as that is. Neither W's
gradient nor W + (alpha / rank) A B is ever computed while training.

Shapes: L layers, I inputs, O outputs.

Source: Hu et al., 2021, LoRA, arXiv 2106.09685, section 4.1.
"""

import difflib
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax.config import LoraConfig
from kdjax.models.layers import Linear

NAMES = ("lora_a", "lora_b")


def is_adapter(path: str) -> bool:
    """Return whether the parameter of a path, "a/b/c", belongs to an adapter."""
    return path.rsplit("/", 1)[-1] in NAMES


def add(model: nnx.Module, config: LoraConfig | None) -> Any:
    """Add adapters, all zero, to the linear layers that the targets match.

    Args:
      model: with its layers stacked on axis 0 of every kernel.
      config: None, or a rank of 0, adds nothing.

    Returns:
      The model.

    Raises:
      ValueError: a target that names no linear layer.
    """
    if config is None or not config.rank:
        return model
    layers = {
        "/".join(map(str, path)): layer
        for path, layer in nnx.iter_graph(model)
        if isinstance(layer, Linear)
    }
    for target in config.targets:
        matches = [name for name in layers if re.fullmatch(rf"(.*/)?({target})", name)]
        if not matches:
            near = difflib.get_close_matches(target, layers, n=3, cutoff=0.0)
            raise ValueError(
                f"student.lora.targets={target!r} matches no linear layer: a regular "
                "expression matches a whole name, or its end after a slash; the "
                f"nearest are {near}"
            )
        for name in matches:
            layer = layers[name]
            *stack, in_dim, out_dim = layer.kernel.shape
            layer.lora_a = nnx.Param(jnp.zeros((*stack, in_dim, config.rank)))
            layer.lora_b = nnx.Param(jnp.zeros((*stack, config.rank, out_dim)))
            layer.lora_scale = config.alpha / config.rank
    return model


def without(params: Any) -> Any:
    """Drop the adapters from a nested dict (of anything)."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {path: x for path, x in flat.items() if not is_adapter(path)}, sep="/"
    )


def beside(params: Any, abstract: Any, key: jax.Array) -> Any:
    """Add the adapters of `abstract`, freshly drawn, to a model's own parameters.

    A is uniform within +-I^-1/2 (Kaiming's for a slope of sqrt 5) as in the authors'
    code and peft, so that their learning rates serve; B is 0: at first nothing changes.

    Args:
      params: nested dict of arrays, without adapters.
      abstract: shapes and shardings, with them.
      key: of the random numbers.
    """
    flat = flatten_dict(abstract, sep="/")
    shapes = {path: x for path, x in flat.items() if is_adapter(path)}
    if not shapes:
        return params

    def make(key: jax.Array) -> dict[str, jax.Array]:
        def draw(path: str, x: Any, key: jax.Array) -> jax.Array:
            if path.endswith("lora_b"):
                return jnp.zeros(x.shape, x.dtype)
            bound = x.shape[-2] ** -0.5
            return jax.random.uniform(key, x.shape, x.dtype, -bound, bound)

        keys = jax.random.split(key, len(shapes))
        return {p: draw(p, shapes[p], k) for p, k in zip(shapes, keys, strict=True)}

    placed = {path: x.sharding for path, x in shapes.items()}
    adapters = jax.jit(make, out_shardings=placed)(key)
    return unflatten_dict(flatten_dict(params, sep="/") | adapters, sep="/")


def merged(params: Any, config: LoraConfig) -> Any:
    """Merge adapters into the kernels: W + (alpha / rank) A B.

    In float32, whatever the device multiplies in otherwise.
    """
    flat = flatten_dict(params, sep="/")
    plain = {path: x for path, x in flat.items() if not is_adapter(path)}
    for path, a_LIR in flat.items():
        if path.endswith("/lora_a"):
            name = path.removesuffix("lora_a")
            b_LRO = flat[f"{name}lora_b"]
            change_LIO = jnp.matmul(a_LIR, b_LRO, precision="highest")
            plain[f"{name}kernel"] += config.alpha / config.rank * change_LIO
    return unflatten_dict(plain, sep="/")
