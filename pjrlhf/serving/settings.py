"""The settings of a server, in a module that imports quickly."""

import dataclasses

from pjrlhf.settings import Settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """Sizes of the engine. They decide on memory and speed; an answer is the same with any of them, up to rounding."""

    slots: int = setting(8, "answers drawn at once; rounded up to split evenly over the devices", low=1, high=4096)
    context: int = setting(
        0, "tokens of a prompt and its answer, at most; 0 for what the model takes, or 4096 if less", low=0, high=2**24
    )
    chunk: int = setting(128, "tokens of prompts read at once; the unit of the prefix cache", low=1, high=2**24)
    steps: int = setting(
        8, "tokens drawn per dispatch, at most; more cost less of the host, and come in larger pieces", low=1, high=1024
    )
    prefill_tokens: int = setting(512, "tokens of prompts read between two dispatches, about", low=1, high=2**24)
    queue: int = setting(256, "requests that may wait; more are refused", low=1, high=2**20)
    prefix_mb: float = setting(
        512.0, "MB that keys and values in the prefix cache may take on a device; 0 turns it off", low=0.0, high=2**30
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings(Settings):
    """Where the server listens, and its limits."""

    host: str = setting("127.0.0.1", "address to listen on; others than this machine reach it at 0.0.0.0")
    port: int = setting(8000, "port; 0 for a free one", low=0, high=65535)
    max_body: int = setting(2**20, "bytes of a request, at most", low=1, high=2**31)
    drain_seconds: int = setting(60, "seconds that answers may still take after SIGTERM", low=0, high=86400)
    people: str = setting(
        "",
        "where people are kept, a URL of SQLAlchemy; if empty, that in $PJRLHF_PEOPLE, else people.sqlite in --run",
    )
    comparisons: int = setting(256, "kept of a person; the oldest make room for new ones", low=1, high=100_000)
    questions: str = setting(
        "",
        "comparisons, JSON lines, that the page asks people about; those of the run for the synthetic environment",
    )
    log_prompts: bool = setting(False, "write the texts of requests to the log")
