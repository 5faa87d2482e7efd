"""The records of a run, validated and not yet tokenized: requests, completions and comparisons."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from pjrlhf.data import synthetic
from pjrlhf.data.batching import split_by
from pjrlhf.data.messages import (
    Conversation,
    Prompt,
    Request,
    as_request,
    as_turns,
    columns_of,
    options_of,
    what_needs_template,
    with_words,
    without_template,
)
from pjrlhf.data.schema import Example, in_conversation, last_turn, other_columns, validate
from pjrlhf.data.sources import open_source
from pjrlhf.data.token_table import in_room
from pjrlhf.errors import UserError
from pjrlhf.rewards.sources import RecordColumns
from pjrlhf.runtime.audience import Audience
from pjrlhf.runtime.inputs import hash_of, is_local
from pjrlhf.runtime.streams import Streams
from pjrlhf.settings import Settings, setting
from pjrlhf.terminal import masked
from pjrlhf.training.progress import watched

SourceSpec = Mapping[str, Any]


def check_heldout(source: str | SourceSpec, heldout: SourceSpec, name: str) -> None:
    """Raises UserError where held-out records are given beside what the run makes itself."""
    if heldout and isinstance(source, str):
        raise UserError(
            f"heldout_{name}: {name}={source!r} has its own held-out part; give {name} a source too, or leave out "
            f"heldout_{name}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """The source of prompts, and the lengths of prompts and completions."""

    prompts: str | SourceSpec = setting(
        "synthetic", 'a source of prompt records, such as {"kind": "jsonl", "path": ...}', choices=("synthetic",)
    )
    chat: bool | None = setting(
        None, "ask requests as turns of the tokenizer's chat template; where not set, if it has a template"
    )
    preference_turn: str = setting(
        "user",
        "the turn of a conversation that states preferences: at the end of the last message of the user, or of the "
        "system turn",
        choices=("user", "system"),
    )
    columns: Mapping[str, Any] = setting({}, "column of this package -> its name in your data")
    max_prompt: int = setting(20, "longest prompt, in tokens", low=1, high=2**20)
    prompt_buckets: tuple[int, ...] = setting(
        (12,), "lengths below max_prompt to which prompts are padded; each compiles once", low=1, high=2**20
    )
    max_completion: int = setting(28, "longest completion, in tokens", low=1, high=2**20)
    completion_buckets: tuple[int, ...] = setting(
        (), "lengths below max_completion to which completions are padded; each compiles once", low=1, high=2**20
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
    heldout_prompts: SourceSpec = setting(
        {}, "a source of held-out prompts in place of a fraction; training leaves out those in it"
    )
    max_bad_fraction: float = setting(0.01, "a larger fraction of bad records stops the run", low=0.0, high=1.0)

    def check(self) -> None:
        check_heldout(self.prompts, self.heldout_prompts, "prompts")

    def within(self, context: int, user_tokens: int = 0, learned_positions: bool = False) -> "DataSettings":
        """The settings for a context of so many tokens: shorter lengths, in the same proportion, where texts are cut.

        Args:
          user_tokens: that stand before a prompt.
          learned_positions: of the model, which knows no position beyond its context. Other models read on, and so user
            tokens alone change nothing.

        Raises:
          UserError: the lengths exceed the context, and texts are not cut.
        """
        whole = self.max_prompt + self.max_completion
        if whole + user_tokens * learned_positions <= context:
            return self
        room = context - user_tokens
        if room < 2:
            raise UserError(
                f"model.path: {user_tokens} user tokens leave no room for text in the context of {context} tokens of "
                "the model; lower `tokens` of the entries of preference.models"
            )
        prompt, completion = in_room(self.max_prompt, self.max_completion, room)
        found = self.replace(max_prompt=prompt, max_completion=completion)
        names = "max_prompt", "max_completion"
        if self.long_prompt != "truncate_left" or self.long_completion != "truncate":
            raise UserError(
                f"data.max_prompt={self.max_prompt} and data.max_completion={self.max_completion} tokens"
                f"{f' with {user_tokens} user tokens' if user_tokens else ''} are more than the model's context of "
                f"{context} tokens; set {' '.join(f'--config.data.{name}={getattr(found, name)}' for name in names)}"
            )
        logging.info(
            "the model has a context of %d tokens: data.max_prompt is %d in place of %d, and data.max_completion %d in "
            "place of %d",
            *(context, found.max_prompt, self.max_prompt, found.max_completion, self.max_completion),
        )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusSettings(Settings):
    """The corpus of supervised fine-tuning."""

    data: str | SourceSpec = setting("synthetic", "a source of completion records", choices=("synthetic",))
    records: int = setting(8000, "size of the synthetic corpus, in records", low=1, high=10**8)
    turns: str = setting(
        "all", "the turns of the assistant that are trained in conversations of several", choices=("all", "last")
    )


class Records:
    """The records of a run.

    Args:
      settings: the section `data`.
      audience: its preferences select the synthetic corpus.
      streams: draw the order of the held-out requests.
      corpus: of supervised fine-tuning.
      has_chat_template: whether the tokenizer of the run has one.
      fitting: (examples, name of their source) -> those whose prompts the model can read, as `Text.fitting` does.
      note: called with what was read and has no local file, as `Workdir.check_contents` takes it.
    """

    def __init__(
        self,
        settings: DataSettings,
        audience: Audience,
        streams: Streams,
        corpus: CorpusSettings,
        has_chat_template: Callable[[], bool],
        fitting: Callable[[Sequence[Example], str], Sequence[Example]] = lambda examples, name: examples,
        note: Callable[[Mapping[str, Mapping[str, str]]], None] = lambda inputs: None,
    ):
        self.settings, self.audience, self.streams, self.corpus = settings, audience, streams, corpus
        self._has_chat_template = has_chat_template
        self._fitting = fitting
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

    @functools.cached_property
    def chat(self) -> bool:
        """Whether requests are turns of the chat template, as `data.chat` says; the choice is logged."""
        wanted = self.settings.chat
        if wanted is None:
            wanted = self._has_chat_template()
            reason = f"the tokenizer has {'a' if wanted else 'no'} chat template"
        else:
            reason = f"data.chat={wanted}"
        logging.info("requests are %s (%s)", "turns of the chat template" if wanted else "plain text", reason)
        return wanted

    def ask(self, request: Prompt, words: str = "") -> Prompt:
        """The prompt of a request with `words` about the user's preferences, which end the request, or the system turn
        as `data.preference_turn` says. A text becomes a turn of the chat template, a transcript in the format of
        HH-RLHF several.
        """
        if isinstance(request, str) and not self.chat:
            return with_words(request, words)
        turns = Conversation(as_turns(request)) if isinstance(request, str) else request
        return with_words(turns, words, self.settings.preference_turn)

    def asked(self, examples: Sequence[Example]) -> list[Example]:
        """`examples` whose text prompts are asked as every other request of the run.

        In a conversation, the white space around an answer, which separated it from a text prompt, is dropped.
        """
        return [in_conversation(example) for example in examples] if self.chat else list(examples)

    @functools.cached_property
    def _by_request(self) -> dict[Request, Example]:
        """The records of `data.prompts` and `data.heldout_prompts` by their request; of equal ones the first."""
        d, others = self.settings, 0
        found: dict[Request, Example] = {}
        if isinstance(d.prompts, str):
            return found
        examples = self._read(d.prompts, "prompt", d.columns, "data.prompts")[0]
        for example in [*self._heldout_prompts, *examples]:
            if not isinstance(example.prompt, str) and not self.chat:
                raise UserError(
                    f"{example.where}: the prompt {what_needs_template(example.prompt)}, and requests are plain text "
                    "here; leave out --config.data.chat=False and take a tokenizer with a chat template, or "
                    f"{without_template(example.prompt)}"
                )
            first = found.setdefault(as_request(example.prompt), example)
            others += other_columns(first) != other_columns(example)
        if others and self.audience.sources:
            logging.warning(
                "data.prompts: %d records repeat a prompt with other columns; rewards read those of the first one",
                others,
            )
        return found

    @functools.cached_property
    def _heldout_prompts(self) -> list[Example]:
        d = self.settings
        spec = d.heldout_prompts
        return self._read(spec, "prompt", d.columns, "data.heldout_prompts")[0] if spec else []

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that records of `data.prompts` have beside the prompt."""
        return tuple(dict.fromkeys(name for example in self._by_request.values() for name in other_columns(example)))

    def columns_of(self, requests: Sequence[Prompt]) -> RecordColumns:
        """What the records of requests have beside the prompt, for reward sources."""
        if not self._by_request:
            return RecordColumns()
        records = [self._by_request.get(as_request(request)) for request in requests]
        values = [other_columns(example) if example else {} for example in records]
        columns = {name: [one.get(name) for one in values] for name in self.columns}
        return RecordColumns(columns, [example.where if example else "" for example in records])

    @functools.cached_property
    def requests(self) -> tuple[list[Request], list[Request]]:
        """(training requests, held-out requests), texts and conversations; equal ones are on the same side.

        Raises:
          UserError: the source cannot be read, too many of its prompts cannot be used, or a prompt is a conversation
            and requests are plain text.
        """
        train, held = self._sides
        if not isinstance(self.settings.prompts, str):
            examples = [self._by_request[request] for request in (*train, *held)]
            asked = [dataclasses.replace(e, prompt=self.ask(e.prompt), request=e.prompt) for e in examples]
            usable = {as_request(example.original) for example in self._fitting(asked, "data.prompts")}
            train, held = ([request for request in side if request in usable] for side in (train, held))
            for name, side in (("training", train), ("held-out", held)):
                if not side:
                    raise UserError(f"data.prompts: no {name} prompt is left; raise data.max_prompt, or add prompts")
        return train, held

    @functools.cached_property
    def _sides(self) -> tuple[list[Request], list[Request]]:
        """The requests for training and held out, as they are before a tokenizer is trained on `completions`."""
        d = self.settings
        requests = synthetic.prompts() if isinstance(d.prompts, str) else list(self._by_request)
        alike = "give --config.data.prompts several prompts"
        tested = {as_request(example.prompt) for example in self._heldout_prompts}
        given = [request in tested for request in requests] if tested else None
        train, held = split_by(requests, d.heldout_fraction, self.streams.seed, alike, given)
        # Shuffled, so that the first n requests are a random sample.
        held = self.streams.python("requests/heldout_order").sample(list(held), len(held))
        return [requests[i] for i in train], [requests[i] for i in held]

    @functools.cached_property
    def completions(self) -> list[Example]:
        """The examples for supervised fine-tuning, without answers to held-out requests."""
        d = self.settings
        if isinstance(self.corpus.data, str):
            corpus = synthetic.corpus(
                self._sides[0],
                self.corpus.records,
                self.streams.seed,
                preferences=self.audience.synthetic,
                state=self.ask,
            )
            space = "" if self.chat else " "  # text that follows a text prompt
            records = [
                {**record, **columns_of(record["prompt"]), "completion": space + record["completion"]}
                for record in corpus
            ]
            spec: SourceSpec = {"kind": "records", "records": records, "name": "synthetic environment"}
        else:
            spec = self.corpus.data
        examples, _ = self._read(spec, "completion", d.columns, "sft.data")
        if self.corpus.turns == "last":
            examples = [last_turn(example) for example in examples]
        held = set(self._sides[1])
        held |= {as_request(self.ask(prompt)) for prompt in held}
        return self.asked([example for example in examples if held.isdisjoint(_answered(example))])

    def comparisons(self, spec: SourceSpec, key: str) -> tuple[list[Example], str]:
        """(validated preference records of a source, its name).

        Args:
          key: dotted key of `spec` in the config, for messages.

        Raises:
          UserError: the source cannot be read, or too many of its records are bad.
        """
        columns = {**self.settings.columns, **(spec.get("columns") or {})}
        return self._read(spec, "preference", columns, key)

    def with_heldout(self, spec: SourceSpec, heldout: SourceSpec, section: str) -> tuple[list[Example], str]:
        """`comparisons` of `<section>.data` and `<section>.heldout_data`: `held_out` says which of the two.
        Without `heldout`, those of the first alone, as they are.
        """
        examples, name = self.comparisons(spec, f"{section}.data")
        if not heldout:
            return examples, name
        tested, other = self.comparisons(heldout, f"{section}.heldout_data")
        parts = ((examples, False, ""), (tested, True, "held-out "))
        marked = [
            dataclasses.replace(e, held_out=held, where=f"{prefix}{e.where}")
            for part, held, prefix in parts
            for e in part
        ]
        return marked, name if other == name else f"{name} and {other}"

    def made(self, path: pathlib.Path, key: str) -> tuple[list[Example], str]:
        """The same of a file that a stage of this run wrote: its column `request` is the prompt as it was given, and
        `held_out` says what it says of an `Example`.
        """
        examples, name = self.comparisons({"kind": "jsonl", "path": str(path)}, key)
        return [_restored(example) for example in examples], name


def _restored(example: Example) -> Example:
    extra = dict(example.extra)
    request = extra.pop("request", None)
    if isinstance(request, list):
        request = Conversation(request, options_of(example.prompt))
    return dataclasses.replace(example, request=request, held_out=extra.pop("held_out", None), extra=extra)


def _answered(example: Example) -> Iterator[Request]:
    """The prompts that a completion record answers: one per turn of the assistant."""
    prompt, answer = example.prompt, example.completion
    yield as_request(prompt)
    if isinstance(prompt, list) and isinstance(answer, list):
        for i in range(1, len(answer)):
            if answer[i]["role"] == "assistant":
                yield Conversation([*prompt, *answer[:i]], options_of(prompt))
