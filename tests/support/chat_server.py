"""A server of chat completions on this machine that answers by rule, sometimes badly."""

import contextlib
import http.server
import itertools
import json
import socket
import struct
import threading
import time


class ChatServer:
    """Answers POST /v1/chat/completions.

    Args:
      rule: (body of the request) -> the text of the answer, or a whole choice as a dict.
      faults: what happens to the first requests, one each: "busy" (429), "broken" (500), an HTTP status, "cut" (the
        connection), "reset" (the same, by an error of the connection), "early" (in the middle of the reply), "half"
        (truncated JSON), "other" (JSON of another kind), "slow", or "" for an answer.
      refused: {parameter: what the server says of it}, with status 400, to requests that have it: a message, a whole
        body, or text that is no JSON, in bytes.

    Attributes:
      bodies: of the requests that were answered.
      seen: number of requests.
    """

    def __init__(self, rule, faults=(), key=None, retry_after=0.01, refused=()):
        self.rule, self.key, self.bodies, self.seen = rule, key, [], 0
        self.retry_after, self.refused = str(retry_after), dict(refused)
        self._faults, self._lock = itertools.chain(faults, itertools.repeat("")), threading.Lock()

    @contextlib.contextmanager
    def running(self):
        """The URL of the server, while it runs."""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                outer.answer(self)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, handler):
        with self._lock:
            fault = next(self._faults)
            self.seen += 1
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if self.key and handler.headers["Authorization"] != f"Bearer {self.key}":
            return self._send(handler, 401, {"error": {"message": "wrong key"}})
        if body["model"] == "missing":
            return self._send(handler, 404, {"error": {"message": "no such model"}})
        if fault == "busy":
            return self._send(handler, 429, {"error": {"message": "busy"}}, {"Retry-After": self.retry_after})
        if fault == "broken":
            return self._send(handler, 500, {"error": {"message": "broken"}}, {"Retry-After": "0.01"})
        if isinstance(fault, int):
            return self._send(handler, fault, {"error": {"message": "fault"}}, {"Retry-After": self.retry_after})
        for name, said in self.refused.items():
            if name in body:
                said = {"error": {"message": said}} if isinstance(said, str) else said
                return self._send(handler, 400, said.decode() if isinstance(said, bytes) else said)
        if fault == "reset":
            # Closing a socket that lingers for no time sends a reset.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("cut", "reset"):
            handler.close_connection = True
            return handler.connection.close()
        if fault == "slow":
            time.sleep(0.5)
        choice = self.rule(body)
        if isinstance(choice, str):
            choice = {"message": {"role": "assistant", "content": choice}}
        choice = {"index": 0, "finish_reason": "stop", **choice}
        reply = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
        reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        if fault == "other":
            return self._send(handler, 200, ["no completion"])
        text = json.dumps(reply)
        if fault == "half":
            return self._send(handler, 200, text[: len(text) // 2])
        if fault == "early":
            handler.close_connection = True
            return self._send(handler, 200, text, {"Content-Length": len(text) + 9})
        with self._lock:
            self.bodies.append(body)
        return self._send(handler, 200, text)

    def _send(self, handler, status, content, headers=None):
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        with contextlib.suppress(ConnectionError):
            handler.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": len(data),
                **(headers or {}),
            }.items():
                handler.send_header(name, str(value))
            handler.end_headers()
            handler.wfile.write(data)
