"""The whole experiment as plain dataclasses, a comment on every field.

A config file is a Python file with `get_config(argument: str = "") -> Config`. Any
field is overridden from the command line by `--config.part.field=value`.
"""

import ast
import dataclasses
import inspect
import json
import math
import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

SOURCES = ("auto", "kinship", "jsonl", "datasets", "tfds", "text", "mixture")
SCHEMAS = (
    "auto",
    "plain",
    "commonsense_qa",
    "arc",
    "openbookqa",
    "mmlu",
    "gsm8k",
    "squad",
    "alpaca",
    "sharegpt",
    "messages",
    "preference",
    "text",
)
ANSWER_KINDS = ("auto", "text", "label", "index", "number")
ANSWER_LISTS = ("error", "first", "any")
COUNTERFACTUAL_PLACES = ("decoder", "prompt")
LONG_POLICIES = ("error", "truncate", "drop")
LONG_TEXTS = ("whole", "pieces", "joined")
MISSING_POLICIES = ("error", "drop")
WRONG_LABELS = ("keep", "drop", "weight")
CHAT_LOSSES = ("all", "last", "each")
THINK_POLICIES = ("keep", "strip", "require")
CACHE_KINDS = ("top_k", "sampled", "dense")
TAILS = ("bucket", "renormalize_teacher", "renormalize_both", "drop")
OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = ("compute", *DTYPES, "int8")
REMATS = ("none", "dots", "full")
STUDENT_INITS = ("random", "folder", "teacher_layers")
ARCHITECTURES = ("decoder", "t5")
NON_FINITE = ("stop", "skip")
HIDDEN_LOSSES = ("mse", "cosine")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROTARY = ("global", "local", "none")
METHODS = (  # keys of kdjax.experiment.methods.METHODS
    "finetune",
    "rationale_then_label",
    "multitask",
    "counterfactual",
    "multitask_counterfactual",
    "text",
    "chat",
)
DIVERGENCES = (  # keys of kdjax.losses.divergence.DIVERGENCES
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
)
SPLITS = ("train", "eval")
ANNOTATIONS = (
    "zero_shot",
    "few_shot",
    "counterfactual",
    "contrastive",
    "contrastive_counterfactual",
    "critique_revision",
    "answer",
)
BACKENDS = ("local", "server")
QUALITIES = ("good", "bad")
CONTRASTS = ("wrong", "empty")
CONTRAST_STOPS = ("teacher", "contrast")
GATES = ("empty", "cut_off", "no_choice", "contradicts", "leaks", "states_answer")

# Former name of a field -> its name. `from_json` reads both; elsewhere the former one
# is an error that says the other.
RENAMED = {
    "data.layout": "data.schema",
    "data.trust": "data.wrong_labels",
    "data.wrong_weight": "data.wrong_label_weight",
    "data.cues": "data.prompt_suffix",
}
RENAMED_COMPARISON = {  # the same of a kdjax.comparison.Comparison
    "first": "compare",
    "second": "within",
    "where": "overrides",
    "floors": "chance",
    "leave_out": "exclude",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Limits of a finite number."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def error(self, value: float) -> str:
        """Return what is wrong with a value, and the remedy; "" if it is inside."""
        if self.at_least <= value <= self.at_most and self.above < value < self.below:
            return ""
        problem = "is out of range"
        if self.at_least == 0 and 1 in (self.at_most, self.below):
            problem = "is a share"
        elif self.above == 0 and not value > 0:
            problem = "must be positive"
        elif value < self.at_least:
            problem = f"is below {self.at_least}"
        return f"{problem}: use {self}"

    def __str__(self) -> str:
        low = f"above {self.above}" if self.above > -math.inf else f"{self.at_least}"
        if self.at_most < math.inf:
            return f"{low} to {self.at_most}"
        if self.below < math.inf:
            below = f"below {self.below}"
            return f"{low} to {below}" if self.at_least > -math.inf else below
        if self.at_least > -math.inf:
            return f"{low} or more"
        return low if self.above > -math.inf else "a finite number"


@dataclass(frozen=True, slots=True)
class Choice:
    """The values that a string may have."""

    choices: tuple[str, ...]

    def error(self, value: str) -> str:
        """Return what is wrong with a value, and the remedy; "" if it is one."""
        known = value in self.choices
        return "" if known else f"is unknown: use one of {list(self.choices)}"

    def __str__(self) -> str:
        return ", ".join(self.choices)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A string that is a regular expression."""

    def error(self, value: str) -> str:
        """Return what is wrong with a value; "" if it compiles."""
        try:
            re.compile(value)
        except re.error as error:
            return f"is no regular expression: {error}"
        return ""

    def __str__(self) -> str:
        return "a regular expression"


# A field with a default and a limit; the limit of a tuple is that of each item.


def limited(default: T, limit: Range | Choice | Pattern) -> T:
    """Return a field with a limit, which `check` reads from its metadata."""
    return field(default=default, metadata={"limit": limit})


def number(default: T, **limits: float) -> T:
    """Return a field of a number within the limits of a `Range`."""
    return limited(default, Range(**limits))


def positive(default: T) -> T:
    """Return a field of a number above 0; an integer of 1 or more."""
    is_integer = isinstance(default, int)
    return number(default, at_least=1) if is_integer else number(default, above=0)


def non_negative(default: T) -> T:
    """Return a field of a number of 0 or more."""
    return number(default, at_least=0)


def counted(default: int, *, at_most: int = 2**31 - 1) -> int:
    """Return a field of an integer of 32 bits; 0 is one only if it is the default."""
    return number(default, at_least=min(default, 1), at_most=at_most)


def share(default: T) -> T:
    """Return a field of a number from 0 to 1."""
    return number(default, at_least=0, at_most=1)


def rate(default: T) -> T:
    """Return a field of a number from 0 to below 1."""
    return number(default, at_least=0, below=1)


def random_seed(default: T) -> T:
    """Return a field of a seed; JAX takes larger ones modulo 2^32."""
    return number(default, at_least=0, below=2**32)


def choice(default: T, choices: tuple[str, ...]) -> T:
    """Return a field of one of several strings."""
    return limited(default, Choice(choices))


def patterns(default: T) -> T:
    """Return a field of regular expressions."""
    return limited(default, Pattern())


@dataclass(kw_only=True, slots=True)
class KinshipConfig:
    """The built-in task: who is X to Y, over stated family relations."""

    seed: int = random_seed(0)  # which examples are generated, not their order
    min_hops: int = number(2, at_least=2)  # fewest stated relations of a question
    max_hops: int = number(3, at_least=2)  # most stated relations of a question
    num_distractors: int = non_negative(2)  # stated relations it does not need
    num_choices: int = number(5, at_least=2)  # answer choices, the correct one included
    label_noise: float = share(0.0)  # share of training answers made wrong


@dataclass(kw_only=True, slots=True)
class PrefixConfig:
    """What stands before the question, and one space, in the prompts of each view."""

    label: str = ""  # for example "[predict]"
    rationale: str = ""  # for example "[explain]"
    rationale_then_label: str = ""  # the same
    factual: str = ""  # for example "[factual]"
    counterfactual: str = ""  # for example "[counterfactual]"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where examples come from and how they become tokens."""

    # auto = what `path` is; the built-in task without one
    source: str = choice("auto", SOURCES)
    schema: str = choice("auto", SCHEMAS)  # of the rows; auto = as their columns are
    # "question=stem,answer=answers.text.0": columns of the data by the schema's names
    columns: str = ""
    # an answer names its choice by this; auto = as it reads, refused if ambiguous
    answer_kind: str = choice("auto", ANSWER_KINDS)
    answer_list: str = choice("error", ANSWER_LISTS)  # which of several answers count
    path: str = ""  # file, glob, folder or hub name of the training rows
    eval_path: str = ""  # the same for held-out rows; "" takes eval_split of `path`
    train_split: str = "train"  # split name for datasets and tfds
    eval_split: str = "test"  # split name for datasets and tfds
    rationales: str = ""  # jsonl of {id, text} with one rationale per training row
    eval_rationales: str = ""  # the same for held-out rows
    # their texts are cut before this; "" = never; auto = "So the answer is", in a file
    # of which all texts have it
    rationale_end: str = "auto"
    counterfactuals: str = ""  # jsonl of {id, choice, text}: for a wrong choice each
    counterfactual_place: str = choice("decoder", COUNTERFACTUAL_PLACES)  # its input
    labels: str = ""  # jsonl of {id, answer} by a teacher, to train on; "" = gold
    wrong_labels: str = choice("keep", WRONG_LABELS)  # policy for its wrong answers
    wrong_label_weight: float = share(0.5)  # loss weight (wrong_labels="weight")
    # rows that are held out are drawn with this seed, as by datasets' train_test_split;
    # -1 = they are the last ones
    holdout_seed: int = number(-1, at_least=-1, below=2**32)
    num_train: int = non_negative(0)  # training examples; 0 = all (kinship: above 0)
    num_eval: int = non_negative(0)  # held-out examples; 0 = all (kinship: above 0)
    tokenizer: str = ""  # Hugging Face folder or hub name; "" = the teacher's own
    chat_template: bool = False  # wrap prompts in the tokenizer's chat template
    # variables of the chat template, each "name=value": "enable_thinking=false"
    template_kwargs: tuple[str, ...] = ()
    template_date: str = "2024-07-26"  # what chat templates take for today, ISO
    chat_loss: str = choice("all", CHAT_LOSSES)  # assistant turns that are learnt
    think: str = choice("keep", THINK_POLICIES)  # <think>...</think> of an assistant
    parse_special: bool = False  # special tokens in users' text are tokens, not text
    max_unknown: float = share(0.01)  # largest share of unknown tokens
    max_prompt: int = positive(256)  # longest prompt, tokens
    # longest target, tokens, eos and a decoder's prefix too
    max_target: int = positive(256)
    on_long: str = choice("error", LONG_POLICIES)  # a longer example (counted, logged)
    # texts of more than max_target tokens (method text); whole = as on_long says
    long_text: str = choice("whole", LONG_TEXTS)
    # no text, question, answer, rationale or label
    on_missing: str = choice("error", MISSING_POLICIES)
    prompt_suffix: bool = True  # prompts end with a line such as "Answer:"
    # examples per shard of a prepared store; a smaller split is kept in memory
    shard_size: int = positive(16384)
    prepared: str = ""  # folder of prepared stores; "" = <workdir>/prepared
    num_workers: int = non_negative(0)  # processes that prepare; 0 = one per core
    prefixes: PrefixConfig = field(default_factory=PrefixConfig)
    kinship: KinshipConfig = field(default_factory=KinshipConfig)

    @property
    def is_built_in(self) -> bool:
        """True for the built-in task, which is generated."""
        return self.source == "kinship" or (self.source == "auto" and not self.path)


@dataclass(kw_only=True, slots=True)
class MixtureConfig:
    """Several sources of data (data.source="mixture"): an item for each source.

    A field that is () is that of `data`, or `method.name`, for all of them.
    """

    names: tuple[str, ...] = ()  # of the sources, for metrics and messages
    # of rows of a batch and of the loss, relative to each other
    weights: tuple[float, ...] = positive(())
    paths: tuple[str, ...] = ()  # data.path of each
    eval_paths: tuple[str, ...] = ()  # data.eval_path of each
    schemas: tuple[str, ...] = choice((), SCHEMAS)  # data.schema of each
    columns: tuple[str, ...] = ()  # data.columns of each
    answer_kinds: tuple[str, ...] = choice((), ANSWER_KINDS)  # data.answer_kind of each
    rationales: tuple[str, ...] = ()  # data.rationales of each
    eval_rationales: tuple[str, ...] = ()  # data.eval_rationales of each
    counterfactuals: tuple[str, ...] = ()  # data.counterfactuals of each
    num_train: tuple[int, ...] = non_negative(())  # data.num_train of each
    num_eval: tuple[int, ...] = non_negative(())  # data.num_eval of each
    methods: tuple[str, ...] = choice((), METHODS)  # method.name of each
    # folder of each one's teacher cache; "" = <cache>/<name>
    caches: tuple[str, ...] = ()


@dataclass(kw_only=True, slots=True)
class RopeConfig:
    """How rotary positions are stretched beyond the lengths first trained at."""

    type: str = choice("default", ROPE_TYPES)  # default = not at all
    # times the original length (linear, llama3, yarn)
    factor: float = number(1.0, at_least=1)
    # longest position before stretching, tokens (llama3, yarn)
    original_length: int = non_negative(0)
    # turns below which all is stretched (llama3)
    low_freq_factor: float = positive(1.0)
    # turns above which nothing is stretched (llama3)
    high_freq_factor: float = positive(4.0)
    beta_fast: float = positive(32.0)  # turns above which nothing is stretched (yarn)
    beta_slow: float = positive(1.0)  # turns below which all is stretched (yarn)
    # scales cos and sin; 0 = 0.1 ln(factor) + 1 (yarn)
    attention_factor: float = non_negative(0.0)


@dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """Shape of a decoder-only transformer; families differ by these values alone."""

    vocab_size: int = non_negative(0)  # rows of the embedding; 0 = the tokenizer's size
    width: int = positive(64)  # D, residual stream
    num_layers: int = positive(2)  # L
    num_heads: int = positive(4)  # H, query heads
    num_kv_heads: int = positive(4)  # key/value heads; divides num_heads
    head_dim: int = positive(16)  # per head
    mlp_width: int = positive(192)  # inner width of the gated MLP
    rope_theta: float = number(10000.0, above=1)  # base of the rotary frequencies
    norm_eps: float = non_negative(1e-5)  # RMSNorm epsilon
    tie_embeddings: bool = True  # the output head is the embedding
    max_length: int = positive(2048)  # longest position the model is used at, tokens
    init_std: float = non_negative(0.02)  # standard deviation of random weights
    family: str = choice("llama", FAMILIES)  # architecture it is exported as
    rope: RopeConfig = field(default_factory=RopeConfig)  # of the "global" layers
    # the base in "local" layers, never stretched
    local_rope_theta: float = number(10000.0, above=1)
    rotary: tuple[str, ...] = choice((), ROTARY)  # of each layer; () = all "global"
    # tokens each layer sees, 0 = all; () = all 0
    windows: tuple[int, ...] = non_negative(())
    qkv_bias: bool = False  # query, key and value projections have a bias
    out_bias: bool = False  # attention's output projection has a bias
    mlp_bias: bool = False  # the MLP's projections have a bias
    qk_norm: bool = False  # queries and keys are normed a head, before rotary
    post_norms: bool = False  # what attention and MLP return is normed as well
    # added to every norm's scale; Gemma stores scale - 1: 1.0
    norm_offset: float = number(0.0)
    scale_embeddings: bool = False  # times sqrt(width), rounded to the compute dtype
    activation: str = choice("silu", ACTIVATIONS)  # of the MLP's gate
    query_scalar: int = non_negative(0)  # scores are divided by its root; 0 = head_dim
    # scores stay within +-this, by tanh; 0 = no cap
    attention_softcap: float = non_negative(0.0)
    # logits stay within +-this, by tanh; 0 = no cap
    final_softcap: float = non_negative(0.0)


@dataclass(kw_only=True, slots=True)
class T5Config:
    """Shape of an encoder-decoder transformer: T5 v1.0, v1.1 or FLAN."""

    vocab_size: int = non_negative(0)  # rows of the embedding; 0 = the tokenizer's size
    width: int = positive(64)  # D, residual streams
    num_encoder_layers: int = positive(2)  # layers that read the prompt
    num_decoder_layers: int = positive(2)  # layers that write the target
    num_heads: int = positive(4)  # H, of every attention
    head_dim: int = positive(16)  # per head; H * head_dim need not be the width
    mlp_width: int = positive(128)  # inner width of the MLP
    gated: bool = True  # gelu(gate) * up (v1.1, FLAN), else relu(up) (v1.0)
    tie_embeddings: bool = False  # the output head is the embedding (v1.0)
    scale_outputs: bool = False  # logits are multiplied by width^-0.5 (v1.0)
    num_buckets: int = number(32, at_least=4)  # of relative positions; even
    max_distance: int = positive(128)  # tokens; farther ones share the last bucket
    dropout: float = rate(0.1)  # rate while training
    norm_eps: float = non_negative(1e-6)  # RMSNorm epsilon
    init_factor: float = non_negative(1.0)  # multiplies all random weights
    pad_id: int = non_negative(0)  # fills rows
    eos_id: int = non_negative(1)  # ends a prompt and a target
    start_id: int = non_negative(0)  # first token the decoder reads


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that writes the soft labels."""

    path: str = ""  # Hugging Face folder or hub name; "" trains `decoder` first
    online: bool = False  # runs beside the student; no cache of the training split
    decoder: DecoderConfig = field(default_factory=DecoderConfig)  # when path is ""
    num_train: int = positive(20000)  # examples the trained teacher sees (kinship)
    label_noise: float = share(0.0)  # share of wrong answers among those (kinship)
    steps: int = positive(1000)  # optimizer steps of the trained teacher
    learning_rate: float = positive(3e-3)  # peak learning rate of the trained teacher


@dataclass(kw_only=True, slots=True)
class CacheConfig:
    """The teacher's stored outputs."""

    path: str = ""  # folder; "" = <workdir>/cache
    kind: str = choice("top_k", CACHE_KINDS)  # of the training split
    # pairs stored per target token (top_k; held-out ones, if sampled)
    k: int = positive(64)
    # draws per target token, temperature and round (sampled)
    num_draws: int = number(50, at_least=1, at_most=65535)
    # independent rounds; epoch e uses round e mod it (sampled)
    num_rounds: int = counted(1, at_most=2**16 - 1)
    # declared, at most 64 different ones: exact log Z for each
    temperatures: tuple[float, ...] = number((1.0, 2.0), above=0, at_most=10**9)
    # records (example, view) per shard; 0 = from shard_mib
    shard_size: int = counted(0, at_most=2**22)
    # of a shard, MiB, as estimated; fewer where that makes less than 64 shards of at
    # least 512 records
    shard_mib: int = positive(32)
    num_threads: int = positive(2)  # that encode records beside the teacher
    batch_size: int = positive(8)  # packed rows per teacher forward
    row_length: int = positive(512)  # tokens per packed row while labelling
    encoder_row_length: int = non_negative(0)  # of an encoder; 0 = row_length
    chunk_size: int = non_negative(0)  # tokens per head chunk; 0 = from memory_mib
    memory_mib: int = positive(64)  # memory for one chunk of logits, MiB


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters, trained in place of the weights; see `models.lora`."""

    rank: int = non_negative(0)  # of each adapter; 0 = none, all weights are trained
    alpha: float = positive(16.0)  # an adapter's product is multiplied by alpha / rank
    # regexes of linear layers: "query", "mlp/.*"
    targets: tuple[str, ...] = patterns((".*",))


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """How the student starts."""

    init: str = choice("random", STUDENT_INITS)  # where weights come from
    path: str = ""  # Hugging Face folder or hub name (init="folder")
    # teacher layers kept (init="teacher_layers")
    keep_layers: tuple[int, ...] = non_negative(())
    # of a T5 teacher's encoder; () = all
    keep_encoder_layers: tuple[int, ...] = non_negative(())
    # rate while training (T5); below 0 = as its shape says
    dropout: float = number(-1.0, below=1)
    architecture: str = choice("decoder", ARCHITECTURES)  # of init="random"
    lora: LoraConfig = field(default_factory=LoraConfig)  # not with init="random"
    decoder: DecoderConfig = field(default_factory=DecoderConfig)  # init="random"
    t5: T5Config = field(default_factory=T5Config)  # init="random"; ids of tokenizer


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    """Which views are trained, with which terms."""

    name: str = choice("multitask", METHODS)  # its views
    # a: label view a, rationale view 1 - a (multitask)
    label_weight: float = share(0.5)
    # b: counterfactual view b, factual view 1 - b
    counterfactual_weight: float = share(0.5)
    # g: a's views share g, b's 1 - g (both: all four)
    multitask_weight: float = share(0.5)
    hard_weight: float = non_negative(0.5)  # of cross-entropy with the data
    # weight of the teacher's term; 0 needs no cache
    soft_weight: float = non_negative(0.5)
    weight_schedule: str = choice("constant", SCHEDULES)  # of both weights over the run
    final_hard_weight: float = non_negative(0.5)  # at the last step, unless constant
    final_soft_weight: float = non_negative(0.5)  # at the last step, unless constant
    # share of the hard target spread over the vocabulary
    label_smoothing: float = rate(0.0)
    divergence: str = choice("forward_kl", DIVERGENCES)  # of the soft term
    alpha: float = rate(0.1)  # share of the first distribution in the mixture (skew_*)
    # 0 forward to 1 reverse KL (jsd, divided by beta (1 - beta))
    beta: float = share(0.5)
    # T of the soft term; must be declared in the cache
    temperature: float = positive(1.0)
    temperature_schedule: str = choice("constant", SCHEDULES)  # over the run
    # at the last step, unless constant; also declared
    final_temperature: float = positive(1.0)
    scale_by_t2: bool = True  # multiply the soft term by T^2
    tail: str = choice("bucket", TAILS)  # what stands for ids outside the top k
    # of the hidden-state term; needs teacher.online
    hidden_weight: float = non_negative(0.0)
    hidden_loss: str = choice("mse", HIDDEN_LOSSES)  # of mapped layers' states
    hidden_projection: bool = False  # learned map to the teacher's width
    # of the attention term; needs teacher.online
    attention_weight: float = non_negative(0.0)
    # teacher layer of each student layer; -1 = none
    layer_map: tuple[int, ...] = number((), at_least=-1)


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = choice("adamw", OPTIMIZERS)  # update rule
    learning_rate: float = number(3e-4, above=0, at_most=1e30)  # peak
    schedule: str = choice("cosine", SCHEDULES)  # after warm-up
    warmup_steps: int = counted(0)  # linear from 0 to the peak
    # learning rate at the last step / peak
    final_fraction: float = number(0.0, at_least=0, at_most=1e6)
    # decoupled; not applied to norms
    weight_decay: float = number(0.0, at_least=0, at_most=1e6)
    b1: float = rate(0.9)  # adamw
    b2: float = rate(0.95)  # adamw
    eps: float = number(1e-8, at_least=1e-30, at_most=1e6)  # adamw
    # global gradient norm limit; 0 = off
    clip_norm: float = number(1.0, at_least=0, at_most=1e30)
    # regexes of paths ("layers/mlp/.*") not trained
    freeze: tuple[str, ...] = patterns(())
    # of averaged parameters, which are evaluated; 0 = none
    ema_decay: float = rate(0.0)


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    steps: int = counted(1000)  # optimizer steps
    batch_size: int = counted(16, at_most=2**20)  # packed rows per step over all hosts
    row_length: int = counted(256, at_most=2**24)  # tokens per packed row
    # of an encoder (T5); 0 = row_length
    encoder_row_length: int = counted(0, at_most=2**24)
    # segments shuffled and packed together; 0 = all, above 2^18 of them 65,536
    shuffle_window: int = non_negative(0)
    # gradient accumulation; divides batch_size
    num_microbatches: int = counted(1, at_most=2**20)
    # of compute; parameters and reductions stay float32
    dtype: str = choice("float32", DTYPES)
    remat: str = choice("none", REMATS)  # what the backward pass recomputes
    chunk_size: int = counted(0)  # tokens per head chunk; 0 = from memory_mib
    # memory for one chunk of logits, MiB; 0 = 32 on a CPU, else a 64th of the device's
    memory_mib: int = counted(0, at_most=2**20)
    log_every: int = counted(10)  # steps between lines of metrics.jsonl
    eval_every: int = counted(0)  # steps between evaluations; 0 = at the end
    # steps between checkpoints; 0 = at the end
    save_every: int = number(500, at_least=0, at_most=2**31 - 1)
    keep_last: int = counted(2)  # recent checkpoints kept
    keep_best: bool = True  # also keep the one with the lowest held-out NLL
    non_finite: str = choice("stop", NON_FINITE)  # a non-finite loss
    num_threads: int = counted(2, at_most=1024)  # loader threads
    prefetch: int = counted(8, at_most=2**16)  # batches made ahead


@dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Devices along each axis; exactly one may be -1, meaning "the rest"."""

    data: int = number(-1, at_least=-1)  # batch split, parameters repeated
    fsdp: int = number(1, at_least=-1)  # batch and parameters split
    tensor: int = number(1, at_least=-1)  # heads and inner widths split


@dataclass(kw_only=True, slots=True)
class DistributedConfig:
    """How long the processes of a run wait for each other; no number depends on it."""

    # a process that gave no sign of life for so long is lost, seconds; one that was
    # killed is noticed at once
    heartbeat_seconds: int = number(60, at_least=1, at_most=86400)
    # until all processes must have come, seconds
    initialization_seconds: int = number(600, at_least=1, at_most=86400)
    # for the others at the end, seconds
    shutdown_seconds: int = number(300, at_least=1, at_most=86400)


@dataclass(kw_only=True, slots=True)
class StorageConfig:
    """How a folder of gs:// or s3:// is kept up to date; no number depends on it."""

    # between copies of what has changed on the local disk, seconds
    sync_seconds: float = number(30.0, at_least=0.01, at_most=86400)
    # that a request is tried again for while the store fails, seconds
    retry_seconds: float = number(300.0, at_least=0, at_most=86400)


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What is measured on held-out examples."""

    # packed rows per forward, rounded up to what divides over data * fsdp
    batch_size: int = positive(16)
    row_length: int = non_negative(0)  # tokens per packed row; 0 = train.row_length
    encoder_row_length: int = non_negative(0)  # of an encoder; 0 = that of training
    num_generations: int = non_negative(64)  # greedily answered examples; 0 = none
    max_new_tokens: int = positive(32)  # per generated answer
    # keys and values while answers are generated, in decoders; "compute" = train.dtype
    cache_dtype: str = choice("compute", CACHE_DTYPES)
    num_bins: int = counted(10, at_most=2**20)  # bins of the expected calibration error


@dataclass(kw_only=True, slots=True)
class AnnotateConfig:
    """How a teacher writes rationales or answers; training reads none of it."""

    method: str = choice("few_shot", ANNOTATIONS)  # how texts are asked for
    split: str = choice("train", SPLITS)  # whose examples
    path: str = ""  # folder; "" = <workdir>/annotations/<split>-<method>
    backend: str = choice("local", BACKENDS)  # who writes
    model: str = ""  # folder or hub name, "" = the teacher; or a server's name for it
    prompts: str = ""  # folder of prompt files; "" = the built-in ones
    num_demonstrations: int = non_negative(7)  # worked examples (not zero_shot)
    num_critiques: int = non_negative(6)  # worked critiques, drawn for each example
    conclude: bool = False  # explanations are asked to end with their answer
    quality: str = choice("good", QUALITIES)  # of the rationales asked for
    contrast: str = choice("wrong", CONTRASTS)  # answer that is decoded against
    # lambda of its log-probabilities (contrastive)
    contrast_weight: float = non_negative(0.5)
    # whose most probable token ends a text: the teacher's own, or the contrastive
    # choice alone (contrastive)
    contrast_stop: str = choice("teacher", CONTRAST_STOPS)
    max_new_tokens: int = positive(300)  # of a rationale or an answer
    max_draft_tokens: int = non_negative(0)  # of a draft; 0 = max_new_tokens
    max_critique_tokens: int = non_negative(0)  # of a critique; 0 = max_new_tokens
    max_revision_tokens: int = non_negative(0)  # of a revision; 0 = max_new_tokens
    temperature: float = non_negative(0.0)  # 0 = most probable token, else sampling
    # sample among the fewest tokens of at least this probability
    top_p: float = number(1.0, above=0, at_most=1)
    stop: tuple[str, ...] = ("\nQuestion:",)  # a text ends before the first of these
    seed: int = random_seed(0)  # of adjectives, requests, wrong choices and sampling
    # prompts decoded together (local), rounded up to what divides over data * fsdp
    batch_size: int = positive(16)
    # keys and values (local), in decoders without contrasts; "compute" = train.dtype
    cache_dtype: str = choice("compute", CACHE_DTYPES)
    drop: tuple[str, ...] = choice((), GATES)  # rationales left out of the result
    url: str = ""  # of an OpenAI-compatible server, as "http://localhost:8000/v1"
    key_variable: str = "OPENAI_API_KEY"  # environment variable with its key; "" = none
    concurrency: int = positive(8)  # requests at a time (server)
    num_retries: int = non_negative(8)  # of a request that failed in passing (server)
    timeout: float = positive(120.0)  # seconds for a request (server)
    # tokens, prompts too, to spend on a server; 0 = no limit
    token_budget: int = non_negative(0)


@dataclass(kw_only=True, slots=True)
class Config:
    """One experiment."""

    name: str = "kdjax"  # names the run; the default workdir is runs/<name>
    seed: int = random_seed(0)  # data order, student initialisation, sampling
    # initialisation and data order of a trained teacher
    teacher_seed: int = random_seed(0)
    data: DataConfig = field(default_factory=DataConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)


class Leaf(NamedTuple):
    """A field of a config that is no part of it."""

    path: str  # "train.steps"
    value: Any
    type: Any  # its annotation
    limit: Range | Choice | Pattern | None


def leaves(part: Any, prefix: str = "") -> Iterator[Leaf]:
    """Yield all fields of a config, those of its parts in their place.

    Args:
      part: a config or a part of one.
      prefix: of the paths, "train." for example.

    Raises:
      ValueError: a part is not of its class.
    """
    for f in dataclasses.fields(part):
        path, value = prefix + f.name, getattr(part, f.name)
        if not dataclasses.is_dataclass(f.type):
            yield Leaf(path, value, f.type, f.metadata.get("limit"))
        elif isinstance(value, typing.cast(type, f.type)):
            yield from leaves(value, f"{path}.")
        else:
            name = typing.cast(type, f.type).__name__
            raise ValueError(f"{path}={value!r} is not a {name}")


def replace(config: T, path: str, value: Any) -> T:
    """Return a config with one field changed, the same parts elsewhere.

    Args:
      config: a config or a part of one.
      path: of the field, "train.steps" for example.
      value: its new value; it is not checked.

    Raises:
      ValueError: there is no such field.
    """
    parts: list[Any] = [config]
    *parents, name = path.split(".")
    for parent in parents:
        parts.append(getattr(parts[-1], parent, None))
    known = []
    if dataclasses.is_dataclass(parts[-1]):
        known = sorted(f.name for f in dataclasses.fields(parts[-1]))
    if name not in known:
        remedy = f": known are {known}" if known else ""
        if path in RENAMED:
            remedy = f": it was renamed, use {RENAMED[path]!r}"
        raise ValueError(f"a config has no field {path!r}{remedy}")
    for part, field_name in zip(
        reversed(parts), [name, *reversed(parents)], strict=True
    ):
        value = dataclasses.replace(part, **{field_name: value})
    return value


def check(part: Any, prefix: str = "") -> None:
    """Check type and limit of every field of a config.

    Args:
      part: a config or a part of one.
      prefix: of the fields' names in errors, "train." for example.

    Raises:
      ValueError: name=value, the limit and the remedy, in one line.
    """
    for path, value, kind, limit in leaves(part, prefix):
        items, item_type = (value,), kind
        if typing.get_origin(kind) is tuple:
            items, item_type = value, typing.get_args(kind)[0]
        # Flags and config files may give any type; a bool is an int, an int a float.
        types = (int, float) if item_type is float else item_type
        if not isinstance(items, tuple) or not all(
            isinstance(item, types) and (item_type is bool or type(item) is not bool)
            for item in items
        ):
            raise ValueError(f"{path}={value!r} is not of type {kind}")
        for item in items:
            if limit is not None and (error := limit.error(item)):
                raise ValueError(f"{path}={item!r} {error}")


def to_json(config: Config) -> str:
    """Return the config as indented JSON, which `from_json` reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Read a config from its JSON, in which renamed fields may have their former names.

    Raises:
      ValueError: an unknown field, with the known ones.
    """
    config = Config()
    values = dict(_paths(json.loads(text)))
    for path, value in values.items():
        name = RENAMED.get(path, path)
        config = replace(
            config,
            path if name in values else name,
            tuple(value) if isinstance(value, list) else value,
        )
    return config


def _paths(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def comments(module: str = __name__) -> dict[tuple[str, str], str]:
    """Return the comment of each field, beside it or above it, by (class, field).

    Args:
      module: of the dataclasses.
    """
    source = inspect.getsource(sys.modules[module])
    lines = source.splitlines()
    result = {}
    for cls in ast.parse(source).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                end = (node.end_lineno or 1) - 1  # of its text, in ASCII
                beside = lines[end][node.end_col_offset :]
                above = lines[node.lineno - 2]
                comment = beside or (above if above.lstrip().startswith("#") else "")
                result[cls.name, node.target.id] = comment.strip().lstrip("# ")
    return result


def explain_renamed(error: str) -> str:
    """Return what to use instead where a Python error is about a renamed field.

    Args:
      error: text of the TypeError of a constructor, `DataConfig(layout=...)`, or of the
        AttributeError of an assignment.

    Returns:
      An error message; "" where the error is about something else.
    """
    match = re.search(
        r"(\w+)(?:\.__init__\(\) got an unexpected keyword argument"
        r"|' object has no attribute) '(\w+)'",
        error,
    )
    if match is None:
        return ""
    class_name, former = match.groups()
    if class_name == "Comparison" and former in RENAMED_COMPARISON:
        return f"{former} was renamed: use {RENAMED_COMPARISON[former]}"
    for part in dataclasses.fields(Config):
        path = f"{part.name}.{former}"
        if getattr(part.type, "__name__", "") == class_name and path in RENAMED:
            return f"{path} was renamed: use {RENAMED[path]}"
    return ""
