"""People as added vocabulary, read back by this package."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import chat_templates, persons
from support.drawn_models import golden_families, save_family
from support.persons import NAMES, TOKENS

from pjrlhf import cli
from pjrlhf.data.messages import Conversation, as_turns
from pjrlhf.data.tokenization import Tokenizer
from pjrlhf.errors import UserError
from pjrlhf.export.command import Wish, export
from pjrlhf.export.people import PeopleTokens
from pjrlhf.export.soup import Source
from pjrlhf.export.unsampled import add_rows
from pjrlhf.language_model import load_model
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.huggingface import load_params, read_config
from pjrlhf.serving.opening import open_folders, open_run
from pjrlhf.serving.people.members import open_members

QUESTION, ANSWER = "what is rain ?", "it is wet ."


def some(*quick):
    return [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in golden_families()]


def write(catalogue, output, **changes):
    members = tuple(name for name in catalogue.people.registry.names if name is not None)
    source = Source(catalogue, {name: f"run/{name}" for name in catalogue.names}, members)
    return export(source, Wish(kind="vocabulary", output=output, **changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("llama") / "base", "llama")


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    catalogue = persons.catalogue(base)
    folder = tmp_path_factory.mktemp("exported") / "people"
    write(catalogue, folder)
    return catalogue, folder


@functools.partial(jax.jit, static_argnums=0)
def logps(config, params, tokens):
    """Log-probs [T, V] of the next token."""
    model, tokens = Decoder(config), tokens[None]
    hidden, _ = model.apply({"params": params}, tokens, jnp.ones(tokens.shape, bool))
    logits = model.apply({"params": params}, hidden, method="logits")[0]
    return jax.nn.log_softmax(logits, -1)


@pytest.mark.parametrize("model_type", some("llama", "gemma2", "gpt2", "gptj"))
def test_new_rows_are_never_sampled_and_leave_the_others_as_they_are(model_type, tmp_path):
    folder = save_family(tmp_path / "base", model_type)
    config, params = read_config(folder), load_params(folder)
    rows = np.random.default_rng(0).normal(size=(7, config.hidden_size)).astype(np.float32)
    if config.logit_softcap:
        with pytest.raises(UserError, match="caps logits at"):
            add_rows(config, params, rows, model_type)
        config = config.replace(logit_softcap=30.0)
    wide, added = add_rows(config, params, rows, model_type)
    tokens = np.arange(3, 40)
    with jax.default_matmul_precision("highest"):
        before, after = (np.asarray(logps(*model, tokens)) for model in ((config, params), (wide, added)))
    np.testing.assert_allclose(after[:, : config.vocab_size], before, atol=1e-4)
    # A soft cap of 30 bounds how far below the others they can be.
    assert (after[:, config.vocab_size :] < (-20 if config.logit_softcap else -1000)).all()
    assert wide.head_dim == config.head_dim and not wide.tie_embeddings


def test_every_person_is_answered_as_here(exported):
    catalogue, folder = exported
    model = load_model(folder)
    listed = json.loads((folder / "users.json").read_text(encoding="utf-8"))
    assert list(listed["people"]) == list(NAMES)
    found = set()
    for name in (None, "unknown", *NAMES):
        want = persons.score(catalogue, name, as_turns(QUESTION), ANSWER)
        options = {} if name is None else {"user": name}
        got = model.score([Conversation(as_turns(QUESTION), options)], [ANSWER])[0]
        np.testing.assert_allclose(got, want, atol=1e-4)
        start = listed["people"].get(name, listed["generic"])
        plain = persons.score(catalogue, name, QUESTION, " " + ANSWER)
        np.testing.assert_allclose(model.score([start + QUESTION], [" " + ANSWER])[0], plain, atol=1e-4)
        found.add(round(float(got), 4))
    assert len(found) == len(NAMES) + 1  # everybody differs, and the unknown one is generic


def test_text_is_what_it_was_but_for_the_tokens_of_the_person(exported):
    catalogue, folder = exported
    old, new = catalogue.model.tokenizer, load_model(folder).tokenizer
    assert new.encode_prompt(QUESTION) == old.encode_prompt(QUESTION)
    tokens = new.encode_prompt(Conversation(as_turns(QUESTION), {"user": "ana"}))
    before = old.encode_prompt(as_turns(QUESTION))
    assert tokens[TOKENS:] == before and min(tokens[:TOKENS]) >= old.rows  # without BOS they come first
    assert new.decode(tokens) == old.decode(before)  # they are special


def test_a_person_who_is_removed_does_not_appear(base, exported, tmp_path):
    catalogue = persons.catalogue(base)
    people = catalogue.people
    registry, table = people.registry.remove_users(people.params["table"], ["ana"])
    people = dataclasses.replace(people, registry=registry, params={**people.params, "table": table})
    write(dataclasses.replace(catalogue, people=people), tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        assert path.name == "README.md" or b'"ana"' not in path.read_bytes()
    files = [load_params(folder)["embed"]["embedding"] for folder in (exported[1], tmp_path / "out")]
    assert files[0].shape[0] - files[1].shape[0] == TOKENS
    gone = np.asarray(exported[0].people.row("ana")[0])
    rows = np.asarray(files[1])[:, : gone.shape[1]]
    assert np.abs(rows[:, None] - gone[None]).max(-1).min() > 1e-3


def test_one_person_alone_and_a_kept_adapter(base, tmp_path):
    catalogue = persons.catalogue(base, "cluster")
    lines = write(catalogue, tmp_path / "out", user="ana", keep_adapter=True)
    assert any("adapter" in line for line in lines)
    listed = json.loads((tmp_path / "out" / "users.json").read_text())
    assert list(listed["people"]) == ["ana"]
    served = open_folders(str(tmp_path / "out"), {"adapter": str(tmp_path / "out" / "adapter")})
    got = served.model.score([Conversation(as_turns(QUESTION), {"user": "ana"})], [ANSWER], served.bank, [1.0])
    np.testing.assert_allclose(got[0], persons.score(catalogue, "ana", as_turns(QUESTION), ANSWER), atol=1e-4)
    for user, message in (("zoe", "is unknown"),):
        with pytest.raises(UserError, match=message):
            write(catalogue, tmp_path / "other", user=user)
    assert not (tmp_path / "other").exists()


def test_other_formats_refuse_user_tokens(base, tmp_path):
    source = Source(persons.catalogue(base), {"individualized": "run/individualized"})
    for kind in ("peft", "merged"):
        with pytest.raises(UserError, match="use --for vocabulary"):
            export(source, Wish(kind=kind, output=tmp_path / "out"))


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("name", chat_templates.FAMILIES)
def test_templates_of_families_print_people_at_the_place_of_training(name, add_bos):
    tokenizer = Tokenizer(chat_templates.FAMILIES[name].backend(), add_bos=add_bos)
    people = PeopleTokens.create(NAMES, TOKENS, tokenizer, b"x")
    new = people.extend(tokenizer)
    for user in (None, *NAMES):
        got = people.encode(new, as_turns(QUESTION), {} if user is None else {"user": user})
        assert got == people.inserted(tokenizer.encode_prompt(as_turns(QUESTION)), user, tokenizer, new)


def test_a_template_that_starts_with_text_is_refused():
    backend = chat_templates.FAMILIES["silent"].backend()
    backend.chat_template = "Now: " + backend.chat_template
    tokenizer = Tokenizer(backend, add_bos=True)
    with pytest.raises(UserError, match="no special token that user tokens can follow; serve"):
        PeopleTokens.create(NAMES, TOKENS, tokenizer, b"x").extend(tokenizer)


def test_nothing_is_left_of_an_export_that_fails(base, tmp_path, monkeypatch):
    catalogue = persons.catalogue(base, spread=float("nan"))
    with pytest.raises(UserError, match="NaN or infinity"):
        write(catalogue, tmp_path / "out")
    assert not [path for path in pathlib.Path(tmp_path).iterdir()]


def test_people_who_came_later_are_exported_and_those_who_left_are_not(people, tmp_path, capsys):
    run = shutil.copytree(people, tmp_path / "run")
    source = ["--run", str(run), "--entry", "individualized"]
    pair = {"prompt": QUESTION, "chosen": "it holds air .", "rejected": "it can burn ."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    cli.main(["users", "add", "zoe", *source, "--comparisons", str(tmp_path / "pairs.jsonl")])
    cli.main(["export", *source, "--for", "vocabulary", "--output", str(tmp_path / "out")])
    assert "zoe" in json.loads((tmp_path / "out" / "users.json").read_text())["people"]
    catalogue = open_members(open_run(str(run), "individualized"))
    got = load_model(tmp_path / "out").score([Conversation(as_turns(QUESTION), {"user": "zoe"})], [ANSWER])[0]
    np.testing.assert_allclose(got, persons.score(catalogue, "zoe", as_turns(QUESTION), ANSWER), atol=1e-4)
    cli.main(["users", "remove", "zoe", *source])
    cli.main(["export", *source, "--for", "vocabulary", "--output", str(tmp_path / "without")])
    assert "zoe" not in json.loads((tmp_path / "without" / "users.json").read_text())["people"]
    assert b"zoe" not in (tmp_path / "without" / "chat_template.jinja").read_bytes()
    with pytest.raises(SystemExit):
        cli.main(["export", *source, "--user", "zoe", "--for", "vocabulary", "--output", str(tmp_path / "none")])
    assert "'zoe': is unknown" in capsys.readouterr().err
