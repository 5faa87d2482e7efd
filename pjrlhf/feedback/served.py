"""Entries with a writer in a server: what a person has compared there becomes the text before their prompts.

A server knows what people tell it, and not the comparisons that the run was trained on. Who has told nothing is read as
in training without comparisons.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import xxhash
from jaxtyping import Float

from pjrlhf.data.batching import Completions
from pjrlhf.data.comparisons import SIDES
from pjrlhf.data.messages import Prompt, as_request, request_of, with_words
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import Example
from pjrlhf.data.token_table import cut_left
from pjrlhf.data.tokenization import Tokenizer
from pjrlhf.errors import UserError
from pjrlhf.feedback.history import by_similarity
from pjrlhf.feedback.writers.base import Known, Shot, Writer
from pjrlhf.feedback.writers.kinds import writer
from pjrlhf.models.adapters import Backbone
from pjrlhf.models.folders import read_json
from pjrlhf.rollout.batches import Prompts
from pjrlhf.rollout.features import prompt_states
from pjrlhf.rollout.scoring import sequence_logps
from pjrlhf.runtime.audience import Audience
from pjrlhf.serving.catalogue import Catalogue, People
from pjrlhf.serving.people.fit import as_json
from pjrlhf.serving.people.kept import Kept
from pjrlhf.serving.people.reading import Reader
from pjrlhf.types import Array


class ServedBase:
    """The base of a server, see `feedback.writers.base.Base`. What it gives for a text is kept in memory alone.

    Args:
      reader: reads comparisons, as long as in training.
      turn: `data.preference_turn` of the run.
      sentences: of its preferences.
    """

    run = None

    def __init__(self, backbone: Backbone, reader: Reader, turn: str, sentences: Mapping[str, str]):
        self._reader, self._turn, self.sentences = reader, turn, sentences
        self._logps, self._prompts = (
            Kept(backbone, reader.tokenizer.pad_id, score) for score in (_logps, _prompt_states)
        )

    def margins(self, comparisons: Sequence[Example], words: str) -> Float[np.ndarray, " N"]:
        """See `feedback.writers.base.Base`."""
        found, places, rows = np.full(len(comparisons), np.nan), [], []
        for place, one in enumerate(map(self._reader.asked, comparisons)):
            prompt = with_words(one.prompt or "", words, self._turn)
            for row in self._reader.rows([dataclasses.replace(one, prompt=prompt)]):
                places.append(place)
                rows += [
                    {"prompt": row["prompt"], "completion": row[side], "completion_mask": row[f"{side}_mask"]}
                    for side in SIDES
                ]
        found[places] = np.subtract(*np.array(self._logps(rows), np.float64).reshape(-1, 2).T)
        return found

    def features(self, prompts: Sequence[Prompt]) -> Float[np.ndarray, "N D"]:
        """See `runtime.features.prompt_features`."""
        tokenizer, limit = self._reader.tokenizer, self._reader.lengths.prompt
        asked = [self._reader.asked(Example(prompt=prompt)).prompt or "" for prompt in prompts]
        ids = [cut_left(tokenizer.encode_prompt(prompt), limit, tokenizer.bos_id) for prompt in asked]
        return np.array(self._prompts([{"prompt": one, "completion": ()} for one in ids]))


def _logps(backbone: Backbone, batch: Completions) -> Array:
    return sequence_logps(backbone.policies(), batch.tokens, batch.valid, batch.prompt_length, batch.scored)[0]


def _prompt_states(backbone: Backbone, batch: Completions) -> Array:
    return prompt_states(backbone, Prompts(batch.tokens, batch.valid))


@dataclasses.dataclass(frozen=True)
class Told:
    """A `serving.catalogue.Teller`.

    Attributes:
      writer: writes.
      count: comparisons at most, the latest; fewer where text and prompt are longer than `limit` tokens, which no
        training prompt was.
      similar: they are those on the prompts most like the one that is asked, in place of the latest, see
        `feedback.history.History`; less the mean of the prompts that the person has compared.
      base: which is asked.
      tokenizer: of the base.
    """

    writer: Writer
    count: int
    similar: bool
    base: ServedBase
    tokenizer: Tokenizer
    limit: int

    @property
    def asks(self) -> bool:
        return self.similar or self.writer.asks

    def __call__(self, prompt: Prompt, person: str | None, comparisons: Sequence[Example]) -> Prompt:
        others = [one for one in comparisons if request_of(one.original) != request_of(prompt)]
        if self.similar and others:
            others = self._sorted(prompt, others)
        count = min(self.count, len(others)) if self.writer.reads else 0
        while True:
            shots = tuple(Shot(one, _chosen_first(one)) for one in others[len(others) - count :])
            (text,) = self.writer.write([Known(person=person, shots=shots)], self.base)
            asked = self.writer.ask(Example(prompt=prompt), text, False, np.random.default_rng(0)).prompt
            if not count or self._fits(asked):
                return asked
            count -= 1

    def _sorted(self, prompt: Prompt, comparisons: list[Example]) -> list[Example]:
        """Comparisons by the likeness of their prompts to the one that is asked, the most similar last; of those that
        are alike the latest last.
        """
        latest = comparisons[::-1]
        known = {as_request(one.original): one.original for one in latest}
        asked, *features = self.base.features([prompt, *known.values()])
        found = dict(zip(known, features, strict=True))
        mean = np.mean(features, axis=0)
        there = np.stack([found[as_request(one.original)] - mean for one in latest])
        return [latest[i] for i in by_similarity(asked - mean, there)][::-1]

    def _fits(self, prompt: Prompt) -> bool:
        with contextlib.suppress(UserError, RecordError):
            return len(self.tokenizer.encode_prompt(prompt)) <= self.limit
        return True  # what is wrong with the prompt is told where it is read


def _chosen_first(example: Example) -> bool:
    """A coin that always falls the same way for a comparison."""
    return bool(xxhash.xxh3_64_intdigest(json.dumps(as_json(example), sort_keys=True).encode()) & 1)


def with_teller(catalogue: Catalogue) -> Catalogue:
    """The catalogue, with the writer of its entry where it has one.

    Raises:
      UserError: an entry with a writer that cannot be served.
    """
    people = catalogue.people
    if not isinstance(people, People) or people.reads is None:
        return catalogue
    reads, name = people.reads, catalogue.names[0]
    found = writer(reads.writer or "fewshot", f"preference.models.{name}.writer")
    reason = found.unserved and f"its writer {found.unserved}"
    if people.model.personal:
        reason = "it has rows of people beside the text, and these are fitted to comparisons after their own texts"
    if reason:
        raise UserError(f"--entry {name}: is not served, because {reason}; serve another entry")
    assert catalogue.run is not None and people.learning is not None, "entries that read are those of a run"
    config, own, lengths = read_json(catalogue.run / "config.json"), catalogue.model, people.learning.lengths
    # A prompt with an attribute is left out, or cut, as in training.
    reader = Reader(
        own.tokenizer, catalogue.chat, dataclasses.replace(lengths, long_prompt=config["data"]["long_prompt"])
    )
    sentences = Audience(config["preferences"], (), "", "synthetic").sentences
    base = ServedBase(own.backbone, reader, config["data"]["preference_turn"], sentences)
    told = Told(found, reads.history, reads.similar, base, own.tokenizer, lengths.prompt)
    return dataclasses.replace(catalogue, people=dataclasses.replace(people, teller=told))
