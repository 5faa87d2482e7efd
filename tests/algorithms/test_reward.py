"""Reward models: equal shares of all objectives, K models in one program, and what is measured on held-out pairs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from pjrlhf.algorithms import modpo, reward
from pjrlhf.algorithms.reward import Grouped, pair_rewards, reward_loss
from pjrlhf.data import synthetic
from pjrlhf.data.packing import NOWHERE
from pjrlhf.data.schema import is_tie
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.models.storage import load_tree
from pjrlhf.rollout import scoring
from pjrlhf.rollout.batches import Rollout
from pjrlhf.rollout.experience import reward_scores


@pytest.fixture(scope="module")
def method(finished):
    return reward.method_of(tiny.start(finished, tiny.settings()))


@pytest.fixture(scope="module")
def trained(finished):
    return load_tree(finished / "reward" / "model.safetensors")[0]


def slice_of(trained, k):
    return jax.tree.map(lambda x: x[k : k + 1], {name: trained[name] for name in ("bank", "heads")})


_score = jax.jit(pair_rewards)


def test_rewards_whose_squares_are_beyond_floats_have_a_scale():
    scale = reward.scale_of(np.float32([[-1e30], [1e30]]), (0.0, 1.0), 1e-6)
    assert {name: float(x[0]) / 1e30 for name, x in scale.items()} == pytest.approx(
        {"mean": 0, "std": 1, "low": -1, "high": 1}
    )


def score(method, trainable, batch):
    """Rewards (chosen, rejected) [K, n] of a batch."""
    return _score(method.backbone, {name: trainable[name] for name in ("bank", "heads")}, batch.rows)


# ---- the source of batches


def test_every_row_is_seen_equally_often_and_each_turn_has_its_own_order():
    tables = [list(range(12)), list(range(4)), list(range(5))]
    source = Grouped(tables, seed=0)
    assert len(source) == 12
    rows = np.array([source[i] for i in range(60)])
    for column, table in zip(rows.T, tables, strict=True):
        turns = column.reshape(-1, len(table))
        assert (np.sort(turns) == np.array(table)).all()
        assert len({tuple(turn) for turn in turns}) > 1
    assert [source[i] for i in reversed(range(60))] == rows[::-1].tolist(), "the order of asking matters"
    assert [Grouped(tables, seed=1)[i] for i in range(12)] != rows[:12].tolist()


def test_a_batch_has_equally_many_rows_of_each_objective(method):
    batch = next(method.batches)
    n, K = 4, len(tiny.REWARDS)
    owner, last = batch.rows.owner, batch.rows.last_answer
    assert [(last[(owner == k).any(1)] < NOWHERE).sum() for k in range(1, K)] == [2 * n] * (K - 1)
    assert batch.margin.shape == (K, n)
    texts = [{row["objective"] for row in table} for table in method.train.values()]
    assert texts == [{name} for name in tiny.REWARDS]


def test_no_prompt_is_on_both_sides(method):
    train, held = (
        {json.dumps(example.prompt) for table in side.values() for example in table.examples}
        for side in (method.train, method.heldout)
    )
    assert train and held and not train & held


# ---- the loss


def noisy(tree, seed, scale=0.3):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([x + scale * rng.standard_normal(x.shape).astype(x.dtype) for x in leaves])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0])
def test_k_models_in_one_program_equal_k_programs(method, rank):
    K, adapter = len(tiny.REWARDS), AdapterConfig(rank=rank, alpha=4.0)
    backbone = method.backbone.replace(adapter=adapter)
    heads = scoring.init_heads(K, backbone.model.config.hidden_size)
    trainable = noisy({"bank": init_bank(backbone.base, adapter, K, jax.random.key(0)), "heads": heads}, seed=0)
    source = Grouped(list(method.train.values()), 0)
    pairs = [[{**row, "margin": 0.1 * i + 0.01 * k} for k, row in enumerate(source[i])] for i in range(4)]
    grad = jax.jit(jax.value_and_grad(reward_loss, argnums=1, has_aux=True))
    (total, metrics), whole = grad(backbone, trainable, method.collate(pairs))
    losses = []
    for k in range(K):
        one = jax.tree.map(lambda x, k=k: x[k : k + 1], trainable)
        (loss, _), alone = grad(backbone, one, method.collate([row[k : k + 1] for row in pairs]))
        losses.append(float(loss))
        # Sums of another shape are taken in another order, which differs from processor to processor.
        jax.tree.map(lambda x, y, k=k: np.testing.assert_allclose(x[k], y[0], rtol=1e-4, atol=1e-5), whole, alone)
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(alone)) > 1e-3
    assert float(total) == pytest.approx(sum(losses), rel=1e-5)
    mean, count = metrics["loss"]
    np.testing.assert_allclose(mean / count, losses, rtol=1e-5)


def test_the_rewards_are_those_of_the_pairs_one_by_one(method, trained):
    source = Grouped(list(method.train.values()), 0)
    pairs = [source[i] for i in range(4)]
    n, K = len(pairs), len(pairs[0])
    chosen, rejected = score(method, trained, method.collate(pairs))
    assert chosen.shape == rejected.shape == (K, n)
    for k, i in ((0, 0), (K - 1, 1), (2, n - 1)):
        alone = score(method, slice_of(trained, k), method.collate([pairs[i][k : k + 1]]))
        np.testing.assert_allclose([alone[0][0, 0], alone[1][0, 0]], [chosen[k, i], rejected[k, i]], atol=1e-5)


def test_soft_labels_reach_the_loss_and_ties_no_accuracy(finished, tmp_path):
    path = finished / "comparisons" / "comparisons.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for i, record in enumerate(records):
        record["preference"] = (0.5, 0.8, 1.0)[i % 3]
    (tmp_path / "soft.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = tiny.settings()
    with config.ignore_type():
        config.reward.data = {"kind": "jsonl", "path": str(tmp_path / "soft.jsonl")}
    soft = reward.method_of(tiny.start(finished, config))
    assert all(not is_tie(example) for table in soft.heldout.values() for example in table.examples)
    batch = next(soft.batches)
    assert {*np.unique(batch.preference)} <= {np.float32(0.5), np.float32(0.8), np.float32(1)}
    trainable = noisy(soft.init().trainable, seed=1)
    _, metrics = jax.jit(reward_loss)(soft.backbone, trainable, batch)
    gap = np.subtract(*(np.asarray(x, np.float64) for x in score(soft, trainable, batch)))
    losses = batch.preference * np.logaddexp(0, -gap) + (1 - batch.preference) * np.logaddexp(0, gap)
    np.testing.assert_allclose(metrics["loss"][0], losses.sum(1), rtol=1e-4)
    np.testing.assert_array_equal(metrics["rewards/accuracies"][1], (batch.preference > 0.5).sum(1))
    np.testing.assert_array_equal(metrics["rewards/accuracies"][0], ((gap > 0) & (batch.preference > 0.5)).sum(1))


def test_held_out_comparisons_of_your_own_are_trained_on_by_nobody(finished, tmp_path):
    """Neither by reward models nor by MODPO's policies."""
    lines = (finished / "comparisons" / "comparisons.jsonl").read_text().splitlines()
    prompts = [json.dumps(json.loads(line)["prompt"]) for line in lines]
    held = [line for line, prompt in zip(lines, prompts, strict=True) if prompt in sorted(set(prompts))[::3]]
    config = tiny.settings()
    with config.ignore_type():
        for key, part in (("data", lines), ("heldout_data", held)):
            path = tmp_path / f"{key}.jsonl"
            path.write_text("".join(f"{line}\n" for line in part))
            config.reward[key] = {"kind": "jsonl", "path": str(path)}
    run = tiny.start(finished, config)
    method = reward.method_of(run)
    places = {example.where for table in method.heldout.values() for example in table.examples}
    assert 0 < len(places) == len(held) < len(lines) and all(
        place.startswith("held-out heldout_data.jsonl") for place in places
    )
    tested = {example.prompt for table in method.heldout.values() for example in table.examples}
    for table in (*method.train.values(), modpo.labelled(run, run.section(modpo.ModpoSettings))[-1]):
        assert table.examples and not tested & {example.prompt for example in table.examples}


def test_heads_and_adapters_move_in_the_first_step(method):
    state = method.init()
    before = jax.tree.map(np.array, state.trainable)
    after, metrics = method.step(state, next(method.batches))
    moved = jax.tree.map(lambda x, y: np.abs(np.array(x) - y).reshape(len(y), -1).max(1), after.trainable, before)
    assert (moved["heads"]["kernel"] > 0).all()
    assert all((leaf["b"] > 0).all() for block in moved["bank"]["layers"].values() for leaf in block.values())
    assert (np.array(metrics["rewards/accuracies"][1]) == 4).all()


# ---- after training


def test_each_held_out_pair_counts_once(finished, method, trained):
    models = json.loads((finished / "manifest.json").read_text())["stages"]["reward"]["models"]
    found = method.heldout_accuracy({name: trained[name] for name in ("bank", "heads")})
    assert tuple(method.heldout) == tiny.REWARDS
    for k, (name, table) in enumerate(method.heldout.items()):
        assert found[name].items() <= models[name].items()
        assert found[name]["pairs"] == len(table)
        hits = []
        for row in table:
            chosen, rejected = score(method, slice_of(trained, k), method.collate([[row]]))
            hits.append(float(chosen[0, 0]) > float(rejected[0, 0]))
        assert found[name]["accuracy"] == pytest.approx(np.mean(hits))


@pytest.mark.slow
def test_calibrated_rewards_have_mean_0_and_deviation_1(method, trained, monkeypatch):
    text, K, asked = method.text, len(tiny.REWARDS), []
    requests = synthetic.prompts()[:20]

    def answer(backbone, bank, mix, prompts, sampling, key):
        """Replaces sampling: an answer that the prompt decides."""
        tokens = prompts.tokens[:, -sampling.max_new_tokens :] * 3 % backbone.model.config.vocab_size
        return Rollout(tokens, jnp.cumsum(tokens % 5 == 0, axis=1) < 2, jnp.zeros(tokens.shape))

    encode = text.encode
    monkeypatch.setattr(text, "encode", lambda prompts: asked.append(encode(prompts)) or asked[-1])
    monkeypatch.setattr(reward, "sample", answer)
    scale = method.calibrate(trained, requests)
    assert len(asked) * text.sample_rows == method.settings.calibration_samples
    prompt = jax.tree.map(lambda *parts: jnp.concatenate(parts), *asked)
    response = answer(method.backbone, None, None, prompt, text.sampling(), None)
    prompt, response = jax.tree.map(lambda x: jnp.tile(x, (K, 1)), (prompt, response))
    models = {**trained, **scale}
    scores = reward_scores(method.backbone, models, jnp.arange(K)[:, None], prompt, response).reshape(K, -1)
    np.testing.assert_allclose(scores.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(scores.std(1), 1, atol=1e-4)
    assert (np.asarray(scale["std"]) > 1e-3).all()
    shares = np.asarray(
        reward_scores(method.backbone, models, jnp.arange(K)[:, None], prompt, response, "quantiles")
    ).reshape(K, -1)
    assert shares.min() == 0 and shares.max() == 1 and ((shares > 0) & (shares < 1)).mean() > 0.9


def test_a_batch_that_is_too_large_names_the_stage_and_the_objective(copied):
    config = tiny.settings(reward__batch_size=1000)
    with pytest.raises(
        UserError,
        match=r"reward.batch_size: a batch takes 1000 pairs of every objective \(most are of \w+\), and there are only "
        r"\d+ to train on; lower it with --config.reward.batch_size, or add data",
    ):
        reward.method_of(tiny.start(copied, config))
