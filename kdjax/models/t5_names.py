"""T5's Hugging Face folders: names, configs, and weights both ways.

Versions of transformers differ in what `tie_word_embeddings` says. Until version 4 it
is both whether the head is the embedding and whether outputs are scaled. From version 5
on it is always written as true, `scale_decoder_outputs` holds the second, and the first
shows only in whether the weights have a head of their own.
"""

import contextlib
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.config import T5Config
from kdjax.models import hf, t5

HEAD = "lm_head.weight"
# Our path -> Hugging Face name.
TOP_NAMES = {
    "embed/embedding": "shared.weight",
    "head/weight": HEAD,
    **{
        f"{stack}/{ours}": f"{stack}.{theirs}.weight"
        for stack in ("encoder", "decoder")
        for ours, theirs in {
            "norm/scale": "final_layer_norm",
            # Stored with the first layer, used by all.
            "position_bias/table": "block.0.layer.0.SelfAttention."
            "relative_attention_bias",
        }.items()
    },
}
# Our part of a layer -> (number of the sub-layer in encoder, in decoder, its module).
PARTS = {
    "attention_norm": (0, 0, "layer_norm"),
    "attention": (0, 0, "SelfAttention"),
    "cross_norm": (None, 1, "layer_norm"),
    "cross": (None, 1, "EncDecAttention"),
    "mlp_norm": (1, 2, "layer_norm"),
    "mlp": (1, 2, "DenseReluDense"),
}
KERNELS = {"query": "q", "key": "k", "value": "v", "out": "o", "down": "wo"}
# Copies and leftovers that some files hold beside the tensors of the model.
DUPLICATES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
GATED = {"relu": False, "gated-gelu": True}


def stored_names(path: str, config: T5Config) -> tuple[list[str], bool]:
    """Names of the tensors behind one parameter, and whether they are transposed."""
    if path in TOP_NAMES:
        return [TOP_NAMES[path]], False
    stack, _, part, *kernel, _ = path.split("/")
    encoder_number, decoder_number, module = PARTS[part]
    number, num_layers = (
        (encoder_number, config.num_encoder_layers)
        if stack == "encoder"
        else (decoder_number, config.num_decoder_layers)
    )
    if kernel:
        inner = {"gate": "wi_0", "up": "wi_1" if config.gated else "wi"}
        module += f".{(KERNELS | inner)[kernel[0]]}"
    names = [
        f"{stack}.block.{layer}.layer.{number}.{module}.weight"
        for layer in range(num_layers)
    ]
    return names, bool(kernel)


def stored_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the files of a model."""
    _, params = t5.create(config)
    result: dict[str, tuple[int, ...]] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = hf.join(key_path)
        names, transposed = stored_names(path, config)
        shape = leaf.shape if path in TOP_NAMES else leaf.shape[1:]
        result |= dict.fromkeys(names, shape[::-1] if transposed else shape)
    return result


def read_config(raw: dict[str, Any], file: pathlib.Path) -> T5Config:
    """The shape of a model from its config.json, and from the names of its weights.

    Args:
      raw: content of config.json.
      file: where it stands, in the folder of the weights.

    Raises:
      ValueError: an architecture, or a field that changes the numbers, which `t5` does
        not implement.
    """
    if raw.get("model_type") != "t5":
        raise ValueError(
            f"{file}: model_type={raw.get('model_type')!r} is not supported, only "
            "'t5': use a T5 v1.0, v1.1 or FLAN model"
        )
    absent = [name for name in REQUIRED if name not in raw]
    if absent:
        raise ValueError(f"{file} lacks {', '.join(absent)}: add what the model has")
    activation = raw.get("feed_forward_proj", "relu")
    if activation not in GATED:
        raise ValueError(
            f"{file}: feed_forward_proj={activation!r} is not supported, only "
            f"{' and '.join(map(repr, GATED))}: use a T5 v1.0, v1.1 or FLAN model"
        )
    tied = raw.get("tie_word_embeddings", True)
    scaled = raw.get("scale_decoder_outputs", tied)
    if "scale_decoder_outputs" in raw and tied:
        tied = HEAD not in _names_in(file.parent)
    pad_id = raw.get("pad_token_id", 0)
    start_id = raw.get("decoder_start_token_id")
    eos_id = raw.get("eos_token_id", 1)
    return T5Config(
        vocab_size=raw["vocab_size"],
        width=raw["d_model"],
        num_encoder_layers=raw["num_layers"],
        num_decoder_layers=raw.get("num_decoder_layers") or raw["num_layers"],
        num_heads=raw["num_heads"],
        head_dim=raw["d_kv"],
        mlp_width=raw["d_ff"],
        gated=GATED[activation],
        tie_embeddings=tied,
        scale_outputs=scaled,
        num_buckets=raw.get("relative_attention_num_buckets", 32),
        max_distance=raw.get("relative_attention_max_distance", 128),
        dropout=raw.get("dropout_rate", 0.1),
        norm_eps=raw.get("layer_norm_epsilon", 1e-6),
        init_factor=raw.get("initializer_factor", 1.0),
        pad_id=pad_id,
        eos_id=eos_id,
        start_id=pad_id if start_id is None else start_id,
    )


def write_config(config: T5Config, dtype: str) -> dict[str, Any]:
    """The content of config.json.

    Where only one of tied embeddings and scaled outputs holds, which no published model
    has, transformers 5 computes the same numbers, and 4 cannot.
    """
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_width,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_outputs,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_factor": config.init_factor,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "decoder_start_token_id": config.start_id,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def load_params(
    path: str | os.PathLike,
    config: T5Config,
    *,
    shardings: dict | None = None,
    dtype: str = "float32",
) -> t5.Params:
    """Read parameters, each process only the slices that its devices hold.

    Args:
      path: folder or hub name.
      config: of the same folder, from `read_config`.
      shardings: nested dict of `jax.sharding.Sharding` like the parameters; None puts
        everything on the default device.
      dtype: of the result; files may be float32, float16 or bfloat16.

    Raises:
      ValueError: a tensor that is missing, superfluous, or of another shape or type.
    """
    folder = hf.resolve(path)
    _, shapes = t5.create(config)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    with contextlib.ExitStack() as stack:
        tensors, files = hf._open_tensors(folder, stack)
        tensors = _without_copies(tensors, files, config)
        hf._check_tensors(folder, tensors, files, stored_shapes(config))

        def load(key_path, shape, sharding):
            path = hf.join(key_path)
            names, transposed = stored_names(path, config)

            def read(index):
                if path in TOP_NAMES:
                    return tensors[names[0]][index].astype(jnp.dtype(dtype))
                layers, *rest = index
                stored = tuple(rest[::-1] if transposed else rest)
                parts = [tensors[name][stored] for name in names[layers]]
                parts = [part.T if transposed else part for part in parts]
                return np.stack(parts).astype(jnp.dtype(dtype))

            return jax.make_array_from_callback(
                shape.shape, sharding, hf._memoised(read)
            )

        return jax.tree_util.tree_map_with_path(load, shapes, shardings)


def save(
    path: str | os.PathLike,
    config: T5Config,
    params: t5.Params,
    tokenizer: Any = None,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a new folder that `transformers.AutoModelForSeq2SeqLM` loads as it is.

    Args:
      path: the new folder.
      config: shape of the model.
      params: its parameters, sharded or not.
      tokenizer: saved beside it.
      dtype: of the stored tensors, "float32", "bfloat16" or "float16".
      max_shard_bytes: above this the weights are split over several files.

    Raises:
      ValueError: the folder exists and is not empty.
    """
    path = pathlib.Path(path)
    if path.exists() and any(path.iterdir()):
        raise ValueError(
            f"path={str(path)!r} exists and is not empty: remove it or choose another"
        )
    tensors: dict[str, np.ndarray] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names, transposed = stored_names(hf.join(key_path), config)
        host = hf._to_host(leaf)
        parts = [host] if hf.join(key_path) in TOP_NAMES else host
        for name, part in zip(names, parts, strict=True):
            tensors[name] = part.T if transposed else part
    if jax.process_index() != 0:
        return
    scratch = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    scratch.mkdir(parents=True)
    raw = write_config(config, dtype)
    ids = {name: value for name, value in raw.items() if name.endswith("_token_id")}
    hf._write_json(scratch / "config.json", raw)
    hf._write_json(
        scratch / "generation_config.json", {"_from_model_config": True} | ids
    )
    hf._write_weights(scratch, dict(sorted(tensors.items())), dtype, max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch)
    if path.exists():
        path.rmdir()
    os.replace(scratch, path)


def _names_in(folder: pathlib.Path) -> set[str]:
    """Names of the tensors of a folder; none where it has no weights."""
    if not any(folder.glob("*.safetensors")):
        return set()
    with contextlib.ExitStack() as stack:
        return set(hf._open_tensors(folder, stack)[0])


def _without_copies(
    tensors: dict[str, Any], files: dict[str, pathlib.Path], config: T5Config
) -> dict[str, Any]:
    """The tensors without those that no part of the model reads.

    Raises:
      ValueError: a copy of the embedding that is none.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name != UNUSED}
    copies = [name for name in DUPLICATES if config.tie_embeddings or name != HEAD]
    found = [name for name in ("shared.weight", *copies) if name in kept]
    if not found:
        return kept
    embedding = kept.pop(found[0])
    for name in found[1:]:
        if not np.array_equal(kept.pop(name)[:], embedding[:]):
            raise ValueError(
                f"{files[name]}: {name} differs from {found[0]}, which it should "
                "equal: check tie_word_embeddings in config.json"
            )
    return kept | {"shared.weight": embedding}
