"""What the people of a server may do: be answered, state weights, compare answers and learn, and be deleted.

A person is a row of the user table, see `table`. People of the trained user model have theirs; everybody else starts as
the generic user, or as the weights they state.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from pjrlhf.data.messages import Prompt
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError
from pjrlhf.serving.catalogue import Catalogue, People
from pjrlhf.serving.people.fit import Fitter, Row, as_example, as_json
from pjrlhf.serving.people.reading import Reader
from pjrlhf.serving.people.rewards import Scorer
from pjrlhf.serving.people.rows import checked_name, is_name, packed
from pjrlhf.serving.people.store import Store, Taken, store_of, unknown
from pjrlhf.serving.people.table import Output, Table
from pjrlhf.serving.people.trained import forget, left_in, trained_people
from pjrlhf.settings import shown
from pjrlhf.types import Json


class Members:
    """The people of a catalogue, with a store. It takes the place of the catalogue's own people.

    Several threads may use one. Fits run one after the other in a thread of their own.

    Args:
      catalogue: has people.
      store: theirs; other servers of the same models may use it at the same time.

    Attributes:
      table: their rows.
      fitter: fits rows; None where the model is the same for everybody.
      reads: what of a person's comparisons stands before their prompts; None for nothing.
      scorer: rewards answers as a person sees them; None where people are those of a policy.
    """

    def __init__(self, catalogue: Catalogue, store: Store):
        people = catalogue.people
        assert isinstance(people, People)
        self.store, self._run = store, catalogue.run
        self.model, self.trained, self.names = people.model, people.trained, catalogue.names
        self.scorer, self.reads = people.scorer, people.reads
        self.fitter: Fitter | Scorer | None = self.scorer if self.model.personal else None
        if self.scorer is None and people.learns:
            assert people.learning is not None
            parts = catalogue.model.backbone, catalogue.model.tokenizer, catalogue.chat, self.model
            self.fitter = Fitter(*parts, {"bank": catalogue.bank, "users": people.params}, people.learning)
        self._reader = None  # of comparisons that are read and fitted to nothing
        if self.fitter is None and people.learning is not None:
            self._reader = Reader(catalogue.model.tokenizer, catalogue.chat, people.learning.lengths)
        self.table = Table(catalogue, store, self.fitter)

    # ---- who answers

    def row(self, name: str | None) -> Output:
        """See `catalogue.Persons`."""
        known = None if name is None or not is_name(name) else self.table.known(name)
        return self.table.generic if known is None else known.output

    def knows(self, name: str) -> bool:
        """See `catalogue.Persons`."""
        return is_name(name) and self.table.version(name) is not None

    def told(self, prompt: Prompt, name: str | None) -> Prompt:
        """See `catalogue.Persons`."""
        seen = self._given(name) if name is not None and self.reads and self.knows(name) else ()
        return self.table.people.told(prompt, name, seen)

    # ---- learning

    def read(self, comparisons: object) -> list[dict[str, Json]]:
        """Comparisons as the store has them.

        Raises:
          UserError: one that the model cannot read, or nothing can be learned here.
        """
        self._check_learns()
        if not isinstance(comparisons, list) or not comparisons:
            raise UserError("comparisons: is no list of at least one comparison; give prompt, chosen and rejected")
        if len(comparisons) > self.store.limit:
            raise UserError(f"comparisons: are {len(comparisons)}, more than the {self.store.limit} kept; send fewer")
        return [as_json(self._example(one, f"comparisons: number {i}")) for i, one in enumerate(comparisons, 1)]

    def _example(self, comparison: object, where: str) -> Example:
        if not isinstance(comparison, Mapping):
            raise UserError(f"{where}: is no object; give it a prompt, chosen and rejected")
        try:
            example = as_example(comparison)
            if self.fitter is not None:
                self.fitter.check(example)
            elif self._reader is not None:
                self._reader.encoded(example)
            return example
        except RecordError as error:
            raise UserError(f"{where}: {error}; correct it") from error

    @property
    def learns(self) -> bool:
        """Whether comparisons of a person change anything: a row is fitted to them, or they are read."""
        return self.fitter is not None or (self.reads is not None and self.reads.history > 0)

    def _check_learns(self) -> None:
        if not self.learns:
            raise UserError(
                "comparisons: this model is the same for everybody and learns from nobody; serve another entry"
            )

    def learn(self, name: str, comparisons: object) -> None:
        """Adds comparisons of a person and fits their row.

        Raises:
          Unknown: no such person.
          UserError: see `read`.
        """
        self._need(name)
        read = self.read(comparisons)
        self.store.learn(name, read, create=self.table.is_trained(name))
        self.table.fit(name)

    # ---- people

    def add(self, name: object, comparisons: object = None, mix: object = None) -> str:
        """Adds a person, and fits their row.

        Raises:
          Taken: the name is taken.
          UserError: a name that cannot be one, or see `read`; or stated weights that cannot be a soup's.
        """
        name = checked_name(name)
        if self.knows(name):
            raise Taken(f"id: {shown(name)} is taken; choose another, or delete that person first")
        stated = None if mix is None else self.check_mix(mix)
        read = [] if comparisons is None else self.read(comparisons)
        self.store.add(name, read, stated)
        self.table.known(name)
        return name

    def state(self, name: str, mix: object) -> None:
        """Sets the stated weights of a person; what they have compared is fitted from there."""
        self._need(name)
        stated = self.check_mix(mix)
        if self.store.version(name) is None:
            self.store.add(name)
        self.store.state(name, stated)
        self.table.known(name)

    def check_mix(self, mix: object) -> dict[str, float]:
        """Stated weights of a person: none below 0; they are divided by their sum.

        Raises:
          UserError: other weights, or people who are no soups.
        """
        if not self.model.mixes:
            raise UserError("mix: people of this model are no soups; give comparisons")
        if not isinstance(mix, Mapping) or not mix:
            raise UserError("mix: is no object of weights by name; give it as {name: weight}")
        for name, weight in mix.items():
            if name not in self.names:
                raise UserError(f"mix: {shown(name)} is no ingredient; choose from {', '.join(self.names)}")
            good = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
            if not good or not 0 <= weight <= 100:
                raise UserError(f"mix: the weight of {name} is no number from 0 to 100; correct it")
        if not sum(mix.values()):
            raise UserError("mix: all weights are 0; give at least one a positive weight")
        return {str(name): float(weight) for name, weight in mix.items()}

    def remove(self, name: str) -> None:
        """Deletes a person from the store and from the table that is served.

        Raises:
          Unknown: no such person.
        """
        self._need(name)
        trained = self.table.is_trained(name) or (self._run is not None and name in trained_people(self._run))
        self.store.remove(name, trained)
        self.table.forget(name)

    def forget(self, name: str) -> list[pathlib.Path]:
        """Deletes a person from the user models of the run, see `trained.forget`."""
        return [] if self._run is None else forget(self._run, name)

    def left_in(self, name: str) -> str:
        """What of the run still has a person's name, see `trained.left_in`."""
        return "" if self._run is None else left_in(self._run, name)

    def take(
        self,
        name: str,
        comparisons: list[dict[str, Json]],
        stated: dict[str, float] | None,
        row: Row | None,
        start: Row | None,
    ) -> None:
        """Adds a person with the row they had elsewhere under the same model; None fits it."""
        start = row if start is None and not comparisons else start
        self.store.add(name, comparisons, stated, None if start is None else packed(start), self.table.fingerprint)
        person = self.store.person(name)
        if row is not None and comparisons and person is not None:
            self.store.keep_row(name, person.version, self.table.fingerprint, packed(row))
        self.table.known(name)

    def rewards(self, name: str, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """What answers to a prompt are worth to a person.

        Raises:
          Unknown: no such person.
          UserError: people are not those of a reward model, or a text that cannot be read.
        """
        scorer = self.scorer
        if scorer is None:
            raise UserError(
                "answers: no reward model of people is served; serve an entry of the stage user_models with --entry"
            )
        self._need(name)
        return self.table.working.submit(scorer.rewards, self.table.row(name), prompt, answers).result()

    def comparisons(self, name: str) -> list[dict[str, Json]]:
        """What a person has given.

        Raises:
          Unknown: no such person.
        """
        self._need(name)
        return [] if self.store.version(name) is None else self.store.comparisons(name)[1]

    def _given(self, name: str) -> list[Example]:
        """What a known person has given, without what cannot be read."""
        found = []
        for one in self.comparisons(name):
            with contextlib.suppress(RecordError):
                found.append(as_example(one))
        return found

    def linearized(
        self, name: str, comparisons: Sequence[Mapping[str, Json]], where: str
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """(margins, gradients with respect to the row) of `comparisons` and of those that the person has given, at the
        person's row.

        Raises:
          Unknown: no such person.
          UserError: a comparison that the model cannot read, or nothing can be learned here.
        """
        self._need(name)
        self._check_learns()
        if self.fitter is None:
            raise UserError(
                "pairs: this entry reads what a person has compared and cannot say which pair tells most; ask pairs in "
                "any order"
            )
        examples = [self._example(one, f"{where}: number {i}") for i, one in enumerate(comparisons, 1)]
        row, seen = self.table.row(name), self._given(name)

        def work() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
            assert self.fitter is not None
            asked = self.fitter.margins(row, examples)
            return asked, self.fitter.margins(row, seen)

        return self.table.working.submit(work).result()

    def _need(self, name: str) -> None:
        if not self.knows(name):
            raise unknown(name)


def open_members(catalogue: Catalogue, url: str = "", limit: int = 256) -> Catalogue:
    """A catalogue whose people learn.

    Args:
      url: of the store, see `address`; memory where there is none.
      limit: see `Store`.

    Raises:
      UserError: the store cannot be used.
    """
    if not isinstance(catalogue.people, People):
        return catalogue
    return dataclasses.replace(catalogue, people=Members(catalogue, store_of(catalogue.run, url, limit)))
