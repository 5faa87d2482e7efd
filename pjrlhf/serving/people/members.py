"""The people of a server: those of its user model, and those who come later and teach it.

A person is a row of the user table. People of the trained user model have theirs; everybody else starts as the generic
user, or as the weights they state. A row is fitted to all comparisons that its person has given, see `fit`, so
neither their order nor how they are batched matters, and nobody else's row moves.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import threading
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from absl import logging

from pjrlhf.data.messages import Prompt
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError
from pjrlhf.models.provenance import text_provenance
from pjrlhf.serving.catalogue import Catalogue, People
from pjrlhf.serving.people.address import address
from pjrlhf.serving.people.fit import Fitter, Row, as_example, as_json
from pjrlhf.serving.people.reading import Reader
from pjrlhf.serving.people.rewards import Scorer
from pjrlhf.serving.people.rows import checked_name, is_name, packed, unpacked
from pjrlhf.serving.people.store import MEMORY, Person, Store, Taken, Unknown, Unreachable, key_of
from pjrlhf.serving.people.trained import forget, trained_people
from pjrlhf.settings import shown
from pjrlhf.types import Json

ROWS_KEPT = 4096  # people whose rows are kept in memory
SMALLEST = 1e-4  # of a stated weight that learning starts from; softmax gives no zero


@dataclasses.dataclass(frozen=True)
class _Known:
    """A person as they are answered.

    Attributes:
      version: of the store, or "" for people it does not have.
      row: their row.
      output: user tokens [E, D] or None, and mix [K] or None.
    """

    version: str
    row: Row
    output: tuple[np.ndarray | None, np.ndarray | None]


class Members:
    """The people of a catalogue, with a store. It takes the place of the catalogue's own people.

    Several threads may use one. Fits run one after the other in a thread of their own.

    Args:
      catalogue: has people.
      store: theirs; other servers of the same models may use it at the same time.

    Attributes:
      fingerprint: of all that a row depends on besides the comparisons; a row of another one is fitted again.
      fitter: fits their rows; None where the model is the same for everybody.
      reads: what of a person's comparisons stands before their prompts; None for nothing.
      scorer: rewards answers as a person sees them; None where people are those of a policy.
      working: runs fits.
      warming: whether the warm-up goes on.
    """

    def __init__(self, catalogue: Catalogue, store: Store):
        assert isinstance(catalogue.people, People)
        self._people, self.store, self._run = catalogue.people, store, catalogue.run
        self.model, self.trained, self.names = self._people.model, self._people.trained, catalogue.names
        self.scorer, self.reads = self._people.scorer, self._people.reads
        self.fitter: Fitter | Scorer | None = self.scorer if self.model.personal else None
        if self.scorer is None and self._people.learns:
            assert self._people.learning is not None
            parts = catalogue.model.backbone, catalogue.model.tokenizer, catalogue.chat, self.model
            trainable = {"bank": catalogue.bank, "users": self._people.params}
            self.fitter = Fitter(*parts, trainable, self._people.learning)
        self._reader = None  # of comparisons that are read and fitted to nothing
        if self.fitter is None and self._people.learning is not None:
            self._reader = Reader(catalogue.model.tokenizer, catalogue.chat, self._people.learning.lengths)
        self.fingerprint = _fingerprint(catalogue, self._people)
        self.working = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="people")
        self.warming = False
        self._kept: collections.OrderedDict[str, _Known] = collections.OrderedDict()
        self._fitting: set[str] = set()
        self._lock = threading.Lock()
        self._apply = jax.jit(self.model.apply)
        self.trained_names()  # without those who were deleted

    # ---- who answers

    def row(self, name: str | None) -> tuple[np.ndarray | None, np.ndarray | None]:
        """See `catalogue.Persons`."""
        known = None if name is None or not is_name(name) else self._known(name)
        return self._generic if known is None else known.output

    def knows(self, name: str) -> bool:
        """See `catalogue.Persons`."""
        return is_name(name) and self._there(name) is not None

    def told(self, prompt: Prompt, name: str | None) -> Prompt:
        """See `catalogue.Persons`."""
        seen = self._given(name) if name is not None and self.reads and self.knows(name) else ()
        return self._people.told(prompt, name, seen)

    @functools.cached_property
    def _generic(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        return self._people.row(None)

    def _there(self, name: str) -> str | None:
        """The version of a person; None for unknown ones."""
        found = self.store.version(name)
        if found is None:
            return "" if name in self._people.registry.rows else None
        version, there = found
        if not there and name in self._people.registry.rows:
            self._forget_trained(name)  # another server has deleted them
        return version if there else None

    def _known(self, name: str) -> _Known | None:
        version = self._there(name)
        if version is None:
            return None
        with self._lock:
            known = self._kept.get(name)
        if known is not None and known.version == version:
            return known
        person = self.store.person(name) if version else Person(name=name)
        if person is None or person.name is None:  # deleted in between
            return None
        return self._read(person)

    def _read(self, person: Person, fits: bool = True) -> _Known | None:
        """A person's row: the one that is stored, where it is of this model; it is fitted where it is not."""
        name, row = str(person.name), None
        if not person.comparisons or self.fitter is None:
            row = self.start_of(person)
        elif (row := self._stored_row(person)) is not None:
            if person.row_version != person.version:  # votes whose fit has not ended; nobody waits for it here
                self._fit_later(name)
                return self._as_known(person, row)
        elif fits:
            return self.working.submit(self._fit, name).result()
        return None if row is None else self._keep(name, self._as_known(person, row))

    def _stored_row(self, person: Person) -> Row | None:
        """The row that is stored, where it is of this model and intact: it can be fitted again."""
        if person.row is None or person.row_model != self.fingerprint:
            return None
        try:
            return unpacked(person.row, self._table_row(0))
        except ValueError as error:
            logging.warning("%s: the row of a person is damaged (%s); it is fitted again", self.store.where, error)
            return None

    def _as_known(self, person: Person, row: Row) -> _Known:
        stated = self._stated(person)
        if stated is not None and not person.comparisons:
            return _Known(person.version, row, (None, stated))  # exactly what they said
        table = jax.tree.map(lambda generic, own: np.stack([generic, own]), self._table_row(0), row)
        params = {**self._people.params, **({"table": table} if self.model.personal else {})}
        found = self._apply(params, np.array([1], np.int32))
        output = [None if x is None else np.asarray(x, np.float32)[0] for x in found]
        return _Known(person.version, row, (output[0], output[1]))

    def _keep(self, name: str, known: _Known) -> _Known:
        with self._lock:
            self._kept[name] = known
            self._kept.move_to_end(name)
            while len(self._kept) > ROWS_KEPT:
                self._kept.popitem(last=False)
        return known

    def _table_row(self, index: int) -> Row:
        table = self._people.params.get("table", {})
        return jax.tree.map(lambda x: np.asarray(x[index], np.float32), table)

    def _stated(self, person: Person) -> np.ndarray | None:
        """Stated weights in the order of the adapters; None without any, or where they are of other adapters."""
        if person.stated is None or not self.model.mixes or not set(person.stated) <= set(self.names):
            return None
        weights = np.array([person.stated.get(name, 0.0) for name in self.names], np.float64)
        return (weights / weights.sum()).astype(np.float32)  # in float64, where no positive weight is rounded to 0

    def start_of(self, person: Person) -> Row:
        """The row that a person's fits start from."""
        stated = self._stated(person)
        if stated is not None:
            (leaf,) = self._table_row(0)
            return {leaf: np.log(np.maximum(stated, SMALLEST))}
        if person.start is not None and person.start_model == self.fingerprint:
            try:
                return unpacked(person.start, self._table_row(0))
            except ValueError as error:  # nothing here could give it again
                raise Unreachable(
                    f"{self.store.where}: the imported row of user {shown(person.name)} is damaged ({error}); restore "
                    "the database, or delete this person and import them again"
                ) from error
        rows = self._people.registry.rows
        return self._table_row(0 if person.forgotten else rows.get(str(person.name), 0))

    # ---- learning

    def warm_up(self) -> None:
        """Compiles in the background what votes need, one program at a time: votes that come meanwhile go first."""
        if self.fitter is None:
            return
        programs, self.warming = self.fitter.warm_up(), True

        def compile_one() -> None:
            try:
                for _ in programs:
                    with contextlib.suppress(RuntimeError):  # the server has ended
                        self.working.submit(compile_one)
                        return
                    break
            except Exception as error:  # votes compile what they need themselves, and say what is wrong
                logging.warning("people: programs could not be compiled beforehand (%s)", error)
            self.warming = False

        self.working.submit(self._as_known, Person(name=None), self._table_row(0))
        self.working.submit(compile_one)

    def close(self) -> None:
        """Gives up what nobody waits for."""
        self.working.shutdown(wait=False, cancel_futures=True)

    def _fit_later(self, name: str) -> None:
        with self._lock:
            if name in self._fitting:
                return
            self._fitting.add(name)
        self.working.submit(self._fit, name)

    def _fit(self, name: str) -> _Known | None:
        """Fits a person's row to the comparisons in the store, and keeps it there."""
        with self._lock:
            self._fitting.discard(name)
        try:
            version, comparisons = self.store.comparisons(name)
            person = self.store.person(name)
        except Unknown:
            return None
        if person is None or person.name is None or self.fitter is None:
            return None
        examples = []
        for one in comparisons:
            try:
                examples.append(as_example(one))
            except RecordError as error:
                logging.warning("left out a comparison of a person: %s", error.reason)
        row = self.fitter.fit(self.start_of(person), examples)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(row)):
            raise UserError("comparisons: the fit diverges; lower evaluate_users.cold_start_learning_rate")
        if comparisons:
            self.store.keep_row(name, version, self.fingerprint, packed(row))
        return self._keep(name, self._as_known(dataclasses.replace(person, version=version), row))

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
        self.store.learn(name, read, create=name in self._people.registry.rows)
        self.working.submit(self._fit, name).result()

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
        self._known(name)
        return name

    def state(self, name: str, mix: object) -> None:
        """Sets the stated weights of a person; what they have compared is fitted from there."""
        self._need(name)
        stated = self.check_mix(mix)
        if self.store.version(name) is None:
            self.store.add(name)
        self.store.state(name, stated)
        self._known(name)

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
        trained = name in self._people.registry.rows or (self._run is not None and name in trained_people(self._run))
        self.store.remove(name, trained)
        self._forget_trained(name)

    def forget(self, name: str) -> list[pathlib.Path]:
        """Deletes a person from the user models of the run, see `trained.forget`."""
        return [] if self._run is None else forget(self._run, name)

    def _forget_trained(self, name: str) -> None:
        """Zeroes the row of a person of the trained user model in the table that is served."""
        with self._lock:
            self._kept.pop(name, None)
            if name not in self._people.registry.rows:
                return
            table = jax.tree.map(jnp.asarray, self._people.params.get("table", {}))
            registry, table = self._people.registry.remove_users(table, [name])
            params = {**self._people.params, **({"table": table} if table else {})}
            self._people = dataclasses.replace(self._people, registry=registry, params=params)
            if isinstance(self.fitter, Fitter):
                self.fitter.trainable = {**self.fitter.trainable, "users": params}

    def trained_names(self) -> list[str]:
        """The people of the trained user model who were not deleted."""
        gone, names = self.store.forgotten(), list(self._people.registry.rows)
        for name in [name for name in names if gone and key_of(name) in gone]:
            self._forget_trained(name)  # another process has deleted them
        return list(self._people.registry.rows)

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
        self.store.add(name, comparisons, stated, None if start is None else packed(start), self.fingerprint)
        person = self.store.person(name)
        if row is not None and comparisons and person is not None:
            self.store.keep_row(name, person.version, self.fingerprint, packed(row))
        self._known(name)

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
        known = self._known(name)
        row = self.generic_row if known is None else known.row
        return self.working.submit(scorer.rewards, row, prompt, answers).result()

    # ---- rows

    @property
    def generic_row(self) -> Row:
        """The row of everybody unknown."""
        return self._table_row(0)

    def row_of(self, person: Person) -> Row:
        """A person's row."""
        known = self._known(str(person.name))
        return self.start_of(person) if known is None else known.row

    def output(self, person: Person, fits: bool = True) -> tuple[np.ndarray | None, np.ndarray | None] | None:
        """(user tokens, mix) of a person; None where `fits` is False and their row has yet to be fitted."""
        known = self._read(person, fits)
        return None if known is None else known.output

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
        known, seen = self._known(name), self._given(name)
        row = self.generic_row if known is None else known.row

        def work() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
            assert self.fitter is not None
            asked = self.fitter.margins(row, examples)
            return asked, self.fitter.margins(row, seen)

        return self.working.submit(work).result()

    @property
    def variance(self) -> float:
        """Of the numbers of a row around the generic one: that of the trained people, or 1 where there are fewer than
        two.
        """
        if self.scorer is not None:
            return self.scorer.variance
        rows = list(self._people.registry.rows.values())
        if len(rows) < 2 or not self.model.personal:
            return 1.0
        leaves = jax.tree.leaves(self._people.params["table"])
        found = [np.square(np.asarray(x, np.float64)[rows] - np.asarray(x, np.float64)[0]).mean() for x in leaves]
        return float(np.mean(found)) or 1.0

    def is_trained(self, person: Person) -> bool:
        """Whether a person has a row in the trained user model."""
        return not person.forgotten and person.name in self._people.registry.rows

    def _need(self, name: str) -> None:
        if not self.knows(name):
            raise Unknown(f"user {shown(name)}: is unknown; add this person first")


def _fingerprint(catalogue: Catalogue, people: People) -> str:
    """Of all that a fitted row depends on besides the comparisons."""
    tokenizer, learning = catalogue.model.tokenizer, people.learning
    note = {
        "base": people.base,
        "names": catalogue.names,
        "chat": catalogue.chat,
        **text_provenance(tokenizer, catalogue.chat),
        "kind": people.model.kind,
        "learning": None if learning is None else dataclasses.asdict(learning),
    }
    digest = xxhash.xxh3_128(json.dumps(note, sort_keys=True, default=repr).encode())
    generic = jax.tree.map(lambda x: x[0], people.params.get("table", {}))
    for leaf in jax.tree.leaves((catalogue.bank, people.params.get("shared", {}), generic)):
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


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


def store_of(run: pathlib.Path | None, url: str = "", limit: int = 256) -> Store:
    """The store of a run, see `open_members`."""
    return Store(address(run, url) or MEMORY, limit)
