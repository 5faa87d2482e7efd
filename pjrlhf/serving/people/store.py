"""Where people are kept: their comparisons, stated weights and rows, in SQLite beside the run or in any database that
SQLAlchemy reaches. Several processes may use one store at once.

Every change is one transaction and gives the person a new version, a random token, so that whoever holds a copy sees at
once that it is old. A comparison is only ever added or deleted, so votes that two replicas take at the same time are
both kept. The row of a person is a cache: it names the model it was fitted for and the version of the comparisons.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from pjrlhf.errors import UserError
from pjrlhf.paths import expand, install
from pjrlhf.serving.people.address import address
from pjrlhf.settings import shown
from pjrlhf.terminal import masked
from pjrlhf.types import Json

MEMORY = "sqlite://"
BUSY_SECONDS = 30  # that a process waits for another one's transaction
_STARTS = 20  # attempts to make the tables, every 50 ms
_CHECKPOINTS = 100  # attempts to empty the log of SQLite after a deletion, every 50 ms

_tables = sa.MetaData()
_schema = sa.Table("pjrlhf_schema", _tables, sa.Column("version", sa.Integer, primary_key=True))
# Names are JSON texts and keys are digests, so that a name may hold what a database's text cannot.
_people = sa.Table(
    "pjrlhf_people",
    _tables,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("name", sa.Text),  # null: a person of the trained user model who was deleted
    sa.Column("forgotten", sa.Boolean, nullable=False),  # the trained row is never used again
    sa.Column("version", sa.String(32), nullable=False),
    sa.Column("created", sa.DateTime, nullable=False),
    sa.Column("updated", sa.DateTime, nullable=False),
    sa.Column("stated", sa.Text),
    sa.Column("start", sa.LargeBinary),
    sa.Column("start_model", sa.String(64)),
    sa.Column("row", sa.LargeBinary),
    sa.Column("row_model", sa.String(64)),
    sa.Column("row_version", sa.String(32)),
)
_comparisons = sa.Table(
    "pjrlhf_comparisons",
    _tables,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("key", sa.String(64), sa.ForeignKey(_people.c.key), nullable=False, index=True),
    sa.Column("comparison", sa.Text, nullable=False),
    sa.Column("created", sa.DateTime, nullable=False),
)


def _first(connection: sa.Connection) -> None:
    _tables.create_all(connection)


# Changes of the schema in order; a store of version n has had the first n.
MIGRATIONS = (_first,)


class Unreachable(UserError):
    """The database does not answer, or refuses what it is asked."""


class Taken(UserError):
    """A person of this name is there already."""


class Unknown(UserError):
    """No person of this name is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Person:
    """A person as the store has them.

    Attributes:
      name: None for a person of the trained user model who was deleted.
      forgotten: their trained row is never used again.
      version: changes with every change of anything but `row`.
      stated: weights by name, or None.
      start, start_model: the row that fits start from, of an imported person, and the model it belongs to.
      row, row_model, row_version: the fitted row, the model it was fitted for, and the version of its comparisons.
      comparisons: how many there are.
    """

    name: str | None
    forgotten: bool = False
    version: str = ""
    created: datetime.datetime | None = None
    updated: datetime.datetime | None = None
    stated: dict[str, float] | None = None
    start: bytes | None = None
    start_model: str | None = None
    row: bytes | None = None
    row_model: str | None = None
    row_version: str | None = None
    comparisons: int = 0


def key_of(name: str) -> str:
    """The key of a person."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


class Store:
    """A database of people.

    Args:
      url: of SQLAlchemy; a path is SQLite.
      limit: comparisons kept of a person; the oldest make room for new ones.

    Raises:
      UserError: no such database, one of a newer version of this package, or a driver that is not installed.
    """

    def __init__(self, url: str = MEMORY, limit: int = 256):
        self.url, self.limit = url, limit
        self.where = masked(url)
        with self._errors():
            parsed = _parsed(url)
            self._sqlite = parsed.get_backend_name() == "sqlite"
            memory = parsed.database in (None, "", ":memory:")
            self._file = pathlib.Path(parsed.database or "") if self._sqlite and not memory else None
            self._inode: tuple[int, int] | None = None
            options: dict[str, Any] = {"pool_pre_ping": not self._sqlite}
            if self._sqlite:
                options["connect_args"] = {"timeout": BUSY_SECONDS, "check_same_thread": False}
            # One connection is all there is of a database in memory.
            alone = self._sqlite and memory
            self._alone = threading.RLock() if alone else contextlib.nullcontext()
            if alone:
                options["poolclass"] = StaticPool
            if self._file is not None:
                self._create(self._file)
                self._inode = _inode(self._file)
            self._engine = sa.create_engine(parsed, **options)
            self._writer = self._engine.execution_options(writes=True)
            if self._sqlite:
                event.listen(self._engine, "connect", _connected)
                event.listen(self._engine, "begin", _begin)
        self._migrate()

    def close(self) -> None:
        self._engine.dispose()

    # ---- the database

    def _create(self, file: pathlib.Path) -> None:
        """An empty file that only its owner can read: what people compared is theirs."""
        try:
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise UserError(
                f"{file}: people cannot be kept there ({error.strerror}); make it writable, or name another place "
                "with --people or $PJRLHF_PEOPLE; sqlite:// is in memory"
            ) from error

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, UserError):
            raise
        except SQLAlchemyError as error:
            reason = " ".join(str(getattr(error, "orig", None) or error).split())[:200]
            raise Unreachable(f"{self.where}: {masked(reason)}; check --people and its database") from error
        except (ValueError, TypeError) as error:  # of an address, or of a value that a damaged database returns
            raise Unreachable(f"{self.where}: {masked(str(error))[:200]}; check --people and its database") from error
        except ModuleNotFoundError as error:
            way = install("postgres") if error.name == "psycopg" else "install it, or use SQLite or PostgreSQL"
            raise UserError(f"{self.where}: the driver {error.name} is not installed; {way}") from error

    @contextlib.contextmanager
    def _transaction(self, write: bool = False) -> Iterator[sa.Connection]:
        with self._alone, self._errors():
            self._check_file()
            with (self._writer if write else self._engine).begin() as connection:
                yield connection

    def _check_file(self) -> None:
        """SQLite goes on with a file that is no longer there, and what it keeps is lost with the last connection."""
        if self._file is not None and _inode(self._file) != self._inode:
            raise Unreachable(
                f"{self.where}: was deleted, moved or replaced while it was in use, and nothing more can be kept "
                "there; start again, with the file in its place"
            )

    def _migrate(self) -> None:
        for attempt in range(_STARTS):
            try:
                with self._transaction(write=True) as connection:
                    version = 0
                    if sa.inspect(connection).has_table(_schema.name):
                        version = connection.scalar(sa.select(_schema.c.version)) or 0
                    if version > len(MIGRATIONS):
                        raise UserError(
                            f"{self.where}: was written by a newer version of pjrlhf (schema {version}, this one knows "
                            f"{len(MIGRATIONS)}); update pjrlhf, or name another store with --people"
                        )
                    for migrate in MIGRATIONS[version:]:
                        migrate(connection)
                    if version < len(MIGRATIONS):
                        connection.execute(_schema.delete())
                        connection.execute(_schema.insert().values(version=len(MIGRATIONS)))
                return
            except (Unreachable, IntegrityError):  # another replica may be making the same tables
                if attempt == _STARTS - 1:
                    raise
                time.sleep(0.05)

    # ---- reading

    def version(self, name: str) -> tuple[str, bool] | None:
        """(version, whether the person is there) of a name; None where the store knows nothing of it."""
        with self._transaction() as connection:
            found = connection.execute(
                sa.select(_people.c.version, _people.c.name).where(_people.c.key == key_of(name))
            ).first()
        return None if found is None else (found.version, found.name is not None)

    def person(self, name: str) -> Person | None:
        """What the store knows of a name."""
        found = self._select(_people.c.key == key_of(name), tuple(_people.c))
        return found[0] if found else None

    def people(self) -> list[Person]:
        """Everybody, in the order of coming; without their rows."""
        rows = {"start", "start_model", "row", "row_model", "row_version"}
        return self._select(_people.c.name.is_not(None), [x for x in _people.c if x.name not in rows])

    def forgotten(self) -> set[str]:
        """Keys of the people whose trained rows are never used again."""
        with self._transaction() as connection:
            return set(connection.scalars(sa.select(_people.c.key).where(_people.c.forgotten)))

    def _select(self, which: sa.ColumnElement[bool], columns: Sequence[sa.Column]) -> list[Person]:
        count = (
            sa.select(sa.func.count()).where(_comparisons.c.key == _people.c.key).correlate(_people).scalar_subquery()
        )
        query = sa.select(*columns, count.label("comparisons")).where(which).order_by(_people.c.created, _people.c.key)
        with self._transaction() as connection:
            return [_person(row) for row in connection.execute(query).mappings()]

    def comparisons(self, name: str) -> tuple[str, list[dict[str, Json]]]:
        """(version, comparisons in the order of coming) of a person.

        Raises:
          Unknown: no such person.
        """
        while True:
            before = self.version(name)
            if before is None or not before[1]:
                raise unknown(name)
            with self._transaction() as connection:
                found = connection.scalars(
                    sa.select(_comparisons.c.comparison)
                    .where(_comparisons.c.key == key_of(name))
                    .order_by(_comparisons.c.id)
                ).all()
                comparisons = [_object(text, "a comparison") for text in found]
            if self.version(name) == before:  # else another process has added some in between
                return before[0], comparisons

    # ---- changes

    def add(
        self,
        name: str,
        comparisons: Sequence[dict[str, Json]] = (),
        stated: dict[str, float] | None = None,
        start: bytes | None = None,
        start_model: str | None = None,
    ) -> None:
        """Adds a person.

        Raises:
          Taken: the name is taken.
        """
        key, now = key_of(name), _now()
        values = {
            "name": json.dumps(name),
            "version": _version(),
            "created": now,
            "updated": now,
            "stated": None if stated is None else json.dumps(stated),
            "start": start,
            "start_model": start_model,
        }
        try:
            with self._transaction(write=True) as connection:
                deleted = (_people.c.key == key) & _people.c.name.is_(None)
                if not connection.execute(_people.update().where(deleted).values(values)).rowcount:
                    connection.execute(_people.insert().values(key=key, forgotten=False, **values))
                self._insert(connection, key, comparisons)
        except IntegrityError as error:
            raise Taken(f"user {name!r}: the name is taken; choose another, or delete that person first") from error

    def learn(self, name: str, comparisons: Sequence[dict[str, Json]], create: bool = False) -> None:
        """Adds comparisons of a person; all are kept, or none.

        Args:
          create: the person need not be there: they are one of the trained user model.

        Raises:
          Unknown: no such person.
        """
        if create and self.version(name) is None:
            with contextlib.suppress(Taken):
                self.add(name)
        key = key_of(name)
        with self._transaction(write=True) as connection:
            there = (_people.c.key == key) & _people.c.name.is_not(None)
            # The update also locks the person against other writers until the end of the transaction.
            changed = _people.update().where(there).values(version=_version(), updated=_now())
            if not connection.execute(changed).rowcount:
                raise unknown(name)
            self._insert(connection, key, comparisons)

    def _insert(self, connection: sa.Connection, key: str, comparisons: Sequence[dict[str, Json]]) -> None:
        now = _now()
        rows = [{"key": key, "comparison": json.dumps(one), "created": now} for one in list(comparisons)[-self.limit :]]
        if rows:
            connection.execute(_comparisons.insert(), rows)
        kept = (
            sa.select(_comparisons.c.id)
            .where(_comparisons.c.key == key)
            .order_by(_comparisons.c.id.desc())
            .limit(self.limit)
        )
        newest = connection.scalars(kept).all()
        if len(newest) == self.limit:
            old = (_comparisons.c.key == key) & (_comparisons.c.id < newest[-1])
            connection.execute(_comparisons.delete().where(old))

    def state(self, name: str, stated: dict[str, float]) -> None:
        """Sets the stated weights of a person.

        Raises:
          Unknown: no such person.
        """
        values = {"stated": json.dumps(stated), "version": _version(), "updated": _now()}
        with self._transaction(write=True) as connection:
            there = (_people.c.key == key_of(name)) & _people.c.name.is_not(None)
            if not connection.execute(_people.update().where(there).values(values)).rowcount:
                raise unknown(name)

    def keep_row(self, name: str, version: str, model: str, row: bytes) -> None:
        """Keeps a fitted row, unless the person has changed since `version`."""
        current = (_people.c.key == key_of(name)) & (_people.c.version == version) & _people.c.name.is_not(None)
        values = {"row": row, "row_model": model, "row_version": version}
        with self._transaction(write=True) as connection:
            connection.execute(_people.update().where(current).values(values))

    def remove(self, name: str, trained: bool = False) -> None:
        """Deletes a person: what was kept of them is overwritten.

        Args:
          trained: they have a row in the trained user model; a mark stays, without their name, so that this row is
            never used again.

        Raises:
          Unknown: the person is neither in the store nor `trained`.
        """
        key, now = key_of(name), _now()
        nothing = dict.fromkeys(("name", "stated", "start", "start_model", "row", "row_model", "row_version"))
        values = {**nothing, "forgotten": True, "version": _version(), "created": now, "updated": now}
        with self._transaction(write=True) as connection:
            known = connection.execute(
                sa.select(_people.c.name, _people.c.forgotten).where(_people.c.key == key).with_for_update()
            ).first()
            gone = known is not None and known.name is None
            if gone or (known is None and not trained):
                raise unknown(name)
            connection.execute(_comparisons.delete().where(_comparisons.c.key == key))
            if known is None:
                connection.execute(_people.insert().values(key=key, **values))
            elif trained or known.forgotten:
                connection.execute(_people.update().where(_people.c.key == key).values(values))
            else:
                connection.execute(_people.delete().where(_people.c.key == key))
        self._overwrite()

    def _overwrite(self) -> None:
        """Leaves nothing of deleted rows in the files of the database."""
        with self._errors():
            if self._sqlite and self._file is None:
                return
            self._check_file()
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                if not self._sqlite:
                    if self._engine.dialect.name == "postgresql":
                        connection.execute(sa.text(f"VACUUM {_people.name}, {_comparisons.name}"))
                    return
                # `secure_delete` has overwritten the pages; they are still in the log, until it is emptied.
                for _ in range(_CHECKPOINTS):
                    busy, *_ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
                    if not busy:
                        return
                    time.sleep(0.05)


def store_of(run: pathlib.Path | None, url: str = "", limit: int = 256) -> Store:
    """The store of a run, in memory where there is no run.

    Args:
      url: see `address`.
      limit: see `Store`.
    """
    return Store(address(run, url) or MEMORY, limit)


def _parsed(url: str) -> sa.URL:
    """Of a URL, or of a path, in which any character stands for itself."""
    if "://" not in url:
        return sa.URL.create("sqlite", database=expand(url))
    parsed = sa.make_url(url)
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite" and "uri" in parsed.query:
        raise UserError(f"{masked(url)}: addresses with file: are not supported; give the path of the file alone")
    return parsed


def _inode(file: pathlib.Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _connected(connection, _) -> None:
    """Of SQLite: a log that survives the death of a process, and deletions that overwrite."""
    connection.isolation_level = None  # transactions are begun by `_begin`
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").fetchall()


def _begin(connection: sa.Connection) -> None:
    # A transaction that becomes a writer only later fails where another one has written in between.
    options = connection.get_execution_options()
    if options.get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writes") else "BEGIN")


def _person(row: sa.RowMapping) -> Person:
    found = {field.name: row[field.name] for field in dataclasses.fields(Person) if field.name in row}
    for name in ("name", "stated"):
        found[name] = None if found[name] is None else json.loads(found[name])
    if not isinstance(found["name"], str | None):
        raise ValueError("a name is no text")
    if found["stated"] is not None:
        weights = _object(row["stated"], "what a person states").values()
        if not all(type(x) in (int, float) and 0 <= x < math.inf for x in weights) or not sum(weights):
            raise ValueError("what a person states are no weights")
    return Person(**found)


def _object(text: str, what: str) -> dict[str, Any]:
    """Raises ValueError for JSON that is no object, as only a damaged database has it."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no object")
    return value


def unknown(name: str) -> Unknown:
    """The error of a request about somebody who is not there."""
    return Unknown(f"user {shown(name)}: is unknown; GET /v1/users lists all people, and POST adds one")


def _version() -> str:
    return secrets.token_hex(16)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
