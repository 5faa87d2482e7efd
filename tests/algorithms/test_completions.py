"""What policies show while they train: tables of their answers, and rewards on held-out prompts."""

import re
import shutil

import jax
import numpy as np
import pyarrow.parquet
import pytest
from support import tiny, tiny_users

from pjrlhf.algorithms import policy
from pjrlhf.pipeline import stages
from pjrlhf.training.loop import Interrupted
from pjrlhf.training.workdir import Workdir

MODULE = "support.toy_extensions"


@pytest.mark.parametrize("sources", [{}, {"P2A": f"{MODULE}:brevity"}], ids=["models", "sources"])
def test_a_table_shows_what_the_step_trains_on(copied, sources):
    """The same update with and without it; its rewards and answers are those of the step."""
    config = tiny.settings(rewards=sources)
    if sources:
        for name in ("reward", "policy", "comparisons"):
            (copied / name).rename(copied / f"old_{name}")
        (copied / "config.json").unlink()
        with tiny.one_device():
            stages.run(tiny.settings(rewards=sources, stages=("sft", "comparisons", "reward")), Workdir(copied))
    method = policy.method_of(tiny.start(copied, config))
    plain, batch = policy.method_of(tiny.start(copied, config)), next(method.batches)
    state, metrics, rows = method.step_with_rows(method.init(), batch)
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
    assert metrics.keys() >= {"objective/kl"} and method._show is None


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

    step, calls = policy.Policy.step, []

    def stopping(self, state, batch):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted("", 15)
        return step(self, state, batch)

    with monkeypatch.context() as patch, tiny.one_device():
        patch.setattr(policy.Policy, "step", stopping)
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
    config = tiny.settings(eval_every=1, policy__eval_prompts=6)
    method = policy.method_of(tiny.start(finished, config))
    state, kept = method.init(), min(6, len(method.heldout))
    assert kept % config.policy.rollouts, "the last batch is not full"
    first = method.evaluate(state)
    assert method.evaluate(state) == first
    run = tiny.start(finished, config)
    assert set(method.heldout.requests) == set(run.records.requests[1])
    assert not set(method.heldout.requests) & set(method.data.requests)
    seen = []
    inspect = method._inspect

    def counted(*arguments):
        found = inspect(*arguments)
        seen.append(jax.device_get(found[0]))
        return found

    method._inspect = counted
    method.evaluate(state)
    scores = np.concatenate([part.reshape(method.K, -1) for part in seen], axis=1)[:, :kept]
    values = [first[f"rewards/{name}"] for name in method.targets.policies]
    np.testing.assert_allclose(scores.mean(1), values, rtol=1e-5)


def test_user_models_show_held_out_pairs(people):
    """With the margins that the report would have after that step."""
    run = tiny.start(people, tiny_users.settings())
    pairs = tiny_users.pairs_of(run)
    method, plain = (tiny_users.method_of(run, "individualized", pairs) for _ in range(2))
    batch = next(method.batches)
    state, _, rows = method.step_with_rows(method.init(), batch)
    other, _ = plain.step(plain.init(), batch)
    assert tiny.bits(state.trainable) == tiny.bits(other.trainable)
    examples = pairs.tables["heldout"].examples
    assert [row["user"] for row in rows] == [e.user_id for e in examples[: len(rows)]] and len(rows) > 4
    margins = method._margins(state.trainable, "heldout", pairs.users("heldout"))
    np.testing.assert_allclose([row["margin"] for row in rows], margins[: len(rows)], rtol=1e-5, atol=1e-6)
    assert method.evaluate(state)["accuracy"] == np.mean(margins > 0)
