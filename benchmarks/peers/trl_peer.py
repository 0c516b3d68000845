"""TRL's GKD trainer on a prepared case (pip install trl transformers torch).

    python trl_peer.py --folder=FOLDER [--steps=10]

Off-policy forward KL (beta=0) from an online teacher over whole logits. It has
no hard labels and its loss no temperature, so the case must have alpha 1 and T 1.
Prints one line of JSON.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import trl
from cases import peak_rss, read, report
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

_WARM = 3  # steps that are not timed


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **keywords) -> None:
        """Note the time of a step, for the trainer."""
        self.times.append(time.perf_counter())


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows as the trainer's batch: every token but the first is a target."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = ids.clone()
    labels[:, 0] = -100
    ones = torch.ones_like(ids)
    return {
        "input_ids": ids,
        "attention_mask": ones,
        "labels": labels,
        "prompts": ids[:, :1],
        "prompt_attention_mask": ones[:, :1],
    }


def run(folder: pathlib.Path, steps: int) -> None:
    """Trains, and prints the line."""
    before = peak_rss()
    case = read(str(folder))
    if (case["alpha"], case["temperature"]) != (1.0, 1.0):
        raise SystemExit(
            f"alpha={case['alpha']}, temperature={case['temperature']}: this trainer "
            "has soft labels at temperature 1 alone; use a case with 1.0 and 1.0"
        )
    student, teacher = (
        LlamaForCausalLM.from_pretrained(folder / part, dtype=torch.float32)
        for part in ("student", "teacher")
    )
    tokens = np.load(folder / "tokens.npy")
    rows = [{"input_ids": row.tolist()} for row in tokens.reshape(-1, tokens.shape[-1])]
    words = {f"t{i}": i for i in range(case["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")),
        pad_token="t0",
        eos_token="t1",
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=GKDConfig(
                output_dir=scratch,
                lmbda=0.0,
                beta=0.0,
                temperature=1.0,
                per_device_train_batch_size=case["batch_size"],
                max_steps=_WARM + steps,
                learning_rate=case["learning_rate"],
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                max_grad_norm=0.0,
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            data_collator=collate,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        first = collate(rows[: case["batch_size"]])
        with torch.no_grad():
            loss = float(trainer.compute_loss(trainer.model, first))
        trainer.train()
    report(
        case,
        seconds=list(np.diff(clock.times[_WARM - 1 :])),
        loss=loss,
        parameters=sum(p.numel() for p in student.parameters()),
        rss_before_bytes=before,
        versions={"trl": trl.__version__, "torch": torch.__version__},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args(sys.argv[1:])
    run(arguments.folder, arguments.steps)
