"""Folders in and out, against transformers' own Llama."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file

from kdjax.config import DecoderConfig
from kdjax.models import decoder, hf
from kdjax.models.generate import Decoding, Generator
from kdjax.models.hf import folder

CONFIG = DecoderConfig(
    vocab_size=67,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,  # not width / num_heads
    mlp_width=56,
    rope_theta=5e4,
    norm_eps=1e-6,
    max_length=128,
    init_std=0.1,
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


def our_logits(config, params, tokens_BT):
    graphdef, _ = decoder.create(config)
    positions_BT = np.tile(
        np.arange(tokens_BT.shape[1], dtype=np.int32), (len(tokens_BT), 1)
    )

    @jax.jit
    def call(params):
        ones_BT = np.ones_like(tokens_BT)
        hidden = decoder.hidden_states(
            graphdef, params, tokens_BT, positions_BT, ones_BT
        )
        return decoder.logits(params, hidden)

    return np.asarray(call(params))


def their_logits(folder, tokens_BT):
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()


def tokens_of(rows=2, length=20):
    rng = np.random.default_rng(0)
    return rng.integers(0, CONFIG.vocab_size, (rows, length), dtype=np.int32)


@pytest.fixture
def saved(tmp_path):
    """A folder of ours and the parameters in it."""
    params = decoder.init_params(CONFIG, jax.random.key(0))
    hf.save(tmp_path / "model", CONFIG, params)
    return tmp_path / "model", params


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("tied", [True, False])
def test_their_model_loads_here(tmp_path, tied):
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )
    transformers.LlamaForCausalLM(shape).save_pretrained(tmp_path)
    config = hf.read_config(tmp_path)
    assert config == dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = hf.load_params(tmp_path, config)
    ours = our_logits(config, params, tokens_of())
    np.testing.assert_allclose(ours, their_logits(tmp_path, tokens_of()), atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000], ids=["one", "many"])
def test_our_model_loads_there_and_comes_back(tmp_path, config, max_shard_bytes):
    params = decoder.init_params(config, jax.random.key(0))
    folder = tmp_path / "new" / "model"
    hf.save(folder, config, params, max_shard_bytes=max_shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_bytes < 2**30)
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
    assert hf.read_config(folder) == config
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(folder, config), params)
    ours = our_logits(config, params, tokens_of())
    np.testing.assert_allclose(ours, their_logits(folder, tokens_of()), atol=1e-4)


def test_special_ids_come_from_the_tokenizer(tmp_path):
    words = tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    params = decoder.init_params(CONFIG, jax.random.key(0))
    hf.save(tmp_path / "model", CONFIG, params, tokenizer)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (
        0,
        1,
        None,
    )
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again("a").input_ids == [2] and again.eos_token_id == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(saved, tmp_path, dtype):
    _, params = saved
    hf.save(tmp_path / "half", CONFIG, params, dtype=dtype)
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    jax.tree.map(
        np.testing.assert_array_equal,
        hf.load_params(tmp_path / "half", CONFIG),
        rounded,
    )
    loaded = hf.load_params(tmp_path / "half", CONFIG, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {"bfloat16"}


def test_sharded_loading_reads_each_part_once(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, num_layers=4)
    params = decoder.init_params(config, jax.random.key(0))
    hf.save(tmp_path / "model", config, params)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))

    def shard(leaf):
        """Widths over fsdp, stacked layers over data as well."""
        stacked = leaf.shape[0] == config.num_layers
        axes = ["data" if stacked else None, *[None] * (leaf.ndim - 2), "fsdp"]
        return jax.sharding.NamedSharding(mesh, jax.P(*axes[-leaf.ndim :]))

    _, shapes = decoder.create(config)
    shardings = jax.tree.map(shard, shapes)
    sizes = []
    read = folder._read

    def counting_read(*arguments):
        part = read(*arguments)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(folder, "_read", counting_read)
    loaded = hf.load_params(tmp_path / "model", config, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == shardings
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_kept_layers_are_the_named_ones_in_order(saved):
    folder, params = saved
    config = dataclasses.replace(CONFIG, num_layers=2)
    loaded = hf.load_params(folder, config, keep_layers={"layers": (2, 0)})
    chosen = jax.tree.map(lambda leaf: leaf[np.array([2, 0])], params["layers"])
    jax.tree.map(np.testing.assert_array_equal, loaded, params | {"layers": chosen})
    for keep_layers in ((0, 3), (0, 1, 2)):
        with pytest.raises(ValueError, match="does not make 2"):
            hf.load_params(folder, config, keep_layers={"layers": keep_layers})


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mixtral"},
        {"hidden_act": "relu"},
        {"sliding_window": 8},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        {"quantization_config": {"bits": 4}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_that_change_the_numbers_are_refused(saved, fields):
    edit_config(saved[0], **fields)
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=.* is not supported"):
        hf.read_config(saved[0])


def test_a_config_without_sizes_is_refused(saved):
    file = saved[0] / "config.json"
    raw = json.loads(file.read_text())
    del raw["hidden_size"]
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="lacks hidden_size"):
        hf.read_config(saved[0])


def test_damaged_weights_are_named(saved):
    folder, _ = saved
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"

    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(ValueError, match=f"lacks tensor {name}"):
        hf.load_params(folder, CONFIG)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding}, file)  # a copy is one
    jax.tree.map(
        np.testing.assert_array_equal, hf.load_params(folder, CONFIG), saved[1]
    )
    save_file(tensors | {"lm_head.weight": embedding + 1}, file)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        hf.load_params(folder, CONFIG)
    save_file(tensors | {"model.extra.weight": embedding}, file)
    with pytest.raises(ValueError, match=r"also has tensor model\.extra\.weight"):
        hf.load_params(folder, CONFIG)
    save_file(tensors | {name: tensors[name][:5]}, file)
    with pytest.raises(
        ValueError, match=rf"safetensors: tensor {name} is F32\[5, 32\]"
    ):
        hf.load_params(folder, CONFIG)
    file.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        hf.load_params(folder, CONFIG)


def test_resolve(tmp_path):
    assert hf.resolve(tmp_path) == tmp_path
    for name in ("nobody/no-such-model-kdjax", "not//a name"):
        with pytest.raises(ValueError, match="is not a local folder"):
            hf.resolve(name)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        hf.read_config(tmp_path)


def test_save_replaces_model_folders_only(saved, tmp_path):
    folder, params = saved
    with pytest.raises(ValueError, match="exists and is not empty"):
        hf.save(folder, CONFIG, params)
    before = hf.fingerprint(folder)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    hf.save(folder, CONFIG, doubled, overwrite=True)
    assert hf.fingerprint(folder) != before
    hf.save(folder, CONFIG, params, overwrite=True)
    assert hf.fingerprint(folder) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is not empty"):
        hf.save(tmp_path / "notes", CONFIG, params, overwrite=True)


def in_a_subfolder(folder):
    """Move the weights of a folder into one below it, which an index names."""
    (folder / "weights").mkdir()
    moved = folder / "weights" / "model.safetensors"
    (folder / "model.safetensors").rename(moved)
    names = load_file(moved)
    weight_map = dict.fromkeys(names, "weights/model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return moved, index, weight_map


def test_the_fingerprint_sees_what_the_index_names(tmp_path):
    params = decoder.init_params(CONFIG, jax.random.key(0))
    hf.save(tmp_path / "m", CONFIG, params)
    beside = hf.fingerprint(tmp_path / "m")
    moved, _, _ = in_a_subfolder(tmp_path / "m")
    below = hf.fingerprint(tmp_path / "m")
    assert below != beside and hf.has_weights(tmp_path / "m")
    hf.load_params(tmp_path / "m", CONFIG)
    data = bytearray(moved.read_bytes())
    data[-1] ^= 1
    moved.write_bytes(data)
    assert hf.fingerprint(tmp_path / "m") != below
    moved.unlink()
    assert not hf.has_weights(tmp_path / "m")


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/passwd", "a/../../b", "", 7, None, "[" * 5000],
)
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    params = decoder.init_params(CONFIG, jax.random.key(0))
    hf.save(tmp_path / "m", CONFIG, params)
    _, index, weight_map = in_a_subfolder(tmp_path / "m")
    weight_map[min(weight_map)] = name
    index.write_text(json.dumps({"weight_map": weight_map}))
    for call in (hf.fingerprint, hf.has_weights):
        with pytest.raises(ValueError, match=r"index\.json names"):
            call(tmp_path / "m")
    with pytest.raises(ValueError, match=r"index\.json names"):
        hf.load_params(tmp_path / "m", CONFIG)


@pytest.mark.real_data
def test_smollm2_gives_the_logits_of_transformers(smollm2, real_data, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    lines = (real_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:10]
    text = "\n\n".join(json.loads(line)["question"] for line in lines)
    tokens = np.array([tokenizer(text).input_ids[:512]], np.int32)
    assert tokens.shape == (1, 512)
    config = hf.read_config(smollm2)
    params = hf.load_params(smollm2, config)
    theirs = their_logits(smollm2, tokens)
    np.testing.assert_allclose(our_logits(config, params, tokens), theirs, atol=2e-3)
    hf.save(tmp_path / "model", config, params, tokenizer)
    np.testing.assert_array_equal(their_logits(tmp_path / "model", tokens), theirs)


@pytest.mark.real_data
def test_smollm2_continues_prompts_like_transformers(smollm2, real_data):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    lines = (real_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:20]
    prompts = [tokenizer(json.loads(line)["question"]).input_ids for line in lines]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32
    )
    theirs = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            max_new_tokens=32,
            do_sample=False,
        )
        new = output[0, len(prompt) :].tolist()
        eos = tokenizer.eos_token_id
        theirs.append(new[: new.index(eos)] if eos in new else new)
    config = hf.read_config(smollm2)
    decoding = Decoding(
        max_new_tokens=32,
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
    )
    run = Generator(config, decoder.create(config)[0], decoding, batch_size=10)
    ours = run(hf.load_params(smollm2, config), prompts)
    assert ours == theirs
