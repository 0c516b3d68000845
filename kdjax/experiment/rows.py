"""Rows of a Config: their lengths, their order, and what a step computes of them."""

from typing import Any

from kdjax.config import Config, DecoderConfig, T5Config, TrainConfig
from kdjax.data import loader
from kdjax.data.views import Segment
from kdjax.models.lm import Shape


def row_kwargs(
    shape: Shape, row_length: int, encoder_row_length: int
) -> dict[str, Any]:
    """Keywords of `BatchPlan`: rows as a model reads them.

    Args:
      shape: the model's.
      row_length: tokens a row; with an encoder, of the decoder.
      encoder_row_length: tokens a row of the encoder; 0 = row_length.
    """
    if isinstance(shape, DecoderConfig):
        return {"row_length": row_length}
    return {
        "row_length": row_length,
        "encoder_length": encoder_row_length or row_length,
        "start_id": shape.start_id,
        "end_id": shape.eos_id,
    }


def joint_row_length(student: Shape, row_length: int, encoder_row_length: int) -> int:
    """Tokens of a row that holds prompt and target of what a student's rows hold.

    For a model that only decodes beside a student that has an encoder.
    """
    if isinstance(student, DecoderConfig):
        return row_length
    return row_length + (encoder_row_length or row_length)


def flops_kwargs(shape: Shape, train: TrainConfig) -> dict[str, Any]:
    """Keywords of `flops.train_flops` for a training step; the head sees all tokens."""
    num_tokens = train.batch_size * train.row_length
    found = {"num_tokens": num_tokens, "num_head_tokens": num_tokens}
    found["row_length"] = train.row_length
    if isinstance(shape, T5Config):
        length = train.encoder_row_length or train.row_length
        found["encoder_row_length"] = length
        found["num_encoder_tokens"] = train.batch_size * length
    return found


def make_plan(
    config: Config, shape: Shape, segments: list[Segment]
) -> loader.BatchPlan:
    """The order of the training batches of a student."""
    train = config.train
    return loader.BatchPlan(
        segments,
        batch_size=train.batch_size,
        num_microbatches=train.num_microbatches,
        seed=config.seed,
        **row_kwargs(shape, train.row_length, train.encoder_row_length),
    )
