"""A server as a process: its socket, its key, and its end at SIGTERM."""

import logging as python_logging
import math
import os
import signal
import socket
import sys
import time
import types

import uvicorn
from absl import flags, logging

from pjrlhf.errors import UserError, ending_signals
from pjrlhf.serving.catalogue import Catalogue
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.http import Server
from pjrlhf.serving.people.members import Members
from pjrlhf.serving.people.questions import likely_votes
from pjrlhf.serving.people.store import MEMORY
from pjrlhf.serving.settings import EngineSettings, ServerSettings
from pjrlhf.settings import shown
from pjrlhf.training.progress import progress

KEY_VARIABLE = "PJRLHF_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(catalogue: Catalogue, settings: ServerSettings, sizes: EngineSettings) -> None:
    """Serves until SIGTERM or Ctrl-C; answers that have begun are finished first.

    Raises:
      UserError: the address is taken or not of this machine.
    """
    engine = Engine(catalogue.model.backbone, catalogue.model.tokenizer, catalogue.bank, catalogue.user_tokens, sizes)
    catalogue = catalogue.laid_out(engine.served.backbone)
    key = os.environ.get(KEY_VARIABLE, "")
    server = Server(catalogue, engine, settings, key)
    members = server.service.catalogue.people
    listener = _listen(settings)
    with progress("compiling what the server runs", 1):
        engine.warm_up()
    engine.start()
    config = uvicorn.Config(
        server.app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.drain_seconds,
    )
    flags.FLAGS.mark_as_parsed()  # absl warns at the first line of a log otherwise
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    python_logging.getLogger("uvicorn").setLevel(python_logging.WARNING)
    host, port = listener.getsockname()[:2]
    print(f"serving {', '.join(catalogue.models)} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if isinstance(members, Members) and members.store.url == MEMORY:
        print("people are kept in memory, until the server ends; keep them with --people sqlite:///FILE", flush=True)
    if isinstance(members, Members):
        members.table.warm_up(likely_votes(server.service.questions))
    if server.service.compiling:
        logging.info("people: compiling what votes need, in the background; votes and questions may wait for it so far")
    if not key and settings.host not in LOOPBACK:
        print(f"anybody who reaches {host} can use it; set {KEY_VARIABLE} to ask for a key", file=sys.stderr)
    # After a second one uvicorn sends itself the signal again.
    signal.signal(signal.SIGTERM, lambda *_: None)
    if signal.SIGHUP in ending_signals():
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    _Process(config, engine).run(sockets=[listener])
    engine.close(settings.drain_seconds)
    if isinstance(members, Members):
        members.table.close()


class _Process(uvicorn.Server):
    """Keeps its port at SIGTERM until all answers are finished: probes see that it drains, late requests get a 503.

    A second SIGTERM, and Ctrl-C, close the port at once; answers that have begun are finished all the same.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine, self._until = engine, math.inf

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        if sig == signal.SIGTERM and self._engine.state == "ok":
            self._until = time.monotonic() + (self.config.timeout_graceful_shutdown or 0)
            self._engine.drain()
            print("stopping: answers that have begun are finished first", file=sys.stderr, flush=True)
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        left = self._until - time.monotonic()
        if self._until < math.inf and (left <= 0 or not self._engine.busy):
            # The last bytes of finished answers may still be on their way.
            self.config.timeout_graceful_shutdown = max(1, round(left))
            self.should_exit = True
        return await super().on_tick(counter)


def _listen(settings: ServerSettings) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except (OSError, ValueError) as problem:  # ValueError: a host that no name of the network can be
        place, reason = f"{shown(settings.host)}, port {settings.port}", getattr(problem, "strerror", None) or problem
        raise UserError(f"{place}: {reason}; choose another --host or --port") from problem
    return listener
