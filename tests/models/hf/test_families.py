"""Families of decoders: as transformers computes them, in, out, and packed.

The golden folders hold small models whose special features are all on (their config
says which), and logits that transformers gave: see tests/golden/make_families.py.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

from kdjax.config import FAMILIES, MeshConfig, RopeConfig, StudentConfig
from kdjax.experiment import validate
from kdjax.experiment.models import student_shape
from kdjax.models import decoder, flops, hf, lm
from kdjax.models.decoder_shape import select_layers
from kdjax.models.generate import Decoding, Generator
from kdjax.models.hf import families
from kdjax.parallel import sharding
from tests import helpers
from tests.golden import make_families
from tests.golden.make_families import CASES, FOLDER, LENGTH, POSITIONS
from tests.models.hf.published import PUBLISHED


def our_logits(config, params, tokens_BT, positions_BT=None, segments_BT=None):
    graphdef, _ = decoder.create(config)
    if positions_BT is None:
        positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
        segments_BT = np.ones_like(positions_BT)

    @jax.jit
    def call(params):
        hidden = decoder.hidden_states(
            graphdef, params, tokens_BT, positions_BT, segments_BT
        )
        return decoder.logits(
            params, hidden, transform=lm.logit_transform(graphdef, params)
        )

    return np.asarray(call(params))


def assert_close(ours, theirs, tolerance):
    """Within a share of the spread of the logits."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * theirs.std())


def golden(name):
    config = hf.read_config(FOLDER / name)
    return config, hf.load_params(FOLDER / name, config)


def test_every_family_has_a_case():
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)
    assert {folder.name for folder in FOLDER.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_golden_logits(name):
    config, params = golden(name)
    ours = our_logits(config, params, make_families.tokens())[:, POSITIONS]
    expected = np.array(json.loads((FOLDER / name / "expected.json").read_text()))
    assert_close(ours, expected, 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_alike_in_transformers_both_ways(name, tmp_path):
    transformers.utils.logging.disable_progress_bar()
    model, tokens = make_families.build(name), make_families.tokens()
    model.save_pretrained(tmp_path / "theirs")
    config = hf.read_config(tmp_path / "theirs")
    assert config.family == CASES[name][0]
    params = hf.load_params(tmp_path / "theirs", config)
    theirs = make_families.logits(model, tokens)
    assert_close(our_logits(config, params, tokens), theirs, 1e-4)

    prompts = [tokens[0, :6].tolist(), tokens[1, :20].tolist()]  # 20: past the window
    decoding = Decoding(max_new_tokens=20, eos_ids=(), pad_id=0)
    run = Generator(config, decoder.create(config)[0], decoding, batch_size=2)
    continued = run(params, prompts)
    for prompt, ours in zip(prompts, continued, strict=True):
        whole = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
        )
        assert ours == whole[0, len(prompt) :].tolist()

    hf.save(tmp_path / "ours", config, params)
    assert hf.read_config(tmp_path / "ours") == config
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    assert type(again) is type(model)
    np.testing.assert_array_equal(make_families.logits(again, tokens), theirs)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_counted_and_placed(name):
    config = hf.read_config(FOLDER / name)
    _, shapes = decoder.create(config)
    counted = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert flops.params_count(config) == counted
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = sharding.param_shardings(shapes, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(shapes)
    params = decoder.init_params(config, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, shapes
    )


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_packed_rows_with_windows_equal_one_example_a_row(name):
    config, params = golden(name)
    first, second = make_families.tokens()
    alone = our_logits(config, params, np.stack([first, second]))
    packed = np.concatenate([first[:23], second[:15], [0, 0]])
    segments = np.array([1] * 23 + [2] * 15 + [0] * 2, np.int32)
    positions = np.array([*range(23), *range(15), 0, 1], np.int32)
    tokens, positions, segments = (
        np.stack([x, x]) for x in (packed, positions, segments)
    )
    together = our_logits(config, params, tokens, positions, segments)[0]
    np.testing.assert_allclose(together[:23], alone[0, :23], atol=2e-5)
    np.testing.assert_allclose(together[23:38], alone[1, :15], atol=2e-5)


def test_kept_layers_keep_their_windows_and_positions(tmp_path):
    config = helpers.small_config(
        teacher={"path": str(FOLDER / "gemma3")},
        student=StudentConfig(init="teacher_layers", keep_layers=(2, 3)),
    )
    shape = student_shape(config, range(96))
    assert (shape.windows, shape.rotary) == ((0, 8), ("global", "local"))
    params = hf.load_params(FOLDER / "gemma3", shape, keep_layers={"layers": (2, 3)})
    hf.save(tmp_path / "student", shape, params)
    student = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", attn_implementation="eager"
    )
    teacher = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER / "gemma3", attn_implementation="eager", dtype=torch.float32
    )
    kept = torch.nn.ModuleList(list(teacher.model.layers)[2:])
    teacher.model.layers, teacher.config.num_hidden_layers = kept, 2
    teacher.config.layer_types = ["full_attention", "sliding_attention"]
    tokens = make_families.tokens()
    expected = make_families.logits(teacher, tokens)
    np.testing.assert_allclose(make_families.logits(student, tokens), expected, 1e-5)
    assert_close(our_logits(shape, params, tokens), expected, 1e-4)


def test_layers_kept_without_windows_have_none():
    config = hf.read_config(FOLDER / "qwen3")
    assert config.windows == (0, 8, 0, 8)
    assert select_layers(config, (2, 0)).windows == ()
    assert select_layers(config, (3, 0)).windows == (8, 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    raw, expected = PUBLISHED[name]
    config = families.read(raw, "config.json")
    assert config == expected
    assert families.read(families.write(config), "config.json") == config


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "gemma3",
            {"layer_types": None, "sliding_window_pattern": None},
            "sliding_window_pattern=None",
        ),
        (
            "gemma3",
            {"layer_types": None, "sliding_window_pattern": 0},
            "sliding_window_pattern=0",
        ),
        (
            "llama3",
            {"model_type": "mamba"},
            "model_type='mamba' is not supported, only",
        ),
        ("llama3", {"sliding_window": 8}, "sliding_window=8 is not supported, only"),
        ("llama3", {"clip_qkv": 8.0}, "clip_qkv=8.0 is unknown to this family: remove"),
        ("llama3", {"hidden_act": "relu"}, "hidden_act='relu' is not supported, only"),
        ("llama3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters="),
        ("llama3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "says otherw"),
        ("qwen2_yarn", {"rope_scaling": {"type": "yarn"}}, "yarn needs factor"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types=.*unknown"),
        ("qwen2", {"use_sliding_window": False}, "there is no sliding_window in use"),
        ("qwen3", {"layer_types": ["full_attention"]}, "only 4 of sliding_attention"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "only one of 0 or 1 for 4"),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        ("gemma2", {"hidden_act": "silu"}, "hidden_act='silu' is not supported, only"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("llama3", {"num_hidden_layers": "4"}, "num_layers='4', not int"),
    ],
)
def test_what_is_not_implemented_is_refused(name, fields, message):
    raw = json.loads((FOLDER / name / "config.json").read_text())
    with pytest.raises(ValueError, match=message) as caught:
        families.read(raw | fields, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json")


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("mistral", "sliding_window"),
        ("mistral", "num_key_value_heads"),
        ("gemma2", "final_logit_softcapping"),
        ("gemma3", "query_pre_attn_scalar"),
    ],
)
def test_what_a_family_must_say_has_no_silent_default(name, field):
    raw = json.loads((FOLDER / name / "config.json").read_text())
    del raw[field]
    with pytest.raises(ValueError, match=f"lacks {field}"):
        families.read(raw, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"windows": (8, 8)},
            r"windows=\(8, 8\) is not what a config.json of family='ll",
        ),
        ({"qk_norm": True}, "qk_norm=True is not what"),
        ({"family": "gpt5"}, "family='gpt5' is unknown"),
        ({"windows": (8,)}, "of 1 layers, num_layers=2"),
        ({"rotary": ("global", "all")}, "rotary='all' is unknown"),
        ({"activation": "relu"}, "activation='relu' is unknown"),
        ({"final_softcap": -1.0}, "final_softcap=-1.0 is below 0"),
        ({"rope": RopeConfig(type="llama3")}, "rope.original_length=0"),
        ({"rope": RopeConfig(type="linear", factor=0.5)}, "rope.factor=0.5"),
        ({"family": "mistral", "windows": (8, 0)}, "would be read as"),
    ],
)
def test_a_shape_that_no_family_can_export_is_refused(changes, message):
    config = helpers.small_config()
    config.teacher.decoder = dataclasses.replace(helpers.DECODER, **changes)
    with pytest.raises(ValueError, match=rf"teacher\.decoder\..*{message}"):
        validate.validate(config)


def test_damaged_folders_name_the_file(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FOLDER / "llama2", folder)
    config = hf.read_config(folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1000], content[:100], b"", content[:3]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*again"):
            hf.load_params(folder, config)
    file.write_bytes(content)
    params = hf.load_params(folder, config)
    shards = tmp_path / "shards"
    hf.save(shards, config, params, max_shard_bytes=20_000)
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=rf"{first.name} lacks tensor lm_head\.weight"):
        hf.load_params(shards, config)
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} is missing"):
        hf.load_params(shards, config)
    first.write_bytes(content)
    for name, text, message in (
        ("model.safetensors.index.json", "{}", "lacks weight_map"),
        ("model.safetensors.index.json", "{", "index.json is damaged"),
        ("config.json", '{"model_', r"config\.json is damaged"),
        ("config.json", "[]", r"config\.json holds no object"),
    ):
        (shards / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            hf.load_params(shards, config)
