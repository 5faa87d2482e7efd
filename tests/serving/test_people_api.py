"""People over HTTP: added, taught, asked, exported, deleted; and what is refused."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import sqlite3
import threading
import time
import urllib.parse

import jax
import numpy as np
import pytest
from safetensors.numpy import save
from support import tiny_serving, tiny_users
from support.postgres import postgres
from support.serving import answering, compilations, send, served

from pjrlhf.data.packing import NOWHERE
from pjrlhf.data.token_table import Lengths
from pjrlhf.errors import UserError
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.users import UserModel
from pjrlhf.rollout.preference import PreferenceConfig
from pjrlhf.serving import monitoring, running
from pjrlhf.serving.catalogue import Catalogue, People
from pjrlhf.serving.opening import soup_people
from pjrlhf.serving.people import fit
from pjrlhf.serving.people.fit import Learning
from pjrlhf.serving.people.members import open_members
from pjrlhf.serving.people.questions import ask_of, likely_votes, next_questions, pool_of, read_pool
from pjrlhf.serving.people.store import Unreachable
from pjrlhf.serving.service import Service
from pjrlhf.serving.settings import ServerSettings

NAMES = ("P1A", "P2B", "P3A")
ANSWERS = ("it is wet .", "the sky is blue .", "a dog runs .", "yes .")
LEARNING = Learning(
    objective=PreferenceConfig(beta=0.5),
    lengths=Lengths(prompt=16, completion=12, long_prompt="truncate_left", long_completion="truncate"),
    steps=10,
)
E = 2


def comparison(i, chosen=0, rejected=1):
    return {
        "prompt": f"what is {['rain', 'snow', 'wind'][i % 3]} ?",
        "chosen": ANSWERS[chosen],
        "rejected": ANSWERS[rejected],
    }


def catalogue_of(model, kind="soup"):
    bank = tiny_serving.bank(model)
    if kind == "soup":
        return Catalogue(model, NAMES, bank, soup_people(bank, NAMES, LEARNING, "base"))
    width = model.backbone.model.config.hidden_size
    users = UserModel(kind=kind, num_users=2, tokens=E, width=width, clusters=3)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: users.init(jax.random.key(0), model.backbone.base["embed"]["embedding"]))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    one = jax.tree.map(lambda x: x[:1], bank)
    people = People(users, UserRegistry((None, "ana", "bo")), params, learning=LEARNING, base="base")
    return Catalogue(model, (kind,), one, people)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_serving.model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def place(model):
    engine = tiny_serving.engine(model)
    with answering(catalogue_of(model), engine, max_body=20_000) as found:
        yield found


def users(place, path="", body=None, method=None):
    status, found, _ = send(place, body, f"/v1/users{path}", method or ("GET" if body is None else "POST"))
    return status, found


def quoted(name):
    return "/" + urllib.parse.quote(name, safe="")


def mix_of(place, name):
    """The soup that answers a person."""
    body = {"model": "personal", "user": name, "messages": [{"role": "user", "content": "what is rain ?"}]}
    status, found, _ = send(place, {**body, "max_tokens": 1})
    assert status == 200, found
    return found["pjrlhf"]["mix"]


@pytest.mark.parametrize(
    "name", ["ana", "a/b", "x/export", "import", "Zoë ☃", "a b?c#d%41", "next", "\n", "a\nb", "x/export\n"]
)
def test_a_person_is_added_taught_and_deleted(place, name):
    status, found = users(place, "", {"id": name})
    assert status == 200 and found["id"] == name and found["known"] and found["comparisons"] == 0, found
    assert found["mix"] == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
    assert users(place, "", {"id": name})[0] == 409
    before = mix_of(place, "somebody else")
    status, found = users(place, quoted(name) + "/feedback", {"comparisons": [comparison(0), comparison(1)]})
    assert status == 200 and found["comparisons"] == 2 and found["seconds"] > 0, found
    assert found["mix"] != pytest.approx(dict.fromkeys(NAMES, 1 / 3), abs=1e-3)
    assert mix_of(place, name) == pytest.approx(found["mix"]), "the next answer is already another one"
    assert mix_of(place, "somebody else") == before == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
    status, shown = users(place, quoted(name))
    assert status == 200 and shown == {key: x for key, x in found.items() if key != "seconds"}
    assert name in [one["id"] for one in users(place)[1]["data"]]
    status, export = users(place, quoted(name) + "/export")
    assert status == 200 and export["comparisons"] == [comparison(0), comparison(1)], export
    status, gone = users(place, quoted(name), method="DELETE")
    assert status == 200 and gone == {"object": "user.deleted", "id": name, "deleted": True, "rewritten": []}
    assert users(place, quoted(name))[0] == 404
    assert mix_of(place, name) == before
    status, back = users(place, "/import", export)
    assert status == 200 and back["mix"] == found["mix"] and back["comparisons"] == 2
    assert users(place, "/import", export)[0] == 409
    assert users(place, quoted(name), method="DELETE")[0] == 200


@pytest.mark.slow
def test_neither_order_nor_batches_of_votes_matter(place):
    votes = [comparison(i, i % 4, (i + 1) % 4) for i in range(11)]
    found = []
    for name, batches in (("all", [votes]), ("one by one", [[x] for x in votes]), ("back", [votes[6:], votes[:6]])):
        users(place, "", {"id": name})
        for batch in batches:
            status, person = users(place, quoted(name) + "/feedback", {"comparisons": batch})
            assert status == 200, person
        found.append(users(place, quoted(name) + "/export")[1]["row"])
    assert found[0] == found[1] == found[2]


def test_stated_weights_are_taken_as_they_are_until_the_first_vote(place):
    status, found = users(place, "", {"id": "stated", "mix": {"P1A": 3, "P3A": 1}})
    assert status == 200 and found["mix"] == {"P1A": 0.75, "P2B": 0.0, "P3A": 0.25} == found["mix"]
    assert mix_of(place, "stated") == {"P1A": 0.75, "P3A": 0.25}
    status, found = users(place, "/stated/feedback", {"comparisons": [comparison(0)]})
    assert status == 200 and abs(found["mix"]["P1A"] - 0.75) < 0.25 and found["mix"]["P1A"] != 0.75


@pytest.mark.parametrize("mix", [{"P1A": 5e-324}, {"P1A": 1e-300, "P2B": 1e-300}, {"P3A": 1e-46, "P1A": 100}])
def test_tiny_stated_weights_are_weights(place, mix):
    status, found = users(place, "", {"id": "tiny", "mix": mix})
    want = {name: mix.get(name, 0.0) / sum(mix.values()) for name in NAMES}
    assert status == 200 and found["mix"] == pytest.approx(want), found
    assert users(place)[0] == 200, "the list shows everybody"
    assert users(place, "/tiny/feedback", {"comparisons": [comparison(0)]})[0] == 200
    assert users(place, "/tiny", method="DELETE")[0] == 200


def test_a_newline_tells_people_apart(place):
    assert users(place, "", {"id": "bea"})[0] == 200
    for method in ("GET", "DELETE"):
        assert users(place, quoted("bea\n"), method=method)[0] == 404
    assert users(place, "/bea")[0] == 200


def test_the_most_informative_pair_comes_first(place):
    users(place, "", {"id": "asked"})
    pairs = [
        {"prompt": "what is rain ?", "answers": [ANSWERS[0], ANSWERS[1]]},
        {"messages": [{"role": "user", "content": "what is snow ?"}], "answers": [ANSWERS[2], ANSWERS[3]]},
    ]
    status, found = users(place, "/asked/next", {"pairs": pairs})
    assert status == 200, found
    scores = [one["information"] for one in found["data"]]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0
    assert sorted(one["index"] for one in found["data"]) == [0, 1]
    assert all(one["pair"] == pairs[one["index"]] and 0 < one["probability"] < 1 for one in found["data"])
    vote = comparison(0)
    users(place, "/asked/feedback", {"comparisons": [vote] * 8})
    after = {one["index"]: one["information"] for one in users(place, "/asked/next", {"pairs": pairs})[1]["data"]}
    before = {one["index"]: one["information"] for one in found["data"]}
    assert after[0] < before[0], "what was asked eight times tells less"


VOTE = comparison(0)
ANSWERED = {"role": "assistant", "content": "a"}
BAD = [
    ("", {"id": ""}, 400, "id"),
    ("", {"id": 3}, 400, "id"),
    ("", {}, 400, "id"),
    ("", {"id": "x" * 600}, 400, "id"),
    ("", {"id": "\ud800"}, 400, None),
    ("", {"id": "bad", "mix": {"P9": 1}}, 400, "mix"),
    ("", {"id": "bad", "mix": {"P1A": -1}}, 400, "mix"),
    ("", {"id": "bad", "mix": {"P1A": 0}}, 400, "mix"),
    ("", {"id": "bad", "mix": {}}, 400, "mix"),
    ("", {"id": "bad", "mix": {"P1A": True}}, 400, "mix"),
    ("", {"id": "bad", "comparisons": []}, 400, "comparisons"),
    ("", {"id": "bad", "comparisons": [{}]}, 400, "comparisons"),
    ("", {"id": "bad", "colour": 1}, 400, "colour"),
    ("", [], 400, None),
    ("/nobody/feedback", {"comparisons": [VOTE]}, 404, "id"),
    ("/nobody/next", {"pairs": [{"prompt": "a", "answers": ["b", "c"]}]}, 404, "id"),
    ("/there/feedback", {}, 400, "comparisons"),
    ("/there/feedback", VOTE, 400, "prompt"),
    ("/there/feedback", {"comparisons": []}, 400, "comparisons"),
    ("/there/feedback", {"comparisons": [3]}, 400, "comparisons"),
    ("/there/feedback", {"comparisons": [VOTE] * 300}, 413, None),
    ("/there/feedback", {"comparisons": [{**VOTE, "chosen": VOTE["rejected"]}]}, 400, "comparisons"),
    ("/there/feedback", {"comparisons": [{**VOTE, "chosen": ""}]}, 400, "comparisons"),
    ("/there/feedback", {"comparisons": [{**VOTE, "chosen": None}]}, 400, "comparisons"),
    ("/there/feedback", {"comparisons": [{**VOTE, "messages": []}]}, 400, "comparisons"),
    ("/there/feedback", {"comparisons": [{**VOTE, "prompt": 7}]}, 400, "comparisons"),
    ("/there/feedback", {"comparisons": [{**VOTE, "rating": 7}]}, 400, "comparisons"),
    ("/there/feedback", {"comparisons": [{**VOTE, "prompt": [{"role": "user"}]}]}, 400, "comparisons"),
    (
        "/there/feedback",
        {"comparisons": [{**VOTE, "prompt": [{"role": "assistant", "content": "a"}]}]},
        400,
        "comparisons",
    ),
    ("/there/next", {"pairs": []}, 400, "pairs"),
    ("/there/next", {"pairs": [{"prompt": "a"}]}, 400, "pairs"),
    ("/there/next", {"pairs": [{"prompt": "a", "answers": ["b"]}]}, 400, "pairs"),
    ("/there/next", {"pairs": [{"prompt": "a", "answers": ["b", "b"]}]}, 400, "pairs"),
    ("/import", {}, 400, "object"),
    ("/import", {"object": "user.export", "format": 1, "id": "new", "model": "other"}, 400, "model"),
    ("?limit=0", None, 400, "limit"),
    ("?limit=x", None, 400, "limit"),
    ("?limit=1001", None, 400, "limit"),
    ("?limit=%C2%B2", None, 400, "limit"),
    ("?colour=1", None, 400, "colour"),
    ("?after=nobody", None, 404, "after"),
    ("/nobody", None, 404, "id"),
    ("/nobody/export", None, 404, "id"),
    ("/", None, 404, "id"),
    ("/%FF", None, 404, "id"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD, ids=range(len(BAD)))
def test_bad_requests_are_refused(place, path, body, status, param):
    users(place, "", {"id": "there"})
    got, found = users(place, path, body)
    assert got == status and found["error"]["param"] == param, found
    assert "bad" not in [one["id"] for one in users(place)[1]["data"]]


def test_people_come_in_pages(place):
    for i in range(5):
        users(place, "", {"id": f"page {i}"})
    everybody = [one["id"] for one in users(place)[1]["data"]]
    found, after = [], ""
    while True:
        page = users(place, f"?limit=2{after}")[1]
        found += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={urllib.parse.quote(found[-1])}"
    assert found == everybody


@pytest.mark.parametrize("kind", ["individualized", pytest.param("cluster", marks=pytest.mark.slow)])
def test_people_of_a_trained_user_model(model, kind):
    """Each learns alone: nobody else's row moves, not by a bit."""
    catalogue = catalogue_of(model, kind)
    engine = tiny_serving.engine(model, E, adapters=1)
    engine.start()
    with served(catalogue, engine) as place:
        rows = {name: users(place, f"/{name}/export")[1]["row"] for name in ("ana", "bo")}
        assert [one["id"] for one in users(place)[1]["data"]] == ["ana", "bo"]
        assert users(place, "/ana")[1]["trained"] and users(place, "/ana")[1]["mix"] is None
        assert users(place, "", {"id": "ana"})[0] == 409
        status, refused = users(place, "", {"id": "new", "mix": {kind: 1}})
        assert status == 400 and refused["error"]["param"] == "mix"
        for name in ("ana", "new"):
            users(place, "", {"id": "new"})
            status, found = users(place, f"/{name}/feedback", {"comparisons": [comparison(0), comparison(2)]})
            assert status == 200 and found["comparisons"] == 2, found
        after = {name: users(place, f"/{name}/export")[1]["row"] for name in ("ana", "bo", "new")}
        assert after["bo"] == rows["bo"] and after["ana"] != rows["ana"] != after["new"]
        assert (
            users(place, "/ana/next", {"pairs": [{"prompt": "what is rain ?", "answers": list(ANSWERS[:2])}]})[0] == 200
        )
        assert users(place, "/bo", method="DELETE")[0] == 200
        assert [one["id"] for one in users(place)[1]["data"]] == ["ana", "new"]
        users(place, "", {"id": "bo"})
        assert users(place, "/bo/export")[1]["row"] != rows["bo"], "what training knew of them is forgotten"
        assert not users(place, "/bo")[1]["trained"]
    engine.close(30)


@pytest.mark.slow
def test_a_vote_given_to_one_replica_is_known_to_the_other(model, tmp_path):
    """Two servers, one PostgreSQL; votes for one person on both at once."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(postgres(tmp_path))
        places = []
        for _ in range(2):
            engine = tiny_serving.engine(model)
            engine.start()
            stack.callback(engine.close, 30)
            places.append(stack.enter_context(served(catalogue_of(model), engine, people=url)))
        assert users(places[0], "", {"id": "ana"})[0] == 200
        assert users(places[1], "", {"id": "ana"})[0] == 409
        found = users(places[0], "/ana/feedback", {"comparisons": [comparison(0)]})[1]
        assert mix_of(places[1], "ana") == pytest.approx(found["mix"]) != pytest.approx(dict.fromkeys(NAMES, 1 / 3))

        def vote(i):
            return users(places[i % 2], "/ana/feedback", {"comparisons": [comparison(i, i % 4, (i + 1) % 4)]})[0]

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert set(pool.map(vote, range(12))) == {200}
        exports = [users(place, "/ana/export")[1] for place in places]
        assert len(exports[0]["comparisons"]) == 13 and exports[0] == exports[1]
        assert mix_of(places[0], "ana") == mix_of(places[1], "ana")
        assert users(places[1], "/ana", method="DELETE")[0] == 200
        assert users(places[0], "/ana")[0] == 404
        assert mix_of(places[0], "ana") == pytest.approx(dict.fromkeys(NAMES, 1 / 3))


def test_a_database_that_is_gone_is_a_503(model, tmp_path):
    engine = tiny_serving.engine(model)
    with contextlib.ExitStack() as stack:
        running = contextlib.ExitStack()
        url = running.enter_context(postgres(tmp_path))
        place = stack.enter_context(served(catalogue_of(model), engine, people=url))
        assert users(place, "", {"id": "ana"})[0] == 200
        running.close()
        body = {"model": "personal", "user": "ana", "messages": [{"role": "user", "content": "what is rain ?"}]}
        for status, found, headers in (
            send(place, None, "/v1/users/ana", "GET"),
            send(place, {"comparisons": [comparison(0)]}, "/v1/users/ana/feedback"),
            send(place, body),
        ):
            assert status == 503 and "database does not answer" in found["error"]["message"], found
            assert headers["retry-after"] == "1"


def test_a_damaged_row_is_fitted_again(model, tmp_path):
    """In a database that is intact; another server of the same store has the row in memory."""
    path = tmp_path / "people.sqlite"
    people = catalogue_of(model).people
    shapes = jax.tree.map(lambda x: np.asarray(x[0], np.float32), people.params["table"])
    (leaf,) = shapes
    members = open_members(catalogue_of(model), str(path)).people
    members.add("ana", [comparison(0)])
    before = members.row("ana")[1]
    good = sqlite(path, "SELECT row FROM pjrlhf_people")
    damages = [
        *(b"", b"no tensors", good[:-1], good[:20], "text", 7),
        save({leaf: shapes[leaf][:1]}),
        save({"other": shapes[leaf]}),
        save({leaf: shapes[leaf].astype(np.float64)}),
        save({leaf: np.full_like(shapes[leaf], np.nan)}),
    ]
    for damage in damages:
        sqlite(path, "UPDATE pjrlhf_people SET row = ?", damage)
        again = open_members(catalogue_of(model), str(path)).people
        assert again.row("ana")[1] == pytest.approx(before, abs=1e-6)
        assert sqlite(path, "SELECT row FROM pjrlhf_people") == good, "the row is kept"


def test_a_damaged_start_is_named(model, tmp_path):
    path = tmp_path / "people.sqlite"
    members = open_members(catalogue_of(model), str(path)).people
    row = jax.tree.map(lambda x: np.asarray(x[0], np.float32), catalogue_of(model).people.params["table"])
    members.take("ana", [], None, row, None)
    sqlite(path, "UPDATE pjrlhf_people SET start = x'00'")
    again = open_members(catalogue_of(model), str(path)).people
    with pytest.raises(Unreachable, match=r"imported row of user 'ana' is damaged .*; restore the database, or delete"):
        again.row("ana")
    again.remove("ana")


def sqlite(path, command, *values):
    """Runs a command; its first value, if it has one."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        found = connection.execute(command, values).fetchone()
    return None if found is None else found[0]


def test_a_server_says_where_people_are_kept(model, tmp_path, capsys, monkeypatch):
    """In memory where nothing else is said, which one line tells at the start."""
    monkeypatch.setattr(running._Process, "run", lambda self, sockets: [one.close() for one in sockets])
    monkeypatch.setattr(running.signal, "signal", lambda *_: None)
    path = tmp_path / "people.sqlite"
    for kept, settings, variable in (
        ("memory", {}, ""),
        ("", {"people": str(path)}, ""),
        ("", {}, f"sqlite:///{path}"),
    ):
        monkeypatch.setenv("PJRLHF_PEOPLE", variable)
        running.serve(catalogue_of(model), ServerSettings(port=0, **settings), tiny_serving.SETTINGS)
        out = capsys.readouterr().out
        assert ("people are kept in memory, until the server ends; keep them with --people" in out) == bool(kept)
        assert path.exists() != bool(kept)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soup", "individualized"])
def test_a_vote_after_the_warm_up_compiles_nothing(model, monkeypatch, kind):
    """Of any length, alone or beside others; neither does the question what to ask next."""
    if kind == "soup":  # half as many programs
        monkeypatch.setattr(fit, "SIZES", (2,))
        monkeypatch.setattr(fit, "CHUNK", 2)
    catalogue = catalogue_of(model, kind)
    people = dataclasses.replace(catalogue.people, learning=dataclasses.replace(LEARNING, steps=3))
    members = open_members(dataclasses.replace(catalogue, people=people)).people
    members.table.warm_up()
    while members.table.warming:
        time.sleep(0.01)
    with compilations() as compiled:
        members.add("new")
        for count, words in itertools.product((1, 3), (1, 40)):
            text = " ".join(["wet"] * words)
            votes = [comparison(i) | {"chosen": f"{text} .", "prompt": f"{text} ?"} for i in range(count)]
            members.learn("new", votes)
            pairs = [{"prompt": vote["prompt"], "answers": [vote["chosen"], vote["rejected"]]} for vote in votes]
            next_questions(members, "new", pairs)
    assert not compiled


def test_questions_and_votes_on_them_are_compiled_for_first(model, monkeypatch):
    """And the server says so while it compiles the rest."""
    pool = [
        {"prompt": "what is rain ?", "answers": ["it is wet . " * 2, f"{text} ."]} for text in ("a dog runs", "the sky")
    ]
    engine = tiny_serving.engine(model)
    service = Service(catalogue_of(model), engine, ServerSettings())
    members = service.catalogue.people
    plain, likely, rest = members.fitter.warm_up, threading.Event(), threading.Event()
    shapes = [one for size in fit.SIZES for one in members.fitter._shapes_of(likely_votes(pool), size)]
    assert len(shapes) < 4 and shapes[0] not in [(2, members.fitter._shapes(2)[0]), (8, members.fitter._shapes(8)[0])]

    def programs(first):
        for i, _ in enumerate(plain(first), 1):
            yield
            if i == 1 + 3 * len(shapes):
                likely.set()
                assert rest.wait(60)
                return

    monkeypatch.setattr(members.fitter, "warm_up", programs)
    health = {endpoint.path: endpoint.handler for endpoint in monitoring.endpoints(service)}["/health"]

    def compiling():
        return json.loads(asyncio.run(health(None)).body)["compiling"]

    assert not compiling()
    members.table.warm_up(likely_votes(pool))
    assert likely.wait(300) and compiling()
    rest.set()
    while members.table.warming:
        time.sleep(0.01)
    assert not compiling()
    with compilations() as compiled:
        members.add("new")
        asked = ask_of(members, "new", pool)
        chosen, rejected = asked[0]["pair"]["answers"]
        members.learn("new", [{"prompt": asked[0]["pair"]["prompt"], "chosen": chosen, "rejected": rejected}])
        assert len(ask_of(members, "new", pool)) == 1
    assert not compiled


@pytest.mark.parametrize(("mode", "multiple"), [("share", 1), ("share", 8), ("join", 1), ("join", 2)])
def test_comparisons_of_any_length_have_few_shapes(model, monkeypatch, mode, multiple):
    """Those that the warm-up compiles; no scored token is lost."""
    fitter = open_members(catalogue_of(model, "individualized")).people.fitter
    rng = np.random.default_rng(0)
    for prompt, completion in ((16, 12), (20, 28), (64, 200), (700, 400)):
        length = prompt + E + 2 * completion
        layout = dataclasses.replace(fitter._layout, mode=mode, multiple=multiple, length=length)
        monkeypatch.setattr(fitter, "_layout", layout)
        sizes = sorted(map(fitter._size, (1, 2, 3, 8)))
        assert all(len(fitter._shapes(size)) <= 20 for size in sizes)
        for size, tokens in itertools.product(sizes, (0, E)):
            for fraction in (0.05, 0.3, 1.0):
                p, a, b = (
                    rng.integers(most * fraction / 2 + 1, most * fraction + 2, size).clip(max=most)
                    for most in (prompt, completion, completion)
                )
                lengths = list(zip(p.tolist(), a.tolist(), b.tolist(), strict=True))
                rows = [{"prompt": [1] * p, "chosen": [2] * a, "rejected": [3] * b} for p, a, b in lengths]
                masks = {"chosen_mask": None, "rejected_mask": None}
                packed = fitter._packed([row | masks for row in rows], tokens)
                shape = packed.tokens.shape[1], packed.columns.shape[1]
                assert shape in fitter._shapes(size)
                assert (packed.answer != NOWHERE).sum() == a.sum() + b.sum()


def test_votes_and_deletions_while_a_fit_runs(model, monkeypatch):
    """Answers do not wait for it, votes that come meanwhile count, and nobody comes back."""
    members = open_members(catalogue_of(model)).people
    for name in ("ana", "bo"):
        members.add(name, [comparison(0)])
    before = members.row("ana")[1]
    plain, running, go_on = members.fitter.fit, threading.Event(), threading.Event()

    def held(*arguments):
        running.set()
        assert go_on.wait(60)
        return plain(*arguments)

    monkeypatch.setattr(members.fitter, "fit", held)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        votes = [pool.submit(members.learn, name, [comparison(i)]) for i, name in enumerate(("ana", "ana", "bo"), 1)]
        assert running.wait(60)
        while [len(members.comparisons(name)) for name in ("ana", "bo")] != [3, 2]:
            time.sleep(0.01)
        np.testing.assert_array_equal(members.row("ana")[1], before)
        members.remove("bo")
        go_on.set()
        for vote in votes:
            vote.result(60)
    assert not members.knows("bo") and members.store.person("bo") is None
    members.add("twin", [comparison(i) for i in range(3)])
    np.testing.assert_array_equal(members.row("ana")[1], members.row("twin")[1])
    assert not np.array_equal(members.row("ana")[1], before)


@pytest.fixture(scope="module")
def asking(model, tmp_path_factory):
    """A server with questions of its own, in the forms that a file of comparisons may have."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    talk = {"messages": [{"role": "user", "content": "what is ice ?"}]}
    records = [comparison(0), comparison(0, 1, 0), {**comparison(1), "user_id": "x"}]
    records.append({**talk, "chosen": ANSWERS[2], "rejected": ANSWERS[3]})
    tiny_users.write_records(path, records)
    with answering(catalogue_of(model), tiny_serving.engine(model), questions=str(path)) as found:
        yield found


def test_a_server_asks_what_it_has_not_asked_yet(asking):
    users(asking, "", {"id": "ana"})
    asked = []
    for left in (3, 2, 1, 0):
        status, found = users(asking, "/ana/next", {})
        assert status == 200 and len(found["data"]) == left, found
        scores = [one["information"] for one in found["data"]]
        assert scores == sorted(scores, reverse=True)
        if left:
            best = found["data"][0]
            asked.append(best["index"])
            rest = {name: value for name, value in best["pair"].items() if name != "answers"}
            assert "user_id" not in rest
            sides = dict(zip(("chosen", "rejected"), best["pair"]["answers"], strict=True))
            assert users(asking, "/ana/feedback", {"comparisons": [{**rest, **sides}]})[0] == 200
    assert len(set(asked)) == 3, "both orders of two answers are one question"
    assert users(asking, "/nobody/next", {})[0] == 404
    # No body is one without fields, whatever the headers say of it; a body is JSON.
    for kind in ("application/json", "text/plain", ""):
        assert send(asking, None, "/v1/users/ana/next", Content_Type=kind)[0] == 200
    assert send(asking, b"{}", "/v1/users/ana/next", Content_Type="text/plain")[0] == 415
    assert send(asking, None, "/page/about", "GET")[1]["asks"]


def test_a_server_without_questions_says_so(place):
    users(place, "", {"id": "there"})
    status, found = users(place, "/there/next", {})
    assert status == 400 and "start it with --questions" in found["error"]["message"]
    assert not send(place, None, "/page/about", "GET")[1]["asks"]


def test_which_answer_was_chosen_does_not_show(tmp_path):
    records = [{"prompt": f"{i} ?", "chosen": "good", "rejected": "bad"} for i in range(40)]
    pool = read_pool(tiny_users.write_records(tmp_path / "questions.jsonl", records))
    first = [pair["answers"][0] == "good" for pair in pool]
    assert 8 < sum(first) < 32 and len({pair["prompt"] for pair in pool}) == 40


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no comparisons"),
        ("{}", "line 1: missing chosen and rejected"),
        (None, "no such file; name a file of JSON lines"),
    ],
)
def test_what_is_wrong_with_questions_is_told_at_the_start(model, tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    if line is not None:
        path.write_text(line)
    with pytest.raises(UserError, match=f"questions: {path}.*{message}"):
        Service(catalogue_of(model), None, ServerSettings(questions=str(path)))
    with pytest.raises(UserError, match="questions: no row of a person is fitted"):
        Service(Catalogue(model), None, ServerSettings(questions=str(path)))


@pytest.mark.parametrize("name", ["comparisons/comparisons.jsonl", "population/train.jsonl"])
def test_only_answers_that_a_run_has_drawn_itself_are_shown(tmp_path, name):
    """Records that it was given may be somebody's own."""
    (tmp_path / name).parent.mkdir()
    tiny_users.write_records(tmp_path / name, [comparison(0)])
    assert len(pool_of(tmp_path, "", own=True)) == 1
    assert pool_of(tmp_path, "", own=False) == pool_of(None, "", own=True) == ()
    (tmp_path / name).write_text("{")
    assert pool_of(tmp_path, "", own=True) == (), "a server starts without"


def test_a_server_that_ends_gives_up_its_warm_up(model, monkeypatch):
    """After the program that is being compiled, without a word."""
    members = open_members(catalogue_of(model)).people
    compiling, go_on, compiled, said = threading.Event(), threading.Event(), [], []

    def programs(likely):
        for i in range(9):
            compiling.set()
            assert go_on.wait(60)
            compiled.append(i)
            yield

    monkeypatch.setattr(members.fitter, "warm_up", programs)
    for level in ("info", "warning"):
        monkeypatch.setattr(f"absl.logging.{level}", lambda *text: said.append(text))
    members.table.warm_up()
    assert compiling.wait(60) and members.table.warming
    members.table.close()
    go_on.set()
    members.table.working.shutdown(wait=True)
    assert compiled == [0] and not members.table.warming and not said
