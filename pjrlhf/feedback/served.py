"""Entries with a writer in a server: what a person has compared there becomes the text before their prompts.

A server knows what people tell it, and not the comparisons that the run was trained on. Who has told nothing is read as
in training without comparisons.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import xxhash

from pjrlhf.data.messages import Prompt, request_of
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import Example
from pjrlhf.data.tokenization import Tokenizer
from pjrlhf.errors import UserError
from pjrlhf.feedback.writers.base import Known, Shot, Writer
from pjrlhf.feedback.writers.kinds import writer
from pjrlhf.serving.catalogue import Catalogue, People
from pjrlhf.serving.people.fit import as_json


@dataclasses.dataclass(frozen=True)
class Told:
    """A `serving.catalogue.Teller`.

    Attributes:
      writer: writes.
      count: comparisons at most, the latest; fewer where text and prompt are longer than `limit` tokens, which no
        training prompt was.
      tokenizer: of the base.
    """

    writer: Writer
    count: int
    tokenizer: Tokenizer
    limit: int

    def __call__(self, prompt: Prompt, person: str | None, comparisons: Sequence[Example]) -> Prompt:
        others = [one for one in comparisons if request_of(one.original) != request_of(prompt)]
        count = min(self.count, len(others)) if self.writer.reads else 0
        while True:
            shots = tuple(Shot(one, _chosen_first(one)) for one in others[len(others) - count :])
            (text,) = self.writer.write([Known(person=person, shots=shots)], None)
            asked = self.writer.ask(Example(prompt=prompt), text, False, np.random.default_rng(0)).prompt
            if not count or self._fits(asked):
                return asked
            count -= 1

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
    if reads.similar:
        reason = "it chooses comparisons by the features of prompts (similar=True)"
    if people.model.personal:
        reason = "it has rows of people beside the text, and these are fitted to comparisons after their own texts"
    if reason:
        raise UserError(f"--entry {name}: is not served, because {reason}; serve another entry")
    limit = people.learning.lengths.prompt if people.learning else catalogue.model.backbone.model.config.max_length
    told = Told(found, reads.history, catalogue.model.tokenizer, limit)
    return dataclasses.replace(catalogue, people=dataclasses.replace(people, teller=told))
