"""The fused head beside the plain one, and beside the rate of a matrix product.

    python benchmarks/head.py [--tokens=4096] [--width=512] [--vocab=32128] [--k=32]
        [--dtype=float32] [--chunk=256] [--no-dense] [--rounds=5] [--json=FILE]

Loss and gradients of hard and soft terms from hidden states, on one device. "plain" is
what one writes first: all logits, their log-softmax, the pairs gathered from it, and
automatic differentiation; it computes the same loss. 6 N D V FLOPs are counted for
both (logits, and two gradients). Memory is what the compiler plans, in units of one
float32 [N, V] array, and how it changes from N to 2 N tokens.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.bench import timing
from kdjax.config import DTYPES
from kdjax.runtime.console import print_table

Inputs = tuple[jax.Array, jax.Array, jax.Array, losses.Teacher]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one head."""

    num_tokens: int
    width: int
    vocab_size: int
    k: int
    dtype: str = "float32"
    chunk_size: int = 256


def make_inputs(shape: Shape) -> Inputs:
    """Hidden states, weight, targets and the top k of a random teacher."""
    n, d, v, k = shape.num_tokens, shape.width, shape.vocab_size, shape.k
    keys = jax.random.split(jax.random.key(0), 5)
    hidden_ND = jax.random.normal(keys[0], (n, d), shape.dtype)
    weight_VD = jax.random.normal(keys[1], (v, d)) * d**-0.5
    targets_N = jax.random.randint(keys[2], (n,), 0, v)
    # Distinct ids: a random start, and steps that do not come round.
    start_N = jax.random.randint(keys[3], (n, 1), 0, v)
    ids_NK = (start_N + jnp.arange(k)[None] * (v // k)) % v
    # The pairs hold 0.95 of the mass: a teacher of text.
    logits_NK = 2 * jax.random.normal(keys[4], (n, k))
    log_probs_NK = jax.nn.log_softmax(logits_NK) + jnp.log(0.95)
    teacher = losses.Teacher(ids_NK, log_probs_NK, jnp.zeros((n,), jnp.float32))
    return hidden_ND, weight_VD, targets_N, teacher


def fused_loss(shape: Shape) -> Callable[..., jax.Array]:
    """Ours: half hard, half soft, means over the tokens."""

    def loss(hidden_ND, weight_VD, targets_N, teacher):
        weights_N = jnp.full(targets_N.shape, 0.5 / shape.num_tokens, jnp.float32)
        return losses.fused_loss(
            hidden_ND,
            weight_VD,
            targets_N,
            weights_N,
            weights_N,
            teacher,
            losses.LossOptions(chunk_size=shape.chunk_size),
        )[0]

    return loss


def plain_loss(shape: Shape) -> Callable[..., jax.Array]:
    """Return the same loss with all logits at once, by automatic differentiation."""
    del shape

    def loss(hidden_ND, weight_VD, targets_N, teacher):
        logits_NV = jnp.einsum(
            "nd,vd->nv",
            hidden_ND,
            weight_VD.astype(hidden_ND.dtype),
            preferred_element_type=jnp.float32,
        )
        log_q_NV = jax.nn.log_softmax(logits_NV)
        nll_N = -jnp.take_along_axis(log_q_NV, targets_N[:, None], axis=1)[:, 0]
        log_q_NK = jnp.take_along_axis(log_q_NV, teacher.ids_NK, axis=1)
        p_NK = jnp.exp(teacher.log_probs_NK)
        rest_p_N, rest_q_N = 1 - p_NK.sum(1), 1 - jnp.exp(log_q_NK).sum(1)
        kl_N = (p_NK * (teacher.log_probs_NK - log_q_NK)).sum(1)
        kl_N += rest_p_N * (jnp.log(rest_p_N) - jnp.log(rest_q_N))
        return 0.5 * nll_N.mean() + 0.5 * kl_N.mean()

    return loss


def compile_gradient(loss: Callable[..., jax.Array], inputs: Any) -> Any:
    """Compiles the value and the gradients in hidden states and weight."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()


def temporary_arrays(make: Callable[[Shape], Any], shape: Shape) -> float | None:
    """Temporary memory in units of one float32 [N, V] array, nothing allocated."""
    inputs = jax.eval_shape(lambda: make_inputs(shape))
    found = timing.memory(compile_gradient(make(shape), inputs))
    size = 4 * shape.num_tokens * shape.vocab_size
    return found["temporary_bytes"] / size if found else None


def measure(
    shape: Shape, *, rounds: int, steps: int, dense: bool = True
) -> dict[str, Any]:
    """Time the heads and the matrix product in turn.

    Returns:
      For "fused" and "plain": "loss", "seconds" a pass (median over rounds),
      "flops_per_second", "of_matmul" (share of the matmul rate), "temporary_bytes",
      "temporary_arrays" and "temporary_arrays_at_2n" (units: float32 [N, V], the N of
      the shape in both, so that flat memory gives equal numbers).
    """
    inputs = make_inputs(shape)
    matmul = timing.matmul(shape.dtype)
    forms = {"fused": fused_loss} | ({"plain": plain_loss} if dense else {})
    compiled = {
        name: compile_gradient(make(shape), inputs) for name, make in forms.items()
    }
    values: dict[str, float] = {}
    variants: dict[str, Callable[[], Any]] = {"matmul": matmul.call}
    for name, function in compiled.items():
        values[name] = float(function(*inputs)[0])
        variants[name] = lambda function=function: function(*inputs)[0]
    samples = timing.alternate(variants, rounds=rounds, steps=steps)
    rate = matmul.flops / samples["matmul"].median
    flops = 6 * shape.num_tokens * shape.width * shape.vocab_size
    found: dict[str, Any] = {
        "shape": dataclasses.asdict(shape),
        "device": jax.devices()[0].device_kind,
        "matmul_flops_per_second": rate,
        "flops": flops,
    }
    double = dataclasses.replace(shape, num_tokens=2 * shape.num_tokens)
    for name, make in forms.items():
        seconds = samples[name].median
        doubled = temporary_arrays(make, double)
        found[name] = {
            "loss": values[name],
            "seconds": seconds,
            "flops_per_second": flops / seconds,
            "of_matmul": flops / seconds / rate,
            **timing.memory(compiled[name]),
            "temporary_arrays": temporary_arrays(make, shape),
            "temporary_arrays_at_2n": 2 * doubled if doubled is not None else None,
        }
    if dense:
        found["plain_over_fused"] = timing.compare(samples["plain"], samples["fused"])
    return found


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes."""
    shape = Shape(
        num_tokens=arguments.tokens,
        width=arguments.width,
        vocab_size=arguments.vocab,
        k=min(arguments.k, arguments.vocab),
        dtype=arguments.dtype,
        chunk_size=arguments.chunk,
    )
    found = measure(
        shape, rounds=arguments.rounds, steps=arguments.steps, dense=arguments.dense
    )
    rows = [
        {
            "head": name,
            "loss": found[name]["loss"],
            "seconds": found[name]["seconds"],
            "of matmul": found[name]["of_matmul"],
            "[N, V] arrays": found[name]["temporary_arrays"],
            "at 2 N": found[name]["temporary_arrays_at_2n"],
        }
        for name in ("fused", "plain")
        if name in found
    ]
    rate = found["matmul_flops_per_second"]
    print_table(f"{found['device']}: matmul {rate / 1e9:,.0f} GFLOP/s", rows)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value, meaning in (
        ("tokens", 4096, "N, target tokens"),
        ("width", 512, "D, width"),
        ("vocab", 32128, "V, vocabulary"),
        ("k", 32, "K, pairs per token"),
        ("chunk", 256, "tokens of a chunk"),
        ("rounds", 5, "in which the forms take turns"),
        ("steps", 3, "of a round"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=meaning)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", help="where to write what is printed")
    main(parser.parse_args())
