"""The name of the person, or of their community, as text (ComPO, arXiv 2410.16027, section 3).

    p(y | x, c) with the tag of c before x; a generic tag stands for everybody

A part of the training records has the generic tag, as the generic user of P-RLHF has a part of the loss, so that it
means something to a person that nobody was trained on. A person has no parameters.

Trap: a name that was never trained on is no generic person to a language model. It gets the generic tag.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pjrlhf.data.schema import Example
from pjrlhf.feedback.writers.base import Base, Known, Writer, check_fields
from pjrlhf.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(Writer):
    """Name or community."""

    reads = False
    once = True

    template: str = setting("Person: {name}", "the tag of a person")
    generic: str = setting("Person: anybody", "the tag of everybody")
    generic_fraction: float = setting(0.5, "of the training records, which get the generic tag", low=0.0, high=1.0)
    column: str = setting("", "column with a community, which gives the name; the person's own name where empty")

    def check(self) -> None:
        check_fields("template", self.template, ("name",), ("name",))

    @property
    def unserved(self) -> str:
        return f"reads the column {self.column!r} of records" if self.column else ""

    def _name(self, known: Known) -> str | None:
        if not self.column:
            return known.person
        value = known.example.extra.get(self.column) if known.example else None
        return None if value is None else str(value)

    def write(self, known: Sequence[Known], base: Base) -> list[str]:
        names = map(self._name, known)
        return [self.generic if name is None else self.template.format(name=name) for name in names]

    def ask(self, example: Example, text: str, trained: bool, rng: np.random.Generator) -> Example:
        generic = rng.random() < self.generic_fraction
        return super().ask(example, self.generic if trained and generic else text, trained, rng)


WRITER = Identity
