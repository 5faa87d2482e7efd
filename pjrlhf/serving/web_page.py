"""The web page: its files, what it has to know about the server, and the report of the run that is served."""

import hashlib
import hmac
import mimetypes
import pathlib

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from pjrlhf.serving.catalogue import BASE, PERSONAL
from pjrlhf.serving.people.members import Members
from pjrlhf.serving.protocol import Refused
from pjrlhf.serving.service import Endpoint, Service
from pjrlhf.types import Json

FILES = pathlib.Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
REPORT = "report"  # in a run directory
COOKIE = "pjrlhf_report"
_ALWAYS = {
    "cache-control": "no-cache",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_NOTHING_ELSE = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# The page takes scripts, styles, pictures and data from this server alone, and nothing in the page itself is a script.
PAGE_HEADERS = _ALWAYS | {
    "content-security-policy": f"{_NOTHING_ELSE}; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'"
}
# A report has its styles and pictures in one file, and no scripts.
REPORT_HEADERS = _ALWAYS | {
    "content-security-policy": f"{_NOTHING_ELSE}; style-src 'unsafe-inline'; img-src 'self' data:"
}


def endpoints(service: Service) -> list[Endpoint]:
    """/, /favicon.ico, /page and /report."""
    files = {path.name: path.read_bytes() for path in FILES.iterdir() if path.suffix in KINDS}
    # A link brings no bearer token, so the page gets a cookie that opens the report and nothing else.
    ticket = hmac.new(service.api_key, COOKIE.encode(), hashlib.sha256).hexdigest()

    def file(name: str) -> Response:
        if name not in files:
            raise Refused(f"/page/{name}: there is no such file; the page is at /", status=404)
        return Response(files[name], media_type=KINDS[pathlib.Path(name).suffix], headers=PAGE_HEADERS)

    async def index(request: Request) -> Response:
        return file("index.html")

    async def icon(request: Request) -> Response:
        return file("icon.svg")  # browsers ask for it beside a report, too

    async def part(request: Request) -> Response:
        return file(request.path_params["name"])

    async def about(request: Request) -> Response:
        headers = _ALWAYS | {"cache-control": "no-store"}
        if not service.admits(request):
            return JSONResponse({"locked": True}, headers=headers)
        response = JSONResponse(_about(service), headers=headers)
        if service.api_key:
            response.set_cookie(COOKIE, ticket, path="/report", httponly=True, samesite="strict")
        return response

    async def report(request: Request) -> Response:
        admitted = hmac.compare_digest(request.cookies.get(COOKIE, "").encode("latin-1", "replace"), ticket.encode())
        if not (admitted or service.admits(request)):
            raise Refused("the API key is missing or wrong; open the report from the page at /", status=401)
        run, path = service.catalogue.run, request.path_params["path"]
        found = None if run is None else _inside(run / REPORT, path or "index.html")
        if found is None:
            raise Refused(f"/report/{path[:200]}: the served run has no such file in its report", status=404)
        kind = mimetypes.guess_type(found.name)[0] or "application/octet-stream"
        return FileResponse(found, media_type=kind, headers=REPORT_HEADERS)

    return [
        Endpoint("GET", "/", index, open=True),
        Endpoint("GET", "/favicon.ico", icon, open=True),
        Endpoint("GET", "/page/about", about, open=True),
        Endpoint("GET", "/page/{name}", part, open=True),
        Endpoint("GET", "/report/{path:path}", report, open=True),
    ]


def _about(service: Service) -> dict[str, Json]:
    catalogue = service.catalogue
    notes, people, run = catalogue.notes, catalogue.people, catalogue.run
    mixing = bool(catalogue.names) and not catalogue.user_tokens
    generic = dict(service.voice(PERSONAL).weights) if PERSONAL in catalogue.models else None
    return {
        "locked": False,
        "title": notes.title,
        "model": catalogue.default,
        "base": BASE,
        "mixing": mixing,  # whether a request may have weights
        "ingredients": [{"name": name, **notes.describe(name)} for name in catalogue.names],
        "people": isinstance(people, Members),
        "learns": isinstance(people, Members) and people.learns,
        "asks": bool(service.questions),  # whether there are pairs to ask a person about
        "generic": generic,  # weights of a person who is not known
        "chat": catalogue.chat,
        "longest": min(256, service.engine.context // 2),  # tokens of a plain completion
        "examples": list(notes.examples),
        "report": run is not None and (run / REPORT / "index.html").is_file(),
    }


def _inside(folder: pathlib.Path, path: str) -> pathlib.Path | None:
    """The file `path` in a folder; None where there is none, or where it lies elsewhere, links followed."""
    try:
        root = folder.resolve()
        found = (root / path).resolve()
        return found if found.is_relative_to(root) and found.is_file() else None
    except (OSError, ValueError):  # names that no file can have
        return None
