"""One model under several names."""

import pytest
from openai import NotFoundError

from tests.e2e.asking import ask, chat, text_of
from tests.e2e.system import MODEL, SEED_NAME, System


def test_models_are_listed(system: System) -> None:
    """Every name that a request may ask for is listed, with the model behind it and its context length."""
    with system.openai() as client:
        models = {model.id: model for model in client.models.list()}
    assert {MODEL, SEED_NAME} <= models.keys()
    for model in (models[MODEL], models[SEED_NAME]):
        assert model.object == "model"
        assert model.to_dict()["root"] == MODEL
        assert model.to_dict()["max_model_len"] == 2048


@pytest.mark.parametrize("name", [SEED_NAME, SEED_NAME.replace("/", "%2F"), MODEL])
def test_one_model_by_its_name(system: System, name: str) -> None:
    """A name with a slash is found, whether the slash is encoded or not."""
    with system.http() as http:
        response = http.get(f"/v1/models/{name}")
    assert response.status_code == 200
    assert response.json()["id"] == name.replace("%2F", "/")


def test_the_official_client_finds_a_name_with_a_slash(system: System) -> None:
    """`models.retrieve` as one would call it; an unknown name is the client's own NotFoundError."""
    with system.openai() as client:
        assert client.models.retrieve(SEED_NAME).id == SEED_NAME
        with pytest.raises(NotFoundError, match="no-such/model"):
            client.models.retrieve("no-such/model")


async def test_all_names_are_one_model(system: System) -> None:
    """The same request gives the same answer under each name, and the answer carries the name that was
    asked for."""
    async with system.async_http() as http:
        one, other = [
            await ask(http, {**chat(seed=1, max_tokens=20), "model": name}) for name in (MODEL, SEED_NAME)
        ]
    assert text_of(one) == text_of(other)
    assert (one["model"], other["model"]) == (MODEL, SEED_NAME)
