"""Writes one case for all libraries: python prepare.py --case=NAME --out=FOLDER.

FOLDER gets case.json, tokens.npy (int32 [batches, B, T + 1]), student/ and teacher/
(Hugging Face folders of random weights, tied embeddings) and cache/train (the teacher's
top k of those tokens, labelled by kdjax's own label step).
"""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import ours
from absl import app, flags
from cases import CASES

from kdjax import losses
from kdjax.config import Config, MeshConfig
from kdjax.experiment.models import load_model
from kdjax.models import decoder, hf
from kdjax.parallel import sharding
from kdjax.teacher import cache, label, synthetic
from kdjax.training import step

_CASE = flags.DEFINE_enum("case", None, list(CASES), "Which case.", required=True)
_OUT = flags.DEFINE_string("out", None, "The folder.", required=True)


def prepare(name: str, folder: pathlib.Path) -> None:
    """Everything but the label; done already, it does nothing."""
    case = CASES[name] | {"name": name}
    file = folder / "case.json"
    if file.is_file() and json.loads(file.read_text()) == case:
        return
    shutil.rmtree(folder, ignore_errors=True)
    for seed, part in enumerate(("student", "teacher")):
        shape = ours.shape(case, part)
        params = decoder.init_params(shape, jax.random.key(seed))
        hf.save(folder / part, shape, params)
    segments = synthetic.make_segments(
        case["num_batches"] * case["batch_size"],
        row_length=case["length"],
        vocab_size=case["vocab_size"],
        seed=0,
    )
    rows = [np.concatenate([s.prompt_ids, s.target_ids]) for s in segments]
    lead = (case["num_batches"], case["batch_size"], case["length"] + 1)
    np.save(folder / "tokens.npy", np.stack(rows).astype(np.int32).reshape(lead))
    _label(ours.config(case, folder), ours.segments(folder), folder)
    file.write_text(json.dumps(case, indent=2) + "\n")


def _label(config: Config, segments: list, folder: pathlib.Path) -> None:
    mesh = sharding.make_mesh(MeshConfig())
    model, params = load_model(config.teacher.path, mesh, dtype=config.train.dtype)
    settings = config.cache
    manifest = cache.Manifest(
        kind="top_k",
        k=settings.k,
        vocab_size=model.shape.vocab_size,
        temperatures=settings.temperatures,
        tokenizer_fingerprint="none",
        teacher_path="teacher",
        teacher_fingerprint=hf.fingerprint(config.teacher.path),
        shard_size=settings.shard_size,
    )
    label_step = step.make_label_step(
        model.graphdef,
        mesh,
        model.abstract,
        k=settings.k,
        temperatures=settings.temperatures,
        chunk_size=losses.chunk_size(settings.memory_mib, model.shape.vocab_size),
    )
    placed = jax.sharding.NamedSharding(mesh, sharding.BATCH_SPEC)
    label.label(
        segments,
        folder / "cache",
        manifest,
        settings,
        lambda *batch: label_step(params, *jax.device_put(batch, placed)),
    )
    size = label.records_per_shard(segments, manifest, settings)
    num_shards = len(label.shards(segments, size))
    cache.finish(folder / "cache", manifest, num_shards=num_shards)


def main(argv: list[str]) -> None:
    """Prepare the case of the flags."""
    del argv
    prepare(_CASE.value, pathlib.Path(_OUT.value))


if __name__ == "__main__":
    app.run(main, argv=sys.argv)
