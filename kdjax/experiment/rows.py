"""Rows of a Config: their lengths, their order and the FLOPs of a step."""

from collections.abc import Sequence
from typing import Any

from kdjax.config import Config, DecoderConfig, T5Config, TrainConfig
from kdjax.data import loader
from kdjax.data.views import Segment
from kdjax.models.lm import Shape


def row_kwargs(
    shape: Shape, row_length: int, encoder_row_length: int
) -> dict[str, Any]:
    """Return the keywords of `BatchPlan`: rows as a model reads them.

    Args:
      shape: the model's.
      row_length: tokens per row; with an encoder, of the decoder.
      encoder_row_length: tokens per row of the encoder; 0 = row_length.
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
    """Return the tokens of a row with both prompt and target of a student's rows.

    For a decoder that reads the data of a student with an encoder.
    """
    if isinstance(student, DecoderConfig):
        return row_length
    return row_length + (encoder_row_length or row_length)


def flops_kwargs(shape: Shape, train: TrainConfig) -> dict[str, Any]:
    """Return the keywords of `flops.train_flops`; the head sees all tokens."""
    num_tokens = train.batch_size * train.row_length
    kwargs = {"num_tokens": num_tokens, "num_head_tokens": num_tokens}
    kwargs["row_length"] = train.row_length
    if isinstance(shape, T5Config):
        length = train.encoder_row_length or train.row_length
        kwargs["encoder_row_length"] = length
        kwargs["num_encoder_tokens"] = train.batch_size * length
    return kwargs


def make_plan(
    config: Config, shape: Shape, segments: Sequence[Segment]
) -> loader.BatchPlan:
    """Plan the order of the training batches of a student."""
    train = config.train
    return loader.BatchPlan(
        segments,
        batch_size=train.batch_size,
        num_microbatches=train.num_microbatches,
        seed=config.seed,
        window=train.shuffle_window,
        **row_kwargs(shape, train.row_length, train.encoder_row_length),
    )
