"""Which models there are, as this pod knows it: the registry behind a short cache."""

import time

from llmboost.registry import ModelCard, Registry
from llmboost_api.errors import ApiError
from llmboost_api.patience import answered

FRESH_S = 1.0
"""How long a card is believed: long enough that a busy pod asks once a second, not once a request."""
NAMES_SHOWN = 10


class ModelDirectory:
    """Looks up models by any of their names."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._cards: dict[str, tuple[float, ModelCard]] = {}

    async def find(self, name: str) -> ModelCard:
        """The card of a name that a client gave.

        Raises:
            ApiError: nobody serves it (404), or Redis can't be asked (503).
        """
        until, card = self._cards.get(name, (0.0, None))
        if card is not None and time.monotonic() < until:
            return card
        card = await answered(lambda: self.registry.model(name))
        if card is None:
            # Only names that exist are kept, so made-up ones can't fill the memory.
            self._cards.pop(name, None)
            raise await self._unknown(name)
        self._cards[name] = (time.monotonic() + FRESH_S, card)
        return card

    async def all(self) -> list[ModelCard]:
        """Every name that is served.

        Raises:
            ApiError: Redis can't be asked (503).
        """
        return await answered(self.registry.models)

    async def _unknown(self, name: str) -> ApiError:
        names = [repr(card.name) for card in await self.all()]
        if not names:
            remedy = "No model is served now: start a worker."
        elif len(names) <= NAMES_SHOWN:
            remedy = f"Served here: {', '.join(names)}."
        else:
            remedy = f"Served here: {', '.join(names[:NAMES_SHOWN])} and more, see GET /v1/models."
        shown = name if len(name) <= 100 else name[:100] + "…"
        return ApiError(
            404, f"The model {shown!r} does not exist. {remedy}", code="model_not_found", param="model"
        )
