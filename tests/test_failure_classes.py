"""Mutations: the ways in which distillation code goes wrong, each put in on purpose.

The classes are those that users of other libraries have reported. For each of them the
code is broken that way in a copy, and the test that guards against it must fail. (That
it passes on the code as it is, the rest of the suite shows.)
"""

import os
import pathlib
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Break:
    """One way to be wrong: `old` of a file becomes `new`, and `test` must fail."""

    number: int  # of the class, several breaks may share one
    what: str
    file: str
    old: str
    new: str
    test: str


BREAKS = [
    Break(
        number=1,
        what="the loss depends on how the batch is cut into microbatches",
        file="data/loader.py",
        old="items = np.concatenate(contents)\n    kinds",
        new="items = np.concatenate(contents[: len(contents) // plan.num_microbatches])"
        "\n    kinds",
        test="training/test_step.py::test_microbatches_do_not_change_the_step",
    ),
    Break(
        number=1,
        what="a microbatch without a valid token spoils the step",
        file="training/step.py",
        old="return jax.tree.map(jnp.add, carry, (total, grads)), sums",
        new="seen = sums['count'].sum().astype(jnp.float32)\n"
        "            return jax.tree.map(\n"
        "                lambda a, b: a + b * seen / seen, carry, (total, grads)\n"
        "            ), sums",
        test="training/test_step.py::test_a_microbatch_without_any_valid_token_is_harmless",
    ),
    Break(
        number=2,
        what="the fused path has another gradient than the dense one: softcap",
        file="losses/options.py",
        old="slope = 1.0 - (logits / self.softcap) ** 2",
        new="slope = jnp.ones_like(logits)",
        test="losses/test_fused_head_features.py::test_features[softcap-pairs-2.0]",
    ),
    Break(
        number=2,
        what="the fused path forgets the bias",
        file="losses/head.py",
        old="if head.bias_V is not None:\n        products_CV +=",
        new="if head.bias_V is None:\n        products_CV +=",
        test="losses/test_fused_head_features.py::test_features[bias-pairs-2.0]",
    ),
    Break(
        number=3,
        what="off by one between stored row and token",
        file="data/loader.py",
        old="slice(first, stop) if mask",
        new="slice(first - 1, stop - 1) if mask",
        test="data/test_loader.py::test_teacher_rows_stand_where_their_token_is_"
        "predicted",
    ),
    Break(
        number=3,
        what="a cache shifted by one is taken",
        file="teacher/record_checks.py",
        old="if not wrong_T.any():",
        new="if True:",
        test="teacher/test_sampling.py::test_rows_shifted_by_one_token_are_noticed",
    ),
    Break(
        number=4,
        what="padding of the vocabulary gets probability",
        file="losses/vocab_shard.py",
        old="logits_CV.at[:, self.num_valid :].set(-jnp.inf)",
        new="logits_CV.at[:, self.num_valid :].set(0.0)",
        test="losses/test_fused_head.py::test_num_valid",
    ),
    Break(
        number=5,
        what="JSD goes to 0 at its ends, where the KLs are",
        file="losses/divergence.py",
        old="    if rescale:\n        return forward",
        new="    if False:\n        return forward",
        test="losses/test_divergence.py::test_the_ends_of_jsd_and_the_skewed_are_the_"
        "kls",
    ),
    Break(
        number=6,
        what="the KL of truncated pairs is negative",
        file="losses/sparse.py",
        old='    if tail == "drop":\n        p =',
        new="    if True:\n        p =",
        test="losses/test_fused_head.py::test_kl_is_never_negative",
    ),
    Break(
        number=7,
        what="the mixture is taken in log space",
        file="losses/divergence.py",
        old="mixed = jnp.logaddexp(\n"
        "        jnp.where(neither, 0.0, logp) + math.log1p(-share),\n"
        "        jnp.where(neither, 0.0, other_logp) + math.log(share),\n"
        "    )",
        new="mixed = jnp.where(neither, 0.0, logp) * (1 - share) + jnp.where(\n"
        "        neither, 0.0, other_logp) * share",
        test="losses/test_divergence.py::test_definitions",
    ),
    Break(
        number=7,
        what="the KL is reported without the teacher's entropy",
        file="losses/chunk_loss.py",
        old="return _SoftLoss(shard.sum(local_kl_C) - teacher.entropy_N, d_log_q)",
        new="return _SoftLoss(shard.sum(local_kl_C), d_log_q)",
        test="teacher/test_sampling.py::test_draws_are_unbiased_in_loss_and_gradient_and_"
        "truncation_is_not",
    ),
    Break(
        number=8,
        what="the teacher's arrays of all microbatches are kept",
        file="training/step.py",
        old="        def add(carry: Any, rows: Batch) -> tuple[Any, Any]:\n"
        "            targets = targets_of(teacher_params, rows)\n",
        new="        of_rows = functools.partial(targets_of, teacher_params)\n"
        "        batch = (batch, jax.lax.map(of_rows, batch))\n\n"
        "        def add(carry: Any, both: Any) -> tuple[Any, Any]:\n"
        "            rows, targets = both\n",
        test="training/test_program.py::test_no_teacher_rows_of_other_microbatches_are_kept"
        "[dense]",
    ),
    Break(
        number=9,
        what="the cache is keyed by something else than content",
        file="data/views.py",
        old='content = base + b"".join(array.tobytes() for array in arrays)',
        new="content = base + lengths.tobytes()",
        test="data/test_views.py::test_keys_depend_on_content_and_tokenizer_alone",
    ),
    Break(
        number=9,
        what="labelling that was killed starts again from nothing",
        file="teacher/label.py",
        old="if index in complete:",
        new="if False:",
        test="teacher/test_interrupted.py::test_killed_anywhere_it_ends_with_"
        "the_same_bytes[8]",
    ),
    Break(
        number=10,
        what="a missing record falls back to the language-model loss in silence",
        file="data/teacher_records.py",
        old="raise missing(segment, 1)",
        new="return",
        test="data/test_loader.py::test_a_missing_record_names_the_example",
    ),
    Break(
        number=11,
        what="the end token, being the padding token too, is not learnt",
        file="data/loader.py",
        old="batch.view[row, span.loss] = segment.view",
        new="batch.view[row, span.loss] = np.where(\n"
        "        segment.loss_ids == segment.target_ids[-1], -1, segment.view)",
        test="data/test_loader.py::test_rows_hold_the_segments",
    ),
    Break(
        number=11,
        what="nothing counted is 0 / 0",
        file="data/loader.py",
        old="        if count:\n            of_view",
        new="        if True:\n            of_view",
        test="data/test_loader.py::test_a_view_without_tokens_has_no_weight",
    ),
    Break(
        number=12,
        what="T^2 is forgotten",
        file="losses/options.py",
        old="return self.temperature**2 if self.scale_by_t2 else 1.0",
        new="return 1.0",
        test="losses/test_fused_head.py::test_scale_by_t2",
    ),
    Break(
        number=12,
        what="the loss takes a temperature that the teacher was not labelled at",
        file="data/teacher_records.py",
        old="if temperature not in cache.temperatures:",
        new="temperature = cache.temperatures[0]\n        if False:",
        test="data/test_loader.py::test_an_undeclared_temperature_names_the_declared",
    ),
    Break(
        number=13,
        what="the perplexity comes from the mixed loss",
        file="evaluation/scorer.py",
        old='nll = float(sums["nll"].sum() / counts.sum())',
        new='nll = float((sums["nll"] + sums.get("kl", 0.0)).sum() / counts.sum())',
        test="evaluation/test_scorer.py::test_nll_and_perplexity_are_the_models_own",
    ),
    Break(
        number=14,
        what="prompts are learnt",
        file="data/loader.py",
        old="first = stop - len(segment.target_ids)",
        new="first = start",
        test="training/test_method_losses.py::test_the_loss_is_the_methods"
        "[finetune-decoder-hard-decoder]",
    ),
    Break(
        number=14,
        what="wrong rationales are learnt",
        file="data/loader.py",
        old="first = stop - len(segment.target_ids)",
        new="first = stop - len(segment.target_ids) - len(segment.prefix_ids)",
        test="training/test_method_losses.py::test_the_loss_is_the_methods"
        "[counterfactual-decoder-hard and soft-decoder]",
    ),
    Break(
        number=15,
        what="the wrong choice is the first one in every epoch",
        file="data/order.py",
        old="drawn = rng.permutation(np.arange(len(self._alternatives)))",
        new="drawn = np.arange(len(self._alternatives))",
        test="data/test_loader.py::test_an_epoch_takes_one_of_the_alternatives",
    ),
    Break(
        number=15,
        what="wrong choices stand at the front of every epoch",
        file="data/order.py",
        old="order = drawn[first][places]",
        new="order = drawn[np.sort(first)]",
        test="data/test_loader.py::test_alternatives_stand_anywhere_in_an_epoch",
    ),
    Break(
        number=15,
        what="the wrong choice is the right one",
        file="data/templates.py",
        old="yield Text(prompt, choice, prefix",
        new="yield Text(prompt, example.answer, prefix",
        test="training/test_method_losses.py::test_the_loss_is_the_methods"
        "[counterfactual-decoder-hard and soft-decoder]",
    ),
    Break(
        number=16,
        what="an answer within another one counts as right",
        file="evaluation/text_match.py",
        old="name: normalize_text(text) in map(normalize_text, targets)",
        new="name: any(normalize_text(t) in normalize_text(text) for t in targets)",
        test="evaluation/test_scorer.py::test_answers_are_parsed_and_compared",
    ),
]


def test_every_class_has_a_break():
    assert {b.number for b in BREAKS} == set(range(1, 17))


@pytest.mark.slow
@pytest.mark.parametrize("broken", BREAKS, ids=lambda b: f"{b.number}: {b.what}")
def test_what_is_broken_exists(broken):
    assert (ROOT / "kdjax" / broken.file).read_text().count(broken.old) == 1
    file, name = broken.test.partition("[")[0].split("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("broken", BREAKS, ids=lambda b: f"{b.number}: {b.what}")
def test_the_break_is_noticed(broken, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("kdjax", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "kdjax" / broken.file
    file.write_text(file.read_text().replace(broken.old, broken.new))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-x", f"tests/{broken.test}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    # 1: tests failed (2 and up would be: none was found, or none could start).
    assert run.returncode == 1, run.stdout + run.stderr
