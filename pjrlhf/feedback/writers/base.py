"""What a writer is: a function from what is known of a person to the text that stands before their prompts.

    known comparisons of the person -> text -> P-DPO or P-RM on prompts with that text

One policy or reward model serves all people, and a new person costs no step. `feedback.history` decides what a writer
may read, so that no writer can read a held-out comparison or the prompt that is asked.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
from jaxtyping import Float

from pjrlhf.data.messages import request_of, text_of, with_text
from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError
from pjrlhf.runtime.run import Run
from pjrlhf.settings import Settings


@dataclasses.dataclass(frozen=True)
class Shot:
    """One known comparison.

    Attributes:
      example: the comparison; its `chosen` is what the person preferred, or what the flip test says so.
      chosen_first: whether the preferred answer is written first, drawn at random.
    """

    example: Example
    chosen_first: bool

    def fields(self) -> dict[str, str]:
        """The texts of the comparison: prompt, chosen, rejected; and first, second in the drawn order."""
        one = self.example
        chosen, rejected = text_of(one.chosen or "").strip(), text_of(one.rejected or "").strip()
        first, second = (chosen, rejected) if self.chosen_first else (rejected, chosen)
        prompt = request_of(one.original or "")
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "first": first, "second": second}


@dataclasses.dataclass(frozen=True)
class Known:
    """What a writer may read about the person behind one prompt, or behind many.

    Attributes:
      person: name of the person; None for a person that nobody was trained on.
      shots: their comparisons.
      others: comparisons of the same answers by people who chose otherwise, for each shot, perhaps none.
      example: a record of the person, for its columns.
    """

    person: str | None
    shots: tuple[Shot, ...]
    others: tuple[tuple[Example, ...], ...] = ()
    example: Example | None = None


class Base(Protocol):
    """The frozen base as writers ask it: that of a run, or of a server."""

    @property
    def run(self) -> Run | None:
        """Has other models to ask; None in a server, see `Writer.unserved`."""
        ...

    @property
    def sentences(self) -> Mapping[str, str]:
        """Preference id -> its sentence, which may be empty."""
        ...

    def margins(self, comparisons: Sequence[Example], words: str) -> Float[np.ndarray, " N"]:
        """log pi(chosen | prompt and words) - log pi(rejected | prompt and words) of N comparisons, in nats; NaN where
        the prompt is too long with these words.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writer(Settings, abc.ABC):
    """A writer; its fields are the settings of `writer` of an entry of `preference.models`.

    Attributes:
      reads: whether it reads comparisons; others read the name or the columns of the person alone.
      once: whether a person has one text for many prompts, because a text is expensive. A person then has a text for
        each half of their training prompts, written from the other half, and one for all other prompts.
      latest: whether it reads the latest comparisons, in place of random ones.
      asks: whether it asks the base for likelihoods.
    """

    reads: ClassVar[bool] = True
    once: ClassVar[bool] = False
    latest: ClassVar[bool] = False
    asks: ClassVar[bool] = False

    @property
    def unserved(self) -> str:
        """Why it cannot write for people who are served, of whom no records are known; "" where it can."""
        return ""

    @abc.abstractmethod
    def write(self, known: Sequence[Known], base: Base) -> list[str]:
        """One text for each; "" where there is nothing to tell."""

    def ask(self, example: Example, text: str, trained: bool, rng: np.random.Generator) -> Example:
        """The record as the model reads it.

        Args:
          text: what `write` gave.
          trained: whether the record is trained on.
          rng: of a writer that changes some records at random.
        """
        return dataclasses.replace(example, prompt=with_text(example.prompt or "", text)) if text else example


def check_fields(name: str, template: str, fields: Sequence[str], needs: Sequence[str]) -> None:
    """Raises UserError for a template that has other fields than `fields`, or none of each group in `needs`.

    Args:
      name: key of the template, for the message.
      needs: names that the template must have all of.
    """
    try:
        told = template.format(**{field: f"\0{field}\0" for field in fields})
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        listed = ", ".join(f"{{{field}}}" for field in fields)
        raise UserError(f"{name}: cannot be filled in ({error}); its fields are {listed}") from error
    if missing := [field for field in needs if f"\0{field}\0" not in told]:
        listed = " and ".join(f"{{{field}}}" for field in needs)
        raise UserError(f"{name}: has no {{{missing[0]}}}; it must name {listed}")
