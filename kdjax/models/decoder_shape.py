"""Checks of decoder configs, and configs with a subset of another's layers."""

import dataclasses
from collections.abc import Sequence

from kdjax.config import Choice, DecoderConfig, check


def select_layers(config: DecoderConfig, layers: Sequence[int]) -> DecoderConfig:
    """Return the config of a model made of some layers of another, in this order."""

    def select(values: tuple, default: int | str) -> tuple:
        selected = tuple(values[layer] for layer in layers) if values else ()
        return selected if any(value != default for value in selected) else ()

    return dataclasses.replace(
        config,
        num_layers=len(layers),
        windows=select(config.windows, 0),
        rotary=select(config.rotary, "global"),
    )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if error := Choice(choices).error(value):
        raise ValueError(f"{name}={value!r} {error}")


def check_shape(config: DecoderConfig) -> None:
    """Raise ValueError, naming a field, for a config that describes no model."""
    check(config)
    if not config.vocab_size:
        raise ValueError("vocab_size=0 must be at least 1: set it")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_kv_heads={config.num_kv_heads} does not divide "
            f"num_heads={config.num_heads}: use a divisor"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"head_dim={config.head_dim} is odd, rotary needs pairs: use even"
        )
    for name in ("windows", "rotary"):
        values = getattr(config, name)
        if len(values) not in (0, config.num_layers):
            raise ValueError(
                f"{name}={values} is of {len(values)} layers, num_layers="
                f"{config.num_layers}: give one value a layer, or ()"
            )
    rope = config.rope
    if rope.type in ("llama3", "yarn") and rope.original_length < 1:
        raise ValueError(
            f"rope.original_length={rope.original_length} with rope.type="
            f"{rope.type!r}: give the length before stretching, in tokens"
        )
    if not rope.low_freq_factor < rope.high_freq_factor:
        raise ValueError(
            f"rope.low_freq_factor={rope.low_freq_factor} is not below "
            f"rope.high_freq_factor={rope.high_freq_factor}: lower it"
        )
