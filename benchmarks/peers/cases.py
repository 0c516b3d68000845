"""The problems that all libraries are given, and what each process reports.

Standard library alone: it is imported in every library's own environment. A case is a
student and a teacher of the Llama family, tokens, and the loss
(1 - alpha) CE + alpha T^2 KL(teacher || student), means over all positions.
"""

import json
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def _decoder(width: int, num_layers: int, mlp_width: int, head_dim: int) -> dict:
    return {
        "width": width,
        "num_layers": num_layers,
        "num_heads": width // head_dim,
        "num_kv_heads": width // head_dim,
        "head_dim": head_dim,
        "mlp_width": mlp_width,
        # google-tunix 0.1.7 computes with this whatever its config says.
        "rope_theta": 1e6,
        # Large enough that student and teacher disagree: a loss that is not zero.
        "init_std": 0.08,
    }


def _case(student: dict, teacher: dict, batch_size: int, length: int, **rest) -> dict:
    return {
        "student": student,
        "teacher": teacher,
        "batch_size": batch_size,
        "length": length,  # positions trained on, each with a next token
        "vocab_size": 32000,
        "k": 64,
        "temperature": 2.0,
        "alpha": 0.5,
        "learning_rate": 1e-4,
        "num_batches": 4,
    } | rest


_SMALL = _decoder(128, 2, 512, 32), _decoder(256, 4, 1024, 32)
_TINY = _decoder(32, 1, 64, 8), _decoder(32, 2, 64, 8)

CASES: dict[str, dict[str, Any]] = {
    "b4_t128": _case(*_SMALL, 4, 128),
    "b8_t256": _case(*_SMALL, 8, 256),
    "60m_b8_t256": _case(
        _decoder(512, 10, 2048, 64), _decoder(768, 8, 2048, 64), 8, 256
    ),
    "soft_b4_t128": _case(*_SMALL, 4, 128, alpha=1.0, temperature=1.0),
    "tiny": _case(*_TINY, 2, 16, vocab_size=512, k=16),  # tests
    "soft_tiny": _case(*_TINY, 2, 16, vocab_size=512, k=16, alpha=1.0, temperature=1.0),
}


def read(folder: str) -> dict[str, Any]:
    """Read the case that `prepare.py` wrote into a folder, with its name."""
    return json.loads((pathlib.Path(folder) / "case.json").read_text())


def time_steps(
    start_step: Callable[[], Any], wait: Callable[[Any], Any], *, steps: int
) -> list[float]:
    """Seconds of each step, waited for one by one; two before them are not timed."""
    for _ in range(2):
        wait(start_step())
    seconds = []
    for _ in range(steps):
        since = time.perf_counter()
        wait(start_step())
        seconds.append(time.perf_counter() - since)
    return seconds


def peak_rss() -> int:
    """Most resident memory of this process so far, bytes."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report(case: dict, *, seconds: list[float], loss: float, **rest: Any) -> None:
    """Print the one line of JSON that `run.py` reads.

    Args:
      case: what was run.
      seconds: of each timed step.
      loss: of the first batch with the initial weights, nats.
      rest: more numbers, with units in their names.
    """
    tokens = case["batch_size"] * case["length"]
    print(
        json.dumps(
            {
                "loss": loss,
                "seconds": seconds,
                "median_seconds": statistics.median(seconds),
                "tokens_per_second": tokens / statistics.median(seconds),
                "tokens_per_step": tokens,
                "max_rss_bytes": peak_rss(),
            }
            | rest
        )
    )
