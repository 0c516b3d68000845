"""Tokenizers: Hugging Face ones, and the word-level one of the built-in task."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kdjax.data import kinship as kinship_task
from kdjax.data import templates


def load(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, or by its hub name.

    Raises:
      ValueError: nothing to load there, or no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), use_fast=True)
    except OSError as error:
        raise ValueError(
            f"tokenizer={str(path)!r} cannot be loaded: give a Hugging Face folder, or "
            f"a hub name while online ({error})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer={str(path)!r} has no eos_token: targets end with it; set one "
            "in tokenizer_config.json"
        )
    return tokenizer


def make_word_tokenizer(extra_words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer of the built-in task, the templates and more words.

    Words that were added later stand at the end, so that ids do not change.
    """
    special = ["<pad>", "<eos>", "<unk>"]
    words = sorted({*kinship_task.vocabulary(), *templates.words()})
    later = [*templates.OTHERWISE.split(), *extra_words]
    distinct = dict.fromkeys([*special, *words, *later])
    vocabulary = {word: index for index, word in enumerate(distinct)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Compute a hex digest of all that determines the ids of a text.

    Covers vocabulary, merges, normalisation, added and special tokens; leaves out
    padding and truncation, which a call may switch on in passing.
    """
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core.pop("padding", None)
        core.pop("truncation", None)
    else:
        core = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    form = json.dumps([core, special], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(form.encode()).hexdigest()
