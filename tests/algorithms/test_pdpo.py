"""The stage that trains user models: its objective, whose rows move, and that it resumes."""

import collections
import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
import shutil
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, tiny_users
from support.tiny_users import entry_of, method_of, pairs_of, trained_of

from pjrlhf.algorithms import pdpo as preference
from pjrlhf.algorithms import pdpo_entries, pdpo_objective
from pjrlhf.algorithms.pdpo import Preference
from pjrlhf.algorithms.pdpo_objective import preference_loss
from pjrlhf.algorithms.pdpo_settings import EntrySettings, PreferenceSettings
from pjrlhf.data import synthetic
from pjrlhf.data.comparisons import PairBatch
from pjrlhf.data.messages import with_text
from pjrlhf.data.preferences import PAPER
from pjrlhf.data.schema import Example, is_tie
from pjrlhf.errors import UserError
from pjrlhf.feedback.history import History
from pjrlhf.feedback.pairs import PairSettings, split, tables_of
from pjrlhf.feedback.writers.answers import Answers
from pjrlhf.feedback.writers.fewshot import FewShot
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.models.users import UserKind
from pjrlhf.objectives.preference import PAIRWISE
from pjrlhf.pipeline import stages
from pjrlhf.rollout.preference import PreferenceConfig, answer_scores, pair_losses, pair_rewards
from pjrlhf.serving import opening
from pjrlhf.training import loop
from pjrlhf.training.optimizer import OptimizerSettings, passes
from pjrlhf.training.workdir import Workdir


@pytest.fixture(scope="module")
def run(people):
    return tiny.start(people, tiny_users.settings())


@pytest.fixture(scope="module")
def pairs(run):
    return pairs_of(run)


@pytest.fixture(scope="module")
def method(run, pairs):
    """The training of an entry by its name, compiled once for all tests; its `batches` go on from test to test."""
    return functools.cache(lambda name: method_of(run, name, pairs))


def one_each(pairs, count):
    """The first pair of each of the first `count` users."""
    users = pairs.users("train").tolist()
    return [pairs.tables["train"][users.index(user)] for user in range(1, count + 1)]


scores_of = jax.jit(answer_scores, static_argnums=1)


def batch_of(pairs, rows, part="train", users=None, num_user_tokens=0):
    return pairs.collate(part, pairs.users(part) if users is None else users, rows, num_user_tokens)


def rows_of(tree):
    """Arrays of the table that a step may donate."""
    return jax.tree.map(lambda x: np.array(x), tree)


# ---- the objective


def test_training_starts_from_the_reference(people):
    first = tiny.lines(people, "preference/pooled")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    # User tokens change what the policy reads: with them it does not start as the reference.
    assert abs(tiny.lines(people, "preference/individualized")[0]["loss"] - np.log(2)) > 1e-4


def test_the_reference_is_the_policy_without_users(method, pairs):
    method = method("pooled")
    rows = [pairs.tables["train"][i] for i in range(8)]
    batch = batch_of(pairs, rows)
    logps = scores_of(method.backbone, method.users, method.init().trainable, batch)
    np.testing.assert_allclose(logps.T, pairs.reference["train"][:8], rtol=1e-5)
    np.testing.assert_array_equal(batch.counts, [[len(row["chosen"]), len(row["rejected"])] for row in rows])


@pytest.fixture(scope="module")
def doubled(run, pairs):
    """A noisy policy of the individualized method and a batch of four pairs, each as its user and as nobody."""
    method = method_of(run, "individualized", pairs)
    leaves, treedef = jax.tree.flatten(method.init().trainable)
    rng = np.random.default_rng(0)
    trainable = treedef.unflatten([x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves])
    rows = one_each(pairs, 4) * 2

    def part(order):
        generic = np.array(order) >= 4
        batch = batch_of(pairs, [rows[i] for i in order], num_user_tokens=method.users.num_tokens)
        return batch.replace(generic=generic, users=np.where(generic, 0, batch.users))

    @jax.jit
    def loss_and_gradient(trainable, batch):
        config = PreferenceConfig(alpha=0.3, beta=0.5)
        shared = method.backbone, method.users
        loss, gradient = jax.value_and_grad(lambda p: preference_loss(*shared, config, p, batch)[0])(trainable)
        return loss, gradient, answer_scores(*shared, trainable, batch)

    return trainable, part, loss_and_gradient


def test_the_exact_mixture_is_that_of_the_paper(doubled):
    trainable, part, loss_and_gradient = doubled
    batch = part(range(8))
    loss, _, logps = loss_and_gradient(trainable, batch)
    h = 0.5 * (np.asarray(logps, np.float64) - batch.reference.T)
    losses = np.log1p(np.exp(-(h[0] - h[1])))
    assert abs(losses[:4] - losses[4:]).min() > 1e-3
    assert loss == pytest.approx(0.3 * losses[:4].mean() + 0.7 * losses[4:].mean(), rel=1e-5)


@pytest.mark.slow
def test_the_mixture_does_not_depend_on_micro_batches(doubled):
    trainable, part, loss_and_gradient = doubled
    _, whole, _ = loss_and_gradient(trainable, part(range(8)))
    # By kind of row, by pair, and mixed: means over a micro-batch's own groups would fit the second only.
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 1, 5, 2, 6, 3, 7], [0, 1, 2, 4, 5, 6, 7, 3]):
        gradients = [loss_and_gradient(trainable, part(order[i : i + 4]))[1] for i in (0, 4)]
        jax.tree.map(
            lambda x, y, z: np.testing.assert_allclose((x + y) / 2, z, rtol=1e-4, atol=1e-6), *gradients, whole
        )


@pytest.mark.parametrize(("loss", "head"), [("sigmoid", "policy"), ("sigmoid_norm", "policy"), ("sigmoid", "reward")])
def test_rewards_are_what_the_loss_compares(loss, head):
    rng = np.random.default_rng(0)
    scores, counts = rng.normal(size=(2, 8)), rng.integers(1, 9, (8, 2)).astype(np.float32)
    batch = PairBatch(
        rows=None, index=None, users=None, reference=rng.normal(size=(8, 2)), counts=counts, margin=np.zeros(8)
    )
    config = PreferenceConfig(loss=loss, head=head, beta=0.7)
    chosen, rejected = pair_rewards(config, scores, batch)
    expected = np.log1p(np.exp(rejected - chosen))
    np.testing.assert_allclose(pair_losses(config, scores, batch), expected, rtol=1e-5)


def test_soft_labels_reach_the_loss():
    rng = np.random.default_rng(0)
    scores, p = rng.normal(size=(2, 8)), np.linspace(0.5, 1, 8, dtype=np.float32)
    arrays = {"counts": np.ones((8, 2), np.float32), "margin": np.zeros(8), "reference": np.zeros((8, 2))}
    batch = PairBatch(rows=None, index=None, users=None, preference=p, **arrays)
    config = PreferenceConfig(beta=0.7)
    gap = 0.7 * (scores[0] - scores[1])
    expected = p * np.logaddexp(0, -gap) + (1 - p) * np.logaddexp(0, gap)
    np.testing.assert_allclose(pair_losses(config, scores, batch), expected, rtol=1e-5)


def test_ties_are_trained_on_and_never_tested():
    settings = PairSettings(heldout_fraction=0.5, new_user_fraction=0.4)
    examples = [
        Example(prompt=f"p{i}", chosen="a", rejected="b", user_id=f"u{i % 5}", preference=0.5 if j else None)
        for i in range(20)
        for j in range(2)
    ]
    parts = split(examples, settings, 0)
    assert any(is_tie(example) for example in parts["train"])
    assert not any(is_tie(example) for name in ("heldout", "new_users") for example in parts[name])
    assert all(parts.values())
    with pytest.raises(UserError, match="all 20 comparisons are ties, which are never held out"):
        split([example for example in examples if is_tie(example)], settings, 0)


@pytest.mark.parametrize(("mixture", "alpha", "times"), [("exact", 0.5, 2), ("dropout", 0.0, 1)])
def test_rows_of_a_step(run, pairs, mixture, alpha, times):
    method = method_of(run, entry_of(run, "individualized", mixture=mixture, alpha=alpha), pairs)
    state, metrics = method.step(method.init(), batch_of(pairs, one_each(pairs, 4) * 2))
    assert metrics["loss"][1] == 8 * times
    assert metrics["rewards/margins"][1] == 8  # the generic copies are no part of what is reported
    # Everybody learns, and with alpha = 0 nobody has anything of their own to learn.
    offset = state.trainable["users"]["table"]["offset"]
    assert (np.abs(offset).max((1, 2)) > 0).tolist() == [False, *[alpha > 0] * 4]
    assert state.trainable["bank"]["layers"]["mlp"]["up"]["b"].any()


# ---- whose rows move


@pytest.mark.parametrize("name", ["individualized", "cluster"])
def test_absent_users_keep_every_bit(method, pairs, name, caplog):
    method = method(name)
    rows = one_each(pairs, 4) * 2
    two = np.where(pairs.users("train") > 2, pairs.users("train") - 2, pairs.users("train"))
    # A first step for everybody: moments that a dense optimizer would go on to apply.
    state, _ = method.step(method.init(), batch_of(pairs, rows))
    before = rows_of([state.trainable["users"]["table"], state.opt_state["table"]["rows"]])
    with jax.log_compiles():
        state, _ = method.step(state, batch_of(pairs, rows, users=two))
    assert "jit(_step)" not in caplog.text, "the second step was compiled again"
    after = rows_of([state.trainable["users"]["table"], state.opt_state["table"]["rows"]])
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert x[3:].tobytes() == y[3:].tobytes()
        assert (x[1:3] != y[1:3]).reshape(2, -1).any(1).all()


def test_pooled_training_does_not_know_who_is_asking(method, pairs):
    method, rows, found = method("pooled"), [pairs.tables["train"][i] for i in range(8)], []
    for users in (pairs.users("train"), np.zeros(len(pairs.tables["train"]), np.int32)):
        found.append(tiny.bits(method.step(method.init(), batch_of(pairs, rows, users=users))))
    assert found[0] == found[1]


def test_the_control_trains_on_everybodys_pairs_under_wrong_names(run, pairs):
    own = pairs.users("train")
    drawn = {}
    for name in ("individualized", "permuted"):
        method, drawn[name] = method_of(run, name, pairs), {}
        for _ in range(2 * len(own) // 8):
            batch = next(method.batches)
            drawn[name] |= dict(zip(batch.index.tolist(), batch.users.tolist(), strict=True))
        assert len(drawn[name]) == len(own)
    named = {name: np.array([users[i] for i in range(len(own))]) for name, users in drawn.items()}
    np.testing.assert_array_equal(named["individualized"], own)
    np.testing.assert_array_equal(np.sort(named["permuted"]), np.sort(own))
    assert (named["permuted"] != own).mean() > 0.4


def test_people_who_were_not_trained_on_are_the_generic_user(pairs):
    assert set(pairs.users("train")) == set(pairs.users("heldout")) == {1, 2, 3, 4}
    assert not pairs.users("new_users").any() and len(pairs.users("new_users"))


def _toy_init(model, key, embedding):
    return {"table": {"weights": jnp.zeros((model.num_users + 1, model.width))}}


def _toy_apply(params, users):
    return jnp.tanh(params["table"]["weights"][users])[:, None], None


def test_a_user_model_of_other_code(records, tmp_path, monkeypatch):
    """One user token, which is the user's own row."""
    module = types.ModuleType("toy_users")
    module.one_token = UserKind(_toy_init, _toy_apply, ("tokens", "width"))
    module.nothing = UserKind(_toy_init, _toy_apply, ("height",))
    monkeypatch.setitem(sys.modules, "toy_users", module)
    models = {"toy": {"kind": "toy_users:one_token", "tokens": 1}}
    run = tiny.start(tmp_path / "run", records(preference__models=models, preference__alpha=1.0))
    pairs = pairs_of(run)
    method, users = method_of(run, "toy", pairs), pairs.users("train")
    first = [pairs.tables["train"][i] for i in np.flatnonzero(users == 1)[:8]]
    state, _ = method.step(method.init(), method.collate("train", users, first))
    moved = np.abs(state.trainable["users"]["table"]["weights"]).max(1) > 0
    assert moved.tolist() == [False, True, False]
    for name, message in (("absent", "toy_users has no absent"), ("nothing", "has no size 'height'")):
        config = records(preference__models={"toy": {"kind": f"toy_users:{name}"}})
        with pytest.raises(UserError, match=f"models.toy.kind: user model 'toy_users:{name}': {message}"):
            tiny.start(tmp_path / "run", config)


# ---- evaluation


@pytest.mark.parametrize("name", [pytest.param("pooled", marks=pytest.mark.slow), "individualized"])
def test_a_batch_in_parts_is_one_update(run, method, pairs, name):
    entry = entry_of(run, name)
    parts = method_of(run, dataclasses.replace(entry, accumulation_steps=2), pairs)
    states, batch = [], next(parts.batches)
    assert entry.accumulation_steps == 1 and len(batch) == 2
    rows = [pairs.tables["train"][i] for part in batch for i in part.index.tolist()]
    for one, given in ((method(name), method(name).collate("train", pairs.users("train"), rows)), (parts, batch)):
        state, metrics = one.step(one.init(), given)
        states.append((state, {key: np.divide(*metrics[key]) for key in ("loss", "rewards/margins", "logps/chosen")}))
    (whole, before), (split, after) = states
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), before, after)
    # Adam's first step is the sign of the gradient times the rate, so compare the moments.
    for x, y in zip(jax.tree.leaves(whole.opt_state), jax.tree.leaves(split.opt_state), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)


def test_dropout_is_drawn_from_the_stream_of_the_step(run, method, pairs):
    plain, method = method("individualized"), method_of(run, "individualized", pairs)
    method.backbone = method.backbone.replace(adapter=method.backbone.adapter.replace(dropout=0.2))
    batch, states = next(method.batches), []
    for times in (2, 2, 1):
        state = method.init()
        for _ in range(times):
            state, _ = method.step(state, batch)
        states.append(state)
    assert tiny.bits(states[0]) == tiny.bits(states[1])
    # A resumed run draws what the undisturbed one draws.
    resumed, _ = method.step(states[2], batch)
    assert tiny.bits(resumed) == tiny.bits(states[0])
    without, _ = plain.step(plain.step(plain.init(), batch)[0], batch)
    assert tiny.bits(without.trainable) != tiny.bits(states[0].trainable)


def test_held_out_accuracy_is_that_of_the_margins(method, pairs):
    method = method("individualized")
    state, _ = method.step(method.init(), next(method.batches))
    table, users = pairs.tables["heldout"], pairs.users("heldout")
    hits = []
    for start in range(0, len(table), 8):  # batches of their own
        rows = [table[i % len(table)] for i in range(start, start + 8)]
        batch = method.collate("heldout", users, rows)
        scores = scores_of(method.backbone, method.users, state.trainable, batch)
        chosen, rejected = pair_rewards(method.objective, scores, batch)
        hits += np.asarray(chosen > rejected)[: len(table) - start].tolist()
    assert method.evaluate(state) == {"accuracy": pytest.approx(np.mean(hits))}
    assert 0 < np.mean(hits) < 1


# ---- resuming


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [2, 5], ids=["in the warm start", "after it"])
def test_a_stopped_run_ends_as_the_undisturbed_one(people, tmp_path, monkeypatch, stop_at):
    config = tiny_users.settings()
    config.preference.models = {"cluster": config.preference.models["cluster"].to_dict()}
    config.evaluate_users.cold_start_models = ()
    folder = tmp_path / "run"
    shutil.copytree(people, folder, ignore=shutil.ignore_patterns("preference", "report", "metrics.jsonl"))
    step, seen = Preference.step, []

    def interrupted(self, state, batch):
        seen.append(self)
        if len(seen) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, state, batch)

    monkeypatch.setattr(Preference, "step", interrupted)
    with pytest.raises(loop.Interrupted, match="stopped by SIGTERM after step 2 of 3"):
        preference.run(tiny.start(folder, config))
    preference.run(tiny.start(folder, config))
    assert len(seen) == 6
    name = "preference/cluster/model.safetensors"
    found, expected = (load_tree(path / name) for path in (folder, people))
    assert tiny.bits(found[0]) == tiny.bits(expected[0]) and found[1] == expected[1]
    for stage in ("preference/cluster/individualized", "preference/cluster"):
        assert tiny.lines(folder, stage) == tiny.lines(people, stage)


# ---- one's own records


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return tiny_users.save_base(tmp_path_factory.mktemp("base"))


ANSWERS = ("it can shine .", "it can melt .")


@pytest.fixture
def records(tmp_path, base_folder):
    """Settings of a run on records of two people: ann prefers the first of `ANSWERS`, bob the second."""
    lines = [
        {"prompt": request, "chosen": pair[0], "rejected": pair[1], "user_id": user}
        for request in synthetic.prompts()[:24]
        for user, pair in (("ann", ANSWERS), ("bob", ANSWERS[::-1]))
    ]
    path = tiny_users.write_records(tmp_path / "records.jsonl", lines)

    def settings(**changes):
        sizes = {"data__max_prompt": 16, "data__max_completion": 8, "data__chat": False, "preference__data__path": path}
        sizes |= {"preference__mixture": "exact", "model__path": str(base_folder)}
        return tiny_users.settings("records", **(sizes | changes))

    return settings


def test_a_published_set_is_read_by_its_kind(records, tmp_path):
    lines = [
        {"prompt": f"{request} {PAPER[profile].sentence}", "chosen": pair[0], "rejected": pair[1], "uid": uid}
        for request in synthetic.prompts()[:24]
        for uid, profile, pair in ((1, "P1A", ANSWERS), (6, "P3B", ANSWERS[::-1]))
    ]
    path = tiny_users.write_records(tmp_path / "train.jsonl", lines * 5)  # as often as in the set
    config = records(preference__data__kind="psoups", preference__data__path=path)
    stages.read(config).check_inputs(Workdir(tmp_path / "run"))
    found = pairs_of(tiny.start(tmp_path / "run", config))
    examples = [example for table in found.tables.values() for example in table.examples]
    assert found.people == {"P1A", "P3B"} and len(examples) == 48
    assert {example.prompt for example in examples} == set(synthetic.prompts()[:24])
    assert {example.user_text for example in examples} == {PAPER["P1A"].sentence, PAPER["P3B"].sentence}


def test_a_group_is_on_one_side_of_the_split():
    turns = [
        Example(prompt=f"{group} {turn}", chosen="a", rejected="b", user_id="ann", extra={"group": f"dialogue {group}"})
        for group in range(10)
        for turn in range(3)
    ]
    parts = split(turns, PairSettings(data={"kind": "records"}, split="group", heldout_fraction=0.3), 0)
    sides = {name: {example.extra["group"] for example in part} for name, part in parts.items()}
    assert len(sides["train"]) == 7 and len(sides["heldout"]) == 3 and not sides["train"] & sides["heldout"]


def test_a_held_out_source_is_tested_whole_and_its_prompts_are_trained_on_by_nobody(records, tmp_path, caplog):
    lines = [json.loads(line) for line in pathlib.Path(records().preference.data.path).read_text().splitlines()]
    tested = [{**line, "user_id": user} for line in lines[:8] for user in (line["user_id"], "eve")]
    folder = tmp_path / "test"
    folder.mkdir()
    path = tiny_users.write_records(folder / "records.jsonl", tested)  # of the same name as those of training
    config = records(preference__heldout_data={"kind": "jsonl", "path": path})
    stages.read(config).check_inputs(Workdir(tmp_path / "run"))
    with caplog.at_level(logging.WARNING, "absl"):
        tables = pairs_of(tiny.start(tmp_path / "run", config)).tables
    assert "8 training records are left out: they share what is split by with held-out ones" in caplog.text
    assert [example.user_id for example in tables["heldout"].examples] == [line["user_id"] for line in tested]
    assert all(example.where.startswith("held-out records.jsonl") for example in tables["heldout"].examples)
    prompts = {name: {example.prompt for example in table.examples} for name, table in tables.items()}
    assert len(tables["train"]) == 40 and not prompts["train"] & prompts["heldout"]


def test_a_new_person_has_records_of_both_sources(records, tmp_path):
    lines = [json.loads(line) for line in pathlib.Path(records().preference.data.path).read_text().splitlines()]
    lines = [{**line, "held_out": "a column of one's own"} for line in lines]
    paths = [tiny_users.write_records(tmp_path / f"{i}.jsonl", part) for i, part in enumerate((lines[:36], lines[36:]))]
    heldout = {"kind": "jsonl", "path": paths[1]}
    config = records(
        preference__data__path=paths[0], preference__heldout_data=heldout, preference__new_user_fraction=0.5
    )
    tables = pairs_of(tiny.start(tmp_path / "run", config)).tables
    counts = collections.Counter(example.held_out for example in tables["new_users"].examples)
    assert counts == {False: 18, True: 6} and len(tables["train"]) == 18 and len(tables["heldout"]) == 6
    assert {e.extra["held_out"] for table in tables.values() for e in table.examples} == {"a column of one's own"}


@pytest.mark.parametrize("section", ["preference", "reward"])
def test_pairs_of_the_run_itself_have_their_own_held_out_part(section):
    config = tiny_users.settings() if section == "preference" else tiny.settings()
    with config.ignore_type():
        config[section].heldout_data = {"kind": "jsonl", "path": "test.jsonl"}
    with pytest.raises(UserError, match=rf"{section}.heldout_data: data='\w+' has its own held-out part; give data a"):
        stages.read(config)


def test_a_held_out_source_that_is_not_there_is_named(records, tmp_path):
    config = records(preference__heldout_data={"kind": "jsonl", "path": str(tmp_path / "none.jsonl")})
    with pytest.raises(UserError, match=r"none\.jsonl: no such file.*preference\.heldout_data\.path"):
        stages.read(config).check_inputs(Workdir(tmp_path / "run"))


def test_own_records_are_split_by_prompt(records, tmp_path):
    pairs = pairs_of(tiny.start(tmp_path / "run", records()))
    prompts = {name: {example.prompt for example in table.examples} for name, table in pairs.tables.items()}
    assert set(prompts) == {"train", "heldout"} and not prompts["train"] & prompts["heldout"]
    assert len(prompts["train"]) == 19 and len(prompts["heldout"]) == 5
    assert len(pairs.tables["train"]) == 38 and pairs.registry.to_json() == [None, "ann", "bob"]


def test_records_without_a_user_are_refused(records, tmp_path):
    path = tmp_path / "records.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    held = pairs_of(tiny.start(tmp_path / "run", records())).tables["heldout"].examples[0].prompt
    for nobody in ({line["prompt"] for line in lines}, {held}):
        changed = [{**line, "user_id": None} if line["prompt"] in nobody else line for line in lines]
        tiny_users.write_records(path, changed)
        with pytest.raises(UserError, match=r"records.jsonl line .*: no user_id; give every record one"):
            pairs_of(tiny.start(tmp_path / "run", records()))


@pytest.mark.parametrize("most", [1, 7, 20, 10**6])
def test_a_sample_of_the_pairs_has_whole_prompts(records, tmp_path, most):
    run = tiny.start(tmp_path / "run", records())
    settings = run.section(PreferenceSettings)
    whole, some = (tables_of(run, settings.replace(max_pairs=count, max_heldout_pairs=count)) for count in (0, most))
    for part in ("train", "heldout"):
        sizes = collections.Counter(str(example.prompt) for example in whole[part].examples)
        kept = collections.Counter(str(example.prompt) for example in some[part].examples)
        assert all(sizes[prompt] == count for prompt, count in kept.items())
        assert len(some[part]) <= max(most, max(sizes.values())) and len(kept) >= 1
        order = [whole[part].examples.index(example) for example in some[part].examples]
        assert order == sorted(order)
        if most >= len(whole[part]):
            assert len(some[part]) == len(whole[part])
        elif most > max(sizes.values()):
            assert len(some[part]) > most - max(sizes.values())


def test_a_reward_model_has_no_reference(records, tmp_path):
    run = tiny.start(tmp_path / "run", records())
    run.reference = lambda table, rows: pytest.fail("the reference is not needed")
    pairs = pairs_of(run)
    entry = entry_of(run, "individualized", head="reward")
    method = Preference(entry, pairs, run.devices, run.workspace.backbone, run.streams)
    batch = method.collate("train", pairs.users("train"), [pairs.tables["train"][i] for i in range(8)])
    assert not batch.reference.any() and batch.reference.shape == (8, 2)


def test_a_split_by_pair_keeps_a_pair_on_one_side(records, tmp_path):
    pairs = pairs_of(tiny.start(tmp_path / "run", records(preference__split="pair")))
    # ann and bob judge the same pair in opposite ways: it is one pair all the same.
    keys = {name: {(e.prompt, *sorted((e.chosen, e.rejected))) for e in t.examples} for name, t in pairs.tables.items()}
    assert not keys["train"] & keys["heldout"]
    assert {name: len(table) for name, table in pairs.tables.items()} == {"train": 38, "heldout": 10}


def test_people_who_are_kept_out_are_met_as_new(records, tmp_path):
    run = tiny.start(tmp_path / "run", records(preference__new_user_fraction=0.5))
    pairs = pairs_of(run)
    who = {name: {example.user_id for example in table.examples} for name, table in pairs.tables.items()}
    assert len(who["new_users"]) == 1 and who["train"] == who["heldout"] == {"ann", "bob"} - who["new_users"]
    # Their comparisons of prompts that were trained on may be used to get to know them, the others to test it.
    prompts = {name: {example.prompt for example in table.examples} for name, table in pairs.tables.items()}
    for example in pairs.tables["new_users"].examples:
        assert example.prompt in prompts["heldout" if example.held_out else "train"]
    assert not pairs.users("new_users").any()


def test_entries_may_differ_in_their_objective(records, tmp_path):
    models = {"one": {"kind": "individualized", "tokens": 2, "alpha": 0.9, "loss": "ipo", "beta": 0.3}}
    run = tiny.start(tmp_path / "run", records(preference__models=models | {"two": {"kind": "uniform"}}))
    one, two = (entry_of(run, name).objective for name in ("one", "two"))
    assert (one.alpha, one.loss, one.beta, one.mixture) == (0.9, "ipo", 0.3, "exact")
    assert two == PreferenceConfig()


# ---- reward models


REWARD = {"mine": {"kind": "individualized", "tokens": 2, "head": "reward"}}


@pytest.mark.slow
def test_the_reward_loss_is_that_of_the_paper(records, tmp_path):
    run = tiny.start(tmp_path / "run", records(preference__models=REWARD, preference__alpha=0.3))
    pairs = pairs_of(run)
    method = method_of(run, "mine", pairs)
    leaves, treedef = jax.tree.flatten(method.init().trainable)
    rng = np.random.default_rng(0)
    trainable = treedef.unflatten([x + 0.3 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves])
    batch = method.collate("train", pairs.users("train"), [pairs.tables["train"][i] for i in range(8)])
    state, metrics = method.step(method.init().replace(trainable=jax.tree.map(jnp.copy, trainable)), batch)

    def gaps(users):
        rewards = answer_scores(method.backbone, method.users, trainable, batch.replace(users=users))
        return np.asarray(rewards[0] - rewards[1], np.float64)

    # alpha of the users' Bradley-Terry loss and 1 - alpha of the generic user's, without beta and without a reference.
    own, generic = (np.log1p(np.exp(-gaps(users))).mean() for users in (batch.users, 0 * batch.users))
    loss = metrics["loss"][0] / metrics["loss"][1]
    assert abs(own - generic) > 1e-3 and loss == pytest.approx(0.3 * own + 0.7 * generic, rel=1e-5)
    # Head, adapters and users learn in the first step.
    for name in ("heads", "bank", "users"):
        assert tiny.bits(state.trainable[name]) != tiny.bits(trainable[name]), name


@pytest.mark.slow
def test_a_reward_model_knows_people_apart(records, tmp_path):
    run = tiny.start(tmp_path / "run", records(preference__models=REWARD, preference__steps=40, preference__alpha=0.5))
    rate = {"learning_rate": 3e-2}
    run.sections[PreferenceSettings] = run.section(PreferenceSettings).replace(optimizer=rate, user_optimizer=rate)
    preference.run(run)
    trained = trained_of(run, "mine", pairs_of(run))
    own = trained.margins("heldout", trained.pairs.users("heldout"))
    assert (own > 0).mean() == 1, "ann and bob want opposite answers"
    generic = trained.margins("heldout", np.zeros(len(own), np.int32))
    assert (generic > 0).mean() == 0.5


# ---- an adapter for each person, the baseline


@pytest.mark.slow
def test_an_adapter_of_their_own_learns_from_nobody_else(records, tmp_path):
    models = {"pooled": {"kind": "uniform"}, "own": {"kind": "adapters"}}
    run = tiny.start(tmp_path / "run", records(preference__models=models, preference__alpha=1.0))
    pairs = pairs_of(run)
    rows = [pairs.tables["train"][i] for i in np.flatnonzero(pairs.users("train") == 1)[:8]]
    one, own = (method_of(run, name, pairs) for name in models)
    start = rows_of(own.init().trainable["bank"])
    (pooled, _), (found, _) = (method.step(method.init(), batch_of(pairs, rows)) for method in (one, own))
    leaves = (jax.tree.leaves(tree) for tree in (found.trainable["bank"], pooled.trainable["bank"], start))
    for got, want, before in zip(*leaves, strict=True):
        assert len(got) == 3  # the generic user, ann and bob
        np.testing.assert_allclose(got[1], want[0], rtol=1e-4, atol=1e-6)  # as if there were nobody else
        for other in (0, 2):
            assert np.asarray(got[other]).tobytes() == before[other].tobytes()
    table = found.trainable["users"]["table"]["adapter"]
    np.testing.assert_array_equal(table, np.eye(3))


@pytest.mark.slow
def test_adapters_of_their_own_are_kept_and_not_served(records, tmp_path):
    models = {"own": {"kind": "adapters"}}
    run = tiny.start(tmp_path / "run", records(preference__models=models, preference__steps=2))
    preference.run(run)
    assert not (run.workdir.path / "preference" / "own" / "ingredient").exists()
    trained = trained_of(run, "own", pairs_of(run))
    margins = [trained.margins("heldout", np.full(len(trained.pairs.tables["heldout"]), row)) for row in range(3)]
    assert all((x != y).any() for x, y in itertools.combinations(margins, 2))
    with pytest.raises(UserError, match="has an adapter for each person, a baseline that is not served; name another"):
        opening._person(run.workdir.path, run.workdir.path / "preference/own/model.safetensors", {}, None)


# ---- what people say about themselves


@pytest.fixture
def told(records, tmp_path):
    """The records of `records` with one word about ann, another about bob."""
    path = tmp_path / "records.jsonl"

    def settings(**changes):
        config = records(**changes)
        words = {"ann": "shine", "bob": "melt"}
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        tiny_users.write_records(path, [{**line, "user_text": words[line["user_id"]]} for line in lines])
        return config

    return settings


def test_text_of_a_user_stands_before_the_prompt(told, tmp_path):
    run = tiny.start(tmp_path / "run", told())
    plain, pairs = pairs_of(run), pairs_of(run, user_text=True)
    for part in ("train", "heldout"):
        assert len(plain.tables[part]) == len(pairs.tables[part])
        for after, before in zip(pairs.tables[part].examples, plain.tables[part].examples, strict=True):
            assert after.prompt == f"{after.user_text}\n{before.prompt}"
            assert (after.chosen, after.user_id) == (before.chosen, before.user_id)
    # It is text: the reference reads it too, and it is no part of what is scored.
    assert np.abs(plain.reference["train"] - pairs.reference["train"]).min() > 1e-6
    batch = batch_of(pairs, [pairs.tables["train"][0]])
    assert batch.counts.tolist() == [[len(plain.tables["train"][0][side]) for side in ("chosen", "rejected")]]


def test_texts_under_wrong_names_are_a_control_of_training(told, tmp_path):
    run = tiny.start(tmp_path / "run", told())
    own, permuted = pairs_of(run, user_text=True), pairs_of(run, user_text=True, permuted_text=True)
    prompts = {name: [e.prompt for e in made.tables["train"].examples] for name, made in (("a", own), ("b", permuted))}
    assert 0.2 < np.mean([a != b for a, b in zip(prompts["a"], prompts["b"], strict=True)]) < 0.8
    words = [[prompt.split("\n")[0] for prompt in part] for part in prompts.values()]
    assert sorted(words[0]) == sorted(words[1]), "as many of each text"
    held = own.tables["heldout"].examples
    assert [e.prompt for e in held] == [e.prompt for e in permuted.tables["heldout"].examples]
    others = tables_of(run, run.section(PreferenceSettings), user_text=True, others_text=True)["heldout"].examples
    for e, other in zip(held, others, strict=True):
        (somebody_else,) = {one.user_text for one in held} - {e.user_text}
        assert other.prompt == str(e.prompt).replace(str(e.user_text), str(somebody_else))


def test_text_in_a_conversation_stands_in_the_message_to_answer():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert with_text(turns, "I am ann.") == [*turns[:2], {"role": "user", "content": "I am ann.\nc"}]
    assert turns[2]["content"] == "c"


@pytest.mark.slow
def test_a_text_alone_tells_people_apart(told, tmp_path):
    models = {"text": {"kind": "uniform", "user_text": True}, "pooled": {"kind": "uniform"}}
    config = told(preference__models=models, preference__steps=60)
    config.preference.optimizer.learning_rate = 3e-2
    run = tiny.start(tmp_path / "run", config)
    preference.run(run)
    shares = {}
    for name in models:
        trained = trained_of(run, name, pairs_of(run, user_text=name == "text"))
        margins = trained.margins("heldout", trained.pairs.users("heldout"))
        shares[name] = (margins > 0).mean()
    assert shares == {"text": 1.0, "pooled": 0.5}


def test_comparisons_of_a_person_stand_before_the_prompt(records, tmp_path):
    run = tiny.start(tmp_path / "run", records(data__max_prompt=32))
    short = History(count=1, writer=FewShot(template="{prompt} {chosen} {rejected}"))
    answer = History(count=1, writer=Answers(template="{chosen}"), permuted=True)
    plain, pairs, wrong = (pairs_of(run, history=h) for h in (None, short, answer))
    known = {"ann": " ".join(ANSWERS), "bob": " ".join(ANSWERS[::-1])}
    trained = {example.prompt for example in plain.tables["train"].examples}
    for part in ("train", "heldout"):
        for before, told in zip(plain.tables[part].examples, pairs.tables[part].examples, strict=True):
            past, asked = told.prompt.split("\n")
            request = past.removesuffix(f" {known[told.user_id]}")
            assert asked == before.prompt and request in trained and request != asked
    preferred = {"ann": ANSWERS[0], "bob": ANSWERS[1]}
    own = [one.prompt.split("\n")[0] == preferred[one.user_id] for one in wrong.tables["train"].examples]
    assert 0.2 < np.mean(own) < 0.8, "the control has the comparisons of anybody"
    own = [one.prompt.split("\n")[0] == preferred[one.user_id] for one in wrong.tables["heldout"].examples]
    assert all(own)
    assert EntrySettings(history=1, permuted=True).trained_texts["history"].permuted
    assert not EntrySettings(history=1, permuted=True).texts["history"].permuted


def test_records_without_text(records, tmp_path):
    with pytest.raises(UserError, match=r"records.jsonl line .*: no user_text; give every record one, or set"):
        pairs_of(tiny.start(tmp_path / "run", records()), user_text=True)


# ---- losses and mistakes


def unigrams(backbone, users, trainable, batch, *_):
    """In place of the decoder, a policy that draws words at random, to compile a step in little time."""
    vector = trainable["bank"]["layers"]["mlp"]["down"]["b"].sum((0, 1, 2))
    logps = jax.nn.log_softmax(backbone.base["embed"]["embedding"] @ vector)
    sums = jnp.zeros(batch.rows.answers).at[batch.rows.answer].add(logps[batch.rows.targets], mode="drop")
    return sums.reshape(-1, 2).T


def test_the_reward_shift_of_bco_is_the_mean_of_all_rewards_so_far(records, tmp_path, monkeypatch):
    monkeypatch.setattr(pdpo_objective, "answer_scores", unigrams)
    changes = {"preference__models": {"pooled": {"kind": "uniform"}}, "preference__loss": "bco_pair"}
    run = tiny.start(tmp_path / "run", records(**changes))
    pairs = pairs_of(run)
    method = method_of(run, "pooled", pairs)
    state, seen = method.init(), []
    for i in (0, 8):
        batch = batch_of(pairs, [pairs.tables["train"][i + k] for k in range(8)])
        scores = np.asarray(unigrams(method.backbone, None, state.trainable, batch))
        state, metrics = method.step(state, batch)
        rewards = 0.1 * (scores - batch.reference.T)
        seen.append(rewards)
        shift = np.mean(seen)
        assert abs(shift) > 1e-2
        np.testing.assert_allclose(state.extra["shift"], [np.sum(seen), np.size(seen)], rtol=1e-4)
        total, count = metrics["rewards/shift"]
        assert total / count == pytest.approx(shift, rel=1e-4)
        want = np.log1p(np.exp(shift - rewards[0])) + np.log1p(np.exp(rewards[1] - shift))
        assert metrics["loss"][0] / metrics["loss"][1] == pytest.approx(want.mean(), rel=1e-4)


@pytest.mark.slow
def test_every_loss_trains(records, tmp_path, monkeypatch):
    monkeypatch.setattr(pdpo_objective, "answer_scores", unigrams)
    run = tiny.start(tmp_path / "run", records(preference__models={"pooled": {"kind": "uniform"}}))
    pairs = pairs_of(run)
    given = run.section(PreferenceSettings).replace(optimizer={"name": "sgd", "learning_rate": 0.3})
    batch = batch_of(pairs, [pairs.tables["train"][i] for i in range(0, 16, 2)])  # ann's
    for kind in PAIRWISE:
        run.sections[PreferenceSettings] = given.replace(loss=kind)
        method = method_of(run, "pooled", pairs)
        state, margins, found = method.init(), [], []
        for _ in range(3):
            state, metrics = method.step(state, batch)
            found.append(float(metrics["loss"][0]))
            margins.append(float(metrics["rewards/margins"][0]))
        assert found[2] < found[0] and margins[2] > margins[0], kind


MISTAKES = [
    ({"loss": "sigmoyd"}, "preference.loss: 'sigmoyd' is unknown; did you mean 'sigmoid'"),
    ({"mixture": "both"}, "preference.mixture: 'both' is unknown; choose one of exact, dropout"),
    ({"alpha": 1.5}, "preference.alpha: 1.5 is out of range; choose a number at least 0 and at most 1"),
    ({"loss": "ipo", "label_smoothing": 0.1}, "preference.label_smoothing: loss 'ipo' has none; set it to 0"),
    ({"models": {"mine": {"kind": "own"}}}, "preference.models.mine.kind: 'own' is unknown; choose one of uniform,"),
    ({"models": {"mine": {"kind": "cluster", "cluster": 2}}}, "did you mean preference.models.mine.clusters?"),
    ({"new_user_fraction": 1.5}, "preference.new_user_fraction: 1.5 is out of range"),
    ({"split": "user"}, "preference.split: 'user' is unknown; choose one of prompt, pair"),
    ({"head": "scalar"}, "preference.head: 'scalar' is unknown; choose one of policy, reward"),
    (
        {"models": {"mine": {"kind": "uniform", "head": "reward", "loss": "ipo"}}},
        "preference.models.mine.head: 'reward' with loss 'ipo' and sft_weight 0.0 needs a policy; choose from sigmoid",
    ),
    ({"models": {"mine": {"kind": "soup"}}}, "preference.bank: entry 'mine' mixes policies; name the bank.safetensors"),
    ({"batch_size": 100}, "preference.batch_size: a batch takes 100 pairs, and there are only 38 to train on"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[str(list(x.values())[-1]) for x, _ in MISTAKES])
def test_mistakes_are_named(records, tmp_path, changes, message):
    changes = {f"preference__{key}": value for key, value in changes.items()}
    with pytest.raises(UserError, match=message) as caught:
        preference.run(tiny.start(tmp_path / "run", records(**changes)))
    assert "\n" not in str(caught.value)


# ---- soups with learned weights


@pytest.fixture
def opposites(records, tmp_path):
    """A run on a bank of two policies, the first trained for ann and the second for bob."""
    run = tiny.start(
        tmp_path / "bank", records(preference__models={"pooled": {"kind": "uniform"}}, preference__steps=12)
    )
    run.sections[PreferenceSettings] = run.section(PreferenceSettings).replace(optimizer={"learning_rate": 3e-2})
    pairs = pairs_of(run)
    users, banks = pairs.users("train"), []
    method = method_of(run, "pooled", pairs)
    for user in (1, 2):
        rows = [pairs.tables["train"][i] for i in np.flatnonzero(users == user)[:8]]
        state = method.init()
        for _ in range(12):
            state, metrics = method.step(state, batch_of(pairs, rows))
        assert metrics["rewards/accuracies"][0] == 8
        banks.append(state.trainable["bank"])
    path = tmp_path / "bank.safetensors"
    save_tree(path, jax.tree.map(lambda *x: jnp.concatenate(x), *banks), run.workspace.provenance)
    changes = {"preference__bank": str(path), "preference__models": {"soup": {"kind": "soup"}}}
    return functools.partial(records, preference__steps=30, **changes), path


@pytest.mark.slow
def test_soup_weights_find_the_right_policy(opposites, tmp_path):
    settings, path = opposites
    config = settings(preference__user_optimizer__learning_rate=0.2)
    run = tiny.start(tmp_path / "soup", config)
    preference.run(run)
    bank, _ = load_tree(path)
    found, registry = pdpo_entries.load(run, entry_of(run, "soup"))
    assert registry.to_json() == [None, "ann", "bob"]
    assert tiny.bits(found["bank"]) == tiny.bits(bank), "the policies are given, not trained"
    assert list(found["users"]) == ["table"]
    weights = jax.nn.softmax(found["users"]["table"]["weights"])
    assert weights[1, 0] > 0.8 and weights[2, 1] > 0.8
    assert abs(weights[0, 0] - 0.5) < 0.2, "the generic user hears both"
    method = method_of(run, "soup", pairs_of(run), start={"bank": pdpo_entries.soup_bank(run)})
    assert list(method.init().trainable) == ["users"]


def test_the_bank_of_the_same_run(opposites, tmp_path):
    settings, path = opposites
    run = tiny.start(tmp_path / "run", settings(preference__bank="policy"))
    with pytest.raises(UserError, match=r"run/policy/bank.safetensors: there is no such file"):
        preference.run(run)
    shutil.copy(path, run.workdir.stage("policy"))
    assert tiny.bits(pdpo_entries.soup_bank(run)) == tiny.bits(load_tree(path)[0])


def test_a_bank_must_fit(opposites, tmp_path):
    settings, path = opposites
    run = tiny.start(tmp_path / "run", settings(adapter__alpha=8.0))
    with pytest.raises(UserError, match=r"bank.safetensors: was trained with alpha: 4.0, here 8.0; use the base and"):
        preference.run(run)
    bank, note = load_tree(path)
    save_tree(path, bank, {**note, "base": "0" * 16})
    with pytest.raises(UserError, match=r"bank.safetensors: was trained with base: '0000000000000000', here '"):
        preference.run(tiny.start(tmp_path / "run", settings()))
    save_tree(path, {"embed": {"embedding": np.zeros((2, 4, 4), np.float32)}})
    with pytest.raises(UserError, match=r"bank.safetensors: holds full parameters"):
        preference.run(tiny.start(tmp_path / "run", settings()))
    path.unlink()
    with pytest.raises(UserError, match=r"bank.safetensors: there is no such file"):
        preference.run(tiny.start(tmp_path / "run", settings()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"steps": 8, "warmup": 5},
            "optimizer.warmup_steps: 5 leaves none of the 4 updates before models.cluster.warm_start=0.5 of 8 steps; "
            "make it at most 3",
        ),
        ({"steps": 8, "warmup": 3}, ""),
        ({"steps": 8, "warmup": 5, "models": {"pooled": {"kind": "uniform"}}}, ""),
        (
            {"steps": 5, "warmup": 5, "models": {"pooled": {"kind": "uniform"}}},
            "optimizer.warmup_steps: 5 leaves none of the 5 updates; make it at most 4",
        ),
    ],
)
def test_a_warm_up_that_is_too_long_names_the_part_that_it_fills(changes, message):
    warmup = changes.pop("warmup")
    make = functools.partial(PreferenceSettings, optimizer=OptimizerSettings(warmup_steps=warmup), **changes)
    if not message:
        make()
        return
    with pytest.raises(UserError) as refused:
        make()
    assert str(refused.value) == message


def test_a_warm_up_that_does_not_fit_is_refused_before_anything_is_scored(people, monkeypatch):
    config = tiny_users.settings()
    config.preference.update({"epochs": 1.0})
    config.preference.optimizer.warmup_steps = 10**6
    run = tiny.start(people, config)
    monkeypatch.setattr(run, "reference", lambda *_: pytest.fail("scored"))
    with pytest.raises(UserError, match=r"preference\.optimizer\.warmup_steps: 1000000 leaves none of the"):
        preference.run(run)


def test_a_warm_up_is_compared_with_the_updates_of_epochs():
    settings = PreferenceSettings(epochs=0.5, steps=1, optimizer=OptimizerSettings(warmup_steps=5))
    told = "preference.optimizer.warmup_steps: 5 leaves none of the 5 updates before .* of epochs=0.5 over 80 rows"
    with pytest.raises(UserError, match=told):
        settings.check_steps(10, "preference.", passes(0.5, 80, 4))


def test_the_entries_are_announced_in_order_with_their_steps():
    models = {
        "cluster": {"kind": "cluster", "tokens": 4, "clusters": 2, "warm_start": 0.5},
        "pooled": {"kind": "uniform"},
    }
    told = "cluster (80 steps, the first 40 as cluster/individualized), pooled (80 steps)"
    assert preference.announced(PreferenceSettings(models=models, steps=80)) == told
    told = "cluster (epochs=2), pooled (epochs=2)"
    assert preference.announced(PreferenceSettings(models=models, epochs=2.0)) == told
