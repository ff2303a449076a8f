"""Which models this engine computes rightly. What isn't known to be right is refused by name: a wrong model
doesn't fail, it talks nonsense."""

import logging
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers.cache import LayerShape
from llmboost_worker.engine.transformers.loading import probe
from llmboost_worker.engine.transformers.loading.probe import LayerCall

logger = logging.getLogger(__name__)

LAYER_KINDS = {"full_attention", "sliding_attention"}
"""Of transformers' names for layers: those whose whole state is keys and values per token, attended
causally."""

UNSUPPORTED = {"position_bias", "alibi"}
"""Keywords that change what attention computes, and that the engine's doesn't know."""


def check_config(name: str, config: Any) -> None:
    """Refuses models called `name` by what their (text) configuration says, before weights are read."""
    if config.is_encoder_decoder:
        raise refusal(name, "it is an encoder-decoder")
    if kinds := set(getattr(config, "layer_types", None) or ()) - LAYER_KINDS:
        raise refusal(name, f"it has layers of kind {', '.join(sorted(kinds))}")
    attention = getattr(config, "attn_config", None)
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False) or config.model_type == "bloom":
        raise refusal(name, "it has ALiBi position biases")


def check_split(name: str, config: Any, tp: int) -> None:
    """Refuses what can't be split over so many devices."""
    if tp == 1:
        return
    if not getattr(config, "base_model_tp_plan", None):
        raise refusal(name, f"--tp is {tp}, and transformers has no plan to split them: use --tp 1")
    for heads in ("num_attention_heads", "num_key_value_heads"):
        if (number := getattr(config, heads, None)) and number % tp:
            raise EngineError(
                f"--tp is {tp}, but {name!r} has {number} {heads}, which it doesn't divide: "
                "use a --tp that does"
            )


def class_of(name: str, config: Any) -> Any:
    """transformers' class to load that configuration with: a causal language model, or the model around one
    that also takes images or sound, and serves for its text.

    Raises:
        EngineError: there is none.
    """
    remote = getattr(config, "auto_map", {})
    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        if type(config) in auto._model_mapping or auto.__name__ in remote:
            return auto
    raise refusal(name, "transformers has no causal language model of that kind")


def check_class(name: str, model: Any) -> None:
    """Refuses by what the model's class says of itself."""
    if getattr(model, "_is_stateful", False):
        raise refusal(name, "it has recurrent layers")
    if not getattr(model, "_supports_attention_backend", False):
        raise refusal(name, "transformers can't replace its attention")


def layers_of(name: str, model: Any, config: Any, max_model_len: int) -> list[LayerShape]:
    """What each layer stores per token.

    Raises:
        EngineError: as `check_calls`, or the model can't compute one token by itself.
    """
    try:
        calls = probe.record(model)
    except Exception as error:  # whatever a model's own code raises
        logger.exception("the model can't compute a token")
        raise refusal(name, f"it can't compute a token ({type(error).__name__}: {error})") from error
    return check_calls(name, config, calls, max_model_len)


def check_calls(name: str, config: Any, calls: list[LayerCall], max_model_len: int) -> list[LayerShape]:
    """
    Raises:
        EngineError: some layer doesn't attend exactly once, asks for something that the engine's attention
            doesn't do, or isn't of one mind about its window, so that it counts on a mask.
    """
    calls = sorted(calls, key=lambda call: call.layer)
    layers = [call.layer for call in calls]
    if layers != list(range(config.num_hidden_layers)):
        raise refusal(name, f"of its {config.num_hidden_layers} layers, these attend: {layers}")
    for call, configured in zip(calls, windows(config), strict=True):
        kind = type(call.module).__name__
        for keyword in UNSUPPORTED & call.keywords.keys():
            raise refusal(name, f"attention with {keyword!r} in {kind}")
        if not getattr(call.module, "is_causal", True):
            raise refusal(name, f"{kind} isn't causal")
        if call.makes_mask:
            raise refusal(name, f"{kind} builds an attention mask of its own")
        asked = call.keywords.get("sliding_window")
        seen = configured if call.mask is None else _window(name, call, max_model_len)
        # The same for the cache of `generate`, for the attention and in the mask; else one of them is wrong.
        if len({_within(window, max_model_len) for window in (configured, asked, seen)}) > 1:
            raise refusal(
                name,
                f"layer {call.layer} has a window of {configured} by its configuration, of {asked} by what "
                f"it asks for, and of {seen} by its mask",
            )
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


def _window(name: str, call: LayerCall, length: int) -> int | None:
    """How many tokens the layer's mask shows to each token, itself included; None if all before it.

    Raises:
        EngineError: it shows others.
    """
    assert call.mask is not None
    seen = int(probe.visible(call.mask, length - 1, length).sum())
    for position in {0, 1, length // 2, seen - 1, seen, length - 1} & set(range(length)):
        expected = torch.zeros(length, dtype=torch.bool)
        expected[max(0, position + 1 - seen) : position + 1] = True
        if not torch.equal(probe.visible(call.mask, position, length), expected):
            raise refusal(name, f"the tokens that layer {call.layer} sees are no window of those before")
    return seen if seen < length else None


def _within(window: int | None, length: int) -> int | None:
    """A window as far as it hides any of that many tokens."""
    return window if window is not None and window < length else None


def windows(config: Any) -> list[int | None]:
    """Per layer, how many tokens one sees by the configuration, which is how transformers' cache has it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    if not getattr(config, "use_sliding_window", True):
        window = None
    return [window] * config.num_hidden_layers
