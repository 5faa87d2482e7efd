"""Bytes that are no proper request: an answer of the 400s or a closed connection, never a 500 and never a wait."""

import json
import socket

import pytest
from support import tiny_serving
from support.serving import answering, send

from pjrlhf.serving.catalogue import Catalogue

PATH = "/v1/completions"
BODY = json.dumps({"model": "base", "prompt": "what", "max_tokens": 1}).encode()
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    model = tiny_serving.model(tmp_path_factory.mktemp("base"))
    engine = tiny_serving.engine(model)
    catalogue = Catalogue(model, ("P1A", "P2B", "P3A"), tiny_serving.bank(model))
    with answering(catalogue, engine, max_body=20_000) as place:
        send(place, json.loads(BODY), PATH)  # compiles, for which the sockets below do not wait
        yield place


def post(*headers, body=BODY, path=PATH, version="HTTP/1.1"):
    """The bytes of a request, with a right length unless the headers say something about it."""
    if not any(word in header.lower() for header in headers for word in ("content-length", "transfer-encoding")):
        headers = (*headers, f"Content-Length: {len(body)}")
    lines = [f"POST {path} {version}", "Host: a", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def chunked(*parts):
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


CHUNKS = "Transfer-Encoding: chunked"
# name -> (bytes, statuses); 0 is a connection closed without an answer.
REQUESTS = {
    "a proper one": (post(JSON), {200}),
    "a charset": (post("Content-Type: Application/JSON; charset=utf-8"), {200}),
    "a byte order mark": (post(JSON, body=b"\xef\xbb\xbf" + BODY), {200}),
    "an old version": (post(JSON, version="HTTP/1.0"), {200}),
    "a body in chunks": (post(JSON, CHUNKS, body=chunked(BODY[:5], BODY[5:])), {200}),
    "many small chunks": (post(JSON, CHUNKS, body=chunked(*(BODY[i : i + 1] for i in range(len(BODY))))), {200}),
    "a client that waits for 100": (post(JSON, "Expect: 100-continue"), {200}),
    "a person in bytes": (post(JSON, "X-OpenWebUI-User-Id: \xe9\xff"), {200}),
    "chunks without an end": (post(JSON, CHUNKS, body=b"5\r\n" + BODY[:5]), {0, 400}),
    "no size of a chunk": (post(JSON, CHUNKS, body=b"zz\r\n" + BODY), {0, 400}),
    "a negative chunk": (post(JSON, CHUNKS, body=b"-5\r\n" + BODY), {0, 400}),
    "chunks that are too large": (post(JSON, CHUNKS, body=chunked(*[b" " * 9_000] * 4)), {413}),
    "a length that is too large": (post(JSON, "Content-Length: 99999999999999999999999"), {0, 400, 413}),
    "a length that is no number": (post(JSON, "Content-Length: five"), {0, 400}),
    "a negative length": (post(JSON, "Content-Length: -1"), {0, 400}),
    "two lengths": (post(JSON, "Content-Length: 3", "Content-Length: 4"), {0, 400}),
    "a length and chunks": (post(JSON, "Content-Length: 3", CHUNKS, body=chunked(BODY)), {0, 200, 400, 499}),
    "an unknown transfer encoding": (post(JSON, "Transfer-Encoding: gzip"), {0, 400, 501}),
    "a body that is too short": (post(JSON, f"Content-Length: {len(BODY) + 9}"), {0, 400}),
    "no body": (post(JSON, body=b""), {400}),
    "no type": (post(), {415}),
    "two types": (post("Content-Type: text/plain, application/json"), {415}),
    "compressed bytes": (post(JSON, "Content-Encoding: gzip", body=b"\x1f\x8b\x08\x00" + bytes(range(99))), {400}),
    "text in UTF-16": (post(JSON, body=BODY.decode().encode("utf-16")), {400}),
    "text in latin-1": (post(JSON, body='{"model": "\u00e9"}'.encode("latin-1")), {400}),
    "a header of 200 kB": (post(JSON, "X-Long: " + "a" * 200_000), {0, 200, 400, 431, 499}),
    "thousands of headers": (post(JSON, *(f"X-{i}: {i}" for i in range(9_000))), {0, 200, 400, 431, 499}),
    "a header without a colon": (post(JSON, "nonsense"), {0, 400}),
    "a header with a null": (post(JSON, "X-A: \x00"), {0, 400}),
    "a long path": (post(JSON, path="/" + "a" * 30_000), {404}),
    "a path in bytes": (post(JSON, path="/v1/\xff"), {0, 400, 404}),
    "another path": (post(JSON, path="/v1/../etc/passwd"), {404}),
    "a proxy's path": (post(JSON, path="http://a/v1/completions"), {200, 400, 404}),
    "no HTTP": (b"hello\r\n\r\n", {0, 400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), {0, 400}),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {0, 400, 404, 505}),
    "an unknown method": (b"BREW /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", {0, 400, 405}),
    "nothing": (b"", {0}),
}


def answer(place, data, ends):
    """(status, or 0 for none; body) to some bytes; `ends` says at once that no more follow."""
    with socket.create_connection(place, timeout=30) as connection:
        received = b""
        try:
            connection.sendall(data)
            if ends:  # a client that ends its side has left: its answer is not waited for
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65_536):
                received += part
        except OSError:  # closed while there was more to send
            pass
    head, _, body = received.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]) if head else 0, body


@pytest.mark.parametrize("name", REQUESTS)
def test_bytes_that_are_no_request_harm_nobody(place, name):
    data, statuses = REQUESTS[name]
    status, _ = answer(place, data, 0 in statuses)
    assert status in statuses
    assert send(place, None, "/health", "GET")[1]["status"] == "ok"


@pytest.mark.parametrize(
    "name",
    ["%00", "%ff", "%c3%28", "a/b", "..%2f..", "soup:", "soup:P1A=1e999", "soup:P1A", "%F0%9F%8D%B2", "x" * 3000, "%"],
)
def test_names_of_models_in_paths(place, name):
    status, body, _ = send(place, None, f"/v1/models/{name}", "GET")
    assert status in (400, 404) and body["error"]["message"]


def test_a_client_that_says_nothing_holds_up_nobody(place):
    """Connections that are idle, or in the middle of a request."""
    half = post(JSON)[:40]
    waiting = [socket.create_connection(place, timeout=30) for _ in range(50)]
    for connection in waiting[::2]:
        connection.sendall(half)
    assert send(place, json.loads(BODY), PATH)[0] == 200
    for connection in waiting:
        connection.close()
    assert send(place, None, "/health", "GET")[1]["status"] == "ok"
