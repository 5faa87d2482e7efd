"""The endpoints that list what is served."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pjrlhf.serving.service import Endpoint, Service
from pjrlhf.types import Json


def endpoints(service: Service) -> list[Endpoint]:
    """/v1/models."""

    def described(name: str, parent: str | None) -> dict[str, Json]:
        text = service.catalogue.notes.describe(name)["description"]
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "pjrlhf",
            "parent": parent,
            "max_model_len": service.engine.context,
            **({"description": text} if text else {}),
        }

    async def every(request: Request) -> Response:
        found = [described(name, parent) for name, parent in service.catalogue.models.items()]
        return JSONResponse({"object": "list", "data": found})

    async def one(request: Request) -> Response:
        name = request.path_params["name"]
        service.voice(name)  # a soup is a model, too
        models = service.catalogue.models
        return JSONResponse(described(name, models.get(name, next(iter(models)))))

    return [Endpoint("GET", "/v1/models", every), Endpoint("GET", "/v1/models/{name:path}", one)]
