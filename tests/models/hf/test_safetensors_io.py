"""The files of a folder: what is written, damage that is found, memory it takes."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kdjax.config import DecoderConfig, T5Config
from kdjax.models import hf, lm
from kdjax.models.hf import safetensors_io

ROOT = pathlib.Path(__file__).parents[3]
DECODER = DecoderConfig(
    vocab_size=67,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=56,
)
T5 = T5Config(vocab_size=67, width=32, num_heads=4, head_dim=8, mlp_width=56)
# A shape, and one of its tensors.
KINDS = {
    "decoder": (DECODER, "model.layers.1.mlp.up_proj.weight"),
    "t5": (T5, "decoder.block.1.layer.2.DenseReluDense.wi_1.weight"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_library_reads_what_was_written(tmp_path, dtype):
    rng = np.random.default_rng(0)
    shapes = {"b": (3, 5), "c": (7,), "a": (2, 3, 4), "d": (50,)}
    tensors = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    tensors["b"] = np.asfortranarray(tensors["b"])
    fetched = []

    def fetch(name):
        fetched.append(name)
        return tensors[name]

    safetensors_io.write(tmp_path, shapes, fetch, dtype=dtype, max_shard_bytes=120)
    assert fetched == list(shapes)
    index = json.loads((tmp_path / safetensors_io.INDEX).read_text())
    itemsize = 4 if dtype == "float32" else 2
    assert index["metadata"] == {"total_size": 96 * itemsize}
    read = {}
    for file in tmp_path.glob("*.safetensors"):
        found = load_file(file)
        assert {index["weight_map"][name] for name in found} == {file.name}
        with safe_open(file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
        read |= found
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor.astype(getattr(ml_dtypes, dtype, dtype))
        assert read[name].dtype == wanted.dtype
        np.testing.assert_array_equal(read[name], wanted)


def test_parameters_of_another_shape_are_not_written(tmp_path):
    params = lm.init_params(DECODER, jax.random.key(0))
    params["embed"]["embedding"] = params["embed"]["embedding"][:60]
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \(60, 32\)"):
        hf.save(tmp_path / "model", DECODER, params)
    assert not (tmp_path / "model").exists()


@pytest.fixture(params=KINDS)
def sharded(request, tmp_path):
    """A shape, its folder, and a tensor with the file that holds it."""
    shape, name = KINDS[request.param]
    hf.save(
        tmp_path / "model",
        shape,
        lm.init_params(shape, jax.random.key(0)),
        max_shard_bytes=30_000,
    )
    weight_map = json.loads((tmp_path / "model" / safetensors_io.INDEX).read_text())
    file = tmp_path / "model" / weight_map["weight_map"][name]
    assert len({*weight_map["weight_map"].values()}) > 2
    return shape, tmp_path / "model", name, file


def test_damage_of_a_file_is_named_with_its_tensors(sharded):
    shape, folder, _, file = sharded
    first, content = sorted(load_file(file))[0], file.read_bytes()
    for damaged in (content[:-1], content[:500], b"", b"\xff" * 8 + content[8:]):
        file.write_bytes(damaged)
        message = rf"{file.name} is damaged .* tensors, {first} \.\.\.: download"
        with pytest.raises(ValueError, match=message):
            hf.load_params(folder, shape)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} is missing, with .* {first} "):
        hf.load_params(folder, shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {}, "FILE lacks tensor NAME "),
        (lambda x: {"NAME": x[:5]}, r"FILE: tensor NAME is F32\[5, 32\]"),
        (lambda x: {"NAME": x.T.copy()}, r"FILE: tensor NAME is F32\[32, 56\]"),
        (lambda x: {"NAME": x.astype(np.int32)}, "FILE: tensor NAME is I32"),
        (lambda x: {"NAME": x, "NAME.scale": x[0]}, "FILE also has tensor NAME.scale "),
    ],
    ids=["missing", "cut", "transposed", "integer", "more"],
)
def test_wrong_tensors_are_named_with_their_file(sharded, change, message):
    shape, folder, name, file = sharded
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors | {n.replace("NAME", name): x for n, x in changed.items()}, file)
    with pytest.raises(
        ValueError, match=message.replace("FILE", file.name).replace("NAME", name)
    ):
        hf.load_params(folder, shape)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
def test_loading_and_saving_hold_the_parameters_once(tmp_path, stored, dtype):
    flags = [f"--stored={stored}", f"--dtype={dtype}", f"--json={tmp_path}/found.json"]
    subprocess.run(
        [sys.executable, "benchmarks/load.py", "--mib=400", *flags],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    found = json.loads((tmp_path / "found.json").read_text())
    size = found["parameters_mib"]
    assert size > 350
    assert found["load"]["peak_mib"] < 1.25 * size + 32
    # The largest tensor, the embedding, is put together from all devices.
    embedding = 32000 * 1024 * (2 if dtype == "bfloat16" else 4) / 2**20
    assert found["save"]["peak_mib"] < 3 * embedding + 32


def test_a_file_that_may_not_be_read_is_not_missing(tmp_path, monkeypatch):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")

    def refuse(file, mode):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(safetensors_io, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match=r"denied: .*model\.safetensors"):
        safetensors_io.find(tmp_path)
