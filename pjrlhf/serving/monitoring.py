"""The endpoints for those who run the server: health and metrics."""

import prometheus_client
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pjrlhf.serving.service import Endpoint, Service


def endpoints(service: Service) -> list[Endpoint]:
    """/health and /metrics."""

    async def health(request: Request) -> Response:
        engine = service.engine
        state = {
            "status": "ok" if engine.healthy else "stopped",
            "waiting": engine.waiting,
            "running": engine.running,
        }
        return JSONResponse(state, 200 if engine.healthy else 503)

    async def metrics(request: Request) -> Response:
        kind = prometheus_client.CONTENT_TYPE_LATEST
        return Response(prometheus_client.generate_latest(service.metrics.registry), headers={"content-type": kind})

    return [Endpoint("GET", "/health", health, open=True), Endpoint("GET", "/metrics", metrics, open=True)]
