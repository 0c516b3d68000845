"""What a config compiles to, known before there is any data."""

import dataclasses

import jax
import pytest

from kdjax.config import MeshConfig
from kdjax.data import loader
from kdjax.experiment import methods
from kdjax.experiment.data import load_data
from kdjax.experiment.models import make_model, student_shape
from kdjax.experiment.rows import make_plan
from kdjax.experiment.teacher import teacher_config
from kdjax.parallel import sharding
from kdjax.training import program
from tests import helpers
from tests.helpers import FakeCache


@pytest.mark.parametrize("soft_weight", [0.0, 0.5])
def test_the_abstract_batch_is_the_real_one(soft_weight):
    config = helpers.small_config(
        train={"num_threads": 1, "batch_size": 8, "row_length": 128},
        method={"soft_weight": soft_weight},
        cache={"k": FakeCache.k},
    )
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:2])
    data = load_data(config, splits=("train",))
    shape = student_shape(config, data.tokenizer)
    batch = loader.make_batch(
        make_plan(config, shape, data.train),
        0,
        terms=methods.terms(config.method),
        cache=FakeCache(data.train, shape.vocab_size) if soft_weight else None,
        temperature=config.method.temperature,
    )
    abstract = program.abstract_batch(config, shape, mesh, vocab_size=shape.vocab_size)
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract)
    assert described == bare
    model = make_model(shape, mesh, dtype="float32")
    made = program.Program(config, model, mesh)
    assert made.step.lower(made.abstract, abstract).compile().memory_analysis()


@pytest.mark.parametrize("kind", ["cache", "top_k", "dense"])
def test_no_teacher_rows_of_other_microbatches_are_kept(kind):
    """Temporary memory is that of one microbatch, however many there are."""

    def temporary(num_microbatches):
        config = helpers.small_config(
            train={
                "batch_size": 4 * num_microbatches,
                "row_length": 128,
                "num_microbatches": num_microbatches,
                "chunk_size": 32,
            },
            student={"decoder": dataclasses.replace(helpers.DECODER, vocab_size=512)},
        )
        config.teacher.online = kind != "cache"
        config.cache.kind = "dense" if kind == "dense" else "top_k"
        mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
        shape = config.student.decoder
        model = make_model(shape, mesh, dtype="float32")
        teacher = model if config.teacher.online else None
        made = program.Program(config, model, mesh, teacher=teacher)
        batch = program.abstract_batch(config, shape, mesh, vocab_size=512)
        frozen = () if teacher is None else (teacher.abstract,)
        compiled = made.step.lower(made.abstract, batch, *frozen).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) < 1.05 * temporary(2)


def test_the_built_in_teacher_has_hard_labels_all_along():
    """Whatever schedule its student has."""
    config = helpers.small_config(
        method={"weight_schedule": "linear", "final_soft_weight": 1.0}
    )
    assert methods.has_soft_terms(config.method)
    terms = methods.terms(teacher_config(config).method, progress=1.0)
    assert {(term.kind, term.weight) for term in terms} == {("hard", 0.5)}
