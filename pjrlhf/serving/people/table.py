"""The rows of a server's people: of the trained user model, stored, or fitted to what their person has compared.

A row is fitted to all comparisons that its person has given, see `fit`, so neither their order nor how they are batched
matters, and nobody else's row moves.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from absl import logging

from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError
from pjrlhf.models.provenance import text_provenance
from pjrlhf.serving.catalogue import Catalogue, People
from pjrlhf.serving.people.fit import Fitter, Row, as_example
from pjrlhf.serving.people.rewards import Scorer
from pjrlhf.serving.people.rows import packed, unpacked
from pjrlhf.serving.people.store import Person, Store, Unknown, Unreachable, key_of
from pjrlhf.settings import shown

ROWS_KEPT = 4096  # people whose rows are kept in memory
SMALLEST = 1e-4  # of a stated weight that learning starts from; softmax gives no zero
Output = tuple[np.ndarray | None, np.ndarray | None]  # user tokens [E, D], mix [K]; None where the model has none


@dataclasses.dataclass(frozen=True)
class Known:
    """A person as they are answered.

    Attributes:
      version: of the store, or "" for people it does not have.
      row: their row.
      output: what it gives the model.
    """

    version: str
    row: Row
    output: Output


class Table:
    """Rows by name. Several threads may use one; fits run one after the other in a thread of their own.

    Args:
      catalogue: has people.
      store: of those who compare or state something.
      fitter: of rows; None where nothing can be fitted.

    Attributes:
      people: of the trained user model, without those who were deleted.
      fingerprint: of all that a row depends on besides the comparisons; a row of another one is fitted again.
      working: runs fits.
      warming: whether the warm-up goes on.
    """

    def __init__(self, catalogue: Catalogue, store: Store, fitter: Fitter | Scorer | None):
        assert isinstance(catalogue.people, People)
        self.people, self.store, self.fitter, self._names = catalogue.people, store, fitter, catalogue.names
        self._model = self.people.model
        self.fingerprint = _fingerprint(catalogue, self.people)
        self.working = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="people")
        self.warming = False
        self._kept: collections.OrderedDict[str, Known] = collections.OrderedDict()
        self._fitting: set[str] = set()
        self._lock = threading.Lock()
        self._apply = jax.jit(self._model.apply)
        self.trained_names()  # without those who were deleted

    @functools.cached_property
    def generic(self) -> Output:
        """What the model is given for everybody unknown."""
        return self.people.row(None)

    @property
    def generic_row(self) -> Row:
        """The row of everybody unknown."""
        return self._table_row(0)

    def row(self, name: str) -> Row:
        """A person's row; the generic one for an unknown person."""
        known = self.known(name)
        return self.generic_row if known is None else known.row

    def version(self, name: str) -> str | None:
        """The version of a person in the store, "" for one that it does not have; None for an unknown person."""
        found = self.store.version(name)
        if found is None:
            return "" if self.is_trained(name) else None
        version, there = found
        if not there and self.is_trained(name):
            self.forget(name)  # another server has deleted them
        return version if there else None

    def known(self, name: str) -> Known | None:
        """A person's row, fitted where the stored one is not of this model; None for an unknown person."""
        version = self.version(name)
        if version is None:
            return None
        with self._lock:
            known = self._kept.get(name)
        if known is not None and known.version == version:
            return known
        person = self.store.person(name) if version else Person(name=name)
        if person is None or person.name is None:  # deleted in between
            return None
        return self.read(person)

    def read(self, person: Person, fits: bool = True) -> Known | None:
        """A person's row: the stored one, where it is of this model. Where it is not, the row is fitted, or with `fits`
        False there is none.
        """
        name, row = str(person.name), None
        if not person.comparisons or self.fitter is None:
            row = self.start_of(person)
        elif (row := self._stored_row(person)) is not None:
            if person.row_version != person.version:  # votes whose fit has not ended; nobody waits for it here
                self._fit_later(name)
                return self._as_known(person, row)
        elif fits:
            return self.fit(name)
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

    def _as_known(self, person: Person, row: Row) -> Known:
        stated = self.stated(person)
        if stated is not None and not person.comparisons:
            return Known(person.version, row, (None, stated))  # exactly what they said
        table = jax.tree.map(lambda generic, own: np.stack([generic, own]), self._table_row(0), row)
        params = {**self.people.params, **({"table": table} if self._model.personal else {})}
        found = self._apply(params, np.array([1], np.int32))
        output = [None if x is None else np.asarray(x, np.float32)[0] for x in found]
        return Known(person.version, row, (output[0], output[1]))

    def _keep(self, name: str, known: Known) -> Known:
        with self._lock:
            self._kept[name] = known
            self._kept.move_to_end(name)
            while len(self._kept) > ROWS_KEPT:
                self._kept.popitem(last=False)
        return known

    def _table_row(self, index: int) -> Row:
        table = self.people.params.get("table", {})
        return jax.tree.map(lambda x: np.asarray(x[index], np.float32), table)

    def stated(self, person: Person) -> np.ndarray | None:
        """Stated weights in the order of the adapters; None without any, or where they are of other adapters."""
        if person.stated is None or not self._model.mixes or not set(person.stated) <= set(self._names):
            return None
        weights = np.array([person.stated.get(name, 0.0) for name in self._names], np.float64)
        return (weights / weights.sum()).astype(np.float32)  # in float64, where no positive weight is rounded to 0

    def start_of(self, person: Person) -> Row:
        """The row that a person's fits start from."""
        stated = self.stated(person)
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
        rows = self.people.registry.rows
        return self._table_row(0 if person.forgotten else rows.get(str(person.name), 0))

    def warm_up(self, likely: Sequence[Example] = ()) -> None:
        """Compiles in the background what votes need, one program at a time: votes that come meanwhile go first.

        Args:
          likely: comparisons like those that come first.
        """
        if self.fitter is None:
            return
        programs, self.warming, began = self.fitter.warm_up(likely), True, time.monotonic()

        def compile_one() -> None:
            try:
                for _ in programs:
                    with contextlib.suppress(RuntimeError):  # the server has ended
                        self.working.submit(compile_one)
                        return
                    break
                else:
                    took = time.monotonic() - began
                    logging.info("people: compiled what votes need in %.0f s; no vote waits for the compiler now", took)
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

    def fit(self, name: str) -> Known | None:
        """Fits a person's row to the comparisons in the store, keeps it there, and waits for that."""
        return self.working.submit(self._fit, name).result()

    def _fit(self, name: str) -> Known | None:
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

    def forget(self, name: str) -> None:
        """Takes a person's row out of memory, and zeroes it in the table of the trained user model that is served."""
        with self._lock:
            self._kept.pop(name, None)
            if not self.is_trained(name):
                return
            table = jax.tree.map(jnp.asarray, self.people.params.get("table", {}))
            registry, table = self.people.registry.remove_users(table, [name])
            params = {**self.people.params, **({"table": table} if table else {})}
            self.people = dataclasses.replace(self.people, registry=registry, params=params)
            if isinstance(self.fitter, Fitter):
                self.fitter.trainable = {**self.fitter.trainable, "users": params}

    def trained_names(self) -> list[str]:
        """The people of the trained user model who were not deleted."""
        gone, names = self.store.forgotten(), list(self.people.registry.rows)
        for name in [name for name in names if gone and key_of(name) in gone]:
            self.forget(name)  # another process has deleted them
        return list(self.people.registry.rows)

    def is_trained(self, name: str) -> bool:
        """Whether a person has a row in the trained user model."""
        return name in self.people.registry.rows

    @property
    def variance(self) -> float:
        """Of the numbers of a row around the generic one: that of the trained people, or 1 where there are fewer than
        two.
        """
        if isinstance(self.fitter, Scorer):
            return self.fitter.variance
        rows = list(self.people.registry.rows.values())
        if len(rows) < 2 or not self._model.personal:
            return 1.0
        leaves = jax.tree.leaves(self.people.params["table"])
        found = [np.square(np.asarray(x, np.float64)[rows] - np.asarray(x, np.float64)[0]).mean() for x in leaves]
        return float(np.mean(found)) or 1.0


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
