"""The HTTP application: routes, keys and errors. The endpoints come in groups, each in a module of its own."""

import uuid
from collections.abc import Callable, Sequence

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pjrlhf.serving import answers, models, monitoring, openapi, web_page
from pjrlhf.serving.catalogue import Catalogue
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.people import api as people
from pjrlhf.serving.protocol import Refused, error
from pjrlhf.serving.service import Endpoint, Service
from pjrlhf.serving.settings import ServerSettings

# Earlier groups come first where two of their paths match.
GROUPS: tuple[Callable[[Service], Sequence[Endpoint]], ...] = (
    models.endpoints,
    answers.endpoints,
    people.endpoints,
    monitoring.endpoints,
    web_page.endpoints,
)


class Server:
    """The application.

    Args:
      catalogue, engine, settings: see `Service`.
      api_key: that requests must bring; "" for none.
    """

    def __init__(self, catalogue: Catalogue, engine: Engine, settings: ServerSettings, api_key: str = ""):
        self.service = Service(catalogue, engine, settings, api_key)
        endpoints = [endpoint for group in GROUPS for endpoint in group(self.service)]
        endpoints.append(openapi.endpoint(endpoints, bool(api_key)))
        routes = [self._route(endpoint) for endpoint in endpoints]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route, Exception: _failed})

    def _route(self, endpoint: Endpoint) -> Route:
        async def answer(request: Request) -> Response:
            try:
                if not endpoint.open and not self.service.admits(request):
                    message = "the API key is missing or wrong; send it as a bearer token"
                    raise Refused(message, status=401, code="invalid_api_key")
                response = await endpoint.handler(request)
            except Refused as refused:
                body = error(refused.message, refused.status, refused.param, refused.code)
                response = JSONResponse(body, refused.status, refused.headers)
            except ClientDisconnect:
                response = Response(status_code=499)
            response.headers["x-request-id"] = uuid.uuid4().hex
            if not endpoint.open:
                self.service.metrics.requests.labels(endpoint.path, str(response.status_code)).inc()
                logging.info("%s %s: %d", endpoint.method, endpoint.path, response.status_code)
            return response

        return Route(endpoint.path, answer, methods=[endpoint.method])


async def _no_route(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {problem.detail}; GET /openapi.json lists what there is"
    return JSONResponse(error(message, problem.status_code), problem.status_code, problem.headers)


async def _failed(request: Request, problem: Exception) -> Response:
    logging.error("%s %s: %s", request.method, request.url.path, type(problem).__name__)
    return JSONResponse(error("the server failed at this request", 500), 500)
