"""Which models this engine computes rightly. What isn't known to be right is refused by name: a wrong model
doesn't fail, it talks nonsense."""

from typing import Any

import torch

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers.attention import LayerCall, Probe, attending
from llmboost_worker.engine.transformers.cache import LayerShape

LAYER_KINDS = {"full_attention", "sliding_attention"}
"""Of transformers' names for layers: those whose whole state is keys and values per token, attended
causally."""


def check_config(config: Any) -> None:
    """Refuses by what the (text) configuration says, before weights are read."""
    name = config.model_type
    if config.is_encoder_decoder:
        raise refusal(name, "it is an encoder-decoder")
    if kinds := set(getattr(config, "layer_types", None) or ()) - LAYER_KINDS:
        raise refusal(name, f"it has layers of kind {', '.join(sorted(kinds))}")
    attention = getattr(config, "attn_config", None)
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False) or name == "bloom":
        raise refusal(name, "it has ALiBi position biases")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refusal(name, "its layers share keys and values")
    if getattr(config, "use_bidirectional_attention", None):
        raise refusal(name, "its attention looks ahead")


def check_class(model: Any, config: Any) -> None:
    """Refuses by what the model's class says of itself."""
    if getattr(model, "_is_stateful", False):
        raise refusal(config.model_type, "it has recurrent layers")
    if not all(getattr(module, "is_causal", True) for module in model.modules()):
        raise refusal(config.model_type, "its attention isn't causal")
    if not getattr(model, "_supports_attention_backend", False):
        raise refusal(config.model_type, "transformers can't replace its attention")


def probe(model: Any, config: Any) -> list[LayerShape]:
    """What each layer stores per token, found by a forward of one token.

    Raises:
        EngineError: as `check_calls`, or a layer asks its attention for something that it doesn't do.
    """
    recorder = Probe()
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        with attending(recorder):
            model(input_ids=one, position_ids=one, use_cache=False)
    except NotImplementedError as error:
        raise refusal(config.model_type, str(error)) from error
    return check_calls(config, recorder.calls)


def check_calls(config: Any, calls: list[LayerCall]) -> list[LayerShape]:
    """
    Raises:
        EngineError: some layer doesn't attend exactly once, or has a window other than the
            configuration's, so that it counts on a mask.
    """
    name, calls = config.model_type, sorted(calls, key=lambda call: call.layer)
    layers = [call.layer for call in calls]
    if layers != list(range(config.num_hidden_layers)):
        raise refusal(name, f"of its {config.num_hidden_layers} layers, these attend: {layers}")
    for call, window in zip(calls, windows(config), strict=True):
        if call.window != window:
            raise refusal(name, f"layer {call.layer} should have a window of {window}, not {call.window}")
    return [call.shape for call in calls]


def position_limit(config: Any) -> int | None:
    """Positions the model was made for, as far as they are encoded alike whatever else is in the batch."""
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            # These change the frequencies of all rows when one passes the original length.
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(filter(None, (limit, original)), default=None)
    return limit


def refusal(name: str, why: str) -> EngineError:
    return EngineError(f"the transformers engine can't serve {name!r} models: {why}. Try the vllm engine.")


def windows(config: Any) -> list[int | None]:
    """Per layer, how many tokens one sees; as transformers builds its masks."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    if not getattr(config, "use_sliding_window", True):
        window = None
    return [window] * config.num_hidden_layers
