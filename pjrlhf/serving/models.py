"""The endpoints that list what is served."""

from typing import Literal, NotRequired

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from pjrlhf.serving.service import Endpoint, Service


class ModelCard(TypedDict):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    max_model_len: int
    description: NotRequired[str]
    mix: NotRequired[dict[str, float]]


class ModelList(TypedDict):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


def endpoints(service: Service) -> list[Endpoint]:
    """/v1/models."""

    def described(name: str, parent: str | None) -> ModelCard:
        card: ModelCard = {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "pjrlhf",
            "parent": parent,
            "max_model_len": service.engine.context,
        }
        if text := service.catalogue.notes.describe(name)["description"]:
            card["description"] = text
        if (soup := service.catalogue.soups.get(name)) is not None:
            card["mix"] = dict(soup)
        return card

    async def every(request: Request) -> Response:
        found = [described(name, parent) for name, parent in service.catalogue.models.items()]
        body: ModelList = {"object": "list", "data": found}
        return JSONResponse(body)

    async def one(request: Request) -> Response:
        name = request.path_params["name"]
        service.voice(name)  # a soup is a model, too
        models = service.catalogue.models
        return JSONResponse(described(name, models.get(name, next(iter(models)))))

    return [
        Endpoint("GET", "/v1/models", every, summary="Lists what is served", answer=ModelList),
        Endpoint("GET", "/v1/models/{name:path}", one, summary="Describes one model", answer=ModelCard),
    ]
