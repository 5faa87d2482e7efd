"""MODPO: K policies in one program, DPO where weights are one-hot, margins from reward models where they are not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.small_trees import assert_same

from pjrlhf.algorithms import banks, modpo, reward
from pjrlhf.algorithms.modpo import ModpoSettings, policies_loss
from pjrlhf.config import without_ppo
from pjrlhf.data.batching import pad_left, pad_right
from pjrlhf.errors import UserError
from pjrlhf.objectives.preference import pairwise_loss
from pjrlhf.rollout import scoring

pytestmark = pytest.mark.slow  # many programs to compile

# Over P1A, P1B, P2A, P2B: one-hot, two mixtures, and a tie, of which the first counts.
POINTS = ((0, 0, 1, 0), (0.7, 0, 0.3, 0), (0.1, 0.2, 0.3, 0.4), (0, 0.5, 0, 0.5))
LABELS = ("P2A", "P1A", "P2B", "P1B")
K, n, BETA = len(POINTS), 4, 0.3


def settings(**changes):
    config = tiny.settings()
    with config.unlocked():
        without_ppo(config)
    config.modpo.update({"steps": 4, "batch_size": n, "beta": BETA, **changes})
    if "preferences" not in changes:
        config.modpo.preferences.update({"kind": "fixed", "points": POINTS})
    return config


def of_run(run):
    return modpo.method_of(run, run.section(ModpoSettings))


def made(folder, **changes):
    return of_run(tiny.start(folder, settings(**changes)))


@pytest.fixture(scope="module")
def run(finished):
    return tiny.start(finished, settings())


@pytest.fixture(scope="module")
def method(run):
    return of_run(run)


@pytest.fixture(scope="module")
def bank(method):
    """Policies that differ from each other and from the base."""
    leaves, structure = jax.tree.flatten(method.init().trainable)
    rng = np.random.default_rng(0)
    return structure.unflatten([x + 0.3 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="module")
def batch(method):
    """n lists of K pairs."""
    source = reward.Grouped(method.data.tables, 0)
    return [source[i] for i in range(n)]


def only(tree, k):
    return jax.tree.map(lambda x: x[k : k + 1], tree)


_gradient = jax.jit(jax.value_and_grad(policies_loss, argnums=1, has_aux=True), static_argnames=("beta", "kind"))


def gradient(method, bank, batch, k=None, kind="sigmoid"):
    """((loss, metrics), gradient) of all policies, or of policy k in a program of its own."""
    weights = method.data.weights
    if k is not None:
        batch, bank, weights = [row[k : k + 1] for row in batch], only(bank, k), weights[k : k + 1]
    return _gradient(method.backbone, bank, method.collate(batch).replace(weights=weights), beta=BETA, kind=kind)


def plain(pairs):
    """Tokens, valid [2 n, P + N] of n pairs: the chosen answers, then the rejected ones; and P."""
    answers = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    before = pad_left([pair["prompt"] for pair in pairs] * 2, 12, 0)
    after = pad_right(answers, 18, 0)
    tokens, valid = (np.concatenate(both, axis=1) for both in zip(before, after, strict=True))
    return tokens, valid, 12


def losses(method, bank, batch, kind="sigmoid"):
    total, count = gradient(method, bank, batch, kind=kind)[0][1]["loss"]
    return np.asarray(total / count)


# ---- data


def test_policies_learn_from_the_pairs_of_what_weighs_most(method, batch):
    assert [{row["objective"] for row in table} for table in method.data.tables] == [{label} for label in LABELS]
    assert {example.objective for example in method.data.table.examples} == set(LABELS)
    assert [[row["objective"] for row in rows] for rows in batch] == [list(LABELS)] * n
    # One weight per reward model, the general one included; that of the labelled objective first.
    expected = [[1, 0, 0, 0, 0], [0.7, 0, 0.3, 0, 0], [0.4, 0.1, 0.2, 0.3, 0], [0.5, 0, 0, 0.5, 0]]
    np.testing.assert_allclose(method.data.weights[:, 0], expected, rtol=1e-6)


def test_rewards_are_raw_and_those_of_the_pairs_one_by_one(method, run):
    rewarder, score, table = reward.load(run), jax.jit(reward.pair_rewards), method.data.table
    assert len(table) > 2 * run.settings.sample_rows, "one chunk proves nothing"
    models = {name: rewarder[name] for name in ("bank", "heads")}
    for i in (0, 17, len(table) - 1):
        rows, _ = reward.by_model(run.text, [[table[i]] * len(tiny.REWARDS)])
        sides = score(method.backbone, models, rows)  # [R, 1] each
        others = np.delete(np.array(sides)[..., 0], tiny.REWARDS.index(table.examples[i].objective), axis=1)
        np.testing.assert_allclose(method.data.rewards[i], others, atol=1e-5)
    assert np.abs(method.data.rewards).max() > 0.1


def test_a_warm_up_that_does_not_fit_is_refused_before_anything_is_scored(finished):
    changes = {"epochs": 1.0, "optimizer": {"warmup_steps": 10**6}}
    run = tiny.start(finished, settings(**changes))

    def score(table):
        raise AssertionError("scored")

    with pytest.raises(UserError, match=r"modpo\.optimizer\.warmup_steps: 1000000 leaves none of the"):
        modpo.data_of(run, run.section(ModpoSettings), score, score)


def test_samples_are_answers_not_labels(method, finished):
    records = [json.loads(x) for x in (finished / "comparisons" / "comparisons.jsonl").read_text().splitlines()]
    pairs = {(r["request"], *sorted([r["chosen"][0]["content"], r["rejected"][0]["content"]])) for r in records}
    assert len(pairs) < len(method.data.table) < len(records), "some label is used, and not every one"
    assert method.data.samples == 2 * len(pairs) <= 2 * tiny.TINY["comparisons.pairs"]


# ---- the loss


@pytest.mark.parametrize("kind", ["sigmoid", pytest.param("hinge", marks=pytest.mark.slow)])
def test_policies_in_one_program_have_the_gradients_of_programs_of_their_own(method, bank, batch, kind):
    (total, metrics), whole = gradient(method, bank, batch, kind=kind)
    alone = [gradient(method, bank, batch, k, kind) for k in range(K)]
    assert float(total) == pytest.approx(sum(float(loss) for (loss, _), _ in alone), rel=1e-5)
    for k, ((_, mine), found) in enumerate(alone):
        jax.tree.map(lambda x, y, k=k: np.testing.assert_allclose(x[k], y[0], rtol=1e-4, atol=1e-5), whole, found)
        assert max(float(np.abs(x).max()) for x in jax.tree.leaves(found)) > 1e-3
        del mine["wasted_tokens"]  # of all policies together
        for name, pair in mine.items():
            np.testing.assert_allclose(pair[0][0], metrics[name][0][k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_one_hot_weights_are_dpo(method, bank, batch, kind):
    tokens, valid, slots = plain([row[0] for row in batch])

    @jax.jit
    def dpo(one, backbone):
        def logps(bank, mix):
            policies = backbone.policies(bank, mix)
            return scoring.sequence_logps(policies, tokens, valid, slots)[0].reshape(2, n)

        return pairwise_loss(kind, logps(one, np.ones((1, 1))), logps(None, None), BETA).mean()

    loss, slope = jax.value_and_grad(dpo)(only(bank, 0), method.backbone)
    assert losses(method, bank, batch, kind)[0] == pytest.approx(float(loss), rel=1e-4)
    found = gradient(method, bank, batch, kind=kind)[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0], y[0], rtol=1e-3, atol=1e-5), found, slope)


def test_the_loss_of_a_mixture_is_the_papers(method, bank, batch):
    """Policy 1: 0.7 P1A, which its pairs are labelled for, and 0.3 P2A."""
    mine = [row[1] for row in batch]
    tokens, valid, slots = plain(mine)

    @jax.jit
    def logps(bank, backbone):
        policies = backbone.policies(bank, np.ones((1, 1)))
        return scoring.sequence_logps(policies, tokens, valid, slots)[0].reshape(2, n)

    index = [pair["index"] for pair in mine]
    ratio = np.array(logps(only(bank, 1), method.backbone)) - method.data.reference[index].T
    column = [name for name in tiny.REWARDS if name != "P1A"].index("P2A")
    gap = method.data.rewards[index, 0, column] - method.data.rewards[index, 1, column]
    assert np.abs(gap).min() > 0.01
    h = (BETA * (ratio[0] - ratio[1]) - 0.3 * gap) / 0.7
    assert losses(method, bank, batch)[1] == pytest.approx(np.log1p(np.exp(-h)).mean(), rel=1e-4)
    metrics = {name: np.array(x[0] / x[1]) for name, x in gradient(method, bank, batch)[0][1].items()}
    assert metrics["rewards/margins"][1] == pytest.approx(h.mean(), rel=1e-3)
    assert metrics["rewards/accuracies"][1] == pytest.approx((h > 0).mean())


def test_weights_follow_their_schedules_in_margins_too(finished, bank, batch):
    """Policy 1 after two steps: 1.4 P1A, and 0.225 P2A."""
    changing = made(finished, reward_weights={"P1A": 2, "P2A": [[0, 1.0], [4, 0.5]], "helpful": 0})
    own = jax.tree.map(jnp.copy, bank)  # the step takes the memory of its state
    state = changing.init().replace(step=jnp.array(2, jnp.int32), trainable=own)
    placed = changing.collate(batch)
    by_hand = {k: dict(zip(changing.data.objectives[k], changing.data.weights[k, 0], strict=True)) for k in range(K)}
    factor = {"P1A": 2.0, "P2A": 0.75, "helpful": 0.0}
    scaled = [[w * factor.get(name, 1.0) for name, w in by_hand[k].items()] for k in range(K)]
    assert scaled[1][0] == pytest.approx(1.4) and pytest.approx(max(scaled[1][1:])) == 0.225
    expected = placed.replace(weights=np.array(scaled, np.float32)[:, None])
    (_, want), _ = _gradient(changing.backbone, bank, expected, beta=BETA, kind="sigmoid")
    found = changing.step(state, placed)[1]
    np.testing.assert_allclose(found["loss"][0], want["loss"][0], rtol=1e-4)
    assert [float(found[f"rewards/{name}/weight"][0]) for name in factor] == [2.0, 0.75, 0.0]


@pytest.mark.parametrize(("changed", "touched"), [("P2A", [1, 2]), ("P1B", [2]), ("helpful", [])])
def test_a_reward_model_reaches_the_policies_that_weigh_it_beside_their_label(
    method, run, bank, batch, finished, monkeypatch, changed, touched
):
    before = losses(method, bank, batch)
    model, number = reward.load(run), tiny.REWARDS.index(changed)
    model["heads"]["kernel"] = model["heads"]["kernel"].at[number].multiply(-3.0)
    monkeypatch.setattr(reward, "load", lambda run: model)
    other = made(finished)
    after = losses(other, bank, batch)
    assert [k for k in range(K) if abs(before[k] - after[k]) > 1e-3] == touched
    untouched = [k for k in range(K) if k not in touched]
    np.testing.assert_allclose(after[untouched], before[untouched], rtol=1e-5)


def test_an_untrained_dpo_policy_starts_at_log_2(method, batch):
    """Its log-ratios are 0; that of the mixtures the margins move."""
    found = losses(method, method.init().trainable, batch)
    assert found[0] == pytest.approx(np.log(2), abs=1e-5)
    assert np.abs(found[1:3] - np.log(2)).min() > 1e-4


# ---- the whole


def test_training(copied):
    config = settings(steps=25, optimizer={"learning_rate": 2e-2, "schedule": "constant"})
    run = tiny.start(copied, config)
    section = run.section(ModpoSettings)
    info = modpo.train(run, section, "methods/modpo")
    names = ["P2A1", "P1A0.7+P2A0.3", "P1A0.1+P1B0.2+P2A0.3+P2B0.4", "P1B0.5+P2B0.5"]
    assert info["ingredients"] == names
    assert len(info["base"]) > 8 and info["samples"] > 0
    bank = banks.load(run, "methods/modpo", names)
    moved = jax.tree.leaves(jax.tree.map(lambda x: np.abs(x).reshape(K, -1).max(1).min(), bank))
    assert min(moved) > 0
    for name in names:
        assert (copied / "methods/modpo/ingredients" / name / "adapter_model.safetensors").is_file()
    rows = tiny.lines(copied, "methods/modpo")
    for name in names:
        first, last = (np.mean([row[f"loss/{name}"] for row in part]) for part in (rows[:5], rows[-5:]))
        assert last < first - 0.05, name
        assert {f"rewards/accuracies/{name}", f"rewards/margins/{name}"} < rows[0].keys()
    # Started again it only hands out what is there.
    assert modpo.train(run, section, "methods/modpo") == info
    assert_same(banks.load(run, "methods/modpo", names), bank)
    assert tiny.lines(copied, "methods/modpo") == rows


def test_own_preferences_are_those_of_the_reward_models(finished):
    own = made(finished, preferences={"kind": "own"})
    assert own.data.policies == own.data.labels == tiny.REWARDS
    np.testing.assert_array_equal(own.data.weights[:, 0], np.eye(len(tiny.REWARDS))[[0] * len(tiny.REWARDS)])
    assert [table[0]["objective"] for table in own.data.tables] == list(tiny.REWARDS)


MISTAKES = [
    (
        {"preferences": {"kind": "dirichlet"}},
        "modpo.preferences.kind: 'dirichlet' draws preferences, .*; choose own or",
    ),
    (
        {"preferences": {"kind": "grid", "points": POINTS}},
        "modpo.preferences.kind: 'grid' draws .*; choose own or fixed",
    ),
    ({"mix": "weights"}, "modpo.mix: 'weights' is unknown; choose one of own"),
    ({"prompt_preference": "half"}, "modpo.prompt_preference: 'half', but MODPO .*; set it to never"),
    ({"loss": "ipo"}, "modpo.loss: 'ipo' is unknown; choose one of sigmoid, hinge"),
    ({"reward_weights": {"P9": 1}}, r"reward_weights: 'P9' is not one of P1A, .*; name one of these"),
    ({"reward_weights": {"P1A": "slow"}}, r"modpo.reward_weights.P1A: 'slow' is no schedule; give a number"),
    (
        {"reward_weights": {"P2A": {"start": 1, "end": 0, "steps": 9}}},
        r"reward_weights.P2A: is 0 at some step, and MODPO divides by the weight .*; keep it above 0",
    ),
    ({"beta": 0.0}, "modpo.beta: 0.0 is out of range; choose a number above 0"),
    (
        {"batch_size": 10_000},
        r"modpo.batch_size: a batch takes 10000 pairs of every objective .*, and there are only \d+",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[str(changes) for changes, _ in MISTAKES])
def test_wrong_settings(finished, changes, message):
    with pytest.raises(UserError, match=message):
        made(finished, **changes)


def test_an_objective_without_pairs(copied):
    path = copied / "comparisons" / "comparisons.jsonl"
    path.write_text("".join(x for x in path.read_text().splitlines(True) if json.loads(x)["objective"] != "P2B"))
    message = "no pair is labelled for 'P2B', which weighs most for policy 'P1A0.1.*'; add comparisons"
    with pytest.raises(UserError, match=message):
        made(copied)


def test_pairs_of_a_source(finished, tmp_path):
    """`reward.data` names them where the run did not sample its own."""
    lines = (finished / "comparisons" / "comparisons.jsonl").read_text().splitlines(True)
    (tmp_path / "pairs.jsonl").write_text("".join(lines[: len(lines) // 2]))
    config = settings(batch_size=2)
    with config.ignore_type():
        config.reward.data = {"kind": "jsonl", "path": str(tmp_path / "pairs.jsonl")}
    half, whole = of_run(tiny.start(finished, config)).data, made(finished).data
    assert 0 < len(half.table) < len(whole.table)
    assert half.table.bad.source_name == "pairs.jsonl"
    for one, other in zip(half.table.examples, whole.table.examples, strict=False):
        assert (one.prompt, one.chosen, one.objective) == (other.prompt, other.chosen, other.objective)
