"""What a run or folders offer, who answers a request, and the commands that say so."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from support import tiny, tiny_decoder, tiny_serving, tiny_users
from support.small_policies import noise

import pjrlhf
from pjrlhf import cli
from pjrlhf.errors import UserError
from pjrlhf.language_model import load_bank, load_model
from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.models.peft import save_peft
from pjrlhf.models.quantization import QUANTIZATIONS, NormalFloat4, kind_of
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.users import UserModel
from pjrlhf.runtime.records import DataSettings
from pjrlhf.serving.catalogue import Catalogue, People, UnknownIngredient, UnknownModel, parse_mix
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.opening import open_folders, open_run, parse_mesh, soup_people
from pjrlhf.serving.people.rewards import lengths_of
from pjrlhf.serving.soups import read_soups
from pjrlhf.serving.tickets import Request

NAMES = ("P1A", "P2B", "P3A")
QUESTION = "what is rain ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_users.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def soups(folder):
    model = load_model(folder, adapter=tiny_serving.ADAPTER)
    return Catalogue(model, NAMES, tiny_serving.bank(model))


def test_a_model_a_soup_and_a_mix_name_who_answers(soups):
    for voice, row in (
        (soups.voice(), [0, 0, 0]),
        (soups.voice("base"), [0, 0, 0]),
        (soups.voice("P2B"), [0, 1, 0]),
        (soups.voice("soup:P1A=0.5,P3A=-2"), [0.5, 0, -2]),
        (soups.voice("base", {"P1A": 0.5, "P2B": 0}), [0.5, 0, 0]),
        (soups.voice("base", {}, "ana"), [0, 0, 0]),
    ):
        assert voice.mix.tolist() == row and voice.user is None
        assert voice.weights == {name: weight for name, weight in zip(NAMES, row, strict=True) if weight}
        assert voice.describe() == {"mix": voice.weights}


def test_what_is_not_served_is_refused(soups):
    with pytest.raises(UnknownModel, match="base, P1A, P2B, P3A"):
        soups.voice("P2C")
    with pytest.raises(UnknownIngredient, match="did you mean P2B"):
        soups.voice("base", {"P2C": 1.0})
    for model, mix in (("P1A", {"P1A": 1.0}), ("soup:P1A=1", {"P1A": 1.0}), ("base", {"P1A": 1e9})):
        with pytest.raises(UserError, match=r"^mix: "):
            soups.voice(model, mix)
    with pytest.raises(UnknownIngredient, match="only the base is served; leave the mix out"):
        Catalogue(soups.model).voice("base", {"P1A": 1.0})
    for text in ("", "P1A", "P1A=", "=1", "P1A=x", "P1A=nan", "P1A=1,P1A=2", "P1A=1,,"):
        with pytest.raises(UserError, match=r"^mix: "):
            parse_mix(text)
    for name in ("base", "P1A", "a b", "a=b", "soup:x", ""):
        with pytest.raises(UserError, match="ingredient"):
            dataclasses.replace(soups, names=("P1A", "P2B", name))


def test_a_person_who_is_a_soup_has_a_model(soups):
    users = UserModel(kind="soup", num_users=2, adapters=len(NAMES))
    params = {"table": {"weights": np.array([[0, 0, 0], [5, 0, 0], [0, 9, 0]], np.float32)}}
    catalogue = dataclasses.replace(soups, people=People(users, UserRegistry((None, "ana", None)), params))
    assert list(catalogue.models) == ["base", "personal", *NAMES] and catalogue.default == "personal"
    ana, nobody = catalogue.voice(user="ana"), catalogue.voice(user="zoe")
    np.testing.assert_allclose(ana.mix, jax.nn.softmax(np.array([5.0, 0, 0])), rtol=1e-6)
    np.testing.assert_allclose(nobody.mix, 1 / 3, rtol=1e-6)
    assert ana.known and not nobody.known and nobody.describe()["user"]["id"] == "zoe"
    assert catalogue.voice("P1A", user="ana").weights == {"P1A": 1.0}
    assert catalogue.voice("base", {"P3A": 0.5}, "ana").weights == {"P3A": 0.5}


def test_a_bank_alone_has_people_and_answers_as_the_base_by_default(soups):
    bank = dataclasses.replace(soups, people=soup_people(soups.bank, NAMES, None, "base"))
    assert list(bank.models) == ["base", "personal", *NAMES] and bank.default == "base"
    np.testing.assert_allclose(bank.voice("personal", user="zoe").mix, 1 / 3, rtol=1e-6)
    assert bank.voice(user="zoe").describe() == {"mix": {}}, "the base alone, which knows nobody"
    assert bank.voice("personal", user="zoe").describe()["user"]["answered_as"]
    with pytest.raises(UserError, match="give the mix with model base"):
        bank.voice("P1A", {"P2B": 1.0})
    known = dataclasses.replace(bank.people, registry=UserRegistry((None, "ana")))
    assert dataclasses.replace(bank, people=known).voice(user="ana").model == "personal"
    assert soup_people(soups.bank, NAMES[:1], None, "base") is None


def test_adapters_of_folders_may_differ_in_rank_and_scale(folder, tmp_path):
    model = load_model(folder)
    adapters = {}
    for i, (rank, alpha, targets) in enumerate(((2, 4.0, ()), (3, 1.0, ("query", "up")))):
        shape = AdapterConfig(rank=rank, alpha=alpha, target_modules=targets)
        bank = noise(init_bank(model.backbone.base, shape, 1, jax.random.key(i)), i, 0.3)
        one = jax.tree.map(lambda x: np.asarray(x[0]), bank)
        save_peft(tmp_path / str(i), one, rank, alpha, str(folder), "llama", 8)
        adapters[f"A{i}"] = (load_model(folder, adapter=shape), bank)
    catalogue = open_folders(str(folder), {name: str(tmp_path / str(i)) for i, name in enumerate(adapters)})
    assert catalogue.names == ("A0", "A1")
    answer = "it is wet ."
    for name, (own, bank) in adapters.items():
        got = catalogue.model.score([QUESTION], [answer], catalogue.bank, catalogue.voice(name).mix)
        np.testing.assert_allclose(got, own.score([QUESTION], [answer], bank, [1.0]), rtol=1e-5)
    with pytest.raises(UserError, match="full model"):
        open_folders(str(folder), {"A": str(folder)})
    assert open_folders(str(folder), {}).bank is None


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "data=-1"])
def test_a_model_is_served_from_several_devices(folder, tmp_path, mesh):
    model = load_model(folder, adapter=tiny_serving.ADAPTER)
    one = jax.tree.map(lambda x: np.asarray(x[0]), tiny_serving.bank(model))
    save_peft(tmp_path / "a", one, tiny_serving.ADAPTER.rank, tiny_serving.ADAPTER.alpha, str(folder), "llama", 8)
    found = [
        open_folders(str(folder), {"A": str(tmp_path / "a")}, mesh=devices) for devices in (None, parse_mesh(mesh))
    ]
    ids = found[0].model.tokenizer.encode_prompt([{"role": "user", "content": QUESTION}])
    requests = [
        Request(tokens=ids, max_new_tokens=9, mix=np.array([weight], np.float32)) for weight in (0, 0.3, 1, -1, 2)
    ]
    alone, several = (
        Engine(one.model.backbone, one.model.tokenizer, one.bank, settings=tiny_serving.SETTINGS).answer(requests)
        for one in found
    )
    assert [one.text for (one,) in alone] == [one.text for (one,) in several]
    assert len(found[1].model.backbone.base["embed"]["embedding"].devices()) == 8
    assert len({one.text for (one,) in alone}) > 2


def test_a_mesh_that_does_not_fit_is_refused():
    assert parse_mesh("") is None
    for text, message in (
        ("data", "'data' is no size of an axis; write AXIS=N"),
        ("data=2,data=4", "each axis once"),
        ("data=x", "no size"),
        ("data=1e9", "no size"),
        ("rows=8", "unknown axis 'rows'; the axes are data, fsdp, tensor"),
        ("data=3", "multiply to 8"),
        ("data=-1,tensor=-1", "more than one axis is -1"),
        ("data=0", "multiply to 8"),
        (",", "no size"),
    ):
        with pytest.raises(UserError, match=f"^mesh: .*{message}"):
            parse_mesh(text)


def test_a_run_is_served_with_its_soups(finished, capsys):
    with tiny.one_device():
        catalogue = open_run(str(finished))
    bank, names, adapter = load_bank(finished / "policy")
    assert catalogue.names == names and catalogue.chat and catalogue.default == "base"
    model = load_model(finished / "sft" / "model", adapter=adapter)
    mix = [0.7 if name == "P1A" else 0.3 if name == "P2B" else 0.0 for name in names]
    (want,) = model.generate([[{"role": "user", "content": QUESTION}]], bank, mix, max_new_tokens=6)
    cli.main(["generate", "--run", str(finished), "--mix", "P1A=0.7,P2B=0.3", "--max-tokens", "6", QUESTION])
    assert capsys.readouterr().out.splitlines()[-1] == want
    named = ["--soups", "calm=P1A=0.7,P2B=0.3", "--soups", "other=P1A=1", "--mix", "calm"]
    cli.main(["generate", "--run", str(finished), *named, "--max-tokens", "6", QUESTION])
    assert capsys.readouterr().out.splitlines()[-1] == want
    assert open_run(str(finished), "pmorl").names == load_bank(finished / "methods" / "pmorl")[1]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--run", str(finished), "--mix", "P9=1", QUESTION])
    assert stopped.value.code == 2 and "P9" in capsys.readouterr().err


def test_a_base_of_4_bits_answers_on_the_terminal(folder, monkeypatch, capsys):
    monkeypatch.setitem(QUANTIZATIONS, "nf4", NormalFloat4(block=8))  # the tiny model has 16 inputs
    model = load_model(folder, quantize="nf4")
    assert kind_of(model.backbone.base) == "nf4"
    (want,) = model.generate([[{"role": "user", "content": QUESTION}]], max_new_tokens=6)
    cli.main(["generate", "--model", str(folder), "--quantize", "nf4", "--max-tokens", "6", QUESTION])
    assert capsys.readouterr().out.splitlines()[-1] == want
    assert [*cli.QUANTIZE] == ["", *QUANTIZATIONS]


def test_a_run_is_served_with_its_people(people, capsys):
    with pytest.raises(UserError, match=r"--entry: .*individualized"):
        open_run(str(people))
    catalogue = open_run(str(people), "individualized")
    personal = pjrlhf.load_personal(people / "preference" / "individualized")
    name = next(filter(None, personal.registry.names))
    assert catalogue.names == ("individualized",) and catalogue.user_tokens == personal.users.num_tokens
    cli.main(
        ["generate", "--run", str(people), "--entry", "individualized", "--user", name, "--max-tokens", "6", QUESTION]
    )
    (want,) = personal.generate([QUESTION], [name], max_new_tokens=6)
    assert capsys.readouterr().out.splitlines()[-1] == want
    spread = open_run(str(people), "individualized", parse_mesh("data=2,fsdp=2,tensor=2"))
    voice, ids = spread.voice(user=name), spread.model.tokenizer.encode_prompt(spread.asked(QUESTION))
    engine = Engine(spread.model.backbone, spread.model.tokenizer, spread.bank, spread.user_tokens)
    request = Request(tokens=ids, max_new_tokens=6, mix=voice.mix, user_tokens=voice.user_tokens, plain=not spread.chat)
    assert engine.answer([request])[0][0].text == want
    pooled = open_run(str(people), "pooled")
    assert pooled.user_tokens == 0 and list(pooled.models) == ["base", "pooled"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-tokens", "0"), "error: --max-tokens 0: below 1"),
        (("--temperature", "nan"), "error: --temperature nan: "),
        (("--top-p", "0"), "error: --top-p 0.0: "),
        (("--mix", "x"), "--mix: 'x' is no ingredient and no soup of --soups; name one of P1A"),
        (("--soups", "x", "--mix", "x"), "--soups: "),
        (("--quantize", "int8"), "--dtype and --quantize go with --model"),
        (("--dtype", "bfloat16"), "--dtype and --quantize go with --model"),
    ],
)
def test_flags_that_change_nothing_or_ask_for_nothing_are_refused(finished, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--run", str(finished), *arguments, QUESTION])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_what_cannot_be_served_is_named(finished, folder, tmp_path):
    with pytest.raises(UserError, match="is no run directory; serve a model in Hugging Face layout with --model"):
        open_run(str(folder))
    with pytest.raises(UserError, match=r"config.json"):
        open_run(str(tmp_path))
    shutil.copy(finished / "config.json", tmp_path)
    with pytest.raises(UserError, match="has nothing to serve yet"):
        open_run(str(tmp_path))
    with pytest.raises(UserError, match="no 'xyz'; name one with --entry: policy"):
        open_run(str(finished), "xyz")


def test_an_entry_that_is_still_to_be_trained_is_told_apart_from_an_unknown_one(copied):
    shutil.rmtree(copied / "methods" / "pmorl")
    with pytest.raises(UserError, match=r"has not finished training 'pmorl' \(the command that .* goes on\); name"):
        open_run(str(copied), "pmorl")


def test_saved_soups_are_models(soups, tmp_path):
    file = tmp_path / "soups.json"
    file.write_text('{"calm": {"P1A": 0.7, "P3A": -0.3}}')
    saved = read_soups([str(file), "short=P2B=0.5,P1A=1"])
    catalogue = dataclasses.replace(soups, soups=saved)
    assert list(catalogue.models) == ["base", *NAMES, "calm", "short"] and catalogue.models["calm"] == "base"
    assert catalogue.voice("calm").weights == {"P1A": 0.7, "P3A": -0.3}
    assert catalogue.voice("short").mix.tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(UserError, match="calm is a soup already"):
        catalogue.voice("calm", {"P1A": 1.0})


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["calm=P1A"], "'calm': mix: 'P1A' is no soup; write NAME=WEIGHT"),
        (["calm=P1A=1", "calm=P2B=1"], "comes twice; give each soup a name of its own"),
        (["nothing.json"], "No such file or directory; name a JSON file, or write NAME=INGREDIENT=WEIGHT"),
        ('{"calm": {"P1A": "1"}}', 'is no object of soups; write {"calm": {"P1A": 0.7'),
        ('{"calm": {"P1A": NaN}}', "bad JSON"),
        ("[]", "is no object of soups"),
        (["calm=P9=1"], "soups: calm: mix: 'P9' is no ingredient"),
        (["P1A=P1A=1"], "is the name of an ingredient; choose another one"),
        (["base=P1A=1"], "is the name of the base itself; choose another one"),
        ('{"a b": {"P1A": 1}}', "cannot name a folder and a served model; choose another one"),
        ('{"calm": {"P1A": 1000}}', "is not between -100 and 100; correct it"),
    ],
)
def test_bad_soups_are_refused_at_the_start(soups, tmp_path, items, message):
    if isinstance(items, str):
        (tmp_path / "soups.json").write_text(items)
        items = [str(tmp_path / "soups.json")]
    with pytest.raises(UserError) as caught:
        dataclasses.replace(soups, soups=read_soups(items))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize(("context", "user_tokens"), [(1024, 0), (768, 0), (768, 4), (128, 0), (128, 4), (8, 5)])
def test_texts_of_people_are_cut_to_the_context_as_in_training(positions, context, user_tokens):
    """A run may have longer texts than its base reads, and is served all the same."""
    texts = {"max_prompt": 512, "max_completion": 256, "long_prompt": "truncate_left", "long_completion": "truncate"}
    trained = DataSettings(**texts).within(context, user_tokens, positions == "learned")
    found = lengths_of(texts, tiny_decoder.CONFIG.replace(max_length=context, positions=positions), user_tokens)
    assert (found.prompt, found.completion) == (trained.max_prompt, trained.max_completion)
