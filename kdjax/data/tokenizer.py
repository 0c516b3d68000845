"""Tokenizers: Hugging Face ones, and the word-level one of the built-in task."""

import contextlib
import filecmp
import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kdjax.data import kinship as kinship_task
from kdjax.data import templates

# Characters that Unicode keeps out of texts. The first stands between those of a
# special token that is text, the others around the number of one that is a token.
BREAK, _START, _END = _MARKS = "\ufdd0", "\ufdd1", "\ufdd2"


def load(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, or by its hub name.

    Code of a folder is never run, and nobody is asked whether it may.

    Raises:
      ValueError: nothing to load there, a file that is damaged, or no end-of-sequence
        token.
    """
    _check_files(Path(path))
    try:
        with _held_back_stderr():
            tokenizer = AutoTokenizer.from_pretrained(
                str(path), use_fast=True, trust_remote_code=False
            )
            # Some settings of a damaged folder show when a text is tokenised.
            tokenizer("Who is it?", verbose=False)
    except OSError as error:
        raise ValueError(
            f"tokenizer={str(path)!r} cannot be loaded: give a Hugging Face folder, or "
            f"a hub name while online ({error})"
        ) from error
    except BaseException as error:
        # What its Rust code refuses is an Exception, where it panics a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        reason = " ".join(str(error).split())[:300]
        if "custom code" in reason:
            reason = "its class is code of the folder, which is not run"
        raise ValueError(
            f"tokenizer={str(path)!r} cannot be loaded ({type(error).__name__}: "
            f"{reason}): repair its tokenizer.json, or give another folder"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer={str(path)!r} has no eos_token: targets end with it; set one "
            "in tokenizer_config.json"
        )
    return tokenizer


_PANIC = "PanicException"
_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def _check_files(folder: Path) -> None:
    """Check what a folder's tokenizer is read from, so that errors name the file."""
    for name in _JSON_FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            parts = [content[part] for part in _WITH_PATTERNS if part in content]
            _check_patterns(parts)
        except Exception as error:  # a pattern's is a bare Exception
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{file} is damaged ({type(error).__name__}: {reason}): download it "
                "again"
            ) from None
    sources = [name for name in _SENTENCEPIECE_FILES if (folder / name).is_file()]
    if not sources or (folder / "tokenizer.json").is_file():
        return
    if importlib.util.find_spec("sentencepiece") is None:
        raise ValueError(
            f"{folder / sources[0]} is all there is of the tokenizer: pip install "
            "'kdjax[sentencepiece]', which reads it, or put a tokenizer.json beside it"
        )


_WITH_PATTERNS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def _check_patterns(value: Any) -> None:
    """Compile the regular expressions in a part of a tokenizer.json."""
    if isinstance(value, Mapping):
        if isinstance(pattern := value.get("Regex"), str):
            Regex(pattern)
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        _check_patterns(item)


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Write what is written to stderr in the block after it, and nothing if it fails.

    Code in Rust prints there by itself what it then reports as an error.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        try:
            stderr = os.dup(2)
        except OSError:  # closed
            yield
            return
        try:
            os.dup2(held.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(stderr, 2)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
        finally:
            os.close(stderr)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the rows of a vocabulary that have tokens: one more than the last id."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, path: str | Path, name: str
) -> None:
    """Check that a model's own tokenizer has the same tokens.

    Ids that one of the two lacks are not compared.

    Args:
      tokenizer: of the data.
      path: the model's folder; without a tokenizer nothing is compared.
      name: of the path, in errors.

    Raises:
      ValueError: an id stands for another text.
    """
    folder, own = Path(path), Path(tokenizer.name_or_path or "")
    names = ("tokenizer.json", *_SENTENCEPIECE_FILES, "vocab.json", "vocab.txt")
    if not any((folder / file).is_file() for file in names):
        return
    files = folder / "tokenizer.json", own / "tokenizer.json"
    if all(file.is_file() for file in files) and filecmp.cmp(*files, shallow=False):
        return
    mine = {index: token for token, index in tokenizer.get_vocab().items()}
    theirs = {index: token for token, index in load(folder).get_vocab().items()}
    shared = mine.keys() & theirs.keys()
    differing = sorted(index for index in shared if mine[index] != theirs[index])
    if differing:
        first = differing[0]
        raise ValueError(
            f"{name}={str(path)!r} has another tokenizer than the data's "
            f"({tokenizer.name_or_path!r}): {len(differing)} of {len(shared)} ids are "
            f"other tokens, {first} is {theirs[first]!r} and {mine[first]!r}: use "
            "models of one vocabulary; a teacher of another one can write texts to "
            "train on (kdjax.annotate)"
        )


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


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills rows: the pad token's, or where there is none eos."""
    index = tokenizer.pad_token_id
    return tokenizer.eos_token_id if index is None else index


class TextEncoder:
    """Encoder of texts in which the special tokens of users are text.

    `escape` marks what users wrote before it is put into templates: the special tokens
    of templates, prefixes and prompts stay tokens. Texts without marks are encoded by
    the tokenizer as it is.

    Args:
      tokenizer: of the texts.
      parse_special: True takes special tokens of users for tokens, and marks nothing.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, parse_special: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._special_ids = {
            str(token): index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special and len(str(token)) > 1
        }
        names = sorted(self._special_ids, key=len, reverse=True)
        self._pattern = None
        if names and not parse_special:
            self._pattern = re.compile("|".join(map(re.escape, names)))
        self._alias_ids: dict[int, int] = {}  # of `_core` -> of the tokenizer

    def escape(self, value: Any) -> Any:
        """Mark the special tokens in a text, or in all texts of a value.

        Lists, tuples and dicts have the values of their items marked.

        Raises:
          ValueError: a text has a character that marks are made of.
        """
        if isinstance(value, str):
            for mark in _MARKS:
                if mark in value:
                    raise ValueError(
                        f"a text has the character U+{ord(mark):04X}, which Unicode "
                        "keeps out of texts and kdjax marks special tokens with: take "
                        "it out of the data"
                    )
            if self._pattern is None or not self._pattern.search(value):
                return value
            return self._pattern.sub(lambda match: BREAK.join(match[0]), value)
        if isinstance(value, Mapping):
            return {name: self.escape(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            items = [self.escape(item) for item in value]
            same = all(a is b for a, b in zip(items, value, strict=True))
            return value if same else type(value)(items)
        return value

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it.

        Raises:
          ValueError: a special token that the tokenizer cannot write as text.
        """
        if not texts:
            return []
        marked = [number for number, text in enumerate(texts) if BREAK in text]
        if not marked:
            return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        plain = [text.replace(BREAK, "") for text in texts]
        ids = self._tokenizer(plain, add_special_tokens=False)["input_ids"]
        for number in marked:
            ids[number] = self._encode_marked(texts[number])[0]
        return ids

    def encode_with_ends(
        self, text: str, borders: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Return the ids of a text, and the number of tokens before some characters.

        Args:
          text: to encode.
          borders: numbers of characters, ascending. A token that reaches across one
            belongs to what follows.

        Raises:
          ValueError: as `encode`; or the tokenizer does not say where its tokens stand.
        """
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"tokenizer={self._tokenizer.name_or_path!r} does not say where in a "
                "text its tokens stand, which method.name='chat' needs: use one with a "
                "tokenizer.json"
            )
        if BREAK in text:
            ids, offsets = self._encode_marked(text)
            borders = [len(self._alias(text[:border])) for border in borders]
        else:
            encoding = self._tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True
            )
            ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        ends = np.maximum.accumulate([0, *(end for _, end in offsets)])[1:]
        return ids, np.searchsorted(ends, borders, side="right").tolist()

    def _encode_marked(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text with marks, in which only what has none is a special token."""
        if self._tokenizer.is_fast:
            encoding = self._core.encode(self._alias(text), add_special_tokens=False)
            ids = [self._alias_ids.get(i, i) for i in encoding.ids]
            from_text = {i for i in encoding.ids if i not in self._alias_ids}
            offsets = encoding.offsets
        else:
            plain = text.replace(BREAK, "")
            ids = self._tokenizer.encode(
                plain, add_special_tokens=False, split_special_tokens=True
            )
            from_text, offsets = set(ids), []
        from_text.discard(self._tokenizer.unk_token_id)
        for token, index in self._special_ids.items():
            if index in from_text and BREAK.join(token) in text:
                raise ValueError(
                    f"a text has {token!r}, a special token, and the tokenizer cannot "
                    "write it as text: take it out of the data, or use "
                    "data.parse_special=True, which makes it that token"
                )
        return ids, offsets

    def _alias(self, text: str) -> str:
        """Give special tokens without marks other names, and take out the marks."""
        if self._pattern is not None:
            text = self._pattern.sub(lambda match: self._aliases[match[0]], text)
        return text.replace(BREAK, "")

    @functools.cached_property
    def _aliases(self) -> dict[str, str]:
        """Special token -> a name of it that no text has."""
        return {
            token: f"{_START}{index}{_END}"
            for token, index in self._special_ids.items()
        }

    @functools.cached_property
    def _core(self) -> Tokenizer:
        """The tokenizer with the special tokens under their other names alone."""
        core = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        core.no_padding()
        core.no_truncation()
        core.encode_special_tokens = True  # they are text
        for index, token in self._tokenizer.added_tokens_decoder.items():
            if str(token) in self._special_ids:
                other = AddedToken(
                    self._aliases[str(token)],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                    special=False,
                )
                core.add_tokens([other])
                alias_id = core.token_to_id(other.content)
                assert alias_id is not None
                self._alias_ids[alias_id] = index
        return core


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
