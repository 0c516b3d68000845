"""Prompts of held-out examples, which a model answers."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from kdjax.config import Config, DataConfig
from kdjax.data import chat, templates, views
from kdjax.data import tokenizer as tokenizers
from kdjax.data.example import Example
from kdjax.data.templates import Text
from kdjax.experiment.data import Data, uses_chat_template


class Prompt(NamedTuple):
    """What is answered of a held-out example."""

    example: Example
    view: str
    text: Text  # empty in a chat
    ids: Sequence[int]


def held_out_prompts(config: Config, data: Data) -> list[Prompt]:
    """Make the prompts of the first held-out examples, which are answered.

    Of a chat it is what is before its last learnt turn.
    """
    examples = data.eval_examples[: config.evaluation.num_generations]
    if "chat" in data.eval_views:
        if not examples:
            return []
        encoder = chat.ChatEncoder(data.tokenizer, config.data)
        prompt_ids = encoder.example_prompt_ids(examples)
        pairs = zip(examples, prompt_ids, strict=True)
        return [Prompt(example, "chat", Text("", ""), ids) for example, ids in pairs]
    prompts = [
        (example, view, text)
        for example in views.escape(examples, data.tokenizer, config.data)
        for view in data.eval_views
        for text in templates.render(example, view, config.data)
        if text.prompt
    ]
    if not prompts:
        return []
    prompt_ids = encode_prompts(config, data, [text.prompt for *_, text in prompts])
    return [
        Prompt(
            example,
            view,
            Text(*(part.replace(tokenizers.BREAK, "") for part in text)),
            ids,
        )
        for (example, view, text), ids in zip(prompts, prompt_ids, strict=True)
    ]


def encode_prompts(
    config: Config, data: Data, prompts: Sequence[str]
) -> list[list[int]]:
    """Encode prompts, through the chat template where the config says so."""
    chat_template = uses_chat_template(config)
    return views.prompt_ids(
        prompts,
        data.tokenizer,
        dataclasses.replace(config.data, chat_template=chat_template),
    )


def max_prompt_length(config: Config, data: Data) -> int:
    """Return the tokens that a prompt is cut to."""
    is_chat = "chat" in data.eval_views
    return config.data.max_prompt + (config.data.max_target if is_chat else 0)


def last_turn_text(example: Example, config: DataConfig) -> str:
    """Return the text of a chat's last learnt turn."""
    turn = chat.learnt_turns(example, config)[-1]
    return chat.apply_think(example.messages[turn], config.think).get("content") or ""
