"""The tokens that end a text: of tokenizer, models' folders and chat template."""

import dataclasses
import json

import jax
import pytest
import transformers

from kdjax.config import Config
from kdjax.experiment import data
from kdjax.models import decoder, hf
from tests import helpers
from tests.data.chat_templates import make_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A model whose generation_config.json has a list, as Llama 3's has."""
    shape = dataclasses.replace(helpers.DECODER, num_layers=1, vocab_size=264)
    params = decoder.init_params(shape, jax.random.key(0))
    path, tokenizer = tmp_path / "model", make_tokenizer("llama3")
    eos, turn = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    hf.save(path, shape, params, tokenizer, eos_ids=(eos, turn, 7))
    return path


def test_a_list_survives_export_and_is_read_by_transformers(folder):
    tokenizer = make_tokenizer("llama3")
    ids = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert hf.eos_ids(folder) == tuple(sorted([*ids, 7]))
    found = transformers.GenerationConfig.from_pretrained(folder)
    assert found.eos_token_id == [*ids, 7]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == ids[0]
    file = folder / "generation_config.json"
    file.unlink()
    assert hf.eos_ids(folder) == (ids[0],)
    file.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id='</"):
        hf.eos_ids(folder)


def test_all_of_them_stop(folder):
    tokenizer = make_tokenizer("phi3")
    config = Config()
    eos, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert data.stop_ids(config, tokenizer, ()) == (eos,)
    assert data.stop_ids(config, tokenizer, ("", str(folder))) == tuple(
        sorted({eos, *hf.eos_ids(folder)})
    )
    for changed in (
        helpers.changed(config, data={"chat_template": True}),
        helpers.changed(config, method={"name": "chat"}),
    ):
        assert data.stop_ids(changed, tokenizer, ()) == tuple(sorted({eos, end}))
