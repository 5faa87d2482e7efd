"""Methods side by side: what is trained, what is skipped, and what the report says of them."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, tiny_family

from pjrlhf.algorithms import methods, policy, reward
from pjrlhf.algorithms.modpo import answer_rewards
from pjrlhf.errors import UserError
from pjrlhf.evaluation import pareto
from pjrlhf.models.storage import load_tree
from pjrlhf.objectives.simplex import simplex_grid
from pjrlhf.pipeline import seeds, stages
from pjrlhf.protocols.front import Front
from pjrlhf.runtime.answers import Row, sample_rows
from pjrlhf.training.workdir import Workdir

pytestmark = pytest.mark.slow


def read(folder):
    return json.loads((folder / "report" / "summary.json").read_text())


@pytest.fixture(scope="module")
def summary(family):
    return read(family)


def again(folder, config):
    """All stages once more in the same folder."""
    with tiny.one_device():
        stages.run(config, Workdir(folder))


def test_every_entry_has_its_folder_and_its_row(family, summary):
    config = tiny_family.settings()
    assert set(summary["methods"]) == set(config.methods) == set(tiny_family.QUICK)
    adapters = {"rsoups": 2, "bone": 2, "moc": 1, "clp": 2, "ric": 1, "modpo": len(simplex_grid(2))}
    assert {path.name for path in (family / "methods").iterdir()} == set(adapters)
    for name, count in adapters.items():
        bank, note = load_tree(family / "methods" / name / "bank.safetensors")
        assert len(note["adapters"]) == count and {leaf.shape[0] for leaf in jax.tree.leaves(bank)} == {count}
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(bank)), "fresh adapters: nothing was trained"
    samples = {name: found["samples"] for name, found in summary["methods"].items()}
    comparisons = (family / "comparisons" / "comparisons.jsonl").read_text().splitlines()
    assert samples == {
        "prompting": 0,
        **dict.fromkeys(("rsoups", "bone", "mod"), 2 * 2 * 4),
        **dict.fromkeys(("moc", "clp"), 2 * 4),
        "ric": 32 + 16,
        "modpo": len(comparisons),
    }


def test_numbers_of_the_report_are_those_of_the_points(summary):
    for name, found in summary["methods"].items():
        points = found["points"]
        seen = [i for i, unseen in enumerate(points["unseen"]) if not unseen]
        weights, rewards = np.array(points["weights"])[seen], np.array(points["rewards"])[seen]
        assert weights.tolist() == [list(p) for p in tiny_family.POINTS]
        assert found["hypervolume"] == pytest.approx(
            pareto.hypervolume(rewards, np.array(summary["front"]["reference"]))
        )
        assert found["mip"] == pytest.approx((weights * rewards).sum(1).mean())
        assert found["mse"] == pytest.approx(np.square(weights - rewards).mean())
        if name == "modpo":  # which answers for the points it was trained for
            assert found["unseen"] is None and len(seen) == len(points["unseen"])
        else:
            assert found["unseen"]["mip"] is not None and sum(points["unseen"]) == 10


def test_every_policy_answers_in_its_own_way(family):
    """As many different answers of a method as the front has points, or a policy that hears no weights has one."""
    rewards = {name: found["points"]["rewards"] for name, found in read(family)["methods"].items()}
    assert all(np.isfinite(points).all() for points in rewards.values())
    for name, points in rewards.items():
        assert len({tuple(point) for point in points}) > 1, name
    assert len({str(points) for points in rewards.values()}) >= len(rewards) - 1  # mod decodes what rsoups mixes


def test_metrics_are_logged_per_objective(family):
    row = tiny.lines(family, "methods/moc")[-1]
    for name in ("P2A", "P2B"):
        assert 0 <= row[f"rewards/{name}/mean"] <= 1 and row[f"rewards/{name}/std"] >= 0
    assert row["objective/weights/reward"] + row["objective/weights/control"] == pytest.approx(1)
    assert -1 <= row["objective/gradient_cosine"] <= 1 and -1 <= row["rewards/correlation"] <= 1
    soups = tiny.lines(family, "methods/rsoups")[-1]
    assert "objective/scores/P2A" in soups and not any(name.startswith("rewards/") for name in soups)


def test_finished_entries_are_skipped_and_new_ones_trained(family, tmp_path, monkeypatch):
    trained = []
    fake = dataclasses.replace(policy.TRAINER, train=lambda run, settings, stage: trained.append(stage) or {})
    monkeypatch.setattr(policy, "TRAINER", fake)
    again(shutil.copytree(family, tmp_path / "run"), tiny_family.settings((*tiny_family.QUICK, "psoups")))
    assert trained == ["methods/psoups"]


def test_an_entry_whose_settings_changed(family, tmp_path):
    config = tiny_family.settings()
    config.methods.moc.combine.control_weight = 2.0
    with pytest.raises(UserError, match=r"methods.moc: trained with other settings before; choose another name for it"):
        again(shutil.copytree(family, tmp_path / "run"), config)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"train": "magic"},
            r"methods: train 'magic' is no trainer; choose one of modpo, policy, ric, or pack",
        ),
        ({"rolouts": 3}, r"methods.moc.rolouts: no such setting; did you mean methods.moc.rollouts\?"),
        ({"answer": "guess"}, r"methods.moc.answer: 'guess' is unknown; choose one of soup, bone, mod"),
        ({"of": "nobody"}, r"methods.moc.of: there is no entry 'nobody'; name one of the others"),
        (
            {"of": "rsoups", "answer": "mod", "divergence": "alpha"},
            r"methods.moc.divergence: divergence 'alpha' is unknown; choose reverse_kl, forward_kl or a number",
        ),
    ],
)
def test_wrong_entries(family, change, message):
    config = tiny_family.settings()
    with config.methods.moc.unlocked():
        config.methods.moc.update(change)
    with pytest.raises(UserError, match=message):
        methods.evaluated(tiny.start(family, config), "moc")


# ---- the best of several answers


def test_the_best_answer_on_a_front_is_that_with_the_highest_weighed_rewards(family):
    """Of the base, by the point of the front; of one answer it is the answer itself."""
    config = tiny_family.settings()
    for N in (1, 3):
        config.methods[f"best{N}"] = {"train": "", "prompted": False, "best_of": N}
    run = tiny.start(family, config)
    front = Front(run)
    points, names, rewarder = front.points[:2], run.audience.objectives, reward.load(run)
    for N in (1, 3):
        front.sampled.clear()
        front.answers(f"best{N}", methods.evaluated(run, f"best{N}"), points)
        rows = [Row(q, "", ()) for _ in points for q in front.requests for _ in range(N)]
        texts = sample_rows(run, None, rows, functools.partial(run.streams.key, "evaluate_front/answers"))
        raw = answer_rewards(run, rewarder, [row.request for row in rows], texts, "test")[0]
        scaled = ((raw - rewarder["mean"]) / rewarder["std"])[:, : len(names)]
        assert len(front.sampled) == len(rows) // N
        for i, kept in enumerate(front.sampled):
            own = slice(N * i, N * i + N)
            total = np.nan_to_num(scaled[own] @ np.array([kept["weights"][name] for name in names]), nan=-np.inf)
            assert kept["prompt"] == rows[N * i].request and kept["answer"] == texts[own][int(total.argmax())]


# ---- who answers how


def evaluated(family, entry, monkeypatch, name="other"):
    """The evaluated policy of `entry`; its bank is the names of its adapters."""
    config = tiny_family.settings()
    with config.methods.unlocked():
        config.methods[name] = entry
    run = tiny.start(family, config)
    monkeypatch.setattr("pjrlhf.algorithms.banks.load", lambda run, stage, names: {"layers": list(names)})
    return methods.evaluated(run, name)


P = (0.7, 0.3)


def test_soups_are_mixed_by_the_weights(family, monkeypatch):
    found = evaluated(family, {"preferences": {"kind": "own"}}, monkeypatch)
    assert (found.mix(P), found.words(P), found.points) == (P, "", None)
    told = evaluated(family, {"preferences": {"kind": "own"}, "prompt_preference": "half"}, monkeypatch)
    assert told.words(P) == "keep it short . tell me everything ." and told.words((1.0, 0.0)) == "keep it short ."


def test_a_policy_per_point_answers_for_its_point_alone(family, monkeypatch):
    entry = {"preferences": {"kind": "fixed", "points": tiny_family.POINTS}}
    found = evaluated(family, entry, monkeypatch)
    assert found.points == list(tiny_family.POINTS) and found.mix(tiny_family.POINTS[1]) == (0.0, 1.0, 0.0)
    for_all = evaluated(family, {"preferences": {"kind": "fixed", "points": ((0.5, 0.5),)}}, monkeypatch)
    assert for_all.points is None and for_all.mix(P) == (1.0,)


def test_bone_soups_invert_their_mixing(family, monkeypatch):
    points = ((0.7, 0.3), (0.3, 0.7))
    entry = {"preferences": {"kind": "fixed", "points": points}, "answer": "bone", "extrapolation": 0.2}
    found = evaluated(family, entry, monkeypatch)
    # (0.6, 0.4) / (1 - 0.2) = 0.9375 (0.7, 0.3) + 0.3125 (0.3, 0.7)
    np.testing.assert_allclose(found.mix((0.6, 0.4)), (0.9375, 0.3125))
    plain = evaluated(family, {k: v for k, v in entry.items() if k != "extrapolation"}, monkeypatch)
    np.testing.assert_allclose(plain.mix(points[0]), (1, 0), atol=1e-9)


def test_a_conditioned_policy_is_told_the_weights(family, monkeypatch):
    entry = {
        "preferences": {"kind": "dirichlet"},
        "prompt_preference": "always",
        "prompt_format": {"form": "tally", "levels": 10},
    }
    found = evaluated(family, entry, monkeypatch)
    assert found.mix(P) == (1.0,) and found.words(P) == " ".join(["short"] * 7 + ["everything"] * 3)
    mixed = evaluated(family, {"preferences": {"kind": "dirichlet"}, "mix": "weights"}, monkeypatch)
    assert mixed.mix(P) == P and mixed.words(P) == "" and mixed.bank == {"layers": ["P2A", "P2B"]}


def test_rewards_in_context_is_told_the_target(family, monkeypatch):
    entry = {"train": "ric", "prompt_format": {"form": "tally", "levels": 10}, "target": "max"}
    found = evaluated(family, entry, monkeypatch)
    assert found.words((0.5, 0.5)) == " ".join(["short"] * 10 + ["everything"] * 10)


def test_the_base_is_told_sentences_or_nothing(family, monkeypatch):
    assert evaluated(family, {"train": ""}, monkeypatch).words((0.0, 1.0)) == "tell me everything ."
    silent = evaluated(family, {"train": "", "prompted": False}, monkeypatch)
    assert silent.words((0.0, 1.0)) == "" and silent.bank is None and silent.mix(P) == ()


# ---- one-hot weights, seeds


@pytest.mark.slow
def test_a_policy_for_a_corner_is_the_policy_of_that_reward(family, tmp_path):
    """The weighted sum with one-hot weights trains what the single objective trains."""
    config = tiny_family.settings()
    run = tiny.start(family, config)
    banks = []
    for spec in ({"kind": "own"}, {"kind": "fixed", "points": ((1.0, 0.0), (0.0, 1.0))}):
        settings = methods.settings_of(run, "rsoups").replace(preferences=spec)
        method = policy.method_of(run, settings)
        state = method.init()
        for _ in range(2):
            state, _ = method.step(state, next(method.batches))
        banks.append(state.trainable["bank"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), *banks)
    moved = jax.tree.map(lambda x: float(jnp.abs(x[0] - x[1]).max()), banks[0])
    assert max(jax.tree.leaves(moved)) > 1e-3, "the two policies are one: this test could not fail"


def test_seeds_are_averaged(summary):
    other = json.loads(json.dumps(summary))
    for found in other["methods"].values():
        found["hypervolume"] += 0.2
        found["points"]["rewards"] = (np.array(found["points"]["rewards"]) + 0.4).tolist()
    found = seeds.average([summary, other])
    one, mean = summary["methods"]["moc"], found["methods"]["moc"]
    assert mean["hypervolume"]["mean"] == pytest.approx(one["hypervolume"] + 0.1)
    # Student's t for two values: 12.706 standard errors.
    assert mean["hypervolume"]["high"] - mean["hypervolume"]["mean"] == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert mean["spearman"]["low"] == mean["spearman"]["high"] == pytest.approx(one["spearman"])
    np.testing.assert_allclose(mean["points"]["rewards"], np.array(one["points"]["rewards"]) + 0.2)
    assert found["front"]["seeds"] == 2 and mean["samples"] == one["samples"]


def test_every_seed_has_its_folder(tmp_path, monkeypatch, summary):
    ran = []

    def fake(config, workdir):
        if config.seeds:
            return seeds.run(config, workdir)
        ran.append((config.seed, workdir.path.name))
        folder = workdir.stage("report")
        (folder / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(stages, "run", fake)
    config = tiny_family.settings(seeds=(3, 5))
    fake(config, Workdir(tmp_path))
    assert ran == [(3, "seed3"), (5, "seed5")]
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["front"]["seeds"] == 2


@pytest.mark.parametrize(
    "changes, message",
    [({"seeds": (1, 1)}, "seeds: .* repeats one"), ({"seeds": (1,), "stages": ("sft",)}, "end in evaluate_front")],
)
def test_wrong_seeds(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        seeds.run(tiny_family.settings(**changes), Workdir(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("variant", ["two", "three", "ablation"])
def test_the_whole_family(tmp_path, variant):
    names = tuple(tiny.catalogue("family").get_config(variant).methods)
    if variant == "ablation":  # those that no other test trains
        names = ("moc_held_out", "moc_mixed", "moc_per_preference", "moc_per_reward", "pama", "tchebycheff")
    size = 3 if variant == "three" else 2
    points = simplex_grid(size).tolist()
    config = tiny_family.settings(names, variant, evaluate_front__points=points)
    folder = tiny.run(tmp_path / "run", config)
    found = json.loads((folder / "report" / "summary.json").read_text())["methods"]
    assert set(found) == set(names)
    assert all(np.isfinite(one["hypervolume"]) for one in found.values())


@pytest.mark.slow
@pytest.mark.real_data
def test_sentiment_against_brevity_on_a_real_model(shared, tmp_path):
    config = tiny.catalogue("moc").get_config("stories")
    sizes = {
        "comparisons.pairs": 24,
        "reward.steps": 2,
        "reward.batch_size": 8,
        "reward.calibration_samples": 16,
        "sample_rows": 16,
    }
    sizes |= {"policy.steps": 2, "policy.rollouts": 4, "data.max_completion": 16, "evaluate_front.base_samples": 1}
    config.update_from_flattened_dict(sizes | {"model.path": str(shared / "models" / "stories260K")})
    config.evaluate_front.points = tiny_family.POINTS
    for name in list(config.methods):
        if name not in ("moc", "rsoups"):
            del config.methods[name]
    config.methods.rsoups.rollouts = 4
    folder = tiny.run(tmp_path / "run", config)
    found = json.loads((folder / "report" / "summary.json").read_text())
    assert found["front"]["objectives"] == ["happy", "short"] and set(found["methods"]) == {"moc", "rsoups"}
    assert found["front"]["high"][0] <= 1 and found["front"]["low"][1] < 0
