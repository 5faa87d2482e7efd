"""Where people are kept: SQLite and PostgreSQL, several processes at once, and what a deletion leaves."""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest
import sqlalchemy as sa
from support.postgres import postgres

from pjrlhf.errors import UserError
from pjrlhf.serving.people import store as stores
from pjrlhf.serving.people.store import MIGRATIONS, Store, Taken, Unknown, Unreachable

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def url(request, tmp_path):
    if request.param == "memory":
        return "sqlite://"
    if request.param == "sqlite":
        return str(tmp_path / "people.sqlite")
    found = request.getfixturevalue("server")
    engine = sa.create_engine(found.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        stores._tables.drop_all(connection)
    engine.dispose()
    return found


def vote(i):
    return {"prompt": f"question {i}", "chosen": "a\0b", "rejected": "☃"}


@pytest.mark.parametrize("name", ["ana", "a/b'\"; drop table", "nul\0", "☃"])
def test_what_is_written_is_read(url, name):
    store = Store(url)
    store.add(name, [vote(0)], {"P1A": 0.5}, b"start", "model")
    with pytest.raises(Taken):
        store.add(name)
    store.learn(name, [vote(1), vote(2)])
    version, comparisons = store.comparisons(name)
    assert comparisons == [vote(0), vote(1), vote(2)]
    store.keep_row(name, version, "model", b"row\0")
    person = store.person(name)
    assert (person.name, person.stated, person.start, person.row) == (name, {"P1A": 0.5}, b"start", b"row\0")
    assert person.row_version == person.version == version and person.comparisons == 3
    store.state(name, {"P1A": 1.0})
    store.keep_row(name, version, "model", b"late")
    assert store.person(name).row == b"row\0", "a row of older comparisons is not kept"
    assert store.person(name).version != version
    assert [person.name for person in store.people()] == [name]
    store.remove(name)
    assert store.person(name) is None and store.people() == [] and store.version(name) is None
    for change in (
        lambda: store.remove(name),
        lambda: store.learn(name, [vote(0)]),
        lambda: store.state(name, {}),
        lambda: store.comparisons(name),
    ):
        with pytest.raises(Unknown):
            change()
    store.close()


def test_the_oldest_comparisons_make_room(url):
    store = Store(url, limit=3)
    store.add("ana", [vote(i) for i in range(5)])
    assert store.comparisons("ana")[1] == [vote(2), vote(3), vote(4)]
    store.learn("ana", [vote(5)])
    store.learn("ana", [vote(i) for i in range(6, 8)])
    assert store.comparisons("ana")[1] == [vote(5), vote(6), vote(7)]
    store.close()


def test_a_deleted_person_of_the_user_model_stays_forgotten(url):
    store = Store(url)
    store.remove("ana", trained=True)
    assert store.version("ana")[1] is False and store.people() == [] and len(store.forgotten()) == 1
    with pytest.raises(Unknown):
        store.remove("ana", trained=True)
    store.add("ana", [vote(0)])
    assert store.person("ana").forgotten
    store.remove("ana")
    assert len(store.forgotten()) == 1 and store.person("ana").row is None and store.person("ana").name is None
    store.close()


def test_no_vote_of_two_replicas_is_lost(url):
    """Each has its own connection, but for memory, which only one process can have."""
    one = Store(url)
    other = one if url == "sqlite://" else Store(url)
    one.add("ana")
    versions = set()

    def give(i):
        store = (one, other)[i % 2]
        store.learn("ana", [vote(2 * i), vote(2 * i + 1)])
        versions.add(store.version("ana"))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(give, range(40)))
    for store in (one, other):
        found = [one["prompt"] for one in store.comparisons("ana")[1]]
        assert sorted(found, key=lambda x: int(x.split()[1])) == [f"question {i}" for i in range(80)]
    assert one.version("ana") == other.version("ana")
    one.close()
    other.close()


def test_votes_and_a_deletion_at_once(url):
    """Whoever comes first: afterwards there is nothing, or a new person with only what came after."""
    store = Store(url)
    for _ in range(10):
        store.add("ana", [vote(0)])
        start = threading.Barrier(2)

        def learn(start=start):
            start.wait()
            with contextlib.suppress(Unknown):
                store.learn("ana", [vote(1)])

        thread = threading.Thread(target=learn)
        thread.start()
        start.wait()
        store.remove("ana")
        thread.join()
        assert store.person("ana") is None
        store.add("ana")
        assert store.comparisons("ana")[1] == []
        store.remove("ana")
    store.close()


def test_replicas_that_start_together_share_the_tables(url):
    if url == "sqlite://":
        pytest.skip("memory belongs to one process")
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda _: Store(url), range(6)))
    stores[0].add("ana")
    assert all(store.version("ana") for store in stores)
    for store in stores:
        store.close()


WRITER = """
import sys
from pjrlhf.serving.people.store import Store
store = Store(sys.argv[1], limit=10**6)
store.add("ana")
for i in range(10**6):
    store.learn("ana", [{"prompt": str(i)}])
    print(i, flush=True)
"""


@pytest.mark.parametrize("url", ["sqlite", "postgres"], indirect=True)
def test_what_was_acknowledged_survives_a_kill(url):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", WRITER, url], env=env, stdout=subprocess.PIPE, text=True)
    acknowledged = [int(process.stdout.readline()) for _ in range(30)]
    process.send_signal(signal.SIGKILL)
    acknowledged += map(int, process.stdout.read().split())
    process.wait()
    store = Store(url, limit=10**6)
    found = [int(one["prompt"]) for one in store.comparisons("ana")[1]]
    assert found == list(range(len(found))) and len(found) >= len(acknowledged)
    store.learn("ana", [{"prompt": "after"}])
    store.close()


def test_a_deletion_leaves_no_bytes_in_the_files(tmp_path):
    """Also where another process has the file open."""
    store, other = (Store(str(tmp_path / "people.sqlite")) for _ in range(2))
    secret, row = "a very private answer", bytes(range(64)) * 40
    store.add("bo", [{"prompt": "public", "chosen": "kept", "rejected": "no"}])
    for _ in range(3):  # several versions of everything, on several pages
        store.add("ana", [{"prompt": f"{secret} {i}", "chosen": "x" * 500, "rejected": "y"} for i in range(50)])
        store.keep_row("ana", store.version("ana")[0], "model", row)
        store.learn("ana", [{"prompt": secret}])
        assert other.person("ana").comparisons == 51
        assert secret in str(files(tmp_path)) and row in files(tmp_path)
        store.remove("ana")
        left = files(tmp_path)
        assert b"private" not in left and row[:64] not in left and b"ana" not in left.replace(b"bo", b"")
    assert other.comparisons("bo")[1][0]["chosen"] == "kept" and b"kept" in files(tmp_path)
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}, "only the owner reads them"


def files(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def test_a_store_of_a_newer_version_is_refused(url):
    if url == "sqlite://":
        pytest.skip("memory is always new")
    store = Store(url)
    with store._transaction(write=True) as connection:
        connection.execute(stores._schema.update().values(version=len(MIGRATIONS) + 1))
    store.close()
    with pytest.raises(UserError, match=r"newer version of pjrlhf \(schema 2, this one knows 1\); update pjrlhf"):
        Store(url)


def test_a_store_is_migrated_once(tmp_path, monkeypatch):
    path = str(tmp_path / "people.sqlite")
    Store(path).add("ana")
    add = sa.text("ALTER TABLE pjrlhf_people ADD COLUMN colour TEXT")
    monkeypatch.setattr(stores, "MIGRATIONS", (*MIGRATIONS, lambda connection: connection.execute(add)))
    for _ in range(2):
        assert [person.name for person in Store(path).people()] == ["ana"]
    columns = {row[1] for row in sqlite3.connect(path).execute("PRAGMA table_info(pjrlhf_people)")}
    assert "colour" in columns


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("x://y", "x://y: .*; check --people"),
        (
            "postgresql://ana:secret@127.0.0.1:1/people",
            r"\*\*\*@127.0.0.1:1/people: connection failed.*; check --people",
        ),
        ("/nowhere/people.sqlite", "/nowhere/people.sqlite: people cannot be kept there"),
        ("sqlite:////nowhere/people.sqlite", "/nowhere/people.sqlite: people cannot be kept there"),
        ("firebird://h/x", "check --people"),
        ("postgresql://ana:secret@h:port/people", r"\*\*\*@h:port/people: .*; check --people"),
        ("sqlite://?timeout=soon", "check --people"),
        ("sqlite:///file:x?uri=true", "addresses with file: are not supported; give the path"),
        ("x\0y", "null character; leave it out"),
    ],
)
def test_what_is_no_store_is_named(url, message):
    with pytest.raises(UserError, match=message) as caught:
        Store(url)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "notes").write_text("hello " * 1000)
    with pytest.raises(Unreachable, match=re.escape(str(tmp_path / "notes"))):
        Store(str(tmp_path / "notes"))


@pytest.mark.parametrize("folder", ["what?", "a?mode=ro&x", "a%20b", "a#b", "x@y:z", "ü ☃"])
def test_any_character_of_a_path_stands_for_itself(tmp_path, folder):
    place = tmp_path / folder
    place.mkdir()
    Store(str(place / "people.sqlite")).add("ana")
    assert (place / "people.sqlite").stat().st_size and list(tmp_path.iterdir()) == [place]
    assert [person.name for person in Store(str(place / "people.sqlite")).people()] == ["ana"]


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Store("~/people.sqlite").add("ana")
    assert (tmp_path / "people.sqlite").is_file()


@pytest.mark.parametrize("change", ["deleted", "moved", "replaced"])
def test_nothing_is_acknowledged_that_a_restart_would_lose(tmp_path, change):
    """SQLite itself goes on with the file that it has open."""
    path = tmp_path / "run" / "people.sqlite"
    path.parent.mkdir()
    store = Store(str(path))
    store.add("ana", [vote(0)])
    if change == "deleted":
        for file in path.parent.iterdir():
            file.unlink()
    elif change == "moved":
        path.parent.rename(tmp_path / "other")
    else:
        Store(str(tmp_path / "new.sqlite")).close()
        (tmp_path / "new.sqlite").replace(path)
    for act in (lambda: store.learn("ana", [vote(1)]), lambda: store.version("ana"), lambda: store.remove("ana")):
        with pytest.raises(Unreachable, match=r"people\.sqlite: was deleted, moved or replaced .*; start again"):
            act()
    assert change != "deleted" or not list(path.parent.iterdir()), "no empty file takes its place"
    if change == "moved":
        assert Store(str(tmp_path / "other" / "people.sqlite")).person("ana").comparisons == 1


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE pjrlhf_people SET stated = '{'",
        "UPDATE pjrlhf_people SET created = 'yesterday'",
        "UPDATE pjrlhf_people SET stated = '[1]'",
        """UPDATE pjrlhf_people SET stated = '{"P1A": "x"}'""",
        """UPDATE pjrlhf_people SET stated = '{"P1A": NaN}'""",
        """UPDATE pjrlhf_people SET stated = '{"P1A": 0}'""",
        "UPDATE pjrlhf_people SET stated = x'00'",
        "UPDATE pjrlhf_people SET name = '7'",
        "UPDATE pjrlhf_people SET created = x'00'",
        "UPDATE pjrlhf_people SET created = 7",
        "UPDATE pjrlhf_comparisons SET comparison = 'no JSON'",
        "UPDATE pjrlhf_comparisons SET comparison = '[]'",
        "UPDATE pjrlhf_comparisons SET comparison = x'00'",
        "DROP TABLE pjrlhf_comparisons",
    ],
)
def test_damage_that_sqlite_does_not_see_is_named(tmp_path, damage):
    path = tmp_path / "people.sqlite"
    store = Store(str(path))
    store.add("ana", [vote(0)], {"P1A": 1.0})
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(damage)
    store = Store(str(path))
    with pytest.raises(Unreachable, match=r"people\.sqlite: .*; check --people and its database"):
        store.people()
        store.comparisons("ana")
