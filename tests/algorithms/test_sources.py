"""Policies trained on rewards from the host."""

import jax
import numpy as np
import pytest
from support import tiny

from pjrlhf.algorithms import policy, reward
from pjrlhf.models.storage import load_tree
from pjrlhf.pipeline import stages
from pjrlhf.rollout.experience import raw_rewards
from pjrlhf.training.workdir import Workdir

MODULE = "support.toy_extensions"


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def method_of(folder, rewards):
    """The method of a run whose objectives have `rewards`, with the reward models of another run."""
    run = tiny.start(folder, tiny.settings(rewards=rewards))
    found = load_tree(folder / "reward" / "model.safetensors")[0]
    if learned := [run.audience.rewards.index(name) for name in run.audience.learned]:
        found |= jax.tree.map(lambda x: x[np.array(learned)], {name: found[name] for name in ("bank", "heads")})
        numbers = np.full(len(run.audience.rewards), -1, np.int32)
        numbers[learned] = range(len(learned))
    else:
        found, numbers = {name: found[name] for name in reward.SCALE}, np.full(len(run.audience.rewards), -1, np.int32)
    if run.audience.sources:
        found["models"] = numbers
    return policy.method_of(run, rewarder=found)


@pytest.mark.parametrize("sources", [("P2A",), tiny.REWARDS], ids=["one", "all"])
def test_a_source_that_gives_the_rewards_of_a_model_trains_as_the_model(finished, sources):
    """The same states and metrics after two steps."""
    known = method_of(finished, {})
    asked = method_of(finished, dict.fromkeys(sources, f"{MODULE}:brevity"))

    def raw(batch, rollout):
        """What the models say about responses [K n, N], where a source is to say it."""
        K = known.K
        batch, rollout = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch), rollout
        objectives = np.arange(K)[:, None]
        pairs = (batch.reward_prompts.tokens, rollout.tokens), (batch.reward_prompts.valid, rollout.valid)
        tokens, valid = (np.concatenate(pair, axis=1) for pair in pairs)
        found = np.array(raw_rewards(known.backbone, known.rewarder, objectives, tokens, valid))
        own = [name in sources for name in tiny.REWARDS]
        return np.where(np.repeat(own, len(found) // K)[:, None], found, np.nan)

    asked.host_rewards = raw
    states = [known.init(), asked.init()]
    close(tiny.bits(states[0].trainable) == tiny.bits(states[1].trainable), True)
    for _ in range(2):
        found = [method.step(state, next(method.batches)) for method, state in zip((known, asked), states, strict=True)]
        states, metrics = zip(*found, strict=True)
        close(states[0].trainable, states[1].trainable)
        close(metrics[0], {name: metrics[1][name] for name in metrics[0]})
        for name in sources:
            silent, count = metrics[1][f"rewards/{name}/none"]
            assert silent.sum() == 0 and count.sum() == 4


def test_a_run_mixes_sources_and_reward_models(copied):
    config = tiny.settings(
        rewards={"P2A": f"{MODULE}:brevity", "P1B": {"kind": "scorer", "scorer": "words:the,a"}},
        stages=("sft", "comparisons", "reward", "policy"),
    )
    for stage in ("comparisons", "reward", "policy"):
        (copied / stage).rename(copied / f"old_{stage}")
    (copied / "config.json").unlink()  # of another config
    with tiny.one_device():
        stages.run(config, Workdir(copied))
    run = tiny.start(copied, config)
    labelled = {example.objective for example in reward.comparisons(run).examples}
    assert labelled == set(tiny.REWARDS) - {"P2A", "P1B"}
    models = run.workdir.finished("reward")["models"]
    assert "accuracy" in models["P2B"] and "accuracy" not in models["P2A"] and models["P2A"]["mean"] < -1
    found = reward.load(run)
    assert found["heads"]["bias"].shape[0] == 3 and found["models"].tolist() == [0, -1, -1, 1, 2]
    last = tiny.lines(copied, "policy")[-1]
    assert 0 <= last["rewards/P2A/none/P2A"] < 1 and last["rewards/seconds"] >= 0
    assert np.isfinite([value for value in last.values() if isinstance(value, float)]).all()


def test_rewards_of_sources_alone_need_no_comparisons(copied):
    config = tiny.settings(
        rewards=dict.fromkeys(tiny.REWARDS, f"{MODULE}:brevity"),
        stages=("sft", "reward", "policy"),
        policy__scale="raw",
    )
    for stage in ("comparisons", "reward", "policy"):
        (copied / stage).rename(copied / f"old_{stage}")
    (copied / "config.json").unlink()  # of another config
    with tiny.one_device():
        stages.run(config, Workdir(copied))
    for line in tiny.lines(copied, "policy"):
        scores = [value for name, value in line.items() if name.startswith("objective/scores")]
        assert scores and max(scores) < 0 and min(scores) > -60  # characters of ten tokens
