"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from llmboost_api.auth import owner
from llmboost_api.pod import pod_of
from llmboost_api.protocol.models import model_object

router = APIRouter(prefix="/v1", dependencies=[Depends(owner)], tags=["models"])


@router.get("/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Every name that a request may ask for."""
    return {"object": "list", "data": [model_object(card) for card in await pod_of(request).models.all()]}


@router.get("/models/{model:path}")
async def retrieve_model(request: Request, model: str) -> dict[str, Any]:
    """One of them; names may hold slashes, encoded or not."""
    return model_object(await pod_of(request).models.find(model))
