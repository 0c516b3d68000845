"""The loss of every method, from the texts and the full logits, in float64.

Which tokens are learnt, and with which weight, is worked out from the examples' own
words, not from the batch's arrays: prompts, wrong rationales and padding weigh nothing,
the end of a target is learnt.

Shapes: R rows, T row length, S length of the encoder's row, V vocabulary, t target
tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from kdjax.config import MeshConfig, T5Config
from kdjax.data import loader, sources
from kdjax.experiment import methods
from kdjax.experiment.data import load_data
from kdjax.experiment.models import make_model, student_params, student_shape
from kdjax.experiment.rows import make_plan
from kdjax.models import lm
from kdjax.parallel import sharding
from kdjax.teacher.codec import Record
from kdjax.training import program
from tests import helpers

SHARES = {  # with a = 0.3, b = 0.2, g = 0.6
    "finetune": {"label": 1.0},
    "rationale_then_label": {"rationale_then_label": 1.0},
    "multitask": {"label": 0.3, "rationale": 0.7},
    "counterfactual": {"factual": 0.8, "counterfactual": 0.2},
    "multitask_counterfactual": {
        "label": 0.18,
        "rationale": 0.42,
        "factual": 0.32,
        "counterfactual": 0.08,
    },
}
TERMS = {"hard": (1.0, 0.0), "hard and soft": (0.4, 0.6)}  # weights
TEMPERATURE = 2.0


class Words(NamedTuple):
    """A segment as its words."""

    prompt: str
    read: str
    learnt: str  # without the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """What the test has to know of a kind of student.

    Attributes:
      before: a segment's ids -> those before its target in the row that is predicted.
      logits: model, parameters, rows of a batch [R, T] -> logits [R, T, V].
      encoded: a prompt's ids -> those in the encoder's row; None = no encoder.
      changes: of the config, which make it this kind.
    """

    before: Callable[[list[int], list[int]], list[int]]
    logits: Callable[[Any, Any, dict[str, np.ndarray]], np.ndarray]
    encoded: Callable[[list[int]], list[int]] | None = None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def logits(model, params, rows):
    hidden = lm.hidden_states(model.graphdef, params, rows)
    return lm.logits(model.graphdef, params, hidden)


PAD, EOS = 0, 1  # of the built-in tokenizer
SHAPE = T5Config(
    width=32, num_encoder_layers=1, num_decoder_layers=1, num_heads=4, head_dim=8
)
STUDENTS = {
    "decoder": Student(before=lambda prompt, read: prompt + read, logits=logits),
    "T5": Student(
        before=lambda prompt, read: [PAD, *read],
        encoded=lambda prompt: [*prompt, EOS],
        logits=logits,
        changes={"student": {"architecture": "t5", "t5": SHAPE, "dropout": 0.0}},
    ),
}


def words_of(example, view, place, choice):
    """How a view reads, written out; `choice` is that of a counterfactual."""
    letters = " ".join(
        f"({a}) {text}" for a, text in zip("abcde", example.choices, strict=True)
    )
    question = f"{example.question} Choices: {letters}"
    both = f"{example.rationale} Answer: {example.answer}"
    if view == "label":
        return Words(f"{question} Answer:", "", example.answer)
    if view == "rationale":
        return Words(f"{question} Explain:", "", example.rationale)
    if view in ("rationale_then_label", "factual"):
        return Words(f"{question} Explain and answer:", "", both)
    assert choice in example.choices and choice != example.answer
    wrong = [other for other in example.choices if other != example.answer]
    rationale = example.counterfactuals[wrong.index(choice)]
    assert rationale.endswith(f" {choice} of {rationale.split()[-2]} .")
    cue = "Explain and answer otherwise:"
    if place == "prompt":
        return Words(f"{question} {rationale} {cue}", "", choice)
    return Words(f"{question} {cue}", f"{rationale} Answer:", choice)


class DenseTeacher:
    """Random whole rows for any segment, of one seed a segment."""

    kind, temperatures = "dense", (1.0, TEMPERATURE)

    def __init__(self, segments, vocab_size):
        self.vocab_size = self.k = vocab_size
        self._targets = {s.key: s.target_ids for s in segments}

    def has(self, key):
        return key in self._targets

    def log_probs(self, key):
        rng = np.random.default_rng(int.from_bytes(key[:4], "big"))
        return log_softmax(rng.normal(size=(len(self._targets[key]), self.k)) * 2)

    def read(self, key):
        logp = self.log_probs(key)
        log_z = [np.log(np.exp(logp / t).sum(-1)) for t in self.temperatures]
        zeros = np.zeros((len(logp), 0), np.int32)
        return Record(
            ids=zeros,
            log_probs=logp.astype(np.float32),
            target_ids=self._targets[key],
            target_log_probs=logp[:, 0].astype(np.float32),
            log_z=np.stack(log_z, -1).astype(np.float32),
            entropy=np.zeros((len(logp), 2), np.float32),
            kind="dense",
        )


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def loss_by_hand(
    logits_RTV, rows, contents, student, teacher, texts, weights, shares, weigh
):
    """Sum over views of share * (hard * mean nll + soft * T^2 * mean KL).

    A mean is over all tokens, each times what its example weighs.

    Args:
      logits_RTV: of the packed rows.
      rows: of the batch, to see that the words stand there.
      contents: for each row its segments.
      student: what stands before a target.
      teacher: whole rows.
      texts: segment -> view and ids of (prompt, read, learnt with the end).
      weights: of the hard and the soft terms.
      shares: view -> its share of the loss.
      weigh: example's id -> weight.
    """
    sums = {view: np.zeros(3) for view in shares}  # nll, KL, tokens
    for row, segments in enumerate(contents):
        start = 0
        for number, segment in enumerate(segments, 1):
            view, prompt, read, learnt = texts(segment)
            ids = [*student.before(prompt, read), *learnt]
            stop = start + len(ids) - 1
            assert rows.tokens[row, start:stop].tolist() == ids[:-1]
            assert rows.targets[row, start:stop].tolist() == ids[1:]
            if student.encoded is not None:
                there = rows.encoder.segments[row] == number
                encoded = rows.encoder.tokens[row][there].tolist()
                assert encoded == student.encoded(prompt)
            logits_tV = logits_RTV[row, stop - len(learnt) : stop]
            nll_t = -log_softmax(logits_tV)[np.arange(len(learnt)), learnt]
            p_tV = np.exp(log_softmax(teacher.log_probs(segment.key) / TEMPERATURE))
            log_q_tV = log_softmax(np.asarray(logits_tV, np.float64) / TEMPERATURE)
            kl_t = (p_tV * (np.log(p_tV) - log_q_tV)).sum(-1)
            weight = weigh(segment.example_id)
            sums[view] += weight * nll_t.sum(), weight * kl_t.sum(), len(learnt)
            start = stop
    assert all(count for _, _, count in sums.values())
    hard, soft = weights
    return sum(
        shares[view] * (hard * nll + soft * TEMPERATURE**2 * kl) / count
        for view, (nll, kl, count) in sums.items()
    )


# Each method, each place of a wrong rationale and each choice of terms with others.
USUAL = {  # each method, place and kind of terms; multitask has a test of its own
    ("finetune", "decoder", "hard"),
    ("rationale_then_label", "decoder", "hard and soft"),
    ("counterfactual", "prompt", "hard"),
    ("counterfactual", "decoder", "hard and soft"),
    ("multitask_counterfactual", "decoder", "hard"),
    ("multitask_counterfactual", "prompt", "hard and soft"),
}
CASES = [
    pytest.param(
        *(name, place, terms),
        marks=() if (name, place, terms) in USUAL else pytest.mark.slow,
    )
    for name in SHARES
    for place in (("decoder", "prompt") if "counter" in name else ("decoder",))
    for terms in TERMS
]


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize(("name", "place", "terms"), CASES)
def test_the_loss_is_the_methods(name, place, terms, kind):
    check_loss(name, place, terms, kind)


@pytest.mark.parametrize("kind", STUDENTS)
def test_an_example_weighs_what_it_should(kind):
    def weigh(id):
        return (1.0, 0.25, 0.0)[int(id.rpartition("-")[2]) % 3]

    check_loss("multitask", "decoder", "hard and soft", kind, weigh)


def check_loss(name, place, terms, kind, weigh=lambda id: 1.0):
    student, weights = STUDENTS[kind], TERMS[terms]
    config = helpers.small_config(
        data={"counterfactual_place": place},
        method={
            "name": name,
            "label_weight": 0.3,
            "counterfactual_weight": 0.2,
            "multitask_weight": 0.6,
            "hard_weight": weights[0],
            "soft_weight": weights[1],
            "temperature": TEMPERATURE,
        },
        cache={"kind": "dense"},
        train={"batch_size": 12, "num_microbatches": 2},
        **student.changes,
    )
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    data = load_data(config, splits=("train",))
    data.train[:] = [
        dataclasses.replace(s, weight=weigh(s.example_id)) for s in data.train
    ]
    model = make_model(student_shape(config, data.tokenizer), mesh, dtype="float32")
    teacher = DenseTeacher(data.train, model.shape.vocab_size)
    plan = make_plan(config, model.shape, data.train)
    made = program.Program(config, model, mesh)
    batch = loader.make_batch(
        plan,
        1,
        terms=methods.terms(config.method),
        cache=teacher if weights[1] else None,
        temperature=TEMPERATURE,
    )
    state = made.init(student_params(config, model, ""))
    params = jax.tree.map(np.asarray, state.params)
    rows = batch.flattened()
    logits_RTV = np.asarray(student.logits(model, params, rows))
    _, found = made.step(state, sharding.global_batch(batch, mesh, made.num_rows))

    examples = {
        example.id: example
        for example in sources.load_examples(config.data, "train", seed=0)
    }
    encode = data.tokenizer.convert_tokens_to_ids

    def texts(segment):
        view = list(SHARES[name])[segment.view]
        choice = data.tokenizer.decode(segment.target_ids[:1])
        example = examples[segment.example_id]
        words = words_of(example, view, place, choice)
        prompt, read, learnt = (encode(text.split()) for text in words)
        return view, prompt, read, [*learnt, data.tokenizer.eos_token_id]

    contents = [[plan.segments[item] for item in row] for row in plan.batch(1)]
    wanted = loss_by_hand(
        *(logits_RTV, rows, contents, student, teacher, texts, weights),
        shares=SHARES[name],
        weigh=weigh,
    )
    np.testing.assert_allclose(float(found["loss"]), wanted, rtol=1e-5)
