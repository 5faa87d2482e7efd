"""Policies trained on rewards from the host."""

import json
import threading
import time

import jax
import numpy as np
import pytest
from support import tiny, toy_extensions

from pjrlhf.algorithms import policy, policy_host, reward, ric
from pjrlhf.data import synthetic
from pjrlhf.errors import UserError
from pjrlhf.models.storage import load_tree
from pjrlhf.pipeline import stages
from pjrlhf.rewards.sources import RewardSource
from pjrlhf.rollout.experience import raw_rewards
from pjrlhf.runtime.audience import Audience, HostRewards
from pjrlhf.training.workdir import Workdir

MODULE = "support.toy_extensions"
BREVITY = f"{MODULE}:brevity"


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def method_of(folder, rewards):
    """The method of a run whose objectives have `rewards`, with the reward models of another run."""
    run = tiny.start(folder, tiny.settings(rewards=rewards, stages=tiny.TRAINING))
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


@pytest.mark.slow
@pytest.mark.parametrize("sources", [("P2A",), tiny.REWARDS], ids=["one", "all"])
def test_a_source_that_gives_the_rewards_of_a_model_trains_as_the_model(finished, monkeypatch, sources):
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

    monkeypatch.setattr(policy_host, "ask", lambda data, *found: lambda: HostRewards(raw(*found), {}))
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
            assert metrics[1][f"rewards/{name}/seconds"][0] >= 0


@pytest.mark.slow
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
    for name in tiny.REWARDS:
        assert np.isfinite([last[f"rewards/{name}/{what}/{name}"] for what in ("mean", "std")]).all()
    assert last["rewards/P2A/seconds"] >= 0 and "rewards/P2B/seconds" not in last
    assert 0 <= last["rewards/P2A/none/P2A"] < 1 and last["rewards/seconds"] >= 0
    assert np.isfinite([value for value in last.values() if isinstance(value, float)]).all()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_source_is_asked_about_as_many_answers_as_are_told_before(finished):
    """Each policy asks about its own criterion; evaluations on held-out prompts count, too."""
    config = tiny.settings(rewards={"P2A": BREVITY}, stages=tiny.TRAINING, eval_every=1, policy__eval_prompts=3)
    made = policy.method_of(tiny.start(finished, config), rewarder=method_of(finished, {"P2A": BREVITY}).rewarder)
    counts = []

    def counted(prompts, completions):
        counts.append(len(completions))
        return toy_extensions.brevity(prompts, completions)

    made.targets.audience.sources["P2A"] = RewardSource("P2A", counted)
    state, _ = made.step(made.init(), next(made.batches))
    made.evaluate(state)
    told = made.asked(1)["P2A"]
    assert sum(counts) * made.settings.steps == told


# ---- a function that calls a reward model


def by_model(run, method, k):
    """A reward function that asks reward model `k` of a run about texts, as anybody would write it."""
    tokenizer, limit = run.workspace.tokenizer, run.settings.data.max_completion

    def rewards(prompts, completions):
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            asked, ids = run.records.ask(prompt), [tokenizer.eos_id]  # of an empty answer
            if completion:
                ids = tokenizer.encode_answers(asked, [completion])[1][0].ids[:limit]
            rows.append({"prompt": tokenizer.encode_prompt(asked), "completion": list(ids)})
        batch = run.text.pad_completions(rows)
        numbers = np.full((len(rows), 1), k)
        return np.asarray(raw_rewards(method.backbone, method.rewarder, numbers, batch.tokens, batch.valid))[:, 0]

    return rewards


@pytest.mark.slow
def test_a_function_that_calls_our_own_reward_model_trains_as_the_model(finished):
    known, asked = method_of(finished, {}), method_of(finished, {"P2A": BREVITY})
    run = tiny.start(finished, tiny.settings())
    function = by_model(run, known, tiny.REWARDS.index("P2A"))
    asked.targets.audience.sources["P2A"] = RewardSource("P2A", function)
    states = [known.init(), asked.init()]
    for _ in range(2):
        found = [method.step(state, next(method.batches)) for method, state in zip((known, asked), states, strict=True)]
        states, metrics = zip(*found, strict=True)
        close(states[0].trainable, states[1].trainable)
        close(metrics[0], {name: metrics[1][name] for name in metrics[0]})


@pytest.mark.slow
def test_a_rollout_in_parts_is_the_whole_rollout_and_parts_are_sampled_while_others_are_scored(finished):
    """One part and two parts give the same state; the second part is drawn before the first is scored."""
    methods = [
        policy.method_of(
            tiny.start(finished, tiny.settings(rewards={"P2A": f"{MODULE}:brevity"}, policy__reward_parts=parts)),
            rewarder=method_of(finished, {"P2A": f"{MODULE}:brevity"}).rewarder,
        )
        for parts in (1, 2)
    ]
    parted = methods[1]
    events, draw = [], parted._draw

    def drawing(*arguments):
        events.append("drawn")
        return draw(*arguments)

    def slow(prompts, completions):
        for _ in range(200):  # seconds, at most
            if events.count("drawn") == 2 or "scored" in events:
                break
            time.sleep(0.05)
        events.append("scored" if events.count("drawn") == 2 else "too early")
        return toy_extensions.brevity(prompts, completions)

    parted._draw = drawing
    parted.targets.audience.sources["P2A"] = RewardSource("P2A", slow)
    states = [method.init() for method in methods]
    found = [method.step(state, next(method.batches)) for method, state in zip(methods, states, strict=True)]
    assert events == ["drawn", "drawn", "scored", "scored"]
    close(found[0][0].trainable, found[1][0].trainable)
    names = [name for name in found[0][1] if not name.endswith("seconds")]
    close(*({name: metrics[name] for name in names} for _, metrics in found))


def test_sources_that_wait_are_asked_at_the_same_time():
    """Two asynchronous functions that wait for each other, beside one that does not wait."""
    barrier = threading.Barrier(2)

    async def patient(prompts, completions):
        barrier.wait(20)
        return [1.0] * len(completions)

    names = ("P1A", "P2A", "P2B")
    people = Audience("synthetic", names, "", "synthetic", dict.fromkeys(names, BREVITY))
    for name in names[:2]:
        people.sources[name] = RewardSource(name, patient)
    found = people.ask(["q"] * 2, ["a", "bc"])()
    np.testing.assert_array_equal(found.rewards, [[1, 1, -1], [1, 1, -2]])
    assert set(found.seconds) == set(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy__reward_parts": 3}, "reward_parts: the prompts of 4 rollouts cannot be split into 3 equal parts"),
        ({"policy__reward_parts": 2}, r"policy\.reward_parts=2: all rewards are those of reward models"),
    ],
)
def test_parts_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        stages.read(tiny.settings(**changes))


# ---- answers for Rewards-in-Context


def test_rewards_that_never_come_together_are_named():
    with pytest.raises(
        UserError, match="ric/round0: none of the answers is both not empty and rewarded by every source"
    ):
        ric.fine_tune(None, ric.RicSettings(), "methods/ric", 0, [])


@pytest.mark.parametrize("damage", [b'{"request": "q", "te', b"\xff", b"[" * 200_000, b"[]", b'{"request": "q"}', b"7"])
def test_stored_answers_that_are_damaged_are_named(tmp_path, damage):
    path = tmp_path / "answers0.jsonl"
    kept = [{"request": "q", "text": "a", "scores": [0.5, 1.0]}]
    assert ric.stored(path, lambda: kept) == kept == ric.stored(path, list)
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(UserError, match=r"answers0\.jsonl: is damaged \(.*\); delete it, and the same command samples"):
        ric.stored(path, list)


# ---- columns of the records, and failures


def with_columns(folder, copied, **changes):
    """The config of a run whose prompts are records with a column `number`; `copied` has its base and nothing else."""
    records = [{"prompt": text, "number": i, "user_id": f"u{i}"} for i, text in enumerate(synthetic.prompts())]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for stage in ("comparisons", "reward", "policy"):
        (copied / stage).rename(copied / f"old_{stage}")
    (copied / "config.json").unlink()  # of another config
    config = tiny.settings(stages=("sft", "reward", "policy"), **changes)
    with config.ignore_type():
        config.data.prompts = {"kind": "jsonl", "path": str(folder / "prompts.jsonl")}
    return config, records


def test_functions_see_the_columns_of_the_record_of_each_answer(copied, tmp_path, monkeypatch):
    config, records = with_columns(tmp_path, copied, rewards=dict.fromkeys(tiny.REWARDS, f"{MODULE}:numbered"))
    known, asked = {one["prompt"]: one for one in records}, []

    def seen(prompts, completions, number, user_id):
        for prompt, i, user in zip(prompts, number, user_id, strict=True):
            assert known[prompt] == {"prompt": prompt, "number": i, "user_id": user}
        asked.extend(number)

    monkeypatch.setattr(toy_extensions, "seen", seen)
    with tiny.one_device():
        stages.run(config, Workdir(copied))
    assert len(set(asked)) > 20


def test_a_source_that_judges_sees_the_columns_too(copied, tmp_path, monkeypatch):
    config, records = with_columns(tmp_path, copied)
    config.stages = ("sft", "comparisons")
    number, asked = {one["prompt"]: one["number"] for one in records}, []
    monkeypatch.setattr(toy_extensions, "seen", lambda prompts, completions, number, user_id: asked.extend(number))
    run = tiny.start(copied, config)
    requests = run.records.requests[0][:5]
    judge = run.judge({"kind": "reward", "source": f"{MODULE}:numbered"})
    assert judge(requests, ["ab"] * 5, ["a"] * 5, "P2A").tolist() == [1] * 5
    assert asked[:5] == [number[request] for request in requests]
    with config.ignore_type():
        config.comparisons.judge = {"kind": "reward", "source": f"{MODULE}:solved"}
    with pytest.raises(UserError, match="its function takes 'solution', and the records of"):
        stages.run(config, Workdir(copied))


@pytest.mark.parametrize("when", ["reward", "policy"])
def test_a_failing_source_stops_the_run_and_leaves_its_batch(copied, tmp_path, monkeypatch, when):
    config, _ = with_columns(tmp_path, copied, rewards=dict.fromkeys(tiny.REWARDS, f"{MODULE}:numbered"))
    calls = []

    def seen(prompts, completions, number, user_id):
        calls.append(len(prompts))
        if when == "reward" or len(prompts) < 32:  # the reward stage asks about its samples at once
            raise RuntimeError("out of order")

    monkeypatch.setattr(toy_extensions, "seen", seen)
    path = copied / "failed_rewards.jsonl"
    message = (
        rf"reward 'P1A': its source raised RuntimeError: out of order for the answer '.*' to '.*' \(.*prompts.jsonl "
        rf"line \d+\); correct the source; what it was asked is in {path}"
    )
    with tiny.one_device(), pytest.raises(UserError, match=message):
        stages.run(config, Workdir(copied))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == {"reward": 32, "policy": 4}[when]
    assert set(lines[0]) == {"reward", "prompt", "completion", "columns", "record"}
    assert set(lines[0]["columns"]) == {"number", "user_id"}


def test_a_parameter_that_is_no_column_is_found_before_the_first_stage(copied, tmp_path):
    config, _ = with_columns(tmp_path, copied, rewards={"P2A": f"{MODULE}:solved"})
    message = (
        "rewards.P2A: its function takes 'solution', and the records of data.prompts have the columns number, user_id"
    )
    with pytest.raises(UserError, match=message):
        stages.run(config, Workdir(copied))
    assert not (copied / "reward").exists()
