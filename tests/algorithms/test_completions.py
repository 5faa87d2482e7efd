"""What policies show while they train: tables of their answers, and rewards on held-out prompts."""

import re
import shutil

import jax
import numpy as np
import pyarrow.parquet
import pytest
from support import tiny, tiny_users

from pjrlhf.algorithms import modpo, pdpo, policy, policy_step, reward, ric, sft
from pjrlhf.models.huggingface import load_params
from pjrlhf.pipeline import stages
from pjrlhf.rollout import experience
from pjrlhf.training.completions import spread
from pjrlhf.training.loop import Interrupted
from pjrlhf.training.workdir import Workdir

MODULE = "support.toy_extensions"


SOURCE = pytest.param({"P2A": f"{MODULE}:brevity"}, marks=pytest.mark.slow, id="sources")


@pytest.mark.parametrize("sources", [pytest.param({}, id="models"), SOURCE])
def test_a_table_shows_what_the_step_trains_on(copied, monkeypatch, sources):
    """The same update with and without it, sampled once; its rewards and answers are those of the step."""
    sampled = []
    monkeypatch.setattr(policy_step, "sample", lambda *a, **k: sampled.append(1) or experience.sample(*a, **k))
    config = tiny.settings(rewards=sources)
    if sources:
        for name in ("reward", "policy", "comparisons"):
            (copied / name).rename(copied / f"old_{name}")
        (copied / "config.json").unlink()
        with tiny.one_device():
            stages.run(tiny.settings(rewards=sources, stages=("sft", "comparisons", "reward")), Workdir(copied))
    method = policy.method_of(tiny.start(copied, config))
    plain, batch = policy.method_of(tiny.start(copied, config)), next(method.batches)
    state, metrics, table = method.step_with_rows(method.init(), batch)
    rows = table()
    assert len(sampled) == 1, "one program samples"
    other, expected = plain.step(plain.init(), batch)
    assert tiny.bits(state.trainable) == tiny.bits(other.trainable)
    K, n, names = method.K, config.policy.rollouts, method.targets.policies
    assert len(rows) == K * n and [row["policy"] for row in rows[::n]] == list(method.targets.policies)
    scores = {name: [row[f"rewards/{name}"] for row in rows if row["policy"] == name] for name in names}
    assert all(row["weights"] == f"{row['policy']} 1" for row in rows)
    total, count = expected["objective/scores"]
    means = (np.asarray(total) / np.asarray(count)).tolist()
    assert [np.mean(scores[name]) for name in names] == pytest.approx(means, abs=1e-4)
    asked = {name for name in rows[0] if name.startswith("rewards/")}
    assert asked == {f"rewards/{name}" for name in names}
    assert all(row[f"rewards/{name}"] is None for row in rows for name in names if name != row["policy"])
    assert all(isinstance(row["prompt"], str) and row["prompt"] and np.isfinite(row["advantage"]) for row in rows)
    assert any(row["completion"] for row in rows)
    assert metrics.keys() >= {"objective/kl"}


@pytest.mark.slow
def test_a_run_leaves_tables_and_evaluates_and_resumes(copied, tmp_path, monkeypatch, capsys):
    """A stopped run ends with the same tables; nothing stands twice, and early ones are not written again."""
    config = tiny.settings(
        stages=("sft", "comparisons", "reward", "policy"),
        policy__steps=4,
        policy__eval_prompts=5,
        eval_every=2,
        log_completions=1,
        num_completions_to_print=1,
    )
    (copied / "policy").rename(copied / "old_policy")
    (copied / "config.json").unlink()
    other = shutil.copytree(copied, tmp_path / "stopped")
    with tiny.one_device():
        stages.run(config, Workdir(copied))
    out = capsys.readouterr().out
    assert re.search(r"policy, step 4: 1 of \d+ rows\npolicy P1A  weights P1A 1  rewards/P1A ", out)
    files = sorted((copied / "completions").iterdir())
    assert [file.name for file in files] == [f"policy-{step}.parquet" for step in (1, 2, 3, 4)]
    tables = {file.name: pyarrow.parquet.read_table(file).to_pylist() for file in files}
    assert {row["step"] for row in tables["policy-3.parquet"]} == {3}
    evaluated = [line for line in tiny.lines(copied, "policy") if "eval/rewards/P1A" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert {f"eval/rewards/{name}" for name in tiny.REWARDS} | {"eval/length"} <= {*evaluated[0]}

    step, calls = policy.Policy.step_with_rows, []

    def stopping(self, state, batch):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted("", 15)
        return step(self, state, batch)

    with monkeypatch.context() as patch, tiny.one_device():
        patch.setattr(policy.Policy, "step_with_rows", stopping)
        config.checkpoint_every = 2
        with pytest.raises(Interrupted):
            stages.run(config, Workdir(other))
    assert len(list((other / "completions").iterdir())) == 3, "one of them after the checkpoint"
    early = {path: path.stat().st_mtime_ns for path in (other / "completions").glob("policy-[12].parquet")}
    with tiny.one_device():
        stages.run(config, Workdir(other))
    assert {path: path.stat().st_mtime_ns for path in early} == early
    assert {p.name: pyarrow.parquet.read_table(p).to_pylist() for p in (other / "completions").iterdir()} == tables
    again = [line for line in tiny.lines(other, "policy") if "eval/rewards/P1A" in line]
    assert again == evaluated


def test_an_evaluation_is_of_all_prompts_and_the_same_twice(finished):
    """The last batch is filled, which does not count; every evaluation draws alike, and held-out prompts alone."""
    config = tiny.settings(eval_every=1, policy__eval_prompts=5)
    method = policy.method_of(tiny.start(finished, config))
    state, kept = method.init(), min(5 * len(method.targets.stated), len(method.heldout))
    assert kept % config.policy.rollouts, "the last batch is not full"
    first = method.evaluate(state)
    assert method.evaluate(state) == first
    run = tiny.start(finished, config)
    assert set(method.heldout.requests) == set(run.records.requests[1])
    assert not set(method.heldout.requests) & set(method.data.requests)
    seen = []
    judge = method._judge

    def counted(*arguments):
        found = judge(*arguments)
        seen.append(jax.device_get(found))
        return found

    method._judge = counted
    method.evaluate(state)
    scores = np.concatenate([part.reshape(method.K, -1) for part in seen], axis=1)[:, :kept]
    values = [first[f"rewards/{name}"] for name in method.targets.policies]
    np.testing.assert_allclose(scores.mean(1), values, rtol=1e-5)


def test_prompts_that_are_asked_in_two_ways_count_once(finished):
    """With `prompt_preference=half` every prompt is asked with and without its preferences stated."""
    config = tiny.settings(eval_every=1, policy__eval_prompts=5, prompt_preference="half")
    method = policy.method_of(tiny.start(finished, config))
    asked, collate = [], method.heldout.collate
    method.heldout.collate = lambda rows, samples: asked.append(rows) or collate(rows, samples)
    method.evaluate(method.init())
    size = config.policy.rollouts // config.policy.experience.samples_per_prompt
    rows = [row for part in asked for row in part][: 2 * 5]
    assert len(asked) == -(-2 * 5 // size)
    assert sorted(row.request for row in rows) == sorted(2 * list(range(5)))
    assert sum(row.prompts[0] != row.reward_prompt for row in rows) == 5


@pytest.mark.slow
def test_user_models_show_held_out_pairs(people):
    """With the margins that the report would have after that step, and what the policy answers that person."""
    run = tiny.start(people, tiny_users.settings(completion_prompts=6, temperature=0.0))
    pairs = tiny_users.pairs_of(run)
    shown = {"shown": 6, "answers": lambda users, numbers: pdpo.heldout_answers(run, pairs, users, numbers)}
    method, plain = (
        tiny_users.method_of(run, "individualized", pairs, **shown),
        tiny_users.method_of(run, "individualized", pairs),
    )
    batch = next(method.batches)
    state, _, table = method.step_with_rows(method.init(), batch)
    rows = table()
    other, _ = plain.step(plain.init(), batch)
    assert tiny.bits(state.trainable) == tiny.bits(other.trainable)
    examples = pairs.tables["heldout"].examples
    numbers = spread(len(examples), 6)
    assert [row["user"] for row in rows] == [examples[i].user_id for i in numbers] and len({*numbers}) == 6
    assert len({row["user"] for row in rows}) > 1, "of several people"
    margins = method._margins(state.trainable, "heldout", pairs.users("heldout"))
    np.testing.assert_allclose([row["margin"] for row in rows], margins[numbers], rtol=1e-5, atol=1e-6)
    assert method.evaluate(state)["accuracy"] == np.mean(margins > 0)
    assert [row["completion"] for row in method.rows(state)] == [row["completion"] for row in rows]
    # A person's tokens that change change what that person is answered.
    moved = jax.tree.map(lambda x: x + 3.0 * np.cos(np.arange(x.size)).reshape(x.shape), state.trainable["users"])
    after = method.rows(state.replace(trainable={**state.trainable, "users": moved}))
    assert any(one["completion"] != other["completion"] for one, other in zip(rows, after, strict=True))


def test_reward_models_show_held_out_pairs_with_their_rewards(finished):
    method = reward.method_of(tiny.start(finished, tiny.settings(completion_prompts=3)))
    state = method.init()
    rows, every = method.rows(state), method.heldout_rewards(state.trainable)
    assert {row["objective"] for row in rows} == set(tiny.REWARDS)
    for name, rewards in every.items():
        own = [row for row in rows if row["objective"] == name]
        numbers = spread(len(rewards), 3)
        found = [[row["rewards/chosen"], row["rewards/rejected"]] for row in own]
        np.testing.assert_allclose(found, rewards[numbers], rtol=1e-4, atol=1e-5)
        assert [row["chosen"] for row in own] == [method.heldout[name].examples[i].chosen for i in numbers]
        hits = float(np.mean(rewards[:, 0] > rewards[:, 1]))
        assert method.heldout_accuracy(state.trainable)[name]["accuracy"] == pytest.approx(hits)


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_base_in_training_answers_held_out_requests(finished, rank):
    """With the parameters in training, whether all are or an adapter is."""
    config = tiny.settings(completion_prompts=4, temperature=1e-4, sft__adapter__rank=rank)
    run = tiny.start(finished, config)
    method = sft.method_of(run)
    state = method.init()
    rows = method.rows(state)
    asked = [run.records.ask(request) for request in run.records.requests[1][:4]]
    decode = run.text.workspace.tokenizer.backend.decode
    assert [row["prompt"] for row in rows] == [decode(run.text.prompt_ids(prompt)) for prompt in asked]
    if not rank:  # the trained base answers as its stage evaluates it
        trained = load_params(run.workspace.base_folder, run.workspace.model_config)
        rows = method.rows(state.replace(trainable=trained))
        texts = run.sampler()("answers", asked, lambda i: run.streams.key("sft/completions", i))
        assert [row["completion"] for row in rows] == texts


@pytest.mark.slow
def test_modpo_and_ric_answer_held_out_requests(finished):
    """Every policy of MODPO by its adapter alone; RiC as its prompts ask."""
    config = tiny.settings(completion_prompts=3, temperature=1e-4)
    run = tiny.start(finished, config)
    method = modpo.method_of(run, run.section(modpo.ModpoSettings))
    bank = jax.tree.map(lambda x: x + 0.3 * np.cos(np.arange(x.size)).reshape(x.shape), method.init().trainable)
    rows = method.rows(method.init().replace(trainable=bank))
    names = method.data.policies
    assert [row["policy"] for row in rows] == [name for name in names for _ in range(3)]
    asked = [run.records.ask(request) for request in run.records.requests[1][:3]]
    for k, name in enumerate(names):
        mix = np.tile(np.eye(len(names), dtype=np.float32)[k], (3, 1))
        texts = run.sampler()("answers", asked, lambda i: run.streams.key("modpo/completions", i), bank, mix)
        assert [row["completion"] for row in rows if row["policy"] == name] == texts

    settings = run.section(ric.RicSettings)
    answers = ric.heldout_answers(run, settings)
    rows = answers(jax.tree.map(lambda x: x[:1], bank))
    assert [row["weights"] for row in rows] == [f"{name} 1" for name in run.audience.objectives[:3]]
    assert len({row["prompt"] for row in rows}) == 3
