"""The endpoints for those who run the server: health and metrics."""

import prometheus_client
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from pjrlhf.serving.service import Endpoint, Service


class Health(TypedDict):
    """The state of the engine, and whether a vote may wait for the compiler."""

    status: str
    waiting: int
    running: int
    compiling: bool


def endpoints(service: Service) -> list[Endpoint]:
    """/health, /health/live and /metrics."""

    async def health(request: Request) -> Response:
        """Whether requests are taken, for load balancers."""
        engine = service.engine
        state: Health = {
            "status": engine.state,
            "waiting": engine.waiting,
            "running": engine.running,
            "compiling": service.compiling,
        }
        return JSONResponse(state, 200 if engine.state == "ok" else 503)

    async def live(request: Request) -> Response:
        """Whether a restart is not needed: also true while answers are finished after SIGTERM."""
        status = service.engine.state
        return JSONResponse({"status": status}, 503 if status == "stopped" else 200)

    async def metrics(request: Request) -> Response:
        kind = prometheus_client.CONTENT_TYPE_LATEST
        return Response(prometheus_client.generate_latest(service.metrics.registry), headers={"content-type": kind})

    return [
        Endpoint("GET", "/health", health, open=True, summary="Tells whether requests are taken", answer=Health),
        Endpoint("GET", "/health/live", live, open=True),
        Endpoint("GET", "/metrics", metrics, open=True, summary="Metrics for Prometheus"),
    ]
