"""A server of chat completions on this machine that answers by rule, sometimes badly."""

import contextlib
import http.server
import itertools
import json
import threading
import time


class ChatServer:
    """Answers POST /v1/chat/completions.

    Args:
      rule: (body of the request) -> the text of the answer, or a whole choice as a dict.
      faults: what happens to the first requests, one each: "busy" (429), "broken" (500), "cut" (the connection), "half"
        (truncated JSON), "other" (JSON of another kind), "slow", or "" for an answer.

    Attributes:
      bodies: of the requests that were answered.
      seen: number of requests.
    """

    def __init__(self, rule, faults=(), key=None, retry_after=0.01):
        self.rule, self.key, self.bodies, self.seen = rule, key, [], 0
        self.retry_after = str(retry_after)
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
        if fault == "cut":
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
