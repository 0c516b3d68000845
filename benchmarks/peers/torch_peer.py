"""PyTorch and transformers on a prepared case, as one writes it by hand.

    python torch_peer.py --folder=FOLDER --mode=dense [--steps=10]

LlamaForCausalLM from the folder, AdamW, cross-entropy and KL over whole logits. Modes:
"dense" (the teacher's logits in memory, made before) and "online" (an online teacher).
Prints one line of JSON.
"""

import argparse
import itertools
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from cases import peak_rss, read, report, time_steps
from transformers import LlamaForCausalLM


def run(folder: pathlib.Path, mode: str, steps: int) -> None:
    """Trains, and prints the line."""
    before = peak_rss()
    case = read(str(folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (
        LlamaForCausalLM.from_pretrained(folder / part, dtype=torch.float32).to(device)
        for part in ("student", "teacher")
    )
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=case["learning_rate"], weight_decay=0.0
    )
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long().to(device)

    @torch.no_grad()
    def teach(batch: torch.Tensor) -> torch.Tensor:
        return teacher(input_ids=batch[:, :-1], use_cache=False).logits

    stored = [teach(batch) for batch in tokens[:2]] if mode == "dense" else None
    if mode == "dense":
        tokens = tokens[:2]
        del teacher
    numbers = itertools.count()

    def start_step() -> float:
        index = next(numbers) % len(tokens)
        batch = tokens[index]
        teacher_logits = teach(batch) if stored is None else stored[index]
        logits = student(input_ids=batch[:, :-1], use_cache=False).logits
        loss = distillation_loss(case, logits, teacher_logits, batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    loss = start_step()
    seconds = time_steps(start_step, lambda loss: loss, steps=steps)
    report(
        case,
        seconds=seconds,
        loss=loss,
        parameters=sum(p.numel() for p in student.parameters()),
        rss_before_bytes=before,
        versions={"torch": torch.__version__},
        threads=torch.get_num_threads(),
    )


def distillation_loss(
    case: dict, logits: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """(1 - alpha) CE + alpha T^2 KL, means over all positions."""
    temperature = case["temperature"]
    hard = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    soft = F.kl_div(
        F.log_softmax(logits.flatten(0, 1) / temperature, dim=-1),
        F.log_softmax(teacher.flatten(0, 1) / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - case["alpha"]) * hard + case["alpha"] * temperature**2 * soft


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--mode", choices=("dense", "online"), default="dense")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args(sys.argv[1:])
    run(arguments.folder, arguments.mode, arguments.steps)
