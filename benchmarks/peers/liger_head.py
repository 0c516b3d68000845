"""Liger-Kernel's heads and torch.compile's, for the shapes of benchmarks/head.py.

    python liger_head.py [--tokens=8192] [--width=4096] [--vocab=128256] [--k=64]

Loss and gradients in hidden states and weight, bfloat16, one GPU. What each computes:

  torch_eager, torch_compiled  hard and soft terms against K pairs and a tail bucket,
                  all logits at once: the loss of kdjax's fused head
  liger_kl        KL against whole rows of teacher probabilities in memory
  liger_jsd       KL against an online teacher's hidden states and head of one width
                  (one matmul more)
  liger_chunked   the same, with hard labels

Prints one line of JSON: seconds of a pass, peak memory beyond the inputs. What is not
installed, or does not fit, says so. Without a GPU there is nothing to run, but for the
two of torch with --device=cpu and small shapes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def pairs_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ids: torch.Tensor,
    log_p: torch.Tensor,
) -> torch.Tensor:
    """Half cross-entropy, half KL over K pairs and the rest, means over tokens."""
    log_q = F.log_softmax((hidden @ weight.T).float(), dim=-1)
    hard = F.nll_loss(log_q, targets)
    log_q_k, p = log_q.gather(1, ids), log_p.exp()
    rest_p, rest_q = 1 - p.sum(1), 1 - log_q_k.exp().sum(1)
    soft = (p * (log_p - log_q_k)).sum(1) + rest_p * (rest_p.log() - rest_q.log())
    return 0.5 * hard + 0.5 * soft.mean()


def forms(
    arguments: argparse.Namespace, device: str
) -> tuple[list[torch.Tensor], dict[str, Callable[[], Callable[[], torch.Tensor]]]]:
    """Return the differentiable inputs, and a maker of the loss function per form."""
    n, d, v, k = arguments.tokens, arguments.width, arguments.vocab, arguments.k
    generator = torch.Generator(device).manual_seed(0)
    kind = {"device": device, "generator": generator}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(n, d, **kind).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, **kind) * d**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), **kind)
    start = torch.randint(0, v, (n, 1), **kind)
    ids = (start + torch.arange(k, device=device) * (v // k)) % v
    log_p = (
        F.log_softmax(2 * torch.randn(n, k, **kind), dim=-1) + torch.tensor(0.95).log()
    )

    def eager() -> Callable[[], torch.Tensor]:
        return lambda: pairs_loss(hidden, weight, targets, ids, log_p)

    def compiled() -> Callable[[], torch.Tensor]:
        function = torch.compile(pairs_loss)
        return lambda: function(hidden, weight, targets, ids, log_p)

    def liger_kl() -> Callable[[], torch.Tensor]:
        from liger_kernel.transformers.fused_linear_kl_div import (
            LigerFusedLinearKLDivLoss,
        )

        loss = LigerFusedLinearKLDivLoss()
        target = torch.randn(n, v, dtype=dtype, **kind).softmax(-1)
        return lambda: loss(hidden, weight, target)

    def teacher() -> tuple[torch.Tensor, torch.Tensor]:
        teacher_hidden = torch.randn(n, d, dtype=dtype, **kind)
        return teacher_hidden, torch.randn(v, d, dtype=dtype, **kind) * d**-0.5

    def liger_jsd() -> Callable[[], torch.Tensor]:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        loss, (hidden_t, weight_t) = LigerFusedLinearJSD(jsd_beta=0.0), teacher()
        return lambda: loss(hidden, weight, hidden_t, weight_t, targets)

    def liger_chunked() -> Callable[[], torch.Tensor]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss, (hidden_t, weight_t) = LigerFusedLinearJSDLoss(beta=0.0), teacher()
        return lambda: loss(hidden, weight, hidden_t, weight_t, targets)

    found = {"torch_eager": eager, "torch_compiled": compiled}
    if device == "cuda":
        found |= {
            "liger_kl": liger_kl,
            "liger_jsd": liger_jsd,
            "liger_chunked": liger_chunked,
        }
    return [hidden, weight], found


def measure(
    make: Callable[[], Callable[[], torch.Tensor]],
    inputs: list[torch.Tensor],
    *,
    steps: int,
    device: str,
) -> dict[str, Any]:
    """Seconds and memory of one form; compiles and autotunes in untimed passes."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    loss_of = make()

    def one_pass() -> float:
        for x in inputs:
            x.grad = None
        wait()
        since = time.perf_counter()
        loss_of().backward()
        wait()
        return time.perf_counter() - since

    for _ in range(3):
        one_pass()
    for x in inputs:
        x.grad = None
    found: dict[str, Any] = {"loss": float(loss_of().detach())}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = [one_pass() for _ in range(steps)]
    if device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found | {"seconds": statistics.median(seconds), "all_seconds": seconds}


def main() -> None:
    """Measures every form and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("tokens", 8192), ("width", 4096), ("vocab", 128256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "no CUDA device: run this where torch.cuda.is_available(), or with "
            "--device=cpu and small shapes (torch's own forms alone)"
        )
    inputs, found_forms = forms(arguments, arguments.device)
    results: dict[str, Any] = {}
    for name, make in found_forms.items():
        try:
            results[name] = measure(
                make, inputs, steps=arguments.steps, device=arguments.device
            )
        except (ImportError, RuntimeError) as error:  # memory, or no such kernel
            results[name] = {"skipped": f"{type(error).__name__}: {error}"[:300]}
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps({"torch": torch.__version__, "forms": results}))


if __name__ == "__main__":
    main()
