"""The records of a run, validated and not yet tokenized: requests, completions and comparisons."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from pjrlhf.data import synthetic
from pjrlhf.data.batching import split_by
from pjrlhf.data.schema import Example, Message, validate
from pjrlhf.data.sources import open_source
from pjrlhf.errors import UserError
from pjrlhf.runtime.audience import Audience
from pjrlhf.runtime.inputs import hash_of, is_local
from pjrlhf.runtime.streams import Streams
from pjrlhf.settings import Settings, setting
from pjrlhf.terminal import masked
from pjrlhf.training.progress import watched

SourceSpec = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """The source of prompts, and the lengths of prompts and completions."""

    prompts: str | SourceSpec = setting(
        "synthetic", 'a source of prompt records, such as {"kind": "jsonl", "path": ...}', choices=("synthetic",)
    )
    chat: bool = setting(True, "apply the chat template of the tokenizer to requests")
    columns: Mapping[str, Any] = setting({}, "column of this package -> its name in your data")
    max_prompt: int = setting(20, "longest prompt, in tokens", low=1, high=2**20)
    prompt_buckets: tuple[int, ...] = setting(
        (12,), "shorter lengths to which prompts are padded; each compiles once", low=1, high=2**20
    )
    max_completion: int = setting(28, "longest completion, in tokens", low=1, high=2**20)
    completion_buckets: tuple[int, ...] = setting(
        (), "shorter lengths to which completions are padded; each compiles once", low=1, high=2**20
    )
    long_prompt: str = setting("drop", "what happens to longer prompts", choices=("drop", "truncate_left", "error"))
    long_completion: str = setting("drop", "what happens to longer completions", choices=("drop", "truncate"))
    packing: str = setting(
        "auto",
        "content of a row: one answer (none), a prompt with its answers (share), several prompts with theirs (pack), "
        "or all that a device gets (join); auto is join for attention by blocks, and share otherwise",
        choices=("auto", "none", "share", "pack", "join"),
    )
    heldout_fraction: float = setting(0.25, "fraction of the prompts held out for evaluation", above=0.0, below=1.0)
    max_bad_fraction: float = setting(0.01, "a larger fraction of bad records stops the run", low=0.0, high=1.0)

    def check(self) -> None:
        for name, limit in (("prompt_buckets", "max_prompt"), ("completion_buckets", "max_completion")):
            longest = max(getattr(self, name), default=0)
            if longest > getattr(self, limit):
                raise UserError(f"{name}: {longest} is more than {limit}={getattr(self, limit)}; lower it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusSettings(Settings):
    """The corpus of supervised fine-tuning."""

    data: str | SourceSpec = setting("synthetic", "a source of completion records", choices=("synthetic",))
    records: int = setting(8000, "size of the synthetic corpus, in records", low=1, high=10**8)


class Records:
    """The records of a run.

    Args:
      settings: the section `data`.
      audience: its preferences select the synthetic corpus.
      streams: draw the order of the held-out requests.
      corpus: of supervised fine-tuning.
      note: called with what was read and has no local file, as `Workdir.check_contents` takes it.
    """

    def __init__(
        self,
        settings: DataSettings,
        audience: Audience,
        streams: Streams,
        corpus: CorpusSettings,
        note: Callable[[Mapping[str, Mapping[str, str]]], None] = lambda inputs: None,
    ):
        self.settings, self.audience, self.streams, self.corpus = settings, audience, streams, corpus
        self._note = note

    def _read(self, spec: SourceSpec, kind: str, columns: Mapping[str, Any], key: str) -> tuple[list[Example], str]:
        """(validated records of a source, its name); `key` is the setting that names it."""
        source = open_source(spec, key)
        with watched(f"reading {source.name}", source) as records:
            examples, _ = validate(records, kind, columns=columns, max_bad_fraction=self.settings.max_bad_fraction)
        if spec.get("kind") != "records" and not is_local(spec):
            described = masked(json.dumps(dict(spec), sort_keys=True, default=repr))
            self._note({f"records of {source.name}": {"path": described, "hash": hash_of(examples)}})
        return examples, source.name

    def ask(self, request: str, words: str = "") -> str | list[Message]:
        """The prompt of a request, followed by `words` about the user's preferences."""
        text = " ".join(filter(None, [request, words]))
        return [{"role": "user", "content": text}] if self.settings.chat else text

    @functools.cached_property
    def requests(self) -> tuple[list[str], list[str]]:
        """(training requests, held-out requests); equal prompts are on the same side.

        Raises:
          UserError: a prompt is a conversation, or the source cannot be read.
        """
        d = self.settings
        if isinstance(d.prompts, str):
            texts = synthetic.prompts()
        else:
            examples, _ = self._read(d.prompts, "prompt", d.columns, "data.prompts")
            texts = []
            for example in examples:
                if not isinstance(example.prompt, str):
                    raise UserError(f"{example.where}: the prompt is a conversation; give requests as text")
                texts.append(example.prompt)
            texts = list(dict.fromkeys(texts))
        train, held = split_by(texts, d.heldout_fraction, self.streams.seed)
        # Shuffled, so that the first n requests are a random sample.
        held = self.streams.python("requests/heldout_order").sample(list(held), len(held))
        return [texts[i] for i in train], [texts[i] for i in held]

    @functools.cached_property
    def completions(self) -> list[Example]:
        """The examples for supervised fine-tuning, without answers to held-out requests."""
        d = self.settings
        if isinstance(self.corpus.data, str):
            corpus = synthetic.corpus(
                self.requests[0], self.corpus.records, self.streams.seed, preferences=self.audience.synthetic
            )
            space = "" if d.chat else " "  # text that follows a text prompt
            records = [
                {"prompt": self.ask(record["prompt"]), "completion": space + record["completion"]} for record in corpus
            ]
            spec: SourceSpec = {"kind": "records", "records": records, "name": "synthetic environment"}
        else:
            spec = self.corpus.data
        examples, _ = self._read(spec, "completion", d.columns, "sft.data")
        held, found = set(self.requests[1]), []
        for example in examples:
            if isinstance(example.prompt, str) and example.prompt:
                if example.prompt in held:
                    continue
                example = dataclasses.replace(example, prompt=self.ask(example.prompt))
            found.append(example)
        return found

    def comparisons(self, spec: SourceSpec, key: str) -> tuple[list[Example], str]:
        """(validated preference records of a source, its name).

        Args:
          key: dotted key of `spec` in the config, for messages.

        Raises:
          UserError: the source cannot be read, or too many of its records are bad.
        """
        columns = {**self.settings.columns, **(spec.get("columns") or {})}
        return self._read(spec, "preference", columns, key)
