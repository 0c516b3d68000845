"""The whole experiment as plain dataclasses, a comment on every field.

A config file is a Python file with `get_config(argument: str = "") -> Config`. Any
field is overridden from the command line by `--config.part.field=value`.
"""

import dataclasses
import json
import re
import typing
from dataclasses import dataclass, field
from typing import Any

SOURCES = ("kinship", "jsonl", "datasets", "tfds", "text")
SCHEMAS = ("plain", "commonsense_qa", "gsm8k")
COUNTERFACTUAL_PLACES = ("decoder", "prompt")
LONG_POLICIES = ("error", "truncate", "drop")
MISSING_POLICIES = ("error", "drop")
WRONG_LABELS = ("keep", "drop", "weight")
CACHE_KINDS = ("top_k", "sampled", "dense")
TAILS = ("bucket", "renormalize_teacher", "renormalize_both", "drop")
OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "dots", "full")
STUDENT_INITS = ("random", "folder", "teacher_layers")
ARCHITECTURES = ("decoder", "t5")
NON_FINITE = ("stop", "skip")
HIDDEN_LOSSES = ("mse", "cosine")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROTARY = ("global", "local", "none")
ANNOTATIONS = (
    "zero_shot",
    "few_shot",
    "counterfactual",
    "contrastive",
    "critique_revision",
    "answer",
)
BACKENDS = ("local", "server")
QUALITIES = ("good", "bad")
CONTRASTS = ("wrong", "empty")
GATES = ("empty", "cut_off", "no_choice", "contradicts", "leaks")

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


@dataclass(kw_only=True, slots=True)
class KinshipConfig:
    """The built-in task: who is X to Y, over stated family relations."""

    seed: int = 0  # which examples are generated (not the order of training)
    min_hops: int = 2  # fewest stated relations that a question needs
    max_hops: int = 3  # most stated relations that a question needs
    num_distractors: int = 2  # stated relations that a question does not need
    num_choices: int = 5  # answer choices, the correct one included
    label_noise: float = 0.0  # share of training answers replaced by a wrong choice


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

    source: str = "kinship"  # one of SOURCES
    schema: str = "plain"  # columns of jsonl/datasets/tfds rows: one of SCHEMAS
    path: str = ""  # file or folder or hub name of the training rows
    eval_path: str = ""  # the same for held-out rows; "" takes eval_split of `path`
    train_split: str = "train"  # split name for datasets and tfds
    eval_split: str = "test"  # split name for datasets and tfds
    rationales: str = ""  # jsonl of {id, text} with one rationale per training row
    eval_rationales: str = ""  # the same for held-out rows
    counterfactuals: str = ""  # jsonl of {id, choice, text}: for a wrong choice each
    counterfactual_place: str = "decoder"  # its input: one of COUNTERFACTUAL_PLACES
    labels: str = ""  # jsonl of {id, answer} by a teacher, to train on; "" = gold
    wrong_labels: str = "keep"  # policy for its wrong answers: one of WRONG_LABELS
    wrong_label_weight: float = 0.5  # loss weight, 0 to 1 (wrong_labels="weight")
    num_train: int = 0  # training examples to use; 0 = all (kinship: must be > 0)
    num_eval: int = 0  # held-out examples to use; 0 = all (kinship: must be > 0)
    tokenizer: str = ""  # Hugging Face folder or hub name; "" = the teacher's own
    chat_template: bool = False  # wrap prompts in the tokenizer's chat template
    max_prompt: int = 256  # longest prompt, tokens
    max_target: int = 256  # longest target, tokens, eos and a decoder's prefix too
    on_long: str = "error"  # a longer example: one of LONG_POLICIES (counted, logged)
    on_missing: str = "error"  # no rationale, no label: one of MISSING_POLICIES
    prompt_suffix: bool = True  # prompts end with a line such as "Answer:"
    prefixes: PrefixConfig = field(default_factory=PrefixConfig)
    kinship: KinshipConfig = field(default_factory=KinshipConfig)


@dataclass(kw_only=True, slots=True)
class RopeConfig:
    """How rotary positions are stretched beyond the lengths first trained at."""

    type: str = "default"  # one of ROPE_TYPES; default = not at all
    factor: float = 1.0  # times the original length (linear, llama3, yarn)
    original_length: int = 0  # longest position before, tokens (llama3, yarn)
    low_freq_factor: float = 1.0  # turns below which all is stretched (llama3)
    high_freq_factor: float = 4.0  # turns above which nothing is stretched (llama3)
    beta_fast: float = 32.0  # turns above which nothing is stretched (yarn)
    beta_slow: float = 1.0  # turns below which all is stretched (yarn)
    attention_factor: float = 0.0  # scales cos and sin; 0 = 0.1 ln(factor) + 1 (yarn)


@dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """Shape of a decoder-only transformer; families differ by these values alone."""

    vocab_size: int = 0  # rows of the embedding; 0 = the tokenizer's size
    width: int = 64  # D, residual stream
    num_layers: int = 2  # L
    num_heads: int = 4  # H, query heads
    num_kv_heads: int = 4  # key/value heads; divides num_heads
    head_dim: int = 16  # per head
    mlp_width: int = 192  # inner width of the gated MLP
    rope_theta: float = 10000.0  # base of the rotary frequencies
    norm_eps: float = 1e-5  # RMSNorm epsilon
    tie_embeddings: bool = True  # the output head is the embedding
    max_length: int = 2048  # longest position the model is used at, tokens
    init_std: float = 0.02  # standard deviation of random weights
    family: str = "llama"  # architecture it is exported as: one of FAMILIES
    rope: RopeConfig = field(default_factory=RopeConfig)  # of the "global" layers
    local_rope_theta: float = 10000.0  # the base in "local" layers, never stretched
    rotary: tuple[str, ...] = ()  # of each layer, one of ROTARY; () = all "global"
    windows: tuple[int, ...] = ()  # tokens each layer sees, 0 = all; () = all 0
    qkv_bias: bool = False  # query, key and value projections have a bias
    out_bias: bool = False  # attention's output projection has a bias
    mlp_bias: bool = False  # the MLP's projections have a bias
    qk_norm: bool = False  # queries and keys are normed a head, before rotary
    post_norms: bool = False  # what attention and MLP return is normed as well
    norm_offset: float = 0.0  # added to every norm's scale; Gemma stores scale - 1: 1.0
    scale_embeddings: bool = False  # times sqrt(width), rounded to the compute dtype
    activation: str = "silu"  # of the MLP's gate: one of ACTIVATIONS
    query_scalar: int = 0  # scores are divided by its root; 0 = head_dim
    attention_softcap: float = 0.0  # scores stay within +-this, by tanh; 0 = no cap
    final_softcap: float = 0.0  # logits stay within +-this, by tanh; 0 = no cap


@dataclass(kw_only=True, slots=True)
class T5Config:
    """Shape of an encoder-decoder transformer: T5 v1.0, v1.1 or FLAN."""

    vocab_size: int = 0  # rows of the embedding; 0 = the tokenizer's size
    width: int = 64  # D, residual streams
    num_encoder_layers: int = 2  # layers that read the prompt
    num_decoder_layers: int = 2  # layers that write the target
    num_heads: int = 4  # H, of every attention
    head_dim: int = 16  # per head; H * head_dim need not be the width
    mlp_width: int = 128  # inner width of the MLP
    gated: bool = True  # gelu(gate) * up (v1.1, FLAN), else relu(up) (v1.0)
    tie_embeddings: bool = False  # the output head is the embedding (v1.0)
    scale_outputs: bool = False  # logits are multiplied by width^-0.5 (v1.0)
    num_buckets: int = 32  # of relative positions; even
    max_distance: int = 128  # tokens; farther ones share the last bucket
    dropout: float = 0.1  # rate while training
    norm_eps: float = 1e-6  # RMSNorm epsilon
    init_factor: float = 1.0  # multiplies all random weights
    pad_id: int = 0  # fills rows
    eos_id: int = 1  # ends a prompt and a target
    start_id: int = 0  # first token the decoder reads


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that writes the soft labels."""

    path: str = ""  # Hugging Face folder or hub name; "" trains `decoder` first
    online: bool = False  # runs beside the student; no cache of the training split
    decoder: DecoderConfig = field(default_factory=DecoderConfig)  # when path is ""
    num_train: int = 20000  # examples the trained teacher sees (kinship)
    label_noise: float = 0.0  # share of wrong answers among those (kinship)
    steps: int = 1000  # optimizer steps of the trained teacher
    learning_rate: float = 3e-3  # peak learning rate of the trained teacher


@dataclass(kw_only=True, slots=True)
class CacheConfig:
    """The teacher's stored outputs."""

    path: str = ""  # folder; "" = <workdir>/cache
    kind: str = "top_k"  # of the training split: one of CACHE_KINDS
    k: int = 64  # pairs stored per target token (top_k; held-out ones, if sampled)
    num_draws: int = 50  # draws per target token, temperature and round (sampled)
    num_rounds: int = 1  # independent rounds; epoch e uses round e mod it (sampled)
    temperatures: tuple[float, ...] = (1.0, 2.0)  # declared: exact log Z for each
    shard_size: int = 512  # records (example, view) per shard
    batch_size: int = 8  # packed rows per teacher forward
    row_length: int = 512  # tokens per packed row while labelling
    encoder_row_length: int = 0  # the same of an encoder; 0 = row_length
    chunk_size: int = 0  # tokens per head chunk; 0 = from memory_mib
    memory_mib: int = 64  # memory for one chunk of logits, MiB


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters, trained in place of the weights; see `models.lora`."""

    rank: int = 0  # of each adapter; 0 = none, all weights are trained
    alpha: float = 16.0  # an adapter's product is multiplied by alpha / rank
    targets: tuple[str, ...] = (".*",)  # regexes of linear layers: "query", "mlp/.*"


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """How the student starts."""

    init: str = "random"  # one of STUDENT_INITS
    path: str = ""  # Hugging Face folder or hub name (init="folder")
    keep_layers: tuple[int, ...] = ()  # teacher layers kept (init="teacher_layers")
    keep_encoder_layers: tuple[int, ...] = ()  # of a T5 teacher's encoder; () = all
    dropout: float = -1.0  # rate while training (T5); below 0 = as its shape says
    architecture: str = "decoder"  # of init="random": one of ARCHITECTURES
    lora: LoraConfig = field(default_factory=LoraConfig)  # not with init="random"
    decoder: DecoderConfig = field(default_factory=DecoderConfig)  # init="random"
    t5: T5Config = field(default_factory=T5Config)  # init="random"; ids of tokenizer


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    """Which views are trained, with which terms."""

    name: str = "multitask"  # key of kdjax.experiment.methods.METHODS
    label_weight: float = 0.5  # a: label view a, rationale view 1 - a (multitask)
    counterfactual_weight: float = 0.5  # b: that view b, factual view 1 - b
    multitask_weight: float = 0.5  # g: a's views share g, b's 1 - g (both: all four)
    hard_weight: float = 0.5  # weight of cross-entropy with the data
    soft_weight: float = 0.5  # weight of the teacher's term; 0 needs no cache
    weight_schedule: str = "constant"  # of both weights over the run: one of SCHEDULES
    final_hard_weight: float = 0.5  # at the last step, unless constant
    final_soft_weight: float = 0.5  # at the last step, unless constant
    label_smoothing: float = 0.0  # share of the hard target spread over the vocabulary
    divergence: str = "forward_kl"  # of the soft term: key of losses.divergence
    alpha: float = 0.1  # share of the first distribution in the mixture (skew_*)
    beta: float = 0.5  # 0 forward to 1 reverse KL (jsd, divided by beta (1 - beta))
    temperature: float = 1.0  # T of the soft term; must be declared in the cache
    temperature_schedule: str = "constant"  # over the run: one of SCHEDULES
    final_temperature: float = 1.0  # at the last step, unless constant; also declared
    scale_by_t2: bool = True  # multiply the soft term by T^2
    tail: str = "bucket"  # what stands for ids outside the top k: one of TAILS
    hidden_weight: float = 0.0  # of the hidden-state term; needs teacher.online
    hidden_loss: str = "mse"  # of mapped layers' states: one of HIDDEN_LOSSES
    hidden_projection: bool = False  # learned map to the teacher's width
    attention_weight: float = 0.0  # of the attention term; needs teacher.online
    layer_map: tuple[int, ...] = ()  # teacher layer of each student layer; -1 = none


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = "adamw"  # one of OPTIMIZERS
    learning_rate: float = 3e-4  # peak
    schedule: str = "cosine"  # after warm-up: one of SCHEDULES
    warmup_steps: int = 0  # linear from 0 to the peak
    final_fraction: float = 0.0  # learning rate at the last step / peak
    weight_decay: float = 0.0  # decoupled; not applied to norms
    b1: float = 0.9  # adamw
    b2: float = 0.95  # adamw
    eps: float = 1e-8  # adamw
    clip_norm: float = 1.0  # global gradient norm limit; 0 = off
    freeze: tuple[str, ...] = ()  # regexes of paths ("layers/mlp/.*") not trained
    ema_decay: float = 0.0  # of averaged parameters, which are evaluated; 0 = none


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 16  # packed rows per step over all hosts
    row_length: int = 256  # tokens per packed row
    encoder_row_length: int = 0  # the same of an encoder (T5); 0 = row_length
    num_microbatches: int = 1  # gradient accumulation; divides batch_size
    dtype: str = "float32"  # compute; parameters and reductions stay float32
    remat: str = "none"  # what the backward pass recomputes: one of REMATS
    chunk_size: int = 0  # tokens per chunk of the fused head; 0 = from memory_mib
    memory_mib: int = 32  # memory for one chunk of logits, MiB
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 0  # steps between evaluations; 0 = only at the end
    save_every: int = 500  # steps between checkpoints; 0 = only at the end
    keep_last: int = 2  # recent checkpoints kept
    keep_best: bool = True  # also keep the one with the lowest held-out NLL
    non_finite: str = "stop"  # a non-finite loss: one of NON_FINITE
    num_threads: int = 2  # loader threads
    prefetch: int = 8  # batches made ahead


@dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Devices along each axis; exactly one may be -1, meaning "the rest"."""

    data: int = -1  # batch split, parameters repeated
    fsdp: int = 1  # batch and parameters split
    tensor: int = 1  # heads and inner widths split


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What is measured on held-out examples."""

    batch_size: int = 16  # packed rows per forward
    row_length: int = 0  # tokens per packed row; 0 = train.row_length
    encoder_row_length: int = 0  # the same of an encoder; 0 = that of training
    num_generations: int = 64  # examples answered by greedy decoding; 0 = none
    max_new_tokens: int = 32  # per generated answer
    num_bins: int = 10  # bins of the expected calibration error


@dataclass(kw_only=True, slots=True)
class AnnotateConfig:
    """How a teacher writes rationales or answers; training reads none of it."""

    method: str = "few_shot"  # one of ANNOTATIONS
    split: str = "train"  # whose examples: "train" or "eval"
    path: str = ""  # folder; "" = <workdir>/annotations/<split>-<method>
    backend: str = "local"  # one of BACKENDS
    model: str = ""  # folder or hub name, "" = the teacher; or a server's name for it
    prompts: str = ""  # folder of prompt files; "" = the built-in ones
    num_demonstrations: int = 7  # worked examples before the question (not zero_shot)
    quality: str = "good"  # of the rationales asked for: one of QUALITIES
    contrast: str = "wrong"  # answer that is decoded against: one of CONTRASTS
    contrast_weight: float = 0.5  # lambda of its log-probabilities (contrastive)
    max_new_tokens: int = 128  # of each generated text
    temperature: float = 0.0  # 0 = most probable token, else sampling
    top_p: float = 1.0  # sample among the fewest tokens of at least this probability
    stop: tuple[str, ...] = ("\nQuestion:",)  # a text ends before the first of these
    seed: int = 0  # of adjectives, requests, wrong choices and sampling
    batch_size: int = 16  # prompts decoded together (local)
    drop: tuple[str, ...] = ()  # rationales left out of the result: some of GATES
    url: str = ""  # of an OpenAI-compatible server, as "http://localhost:8000/v1"
    key_variable: str = "OPENAI_API_KEY"  # environment variable with its key; "" = none
    concurrency: int = 8  # requests at a time (server)
    num_retries: int = 8  # of a request that failed in passing (server)
    timeout: float = 120.0  # seconds for a request (server)
    token_budget: int = 0  # tokens, prompts too, to spend on a server; 0 = no limit


@dataclass(kw_only=True, slots=True)
class Config:
    """One experiment."""

    name: str = "kdjax"  # names the run; the default workdir is runs/<name>
    seed: int = 0  # data order, student initialisation, sampling
    teacher_seed: int = 0  # initialisation and data order of a trained teacher
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)


def to_json(config: Config) -> str:
    """Return the config as indented JSON, which `from_json` reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Read a config from its JSON, in which renamed fields may have their former names.

    Raises:
      ValueError: an unknown field, with the known ones.
    """
    return _build(Config, json.loads(text), "config")


def _build(cls: Any, values: dict[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    for former, name in _renamed_fields(path.removeprefix("config.")).items():
        if former in values and name not in values:
            values = {name if n == former else n: v for n, v in values.items()}
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{path} has no field {unknown}: known are {sorted(hints)}")
    return cls(
        **{
            name: _build(hints[name], value, f"{path}.{name}")
            if dataclasses.is_dataclass(hints[name])
            else tuple(value)
            if typing.get_origin(hints[name]) is tuple
            else value
            for name, value in values.items()
        }
    )


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
    if match[1] == "Comparison" and match[2] in RENAMED_COMPARISON:
        return f"{match[2]} was renamed: use {RENAMED_COMPARISON[match[2]]}"
    for part, cls in typing.get_type_hints(Config).items():
        if cls.__name__ == match[1] and match[2] in _renamed_fields(part):
            name = _renamed_fields(part)[match[2]]
            return f"{part}.{match[2]} was renamed: use {part}.{name}"
    return ""


def _renamed_fields(part: str) -> dict[str, str]:
    """Return former name -> name of the renamed fields of one part."""
    return {
        former.rpartition(".")[2]: name.rpartition(".")[2]
        for former, name in RENAMED.items()
        if former.rpartition(".")[0] == part
    }
