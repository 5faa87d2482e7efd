"""What belongs to what: people and their rows, parameters and their base, a run and what it reads."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from support import tiny, tiny_users
from support.tiny_users import entry_of, pairs_of, trained_of

from pjrlhf.algorithms import banks, pdpo_entries, policy, reward
from pjrlhf.algorithms.pdpo import Preference
from pjrlhf.data import synthetic
from pjrlhf.data.tokenization import load_tokenizer
from pjrlhf.errors import UserError
from pjrlhf.export import merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.feedback.pairs import _warn_of_twins
from pjrlhf.language_model import load_bank, load_model, load_personal
from pjrlhf.models.provenance import check_shapes
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.pipeline import stages
from pjrlhf.runtime.inputs import fingerprints
from pjrlhf.settings import parse
from pjrlhf.training.workdir import Workdir

ANSWERS = ("it can shine .", "it can melt .")
PEOPLE = ("ann", "bob", "eve", "dan")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return tiny_users.save_base(tmp_path_factory.mktemp("base"))


def lines_of(users):
    """Comparisons of two answers to 24 requests; every second person prefers the second answer."""
    pairs = {user: ANSWERS[:: (1, -1)[i % 2]] for i, user in enumerate(users)}
    return [
        {"prompt": request, "chosen": pair[0], "rejected": pair[1], "user_id": user}
        for request in synthetic.prompts()[:24]
        for user, pair in pairs.items()
    ]


MODELS = {"individualized": {"kind": "individualized", "tokens": 2}, "cluster": {"kind": "cluster", "clusters": 2}}


def config_of(path, base, models=MODELS, **changes):
    sizes = {"data__max_prompt": 16, "data__max_completion": 8, "checkpoint_every": 2, "evaluate_users__cold_start": ()}
    config = tiny_users.settings(
        "records",
        **sizes,
        model__path=str(base),
        preference__models=models,
        **changes,
        preference__data__path=str(path),
    )
    config.stages = ("preference",)
    return config


@pytest.fixture(scope="module")
def own(tmp_path_factory, base_folder):
    """(config, folder) of a finished stage preference on one's own records."""
    folder = tmp_path_factory.mktemp("own")
    config = config_of(tiny_users.write_records(folder / "records.jsonl", lines_of(PEOPLE)), base_folder)
    return config, tiny.run(folder / "run", config)


# ---- people and rows


def margins_by_line(trained):
    """(prompt, user) -> held-out margin."""
    found = trained.margins("heldout", trained.pairs.users("heldout"))
    examples = trained.pairs.tables["heldout"].examples
    return {(str(e.prompt), e.user_id): margin for e, margin in zip(examples, found, strict=True)}


CHANGES = {
    "reversed": lambda lines: lines[::-1],
    "by user": lambda lines: sorted(lines, key=lambda line: line["user_id"], reverse=True),
    "one left": lambda lines: [line for line in lines if line["user_id"] != "ann"],
    "one came": lambda lines: [{**line, "user_id": "zoe"} for line in lines if line["user_id"] == "ann"] + lines,
}


@pytest.fixture(scope="module")
def apart(own, tmp_path_factory):
    """(folder, name -> `margins_by_line`) of a copy of the run whose people differ more than a few steps make them."""
    config, folder = own
    folder = shutil.copytree(folder, tmp_path_factory.mktemp("apart") / "run")
    run, expected = tiny.start(folder, config), {}
    pairs, moved = pairs_of(run), np.random.default_rng(0)
    for name in MODELS:
        before = trained_of(run, name, pairs)
        users = before.trainable["users"]
        table = jax.tree.map(lambda x: 3 * moved.standard_normal(x.shape, np.float32), users["table"])
        changed = {**before.trainable, "users": {**users, "table": table}}
        pdpo_entries.save(run, entry_of(run, name), before.users, before.pairs.registry, changed)
        expected[name] = margins_by_line(trained_of(run, name, pairs))
    return folder, expected


@pytest.mark.parametrize("change", CHANGES)
def test_people_keep_their_rows_whatever_the_order_of_lines(apart, tmp_path, base_folder, change):
    folder, margins = apart
    lines = CHANGES[change](lines_of(PEOPLE))
    other = config_of(tiny_users.write_records(tmp_path / "records.jsonl", lines), base_folder)
    again = tiny.start(shutil.copytree(folder, tmp_path / "copy"), other)
    pairs = pairs_of(again)
    for name, expected in margins.items():
        trained = trained_of(again, name, pairs)
        assert list(trained.pairs.registry.rows) == list(PEOPLE), "those who left keep their rows"
        found = margins_by_line(trained)
        both = found.keys() & expected.keys()
        assert len(both) >= 10
        np.testing.assert_allclose([found[key] for key in both], [expected[key] for key in both], rtol=1e-4, atol=1e-5)
        assert len({round(float(expected[key]), 4) for key in both}) > 3, "people differ: this test can fail"
        names = [e.user_id for e in trained.pairs.tables["heldout"].examples]
        rows = dict(zip(names, trained.pairs.users("heldout").tolist(), strict=True))
        assert rows == {user: PEOPLE.index(user) + 1 if user in PEOPLE else 0 for user in rows}, "others are generic"


def test_names_that_look_like_one_are_named(caplog):
    _warn_of_twins(["ann", "bob", "eve"])
    assert not caplog.messages
    _warn_of_twins(["ann", "Ann ", "bob", "e\u0301", "\u00e9"])
    assert len(caplog.messages) == 2
    assert "'ann' and 'Ann ' are two people here; if they are one, give their records one spelling" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "what is rain ?"}, "need several prompts, or --config.preference.split=pair"),
        ({"user_id": "ann"}, "one person is all there is: set --config.preference.new_user_fraction=0"),
    ],
)
def test_what_cannot_be_split_says_the_way_out(tmp_path, base_folder, changes, message):
    records = [{**line, **changes} for line in lines_of(PEOPLE)]
    path = tiny_users.write_records(tmp_path / "records.jsonl", records)
    run = tiny.start(tmp_path / "run", config_of(path, base_folder, preference__new_user_fraction=0.5))
    with pytest.raises(UserError, match=f"have one key, so nothing can be held out; .*{message}"):
        pairs_of(run)


# ---- what is saved is checked where it is loaded

OTHERS = [
    ("adapter__alpha", 64.0, "alpha: 4.0, here 64.0"),
    ("adapter__rank", 4, "rank: 2, here 4"),
    ("adapter__dtype", "bfloat16", "adapter_dtype: 'float32', here 'bfloat16'"),
    ("model__dtype", "bfloat16", "dtype: 'float32', here 'bfloat16'"),
    ("model__param_dtype", "bfloat16", "param_dtype: 'float32', here 'bfloat16'"),
    ("model__quantize", "int8", "base: '[0-9a-f]{16}', here '[0-9a-f]{16}-int8'"),
    ("data__chat", False, "chat_template: '[0-9a-f]{16}', here ''"),
    ("model__eos_token", ".", r"eos_tokens: \['</s>'\], here \['\.'"),
]


@pytest.mark.parametrize(("key", "value", "message"), OTHERS, ids=[key for key, _, _ in OTHERS])
def test_other_settings_than_those_of_training_are_refused_by_name(finished, people, key, value, message):
    run = tiny.start(finished, tiny.settings(**{key: value}))
    for load in (reward.load, banks.load):
        with pytest.raises(UserError, match=f"safetensors: was trained with .*{message}.*; use the base and settings"):
            load(run)
    run = tiny.start(people, tiny_users.settings(**{key: value}))
    with pytest.raises(UserError, match=f"individualized/model.safetensors: was trained with .*{message}"):
        pdpo_entries.load(run, entry_of(run, "individualized"))


def test_another_base_is_refused(copied):
    path = copied / "sft" / "model" / "model.safetensors"
    from safetensors.numpy import load_file, save_file

    weights = load_file(path)
    save_file({name: 1.01 * x for name, x in weights.items()}, path, {"format": "pt"})
    for load in (reward.load, banks.load):
        with pytest.raises(UserError, match=r"sft/model: its model is not what was saved; .* or delete manifest\.json"):
            load(tiny.start(copied, tiny.settings()))
    (copied / "sft" / "model" / "manifest.json").unlink()
    for load in (reward.load, banks.load):
        with pytest.raises(UserError, match=r"was trained with base: '.*', here '"):
            load(tiny.start(copied, tiny.settings()))


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        (
            "tokenizer_config.json",
            {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
            "chat_template",
        ),
        ("generation_config.json", {"eos_token_id": 0}, "eos_tokens"),
    ],
)
def test_another_template_or_end_of_an_answer_is_refused_where_a_model_is_rebuilt(copied, file, change, what):
    folder = copied / "sft" / "model"
    load_bank(copied / "policy", folder)
    for template in folder.glob("*.jinja"):
        template.unlink()
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(UserError, match=f"was trained with {what}: .*, here "):
        load_bank(copied / "policy", folder)


def test_reward_models_of_another_run(finished, tmp_path):
    path = str(finished / "reward" / "model.safetensors")
    shutil.copytree(finished / "sft", tmp_path / "run" / "sft")
    shutil.copytree(finished / "tokenizer", tmp_path / "run" / "tokenizer")
    run = tiny.start(tmp_path / "run", tiny.settings(reward__path=path))
    assert tiny.bits(reward.load(run)) == tiny.bits(reward.load(tiny.start(finished, tiny.settings())))
    run = tiny.start(tmp_path / "run", tiny.settings(reward__path=path, adapter__alpha=64.0))
    with pytest.raises(UserError, match=f"{path}: was trained with alpha: 4.0, here 64.0"):
        reward.load(run)
    run = tiny.start(tmp_path / "run", tiny.settings(reward__path=str(finished)))
    with pytest.raises(UserError, match=f"{finished}: is a folder; name the .safetensors file in it"):
        reward.load(run)


def test_an_entry_of_other_settings_is_refused(people):
    run = tiny.start(people, tiny_users.settings())
    entry = entry_of(run, "individualized")
    for changed, message in (
        (dataclasses.replace(entry, users=entry.users.replace(tokens=3)), "entry.tokens: 4, here 3"),
        (dataclasses.replace(entry, objective=entry.objective.replace(beta=0.2)), "objective.beta: 0.1, here 0.2"),
    ):
        with pytest.raises(UserError, match=message):
            pdpo_entries.load(run, changed)


def test_a_note_that_lies_about_the_shapes(finished, tmp_path):
    run = tiny.start(finished, tiny.settings())
    bank, _ = load_tree(finished / "policy" / "bank.safetensors")
    short = jax.tree.map(lambda x: x[:-1], bank)
    with pytest.raises(UserError, match=r"x: layers/.* has shape \(.*\), this run needs \(.*\); use the base"):
        check_shapes("x", short, run.workspace.bank_like(len(tiny.REWARDS)))
    other = {"layers": {**bank["layers"], "more": bank["layers"]["attention"]}}
    with pytest.raises(UserError, match=r"layers/more/.* has shape .*, this run needs \(none\)"):
        check_shapes("x", other, run.workspace.bank_like(len(tiny.REWARDS)))


def test_ingredients_say_what_they_were_trained_with(finished):
    run = tiny.start(finished, tiny.settings())
    manifest = json.loads((finished / "policy" / "ingredients" / "P1A" / "manifest.json").read_text())
    assert manifest["trained_with"] == run.workspace.provenance


def test_one_flipped_bit_in_an_ingredient_is_not_merged(copied, tmp_path):
    folders = [copied / "policy" / "ingredients" / name for name in ("P1A", "P2A")]
    values = {"base": str(copied / "sft" / "model"), "ingredients": [str(path) for path in folders], "weights": (1, 1)}
    path = folders[1] / "adapter_model.safetensors"
    flip(path)
    with pytest.raises(UserError, match=f"{path}: its contents are not what was saved"):
        merge.merge(parse(MergeSettings, {**values, "output": str(tmp_path / "out")}, "merge"))
    assert not (tmp_path / "out").exists()


def flip(path):
    """Changes one bit of a number in a safetensors file."""
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(bytes(content))


def test_one_flipped_bit_in_an_ingredient_of_full_parameters_is_not_merged(base_folder, tmp_path):
    """Nor in a merged model, or in the base that a stage fine-tuned."""
    model = str(base_folder)
    run = tiny.start(tmp_path / "run", tiny.settings(adapter__rank=0, model__path=model, stages=("policy",)))
    names, base = ("P1A", "P2A"), run.workspace.base
    banks.save(run, "policy", names, jax.tree.map(lambda x: jax.numpy.stack([x, 1.5 * x]), base))
    folders = [run.workdir.path / "policy" / "ingredients" / name for name in names]
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    assert manifest["trained_with"] == run.workspace.provenance

    def soup(name, *ingredients):
        out = tmp_path / name
        values = {"ingredients": [str(path) for path in ingredients], "weights": (0.5, 0.5), "output": str(out)}
        merge.merge(parse(MergeSettings, values, "merge"))
        return out

    first = soup("first", *folders)
    assert soup("second", first, folders[0]).is_dir()
    for damaged in (first, folders[0]):
        flip(damaged / "model.safetensors")
        with pytest.raises(UserError, match=f"{damaged}: its model is not what was saved; restore it or make it again"):
            soup("third", first, folders[0])
        assert not (tmp_path / "third").exists()
        flip(damaged / "model.safetensors")


def test_tokens_that_end_an_answer_are_compared(own, base_folder, tmp_path):
    _, folder = own
    path, base = folder / "preference" / "individualized", shutil.copytree(base_folder, tmp_path / "base")
    assert load_personal(path, base).model.tokenizer.eos_tokens == ["</s>"]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    with pytest.raises(UserError, match=r"eos_tokens: \['</s>'\], here \['</s>', '.+'\]"):
        load_personal(path, base)


def test_adapters_bring_the_tokens_that_end_their_answers(base_folder, tmp_path):
    """Also where the base knows nothing of them, and through every form of a merge."""
    settings = tiny.settings(model__path=str(base_folder), model__eos_token="<unk>", stages=("policy",))
    run = tiny.start(tmp_path / "run", settings)
    bank = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), run.workspace.bank_like(1))
    banks.save(run, "policy", ("P1A",), bank)
    ingredient, ids = run.workdir.path / "policy" / "ingredients" / "P1A", list(run.workspace.tokenizer.eos_ids)
    assert len(ids) == 2
    for space in ("delta", "concat"):
        values = {"base": str(base_folder), "ingredients": [str(ingredient)], "weights": (1.0,), "space": space}
        out = tmp_path / space
        merge.merge(parse(MergeSettings, {**values, "output": str(out)}, "merge"))
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == sorted(ids)
    assert set(load_tokenizer(tmp_path / "delta").eos_ids) == set(ids)


@pytest.mark.slow
def test_a_policy_of_everybody_is_an_ingredient(base_folder, tmp_path):
    """Merged into its base, it answers as the trained entry does."""
    records = tiny_users.write_records(tmp_path / "records.jsonl", lines_of(PEOPLE))
    models = {"pooled": {"kind": "uniform"}, "reward": {"kind": "uniform", "head": "reward"}, **MODELS}
    folder = tiny.run(tmp_path / "run", config_of(records, base_folder, models)) / "preference"
    assert [path.parent.name for path in folder.glob("*/ingredient")] == ["pooled"]
    values = {"base": str(base_folder), "ingredients": [str(folder / "pooled" / "ingredient")], "weights": (1.0,)}
    merge.merge(parse(MergeSettings, {**values, "output": str(tmp_path / "out")}, "merge"))
    prompts = [[{"role": "user", "content": request}] for request in synthetic.prompts()[:4]]
    answers = [ANSWERS[0]] * 4
    found = load_model(tmp_path / "out").score(prompts, answers)
    wanted = load_personal(folder / "pooled").score(prompts, answers, [None] * 4)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted - load_model(base_folder).score(prompts, answers)).max() > 1e-3


def test_a_bank_for_a_notebook(finished, base_folder):
    _, names, adapter = load_bank(finished / "policy", base=finished / "sft" / "model")
    assert names == tiny.REWARDS and (adapter.rank, adapter.alpha) == (2, 4.0)
    with pytest.raises(UserError, match=r"bank.safetensors: was trained with base: '.*', here '.*'"):
        load_bank(finished / "policy", base=base_folder)


# ---- a trained entry, from its files alone


@pytest.mark.slow
@pytest.mark.parametrize("bos", [True, False])
def test_a_trained_entry_is_rebuilt_from_its_files(tmp_path, base_folder, bos):
    """Log-probs of the rebuilt model give the margins of the run, with and without BOS before the user tokens."""
    base = shutil.copytree(base_folder, tmp_path / "base")
    settings = base / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "add_bos_token": bos}))
    path = tiny_users.write_records(tmp_path / "records.jsonl", lines_of(PEOPLE))
    models = {"mine": {"kind": "individualized", "tokens": 2, "std": 1.0, "start": "normal", "zero_offset": False}}
    config = config_of(path, base, models, data__chat=False)
    run = tiny.start(tiny.run(tmp_path / "run", config), config)
    trained = trained_of(run, "mine", pairs_of(run))
    pairs, table = trained.pairs, trained.pairs.tables["heldout"]
    margins = trained.margins("heldout", pairs.users("heldout"))

    model = load_personal(tmp_path / "run" / "preference" / "mine")
    assert model.model.backbone.model.user_offset == int(bos)
    prompts, users = [e.prompt for e in table.examples], [e.user_id for e in table.examples]
    chosen, rejected = (
        model.score(prompts, [getattr(e, side) for e in table.examples], users) for side in ("chosen", "rejected")
    )
    reference = pairs.reference["heldout"]
    rebuilt = trained.entry.objective.beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1]))
    np.testing.assert_allclose(rebuilt, margins, rtol=1e-3, atol=1e-4)
    # Nobody is not ann, and strangers are nobody.
    nobody, stranger = (model.score(prompts, [ANSWERS[0]] * len(prompts), [u] * len(prompts)) for u in (None, "zoe"))
    np.testing.assert_array_equal(nobody, stranger)
    assert np.abs(nobody - model.score(prompts, [ANSWERS[0]] * len(prompts), ["ann"] * len(prompts))).max() > 1e-2
    assert len(model.generate(prompts[:2], ["ann", None], max_new_tokens=3)) == 2


def test_a_rebuilt_entry_asks_as_in_training_and_its_run_may_move(people, tmp_path):
    run = tiny.start(people, tiny_users.settings())
    trained = trained_of(run, "individualized", pairs_of(run))
    moved = shutil.copytree(people, tmp_path / "moved")
    model = load_personal(moved / "preference" / "individualized" / "model.safetensors")
    table = trained.pairs.tables["heldout"]
    eos = run.workspace.tokenizer.eos_id
    # A sampled answer that reached the limit has no EOS in the run.
    rows = [i for i, row in enumerate(table) if row["chosen"][-1] == eos == row["rejected"][-1]]
    margins, reference = (
        found[rows]
        for found in (
            trained.margins("heldout", trained.pairs.users("heldout")),
            trained.pairs.reference["heldout"],
        )
    )
    examples = [table.examples[i] for i in rows]
    asked = [e.original for e in examples]  # as text, of a run that chats
    users = [e.user_id for e in examples]
    sides = [model.score(asked, [getattr(e, side) for e in examples], users) for side in ("chosen", "rejected")]
    assert rows
    rebuilt = 0.1 * ((sides[0] - reference[:, 0]) - (sides[1] - reference[:, 1]))
    np.testing.assert_allclose(rebuilt, margins, rtol=1e-3, atol=1e-4)
    shutil.rmtree(moved / "sft")
    with pytest.raises(UserError, match=r"sft/model: the base of .* is not there; name its folder with base="):
        load_personal(moved / "preference" / "individualized")
    load_personal(moved / "preference" / "individualized", base=people / "sft" / "model")
    with pytest.raises(UserError, match=r"bank.safetensors: is no user model"):
        save_tree(tmp_path / "bank.safetensors", {"a": np.zeros(1)})
        load_personal(tmp_path / "bank.safetensors")


# ---- a run and what it reads


class Killed(Exception):
    pass


def stop_after(monkeypatch, steps):
    """Training stops as if killed after some steps in all."""
    step, seen = Preference.step, []

    def stopping(self, state, batch):
        seen.append(1)
        if len(seen) > steps:
            raise Killed
        return step(self, state, batch)

    monkeypatch.setattr(Preference, "step", stopping)


def flipped(lines):
    return [{**line, "chosen": line["rejected"], "rejected": line["chosen"]} for line in lines]


@pytest.mark.slow
def test_other_data_or_base_under_the_same_path_are_refused_by_name(tmp_path, base_folder, monkeypatch):
    base = shutil.copytree(base_folder, tmp_path / "base")
    path = tmp_path / "records.jsonl"
    tiny_users.write_records(path, lines_of(PEOPLE))
    whole = tiny.run(tmp_path / "whole", config_of(path, base))
    config, run = config_of(path, base), functools.partial(tiny.run, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 9)  # in the second entry
        with pytest.raises(Killed):
            run(config)

    changed = r"what this run reads has changed since it started \({}.*\); put back what was there, choose another"
    for lines in (flipped(lines_of(PEOPLE)), lines_of(PEOPLE)[::-1], lines_of(("zoe", *PEOPLE))):
        tiny_users.write_records(path, lines)
        with pytest.raises(UserError, match=changed.format(f"preference.data.path: {path}")):
            run(config)
    # Who insists gets finished stages, but no training goes on with other data.
    shutil.copytree(tmp_path / "run", tmp_path / "insists")
    (tmp_path / "insists" / "inputs.json").unlink()
    with pytest.raises(UserError, match=r"checkpoints/.: was written by .*contents of preference.data.path"):
        tiny.run(tmp_path / "insists", config)

    tiny_users.write_records(path, lines_of(PEOPLE))
    for name, content in (("model.safetensors", None), ("tokenizer_config.json", b" ")):
        before = (base / name).read_bytes()
        after = bytearray(before)
        after[-1] ^= 1
        (base / name).write_bytes(bytes(after) if content is None else before + content)
        with pytest.raises(UserError, match=changed.format(f"model.path: {base}")):
            run(config)
        (base / name).write_bytes(before)

    run(config)
    for name in MODELS:
        file = f"preference/{name}/model.safetensors"
        assert tiny.bits(load_tree(tmp_path / "run" / file)[0]) == tiny.bits(load_tree(whole / file)[0])


def test_data_without_a_local_file_are_known_by_their_records(tmp_path, base_folder, monkeypatch):
    import sys
    import types

    module = types.ModuleType("toy_source")
    module.lines = lines_of(PEOPLE)
    module.read = lambda spec: module.lines
    monkeypatch.setitem(sys.modules, "toy_source", module)
    config = config_of("", base_folder, {"pooled": {"kind": "uniform"}})
    with config.ignore_type():
        config.preference.data = type(config)({"kind": "toy_source:read", "name": "hub"})
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Killed):
            tiny.run(tmp_path / "run", config)
    module.lines = flipped(module.lines)
    with pytest.raises(UserError, match=r"has changed since it started \(records of hub: "):
        tiny.run(tmp_path / "run", config)
    module.lines = flipped(module.lines)
    tiny.run(tmp_path / "run", config)


def test_one_flipped_bit_in_what_a_finished_stage_wrote(own, tmp_path):
    config, folder = own
    copy = shutil.copytree(folder, tmp_path / "run")
    tiny.run(copy, config)  # all finished: nothing runs
    path = copy / "preference" / "cluster" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=f"{path}: has changed since the stage wrote it; restore it, or delete"):
        tiny.run(copy, config)
    run = tiny.start(copy, config)
    with pytest.raises(UserError, match="its contents are not what was saved"):
        pdpo_entries.load(run, entry_of(run, "cluster"))
    shutil.rmtree(copy / "preference")
    tiny.run(copy, config)
    assert tiny.bits(load_tree(path)[0]) == tiny.bits(load_tree(folder / "preference/cluster/model.safetensors")[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_base_that_is_not_finite_is_refused(base_folder, tmp_path, value):
    from safetensors.numpy import load_file, save_file

    base = shutil.copytree(base_folder, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].copy()
    weights[name][3, 2] = value
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    path = tiny_users.write_records(tmp_path / "records.jsonl", lines_of(PEOPLE))
    with pytest.raises(UserError, match=f"{base}: layers/.*up/kernel holds numbers that are not finite as float32"):
        tiny.run(tmp_path / "run", config_of(path, base))


def test_what_a_config_reads(finished, tmp_path, monkeypatch):
    """Paths that are there, from whatever setting; nothing of the run directory itself."""
    (tmp_path / "run" / "policy").mkdir(parents=True)
    bank = "run/policy/bank.safetensors"
    for name in ("pairs.jsonl", "votes.jsonl", bank, "report", "train", "cache.jsonl", "ratings"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    config = {
        "title": str(tmp_path / "report"),
        "model": {"path": str(finished / "sft" / "model"), "tokenizer": "synthetic"},
        "data": {"prompts": {"kind": "jsonl", "path": str(tmp_path / "pairs.jsonl")}},
        "reward": {"path": str(tmp_path / "absent"), "data": "comparisons"},
        "preference": {
            "bank": str(tmp_path / bank),
            "data": {"kind": "votes", "more": {"files": ["votes.jsonl", "x"]}, "split": "train"},
        },
        "judge": {"kind": "chat", "cache": str(tmp_path / "cache.jsonl")},
        "rewards": {"P1A": {"kind": "ratings", "path": "ratings"}, "P1B": "train"},
        "merge": {"ingredients": (str(tmp_path / "pairs.jsonl"),)},
    }
    found = fingerprints(config, tmp_path / "run")
    sources = {"data.prompts.path", "preference.data.more.files", "rewards.P1A.path"}
    assert set(found) == {"model.path", "merge.ingredients", *sources}
    (tmp_path / "votes.jsonl").write_text("others")
    again = fingerprints(config, tmp_path / "run")
    assert {name for name in found if found[name] != again[name]} == {"preference.data.more.files"}


def test_a_word_is_no_path_where_a_folder_has_its_name(tmp_path, monkeypatch):
    for name in ("base", "policy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    words = {"comparisons": {"sampler": "base"}, "preference": {"bank": "policy"}}
    assert fingerprints(words, tmp_path / "run") == {}
    # Nor is a folder of records a model because it has a config.json.
    data = {"data": {"prompts": {"kind": "datasets", "path": str(tmp_path / "base")}}}
    assert set(fingerprints(data, tmp_path / "run")) == {"data.prompts.path"}


# ---- the run directory


def test_a_config_is_kept_when_there_is_something_to_keep(tmp_path, base_folder):
    """A run that its data stop can be started again with other settings."""
    lines = lines_of(PEOPLE)
    lines[3] = {**lines[3], "chosen": ""}
    path = tiny_users.write_records(tmp_path / "records.jsonl", lines)
    models = {"pooled": {"kind": "uniform"}}
    with pytest.raises(UserError, match="1 of 96 records are bad"):
        tiny.run(tmp_path / "run", config_of(path, base_folder, models))
    tiny.run(tmp_path / "run", config_of(path, base_folder, models, data__max_bad_fraction=0.5))
    with pytest.raises(UserError, match=r"another config \(data.max_bad_fraction: 0.5 -> 0.01"):
        tiny.run(tmp_path / "run", config_of(path, base_folder, models))


@pytest.mark.parametrize("half", [(), ("tokenizer.json",)])
def test_a_tokenizer_that_was_half_written(tmp_path, monkeypatch, half):
    """Killed while writing, by this version or one that wrote in place: the next run writes it again."""
    config = tiny.settings(stages=("sft",))
    write = synthetic.write_tokenizer

    def killed(folder, *arguments):
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "write_tokenizer", killed)
        with pytest.raises(KeyboardInterrupt):
            _ = tiny.start(tmp_path, config).workspace.tokenizer
    assert not (tmp_path / "tokenizer").exists()
    for name in half:
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "tokenizer" / name).write_text("{")
    found = tiny.start(tmp_path, config).workspace.tokenizer
    write(tmp_path / "expected")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "tokenizer" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert found.vocab_size == len(synthetic.vocabulary())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "tokenizer"]


def test_two_runs_in_one_folder(own):
    config, folder = own
    with Workdir(folder).locked(), pytest.raises(UserError, match=f"{folder}: process .* has been running there since"):
        stages.run(config, Workdir(folder))


def test_policies_and_their_rewards_fit(finished):
    """What a run saved is what it loads."""
    run = tiny.start(finished, tiny.settings())
    reward.load(run)
    banks.load(run)
    policy.method_of(run)
