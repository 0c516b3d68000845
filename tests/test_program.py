"""What a config compiles to, known before there is any data."""

import jax
import pytest

from kdjax import experiment, methods, program, sharding
from kdjax.config import MeshConfig
from kdjax.data import loader
from tests import small
from tests.test_step import FakeCache


@pytest.mark.parametrize("soft_weight", [0.0, 0.5])
def test_the_abstract_batch_is_the_real_one(soft_weight):
    config = small.config(
        train={"num_threads": 1, "batch_size": 8, "row_length": 128},
        method={"soft_weight": soft_weight},
        cache={"k": FakeCache.k},
    )
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:2])
    data = experiment.load_data(config, splits=("train",))
    shape = experiment.student_shape(config, data.tokenizer)
    batch = loader.make_batch(
        experiment.make_plan(config, data.train),
        0,
        terms=methods.terms(config.method),
        cache=FakeCache(data.train, shape.vocab_size) if soft_weight else None,
        temperature=config.method.temperature,
    )
    abstract = program.abstract_batch(config, mesh, vocab_size=shape.vocab_size)
    described = {name: (x.shape, x.dtype) for name, x in abstract.items()}
    assert described == {name: (x.shape, x.dtype) for name, x in batch.items()}
    model = experiment.make_model(shape, mesh, dtype="float32")
    made = program.Program(config, model, mesh)
    assert made.step.lower(made.abstract, abstract).compile().memory_analysis()
