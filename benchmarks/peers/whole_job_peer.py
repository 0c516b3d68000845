"""The whole job by PyTorch, and the measure of everybody's students.

    python whole_job_peer.py --folder=FOLDER --mode=stored|trl|evaluate [...]

stored: the teacher's top 64 of every target token go to disk once, and a plain loop
reads them. trl: TRL's GKD trainer, off-policy, its teacher in every step. Both save the
student after each epoch. evaluate: held-out NLL, and KL from the teacher, of student
folders. Prints one line of JSON, which `whole_job.py` reads; it needs torch and
transformers (and trl).
"""

import argparse
import copy
import json
import os
import pathlib
import time

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from cases import peak_rss
from transformers import AutoModelForCausalLM, get_constant_schedule_with_warmup


def load(folder: str):
    """Return a model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def cut(teacher, layers: list[int]):
    """Return a student of some of the teacher's layers."""
    student = copy.deepcopy(teacher)
    kept = [student.model.layers[number] for number in layers]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    student.model.layers = torch.nn.ModuleList(kept)
    student.config.num_hidden_layers = len(kept)
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [student.config.layer_types[i] for i in layers]
    return student


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return a batch: ids, mask, and labels of the targets alone."""
    width = max(len(row["prompt"]) + len(row["target"]) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        tokens, start = row["prompt"] + row["target"], len(row["prompt"])
        ids[index, : len(tokens)] = torch.tensor(tokens)
        mask[index, : len(tokens)] = 1
        labels[index, start : len(tokens)] = torch.tensor(row["target"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def target_logits(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits that predict the target tokens, [N, V]."""
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
    )
    return out.logits[:, :-1][batch["labels"][:, 1:] != -100]


class Saver:
    """Saves a student after an epoch, and the seconds until then without saving."""

    def __init__(self, out: pathlib.Path, began: float) -> None:
        self.out, self.began = out, began
        self.epochs: list[dict] = []

    def save(self, model) -> None:
        """Save the student of the epoch that has just ended."""
        now = time.time()
        folder = self.out / f"epoch-{len(self.epochs) + 1}"
        model.save_pretrained(folder)
        self.epochs.append({"folder": str(folder), "seconds": now - self.began})
        self.began += time.time() - now


def stored(job: dict, train: list[dict], saver: Saver) -> dict:
    """Label once, then train on what is stored."""
    teacher = load(job["model"]).eval()
    student = cut(teacher, job["layers"])
    out = saver.out / "labels"
    out.mkdir()
    size, k = job["batch_rows"], 64
    by_length = sorted(range(len(train)), key=lambda i: len(train[i]["prompt"]))
    with torch.inference_mode():
        for first in range(0, len(train), size):
            chosen = by_length[first : first + size]
            batch = padded([train[i] for i in chosen])
            values, ids = target_logits(teacher, batch).log_softmax(-1).topk(k)
            ends = np.cumsum([len(train[i]["target"]) for i in chosen])[:-1]
            for i, v, n in zip(
                chosen, np.split(values, ends), np.split(ids, ends), strict=True
            ):
                np.savez(out / f"{i}.npz", v=v.half().numpy(), i=n.int().numpy())
    del teacher
    labelled = time.time() - saver.began
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=job["learning_rate"],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    schedule = get_constant_schedule_with_warmup(optimizer, job["warmup"])
    rng = np.random.default_rng(0)
    student.train()
    for _ in range(job["epochs"]):
        order = rng.permutation(len(train))
        for first in range(0, len(train), size):
            chosen = order[first : first + size]
            files = [np.load(out / f"{i}.npz") for i in chosen]
            log_p = torch.from_numpy(np.concatenate([f["v"] for f in files])).float()
            ids = torch.from_numpy(np.concatenate([f["i"] for f in files])).long()
            logits = target_logits(student, padded([train[i] for i in chosen]))
            log_q = logits.log_softmax(-1).gather(1, ids)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        saver.save(student)
    disk = sum(f.stat().st_size for f in out.iterdir())
    return {"label_seconds": labelled, "disk_bytes": disk}


def trl(job: dict, train: list[dict], saver: Saver) -> dict:
    """Train by TRL's GKD trainer, on the data alone."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    teacher = load(job["model"]).eval()
    student = cut(teacher, job["layers"])

    class Save(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **keywords) -> None:
            saver.save(model)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = padded([train[row["row"]] for row in rows])
        # The loss is of what follows the prompts: of the shortest one's end on,
        # where labels are not -100.
        width = min(len(train[row["row"]]["prompt"]) for row in rows)
        return batch | {
            "prompts": batch["input_ids"][:, :width],
            "prompt_attention_mask": batch["attention_mask"][:, :width],
        }

    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(
            output_dir=str(saver.out / "trainer"),
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            per_device_train_batch_size=job["batch_rows"],
            num_train_epochs=job["epochs"],
            learning_rate=job["learning_rate"],
            weight_decay=0.0,
            adam_beta2=0.95,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=job["warmup"],
            gradient_checkpointing=False,
            max_grad_norm=1.0,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list([{"row": i} for i in range(len(train))]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Save()],
    )
    trainer.train()
    return {"label_seconds": 0.0, "disk_bytes": 0}


@torch.inference_mode()
def evaluate(job: dict, rows: list[dict], folders: list[str]) -> dict:
    """Return NLL and KL per held-out target token, of each student."""
    teacher = load(job["model"]).eval()
    sums: dict[str, list[float]] = {}
    batches = [padded(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    wanted = [target_logits(teacher, batch).log_softmax(-1) for batch in batches]
    for folder in folders:
        student = load(folder).eval()
        nll = kl = 0.0
        for batch, log_p in zip(batches, wanted, strict=True):
            labels = batch["labels"][:, 1:]
            log_q = target_logits(student, batch).log_softmax(-1)
            nll += float(F.nll_loss(log_q, labels[labels != -100], reduction="sum"))
            kl += float((log_p.exp() * (log_p - log_q)).sum())
        num_tokens = sum(len(row["target"]) for row in rows)
        sums[folder] = [nll / num_tokens, kl / num_tokens]
    return sums


def main() -> None:
    """Run a mode and print its line."""
    began = float(os.environ.get("WHOLE_JOB_BEGAN", time.time()))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--mode", choices=("stored", "trl", "evaluate"), required=True)
    parser.add_argument("--students", nargs="*", default=[])
    args = parser.parse_args()
    job = json.loads((args.folder / "job.json").read_text())
    split = "eval" if args.mode == "evaluate" else "train"
    lines = (args.folder / f"{split}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if args.mode == "evaluate":
        print(json.dumps(evaluate(job, rows, args.students)))
        return
    out = args.folder / args.mode
    out.mkdir()
    saver = Saver(out, began)
    found = {"stored": stored, "trl": trl}[args.mode](job, rows, saver)
    seconds = saver.epochs[-1]["seconds"]
    result = {"seconds": seconds, "epochs": saver.epochs, "max_rss_bytes": peak_rss()}
    print(json.dumps(result | found))


if __name__ == "__main__":
    main()
