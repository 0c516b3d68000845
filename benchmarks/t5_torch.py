"""T5 training steps beside PyTorch and transformers, on one machine, in turns.

    python benchmarks/t5_torch.py --data=FOLDER --tokenizer=FOLDER [--rounds=3] \
        [--examples=256] [--json=FILE]

FOLDER of the data holds commonsense_qa's train.jsonl and palm_train.jsonl. Both sides
train a T5 of T5-small's size (v1.0: 6 + 6 layers, width 512, vocabulary 32,128) from
the same random weights by AdamW with dropout and clipping, in float32.

"padded": 8 rows, 256 tokens for the encoder, 128 for the decoder, all of them read.
"epoch": `multitask` over a sample of the real rows, label and rationale of each.
PyTorch as usual: 16 examples per step, both views padded to the longest of the
batch, two forward passes. kdjax packs about as many segments into a step. Seconds are
those of the whole sample. Needs torch.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM

from kdjax.config import (
    Config,
    DataConfig,
    MethodConfig,
    OptimConfig,
    StudentConfig,
    T5Config,
    TrainConfig,
)
from kdjax.data import loader
from kdjax.experiment import methods
from kdjax.experiment.data import load_data
from kdjax.experiment.models import load_model
from kdjax.experiment.rows import make_plan
from kdjax.models import hf, lm
from kdjax.parallel import sharding
from kdjax.runtime.console import print_table
from kdjax.teacher import synthetic
from kdjax.training import program

SHAPE = T5Config(
    vocab_size=32128,
    width=512,
    num_encoder_layers=6,
    num_decoder_layers=6,
    num_heads=8,
    head_dim=64,
    mlp_width=2048,
    gated=False,
    tie_embeddings=True,
    scale_outputs=True,
)
EXAMPLES = 16  # of a step


def make_config(data: str, tokenizer: str, num_examples: int) -> Config:
    """Return the multitask run of the sample."""
    folder = pathlib.Path(data)
    return Config(
        data=DataConfig(
            source="jsonl",
            schema="commonsense_qa",
            path=str(folder / "train.jsonl"),
            rationales=str(folder / "palm_train.jsonl"),
            tokenizer=tokenizer,
            num_train=num_examples,
            num_eval=1,
            max_prompt=256,
            max_target=128,
        ),
        student=StudentConfig(architecture="t5", t5=SHAPE),
        method=MethodConfig(name="multitask", hard_weight=1.0, soft_weight=0.0),
        optim=OptimConfig(learning_rate=5e-5, schedule="constant"),
        train=TrainConfig(batch_size=4, row_length=224, encoder_row_length=384),
    )


class Ours:
    """kdjax's step over the batches of a plan."""

    def __init__(self, config: Config, segments: list, folder: str) -> None:
        """Load the weights and make all batches."""
        mesh = sharding.make_mesh(config.mesh)
        model, params = load_model(folder, mesh, dtype="float32")
        self.program = program.Program(config, model, mesh)
        self.state = self.program.init(lambda: params)
        plan = make_plan(config, model.shape, segments)
        self.batches = [
            loader.make_batch(
                plan, step, terms=methods.terms(config.method), dropout=True
            )
            for step in range(plan.steps_per_epoch(0))
        ]
        self.mesh, self.losses = mesh, []

    def __call__(self) -> float:
        """Seconds of all batches."""
        start = time.perf_counter()
        self.losses = []
        for batch in self.batches:
            placed = sharding.global_batch(batch, self.mesh, self.program.num_rows)
            self.state, found = self.program.step(self.state, placed)
            self.losses.append(found["loss"])
        self.losses = [float(loss) for loss in self.losses]
        return time.perf_counter() - start


class Theirs:
    """PyTorch's step over batches of padded views."""

    def __init__(self, batches: list, folder: str) -> None:
        """Each batch is a list of (prompts, targets, weight)."""
        self.model = AutoModelForSeq2SeqLM.from_pretrained(folder).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=5e-5, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.batches = [
            [(pad(p, 0), pad(p, 0) != 0, pad(t, -100), w) for p, t, w in batch]
            for batch in batches
        ]
        self.losses: list[float] = []

    def __call__(self) -> float:
        """Seconds of all batches."""
        start = time.perf_counter()
        self.losses = []
        for batch in self.batches:
            total = 0.0
            for prompts, mask, labels, weight in batch:
                loss = self.model(
                    input_ids=prompts, attention_mask=mask, labels=labels
                ).loss
                total = total + weight * loss
            total.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(float(total))
        return time.perf_counter() - start


def pad(rows: list, value: int) -> torch.Tensor:
    """Rows of ids as one array, as long as the longest."""
    found = np.full((len(rows), max(map(len, rows))), value)
    for row, ids in zip(found, rows, strict=True):
        row[: len(ids)] = ids
    return torch.tensor(found, dtype=torch.long)


def padded_batches(segments: list, views: int) -> list:
    """Batch the segments as a user does: EXAMPLES at a time, a pass per view."""
    batches = []
    for start in range(0, len(segments), views * EXAMPLES):
        chosen = segments[start : start + views * EXAMPLES]
        batch = []
        for view in range(views):
            found = [s for s in chosen if s.view == view]
            prompts = [[*s.prompt_ids, 1] for s in found]
            batch.append((prompts, [s.target_ids for s in found], 1 / views))
        batches.append(batch)
    return batches


def compare(name: str, ours: Ours, theirs: Theirs, rounds: int) -> dict:
    """Medians of alternating rounds; the first of each is not counted."""
    print(name, "compiling and warming up", ours(), theirs(), flush=True)
    first = (float(np.mean(ours.losses)), float(np.mean(theirs.losses)))
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    seconds = [statistics.median(side) for side in zip(*pairs, strict=True)]
    positions = ours.batches[0]
    return {
        "case": name,
        "kdjax seconds": seconds[0],
        "PyTorch seconds": seconds[1],
        "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
        "steps": f"{len(ours.batches)} / {len(theirs.batches)}",
        "filled": float(np.mean([(b.segments > 0).mean() for b in ours.batches])),
        "encoder filled": float((positions["encoder_segments"] > 0).mean()),
        "first losses": f"{first[0]:.3f} / {first[1]:.3f}",
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    config = make_config(args.data, args.tokenizer, args.examples)
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(pathlib.Path(scratch) / "t5")
        params = jax.jit(lambda key: lm.init_params(SHAPE, key))(jax.random.key(0))
        hf.save(folder, SHAPE, params)
        full = dataclasses.replace(
            config,
            method=MethodConfig(name="finetune", hard_weight=1.0, soft_weight=0.0),
            train=TrainConfig(batch_size=8, row_length=128, encoder_row_length=256),
        )
        segments = synthetic.make_segments(
            16, row_length=128, prompt_length=255, vocab_size=32000, seed=0
        )
        rows = [
            compare(
                "padded",
                Ours(full, segments, folder),
                Theirs(
                    [
                        [
                            (
                                [[*s.prompt_ids, 1] for s in half],
                                [s.target_ids for s in half],
                                1.0,
                            )
                        ]
                        for half in (segments[:8], segments[8:])
                    ],
                    folder,
                ),
                args.rounds,
            )
        ]
        found = load_data(config, splits=("train",)).train
        rows.append(
            compare(
                "epoch",
                Ours(config, found, folder),
                Theirs(padded_batches(found, 2), folder),
                args.rounds,
            )
        )
    shown = [
        {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]
    print_table("T5-small, one step of a batch or one pass over a sample", shown)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
