"""People of a run: what they learn is what the evaluation measures; the commands; and deletions in its files."""

import json
import pathlib
import re
import shutil
import sys
import time

import jax
import numpy as np
import pytest
from support import tiny, tiny_serving, tiny_users
from support.serving import compilations, send, served

import pjrlhf
from pjrlhf import cli
from pjrlhf.models.storage import load_tree
from pjrlhf.protocols.cold_start import fit_new_users
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.opening import open_run, parse_mesh
from pjrlhf.serving.people.fit import as_json
from pjrlhf.serving.people.members import open_members
from pjrlhf.serving.people.questions import next_questions
from pjrlhf.training.workdir import Workdir

COUNTS = (0, 1, 2, 4, 8)


@pytest.fixture
def run(people, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(people, tmp_path / "run")


def place_of(run, **settings):
    catalogue = open_run(str(run), "individualized")
    sizes = tiny_serving.SETTINGS
    return served(
        catalogue, Engine(catalogue.model.backbone, catalogue.model.tokenizer, catalogue.bank, 4, sizes), **settings
    )


def ask(place, path, body=None, method=None):
    status, found, _ = send(place, body, f"/v1/users{path}", method or ("GET" if body is None else "POST"))
    assert status == 200, found
    return found


@pytest.mark.slow
def test_votes_over_http_give_the_accuracy_of_the_evaluation(people):
    trained = tiny_users.trained_of(
        started := tiny.start(people, tiny_users.settings()), "individualized", tiny_users.pairs_of(started)
    )
    table = trained.pairs.tables["new_users"]
    sides = {}
    for i, example in enumerate(table.examples):
        sides.setdefault(example.user_id, {False: [], True: []})[bool(example.held_out)].append(i)
    sides = {user: rows for user, rows in sides.items() if len(rows[False]) >= max(COUNTS) and rows[True]}
    want = fit_new_users(trained, COUNTS, 3, 0.1)
    assert len({tuple(want[k]) for k in COUNTS}) > 1, "votes change nothing: this test could not fail"
    params, found = trained.trainable["users"], {k: [] for k in COUNTS}
    with place_of(people, people="sqlite://") as place:
        for k in COUNTS:
            for user, rows in sides.items():
                name = f"{user} {k}"
                votes = [as_json(table.examples[i]) for i in rows[False][:k]]
                ask(place, "", {"id": name})
                if votes:
                    ask(place, f"/{name.replace(' ', '%20')}/feedback", {"comparisons": votes})
                row = ask(place, f"/{name.replace(' ', '%20')}/export")["row"]
                rows_of = {
                    leaf: np.stack([np.asarray(x[0]), np.asarray(row[leaf], np.float32)])
                    for leaf, x in params["table"].items()
                }
                fitted = {**trained.trainable, "users": {**params, "table": rows_of}}
                margins = trained.margins("new_users", np.ones(len(table), np.int32), rows[True], fitted)
                found[k].append(float((margins > 0).mean()))
    assert {k: pytest.approx(values) for k, values in want.items()} == found


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True])
def test_people_learn_on_several_devices(people, warm):
    """As on one."""
    votes = [
        {"prompt": "what is rain ?", "chosen": f"it is wet {'. ' * (i + 1)}".strip(), "rejected": "the sky is blue ."}
        for i in range(3)
    ]
    found = []
    for mesh in ("", "data=2,fsdp=2,tensor=2"):
        members = open_members(open_run(str(people), "individualized", parse_mesh(mesh)), "sqlite://").people
        if warm:
            members.table.warm_up()
            while members.table.warming:
                time.sleep(0.01)
        with compilations() as compiled:
            members.add("new", votes[:1])
            members.learn("new", votes[1:])
            asked = next_questions(members, "new", [{"prompt": "what is sun ?", "answers": ["it is wet .", "yes ."]}])
        assert not (warm and compiled)
        found.append([members.row("new")[0], asked[0]["information"], asked[0]["probability"]])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)
    assert not np.allclose(found[0][0], members.row(None)[0], atol=1e-2), "votes change nothing: this could not fail"


def test_a_trained_person_is_deleted_from_every_file_of_the_run(run):
    before = {path.parent.name: load_tree(path) for path in run.glob("preference/*/model.safetensors")}
    names = [name for name in before["individualized"][1]["users"] if name]
    gone, kept = names[0], names[1:]
    row = np.asarray(before["individualized"][0]["users"]["table"]["offset"][1]).tobytes()
    path = run / "preference" / "individualized" / "model.safetensors"
    assert row in path.read_bytes()
    with place_of(run) as place:
        answer = ask(place, f"/{gone}", method="DELETE")
        files = [
            file for file in run.glob("report/*") if file.suffix == ".json" and json.dumps(gone) in file.read_text()
        ]
        said = answer.get("warning", "")
        assert all(str(file.relative_to(run)) in said for file in files) and ("delete the run" in said) == bool(said)
        assert len(answer["rewritten"]) == len(before) and [one["id"] for one in ask(place, "")["data"]] == kept
    for file in filter(pathlib.Path.is_file, run.glob("**/*")):
        assert "checkpoints" in file.parts or row not in file.read_bytes(), file
        if file.suffix == ".safetensors" or "sqlite" in file.name:
            assert gone.encode() not in file.read_bytes(), file
    for name, (tree, note) in before.items():
        after, changed = load_tree(run / "preference" / name / "model.safetensors")
        index = note["users"].index(gone)
        assert changed == {**note, "users": [None if one == gone else one for one in note["users"]]}
        for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(after), strict=True):
            same = np.asarray(one) == np.asarray(other)
            assert same.all() or same[[i for i in range(len(same)) if i != index]].all()
    Workdir(run).check_outputs("preference")
    assert gone not in pjrlhf.load_personal(path).registry.rows
    with place_of(run) as place:
        assert [one["id"] for one in ask(place, "")["data"]] == kept, "also after a restart"


def test_a_copy_of_the_run_that_still_has_a_deleted_person_does_not_serve_them(run, tmp_path):
    """Replicas of one store, each with its own copy of the run."""
    copy, url = shutil.copytree(run, tmp_path / "copy"), str(tmp_path / "people.sqlite")
    first, second = (open_members(open_run(str(one), "individualized"), url).people for one in (run, copy))
    name = first.table.trained_names()[0]
    tokens = second.row(name)[0]
    first.learn(name, [{"prompt": "what is rain ?", "chosen": "it is wet .", "rejected": "the sky is blue ."}])
    assert not np.array_equal(second.row(name)[0], tokens), "a vote given to one is known to the other"
    np.testing.assert_array_equal(second.row(name)[0], first.row(name)[0])
    first.remove(name)
    assert not second.knows(name)
    np.testing.assert_array_equal(second.row(name)[0], second.row(None)[0])
    later = open_members(open_run(str(copy), "individualized"), url).people
    assert not later.knows(name) and name not in later.table.trained_names()


def users(capsys, *arguments, code=0):
    if code:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["users", *arguments])
        assert stopped.value.code == code
    else:
        cli.main(["users", *arguments])
    out = capsys.readouterr()
    return out.err if code else out.out


def test_the_commands(run, tmp_path, capsys):
    """Beside a server that uses the same store."""
    where = ["--run", str(run), "--entry", "individualized"]
    votes = tmp_path / "votes.jsonl"
    tiny_users.write_records(
        votes, [{"prompt": "what is rain ?", "chosen": "it is wet .", "rejected": "yes .", "user_id": "new"}]
    )
    with place_of(run) as place:
        shown = json.loads(users(capsys, "add", "new", *where, "--comparisons", str(votes)))
        assert shown == ask(place, "/new") and shown["comparisons"] == 1
        assert json.loads(users(capsys, "update", "new", *where, "--comparisons", str(votes)))["comparisons"] == 2
        assert ask(place, "/new")["comparisons"] == 2
        assert "new: added later, 2 comparisons\n" in users(capsys, "list", *where)
        assert ": trained in the run, no comparisons since\n" in users(capsys, "list", *where)
        export = tmp_path / "new.json"
        users(capsys, "export", "new", *where, "--output", str(export))
        assert (
            json.loads(export.read_text())
            == ask(place, "/new/export")
            == json.loads(users(capsys, "export", "new", *where))
        )
        assert json.loads(users(capsys, "import", str(export), *where, "--name", "twin"))["id"] == "twin"
        assert ask(place, "/twin/export")["row"] == ask(place, "/new/export")["row"]
        asked = ["generate", "--run", str(run), "--entry", "individualized", "--max-tokens", "6", "what is rain ?"]
        cli.main([*asked, "--user", "new"])
        assert "unknown" not in capsys.readouterr().err
        users(capsys, "remove", "new", *where)
        cli.main([*asked, "--user", "new"])
        assert "new is unknown: the generic user answers" in capsys.readouterr().err
        assert "new" not in [one["id"] for one in ask(place, "")["data"]]
        trained = ask(place, "")["data"][0]["id"]
        cli.main(["users", "remove", trained, *where])
        said = capsys.readouterr()
        assert said.out.count("rewritten") == 4
        left = re.search("still have the name: (.*); delete the run", said.err)[1].split(", ")
        texts = [path for path in run.rglob("*") if path.suffix in (".json", ".jsonl", ".html")]
        assert {*left} == {str(path.relative_to(run)) for path in texts if trained in path.read_text()}
        assert {"population/train.jsonl", "report/summary.json"} <= {*left}
        assert trained not in [one["id"] for one in ask(place, "")["data"]]
        assert trained not in users(capsys, "list", *where)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nobody"), "user 'nobody': is unknown; see pjrlhf users list --run"),
        (("remove", "nobody"), "user 'nobody': is unknown; see pjrlhf users list --run"),
        (("update", "user00"), "nothing to update; give --comparisons or --mix"),
        (("add", "user00"), "user 'user00': the name is taken; add to it with pjrlhf users update"),
        (("add", "x", "--mix", "a=1"), "mix: people of this model are no soups; give comparisons"),
        (("add", "x", "--mix", "a"), "mix: 'a' is no soup; write NAME=WEIGHT"),
        (("add", "x", "--comparisons", "/nowhere"), "/nowhere: no such file; name a file of JSON lines"),
        (("add", "x", "--comparisons", "/"), "/: is a folder, not a file of JSON lines; name a file of JSON lines"),
        (("add", "x", "--comparisons", "/dev/null"), "/dev/null"),
        (("import", "/nowhere"), "/nowhere: cannot be read"),
        (("import", "/dev/null"), "name a file that users export wrote"),
        (("list", "--people", "/dev/null/x"), "people cannot be kept there"),
        *(((verb, "\udcff"), r"user '\udcff': is unknown; see pjrlhf users list --run") for verb in ("remove", "show")),
        (("add", "\udcff"), "id: not UTF-8"),
    ],
)
def test_mistakes_of_the_commands_get_one_line(people, tmp_path, capsys, arguments, message):
    store = [] if "--people" in arguments else ["--people", str(tmp_path / "people.sqlite")]
    found = users(capsys, *arguments, "--run", str(people), "--entry", "individualized", *store, code=2)
    assert message in found and found.count("\n") == 1
    assert "no config.json" in users(capsys, "list", "--run", str(tmp_path), code=2)
    for verb in (["list"], ["remove", "user00"]):
        found = users(capsys, *verb, "--run", str(people), "--entry", "individualised", *store, code=2)
        assert found.startswith("error: --entry 'individualised': ") and "individualized" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["users", "show", "nobody"], "user 'nobody': is unknown; see pjrlhf users list --run"),
        (["users", "export", "nobody"], "user 'nobody': is unknown; see pjrlhf users list --run"),
        (["users", "update", "nobody", "--mix", "a=1"], "user 'nobody': is unknown; see pjrlhf users list --run"),
        (["users", "add", "user00"], "user 'user00': the name is taken; add to it with pjrlhf users update"),
        (["users", "add", "x", "--mix", "a"], "mix: 'a' is no soup; write NAME=WEIGHT"),
        (["users", "add", "x", "--comparisons", "nowhere"], "nowhere: no such file; name a file of JSON lines"),
        (["users", "import", "nowhere"], "nowhere: cannot be read"),
        (
            ["generate", "what is rain ?", "--mix", "cluster=1"],
            "'cluster' is no ingredient; choose from individualized",
        ),
    ],
)
def test_names_are_checked_before_the_model_is_read(run, capsys, arguments, message):
    for folder in (run / "sft", run / "base"):
        shutil.rmtree(folder, ignore_errors=True)
    where = ["--run", str(run), "--entry", "individualized"]
    with pytest.raises(SystemExit):
        cli.main([*arguments, *where])
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["users", "show", "user00", *where])
    assert "user00" not in capsys.readouterr().err, "the model can be read: this test could not fail"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hi", "--mix", "P9Z=1"], "error: --mix: 'P9Z' is no ingredient; choose from "),
        (["generate", "hi", "--mix", "P9Z"], "error: --mix: 'P9Z' is no ingredient and no soup of --soups; name one"),
        (["generate", "hi", "--soups", "calm=P9Z=1"], "error: --soups: calm: mix: 'P9Z' is no ingredient"),
        (["serve", "--soups", "calm=P9Z=1"], "error: --soups: calm: mix: 'P9Z' is no ingredient"),
        (["export", "--for=peft", "--output=OUT", "--mix=P9Z=1"], "error: --mix: 'P9Z' is no ingredient; choose from "),
    ],
)
@pytest.mark.parametrize("source", ["run", "folders"])
def test_ingredients_are_checked_before_the_model_is_read(copied, capsys, arguments, message, source):
    for folder in (copied / "sft", copied / "base"):
        shutil.rmtree(folder, ignore_errors=True)
    folders = ["--model", "nowhere", "--ingredients", "P1A=nowhere"]
    with pytest.raises(SystemExit):
        cli.main([*arguments, *(folders if source == "folders" else ["--run", str(copied)])])
    assert capsys.readouterr().err.startswith(message)


def test_people_of_a_run_without_a_store_are_listed_without_a_database(run, capsys, monkeypatch):
    """What needs the database names the extra that has it."""
    monkeypatch.delitem(sys.modules, "pjrlhf.serving.people.store", raising=False)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    assert "user00: trained in the run, no comparisons since" in users(capsys, "list", "--run", str(run))
    assert not (run / "people.sqlite").exists()
    found = users(capsys, "remove", "user00", "--run", str(run), code=2)
    assert found == "error: sqlalchemy: is not installed; pip install 'pjrlhf[serve]'\n"


PAIR = {"prompt": "what is rain ?", "chosen": "it is wet .", "rejected": "yes ."}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no comparisons; give it one on each line"),
        ('{"prompt": "what', "line 1: bad JSON (Unterminated string"),
        ("[1]", "line 1: bad JSON (a list, not an object); correct it"),
        (json.dumps({"chosen": "a", "rejected": "b"}), "line 1: missing prompt"),
        (json.dumps({**PAIR, "rejected": PAIR["chosen"]}), "line 1: chosen equals rejected; correct it"),
        (json.dumps({**PAIR, "user_id": "bob"}), "line 1: is of user 'bob', not 'x'; give a file of one person"),
        (json.dumps({**PAIR, "preference": 0.5}), "give a tie as two comparisons"),
        (json.dumps(PAIR, indent=1), "not one JSON object per line; name a file of JSON lines"),
    ],
)
def test_what_is_wrong_with_a_file_of_comparisons(people, tmp_path, capsys, line, message):
    """The messages have no settings of a config, which the command does not have."""
    (tmp_path / "votes.jsonl").write_text(line)
    where = ["--run", str(people), "--entry", "individualized", "--people", str(tmp_path / "people.sqlite")]
    found = users(capsys, "add", "x", *where, "--comparisons", str(tmp_path / "votes.jsonl"), code=2)
    assert message in found and "--config" not in found and found.count("\n") == 1


def test_files_of_the_commands(people, tmp_path, capsys):
    """Comparisons as HTTP takes them, an export into a folder to be made, and a name that is taken."""
    where = ["--run", str(people), "--entry", "individualized", "--people", str(tmp_path / "people.sqlite")]
    talk = [{"role": "user", "content": PAIR["prompt"]}]
    answers = {"chosen": PAIR["chosen"], "rejected": PAIR["rejected"]}
    tiny_users.write_records(tmp_path / "votes.jsonl", [{"messages": talk, **answers, "source": "a page"}])
    users(capsys, "add", "x", *where, "--comparisons", str(tmp_path / "votes.jsonl"))
    users(capsys, "export", "x", *where, "--output", str(tmp_path / "new" / "x.json"))
    export = json.loads((tmp_path / "new" / "x.json").read_text())
    assert export["comparisons"] == [{"messages": talk, **answers}]
    taken = users(capsys, "import", str(tmp_path / "new" / "x.json"), *where, code=2)
    assert "user 'x': the name is taken; give another one with --name" in taken
