"""Chat templates of published models, written down from what they render.

Each is what the model's own one gives for the messages of the tests: its tokens, its
treatment of white space, of system messages, tools, dates and reasoning.
"""

from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class Published(NamedTuple):
    """A template, and the special tokens that it goes with."""

    template: str
    eos: str
    bos: str | None = None
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()  # tokens of their own that are not special


CHATML = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

MARKED = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ m.content + '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

SMOLLM2 = (
    """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, ' }}
    {{- 'trained by Hugging Face<|im_end|>\\n' }}
{%- endif %}"""
    + CHATML
)

QWEN = """\
{%- set first = messages[0].role == 'system' %}
{%- if tools or first or DEFAULT %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0].content if first else DEFAULT }}
    {%- if tools %}
        {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with ' }}
        {{- 'the user query.\\n\\nYou are provided with function signatures within ' }}
        {{- '<tools></tools> XML tags:\\n<tools>' }}
        {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
        {{- '\\n</tools>\\n\\nFor each function call, return a json object.' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(query=messages|length - 1, searching=true) %}
{%- for m in messages[::-1] %}
    {%- if ns.searching and m.role == 'user' %}
        {%- set ns.query = messages|length - loop.index %}
        {%- set ns.searching = false %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content or '' %}
        {%- set thought = m.reasoning_content or '' %}
        {%- if THINKS and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if THINKS and loop.index0 > ns.query and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
            {%- set content = content.lstrip('\\n') %}
        {%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {%- set f = call.function or call %}
            {{- '\\n' if content or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}
            {{- (f.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif not (loop.first and m.role == 'system') %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if THINKS and enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
_QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN2 = f"{{% set THINKS = false %}}{{% set DEFAULT = '{_QWEN_SYSTEM}' %}}{QWEN}"
QWEN3 = f"{{% set THINKS = true %}}{{% set DEFAULT = '' %}}{QWEN}"

LLAMA3 = """\
{%- if date_string is not defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
    {{- m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

GEMMA2 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

GEMMA3 = """\
{{- bos_token }}
{%- set before = '' %}
{%- if messages[0].role == 'system' %}
    {%- set before = messages[0].content + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' + role + '\\n' + (before if loop.first else '') }}
    {%- if m.content is string %}{{ m.content | trim }}
    {%- else %}
        {%- for item in m.content %}{{ item.text | trim }}{% endfor %}
    {%- endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """\
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

PHI3 = """\
{%- for m in messages %}
    {{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}
{%- endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""

BAR = "\uff5c"  # in the tokens of DeepSeek
DEEPSEEK_R1 = """\
{%- set ns = namespace(system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|User|>' + m.content }}{% endif %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content.split('</think>')[-1] %}
        {{- '<|Assistant|>' + content + '<|end▁of▁sentence|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|Assistant|><think>\\n' }}
{%- endif %}""".replace("|", BAR)

_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_THINK = ("<think>", "</think>")
_TOOL = ("<tool_call>", "</tool_call>")
PUBLISHED = {
    "chatml": Published(CHATML, "<|im_end|>", None, _IM),
    "marked": Published(MARKED, "<|im_end|>", None, _IM),
    "smollm2": Published(SMOLLM2, "<|im_end|>", "<|im_start|>", _IM),
    "qwen2.5": Published(QWEN2, "<|im_end|>", None, _IM, _TOOL),
    "qwen3": Published(QWEN3, "<|im_end|>", None, _IM, _TOOL + _THINK),
    "llama3": Published(
        LLAMA3,
        "<|end_of_text|>",
        "<|begin_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma2": Published(GEMMA2, "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "gemma3": Published(GEMMA3, "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": Published(MISTRAL, "</s>", "<s>", ("[INST]", "[/INST]")),
    "phi3": Published(
        PHI3,
        "<|endoftext|>",
        "<s>",
        ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "deepseek_r1": Published(
        DEEPSEEK_R1,
        f"<{BAR}end▁of▁sentence{BAR}>",
        f"<{BAR}begin▁of▁sentence{BAR}>",
        (f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"),
        _THINK,
    ),
}


def make_tokenizer(
    name: str, *, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Every byte is a token, and so is every special token of a published model."""
    published = PUBLISHED[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens(list(published.added))
    special = dict.fromkeys([published.eos, published.bos, *published.special])
    core.add_special_tokens([token for token in special if token])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=published.eos,
        bos_token=published.bos,
        chat_template=template or published.template,
        clean_up_tokenization_spaces=False,
    )
