"""GET /v1/models: the names that may be asked for."""

from typing import Any

from llmboost.registry import ModelCard


def model_object(card: ModelCard) -> dict[str, Any]:
    """OpenAI's model object, with what other servers add."""
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "llmboost",
        "root": card.root,
        "max_model_len": card.max_model_len,
    }
