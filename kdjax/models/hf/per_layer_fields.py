"""The fields of config.json that say how layers differ: windows, rotary positions."""

from kdjax.config import DecoderConfig
from kdjax.models.hf.config_fields import FULL, SLIDING, Json, Part, Values


def _window(json: Json) -> int:
    size = json.take("sliding_window") or 0
    if not isinstance(size, int) or size < 0:
        json.refuse("sliding_window", size, "only a number of tokens, or null")
    return size


def _types(json: Json) -> list[str] | None:
    """Read the layer types that a file states; None if it does not."""
    types = json.take("layer_types", None)
    if types is None:
        return None
    num_layers = json.take("num_hidden_layers")
    if len(types) != num_layers or not set(types) <= {SLIDING, FULL}:
        json.refuse("layer_types", types, f"only {num_layers} of {SLIDING}, {FULL}")
    return types


def _windows(json: Json, types: list[str], size: int) -> tuple[int, ...]:
    """Windows of layers of these types; () if there is none."""
    if SLIDING not in types:
        return ()
    if not size:
        json.refuse("layer_types", types, "there is no sliding_window in use")
    return tuple(size if kind == SLIDING else 0 for kind in types)


def _types_of(config: DecoderConfig) -> list[str]:
    windows = config.windows or (0,) * config.num_layers
    return [SLIDING if size else FULL for size in windows]


def _size_of(config: DecoderConfig) -> int | None:
    return max(config.windows, default=0) or None


def _read_mistral(json: Json) -> Values:
    size, num_layers = _window(json), json.take("num_hidden_layers")
    return {"windows": (size,) * num_layers if size else ()}


mistral_windows = Part(
    _read_mistral, lambda config: {"sliding_window": _size_of(config)}
)


def _read_qwen(json: Json) -> Values:
    json.take("sliding_window", None)
    size = _window(json) if json.take("use_sliding_window", False) else 0
    first, types = json.take("max_window_layers", None), _types(json)
    if types is None and size:
        first = json.take("max_window_layers")
        num_layers = json.take("num_hidden_layers")
        types = [SLIDING if n >= first else FULL for n in range(num_layers)]
    return {"windows": _windows(json, types or [], size)}


def _write_qwen(config: DecoderConfig) -> Values:
    types = _types_of(config)
    return {
        "use_sliding_window": SLIDING in types,
        "sliding_window": _size_of(config),
        "max_window_layers": [*types, SLIDING].index(SLIDING),
        "layer_types": types,
    }


qwen_windows = Part(_read_qwen, _write_qwen)


def _read_smollm3(json: Json) -> Values:
    json.take("sliding_window", None)
    json.take("max_window_layers", None)  # transformers does not read it either
    size = _window(json) if json.take("use_sliding_window", False) else 0
    num_layers = json.take("num_hidden_layers")
    interval = json.take("no_rope_layer_interval", 4)
    turned = json.take("no_rope_layers", None)  # 1 where there *are* positions
    if turned is None:
        if type(interval) is not int or interval < 1:
            json.refuse("no_rope_layer_interval", interval, "only a number of layers")
        turned = [int((n + 1) % interval != 0) for n in range(num_layers)]
    if len(turned) != num_layers:
        json.refuse("no_rope_layers", turned, f"only one of 0 or 1 for {num_layers}")
    types = _types(json)
    if types is None:
        types = [SLIDING if size and not has else FULL for has in turned]
    rotary = tuple("global" if has else "none" for has in turned)
    return {
        "windows": _windows(json, types, size),
        "rotary": rotary if "none" in rotary else (),
    }


def _write_smollm3(config: DecoderConfig) -> Values:
    types = _types_of(config)
    rotary = config.rotary or ("global",) * config.num_layers
    return {
        "use_sliding_window": SLIDING in types,
        "sliding_window": _size_of(config),
        "no_rope_layers": [int(kind != "none") for kind in rotary],
        "layer_types": types,
    }


smollm3_layers = Part(_read_smollm3, _write_smollm3)


def gemma_layers(*, pattern: int, local_rope: bool) -> Part:
    """Every `pattern`-th layer sees everything; the others have a window."""

    def read(json: Json) -> Values:
        size, num_layers = _window(json), json.take("num_hidden_layers")
        period, types = pattern, _types(json)
        if local_rope:
            period = json.take("sliding_window_pattern", pattern)
            if type(period) is not int or period < 1:
                json.refuse("sliding_window_pattern", period, "only a number of layers")
        if types is None:
            types = [SLIDING if (n + 1) % period else FULL for n in range(num_layers)]
        rotary = tuple("local" if kind == SLIDING else "global" for kind in types)
        return {
            "windows": _windows(json, types, size),
            "rotary": rotary if local_rope and "local" in rotary else (),
        }

    def write(config: DecoderConfig) -> Values:
        return {
            "sliding_window": _size_of(config),
            "layer_types": _types_of(config),
        }

    return Part(read, write)
