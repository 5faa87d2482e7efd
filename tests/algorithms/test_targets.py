"""What policies are trained for: names, weights, held-out preferences, and what prompts say."""

import flax.traverse_util
import jax
import numpy as np
import pytest
from support import tiny

from pjrlhf.algorithms.policy import settings_of
from pjrlhf.algorithms.targets import NEAR, PromptRows, point_name, point_names, simplex_points, targets_of
from pjrlhf.errors import UserError
from pjrlhf.objectives.simplex import simplex_grid

CORNERS = ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.5, 0.5))


@pytest.fixture(scope="module")
def run(finished):
    return tiny.start(finished, tiny.settings(data__max_prompt=40, model__max_length=64))


def targets(run, **changes):
    nested = flax.traverse_util.unflatten_dict({tuple(key.split("__")): value for key, value in changes.items()})
    return targets_of(run, settings_of(run).replace(**nested))


def test_soups_have_a_policy_per_reward_and_one_objective_each(run):
    found = targets(run)
    assert found.policies == found.adapters == tiny.REWARDS and not found.sampled
    assert [found.target(0, k).objectives for k in range(5)] == [(0,), (1,), (2,), (3,), (4,)]
    assert found.target(7, 2).weights == (1.0,)
    np.testing.assert_array_equal(found.objectives, np.arange(5)[:, None])
    some = targets(run, preferences__objectives=("P2B", "P1A"))
    assert some.policies == ("P2B", "P1A") and some.objectives.tolist() == [[3], [0]]
    assert some.target(0, 0).objectives == (3,) and some.words(some.target(0, 0)) == "tell me everything ."


def test_a_policy_per_point(run):
    found = targets(run, preferences__kind="fixed", preferences__points=CORNERS)
    assert found.policies == ("P1A1", "P2A0.5+P2B0.5") and found.target(3, 1).weights == CORNERS[1]
    assert found.target(3, 1).objectives == (0, 1, 2, 3) and found.objectives.tolist() == [[0, 1, 2, 3]]
    assert point_name(("a", "b"), (1 / 3, 2 / 3)) == "a0.333+b0.667"


def test_points_by_name(run):
    def points(name):
        return targets(run, preferences__kind="fixed", preferences__points=name).points

    assert points("corners") == [tuple(row) for row in np.eye(4).tolist()] and points("centre") == [(0.25,) * 4]
    assert len(points("simplex")) == 19 and len(points("subsets")) == 15 and (0.5, 0.0, 0.5, 0.0) in points("subsets")
    np.testing.assert_allclose(points("mixed"), 0.1 + 0.6 * np.eye(4))
    assert points("between") == [tuple(row) for row in simplex_grid(4, held_out=True).tolist()]


def test_drawn_weights_are_the_same_whenever_they_are_asked_and_spread_over_the_simplex(run):
    for kind, count in (("grid", 2), ("dirichlet", 60), ("combinations", 4)):
        found = targets(run, preferences__kind=kind, preferences__points=CORNERS)
        drawn = [found.target(i, 0) for i in range(60)]
        assert drawn == [found.target(i, 0) for i in range(60)] and found.policies == ("policy",)
        assert len({target.weights + target.objectives for target in drawn}) == count
        assert all(sum(target.weights) == pytest.approx(1) for target in drawn)
    means = np.mean([targets(run, preferences__kind="dirichlet").target(i, 0).weights for i in range(400)], axis=0)
    np.testing.assert_allclose(means, 0.25, atol=0.05)


def test_weights_between_two_points(run):
    """Between the corners of a simplex: on its edges, and uniform there."""
    found = targets(run, preferences__kind="between", preferences__points="corners")
    drawn = np.array([found.target(i, 0).weights for i in range(2000)])
    assert found.sampled and found.policies == ("policy",) and ((drawn > 0).sum(1) == 2).all()
    np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(drawn.mean(0), 0.25, atol=0.03)
    # Half of the pairs hold a corner, whose weight is then uniform: E[w^2] = 1 / 2 * 1 / 3.
    np.testing.assert_allclose((drawn**2).mean(0), 1 / 6, atol=0.03)
    with pytest.raises(UserError, match="between takes two or more; add some"):
        targets(run, preferences__kind="between", preferences__points="centre")


def test_held_out_preferences_stay_held_out(run):
    found = targets(run, preferences__kind="grid", preferences__points=CORNERS, preferences__held_out=CORNERS[1:])
    assert {found.target(i, 0).weights for i in range(40)} == {CORNERS[0]}
    two = tiny.start(run.workdir.path, tiny.settings(objectives=("P2A", "P2B")))
    held = tuple((w, 1 - w) for w in np.round(np.arange(0.05, 1, 0.1), 2).tolist())
    found = targets(two, preferences__kind="dirichlet", preferences__held_out=held)
    drawn = np.array([found.target(i, 0).weights for i in range(300)])
    assert np.abs(drawn[:, :1] - [h[0] for h in held]).min() >= NEAR
    with pytest.raises(UserError, match="none is left to train on"):
        targets(run, preferences__kind="grid", preferences__points=CORNERS, preferences__held_out=CORNERS)


def test_a_combination_takes_one_preference_of_each_dimension(run):
    found = targets(run, preferences__kind="combinations", prompt_preference="always")
    for i in range(20):
        target = found.target(i, 0)
        assert target.weights == (0.5, 0.5) and target.objectives[0] in (0, 1) and target.objectives[1] in (2, 3)
        words = found.words(target)
        assert words.count(".") == 2 and ("short" in words) == (2 in target.objectives)
    assert found.objectives is None
    fewer = targets(run, preferences__kind="combinations", preferences__objectives=("P1A", "P1B", "P2A"))
    assert {fewer.target(i, 0).objectives for i in range(30)} == {(0, 2), (1, 2)}


def test_rows_state_the_target_in_the_prompt_and_never_to_the_reward_model(run):
    found = targets(run, preferences__kind="dirichlet", prompt_preference="half", prompt_format__form="tally")
    rows = PromptRows(found, run.records, run.text, 500)
    assert len(rows) >= 500 and len(rows) % (2 * len(run.records.requests[0])) == 0
    for i in (0, 1, 2, 3, len(rows) - 1):
        row = rows[i]
        (target,) = row.targets
        text = run.workspace.tokenizer.decode(row.prompts[0])
        assert (found.words(target) in text) == bool(i % 2)
        assert row.reward_prompt == run.workspace.tokenizer.encode_prompt(
            run.records.ask(rows.requests[i // 2 % len(rows.requests)])
        )
    assert rows[1].targets != rows[1 + 2 * len(rows.requests)].targets, "a request comes with ever new weights"


@pytest.mark.parametrize("kind", ["own", "combinations"])
def test_batches_hold_the_rows_of_each_policy_together(run, kind):
    """[K, n, ...], with the samples of a prompt side by side."""
    found = targets(run, preferences__kind=kind, prompt_preference="always", prompt_format__form="sentences")
    data, K, tokenizer = PromptRows(found, run.records, run.text, 100), len(found.policies), run.workspace.tokenizer
    rows = [data[i] for i in (5, 2, 11)]
    batch = data.collate(rows, samples=2)
    assert {x.shape[:2] for x in jax.tree.leaves(batch)} == {(K, 6)}
    for k in range(K):
        for i in range(6):
            row = rows[i // 2]
            for prompts, ids in ((batch.prompts, row.prompts[k]), (batch.reward_prompts, row.reward_prompt)):
                assert prompts.tokens[k, i][prompts.valid[k, i]].tolist() == ids
                assert prompts.valid[k, i].tolist() == sorted(prompts.valid[k, i].tolist()), "left-padded"
            target = row.targets[k]
            assert tuple(batch.targets.objectives[k, i].tolist()) == target.objectives
            np.testing.assert_allclose(batch.targets.weights[k, i], target.weights, rtol=1e-6)
            assert batch.targets.group[k, i] == target.group
            assert found.words(target) in tokenizer.decode(row.prompts[k])


def test_words_the_tokenizer_does_not_know(run):
    found = targets(run, preferences__kind="dirichlet", prompt_preference="always", prompt_format__form="numbers")
    with pytest.raises(UserError, match=r"prompt_format 'easy 0\..*no token for some of it.*tally"):
        PromptRows(found, run.records, run.text)[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preferences__kind": "all"}, r"preferences\.kind: 'all' is unknown; choose one of own"),
        ({"preferences__kind": "fixed", "preferences__points": ((0.5, 0.5),)}, "2 weights; give one for each of"),
        ({"preferences__kind": "grid", "preferences__points": ((0.5, 0.6, 0.0, 0.0),)}, "not shares"),
        ({"preferences__kind": "fixed", "preferences__points": ()}, "none is left to train on"),
        (
            {"preferences__kind": "grid", "preferences__points": "all"},
            r"preferences\.points: 'all' is unknown; choose one of simplex",
        ),
        ({"preferences__objectives": ("P9",)}, "no reward model for 'P9'"),
        ({"mix": "both"}, "mix: 'both' is unknown; choose one of own, weights"),
        ({"mix": "weights"}, "needs weights over all objectives"),
        ({"prompt_preference": "often"}, "prompt_preference: 'often' is unknown; choose one of .*never, always, half"),
    ],
)
def test_wrong_settings(run, changes, message):
    with pytest.raises(UserError, match=message):
        targets(run, **changes)


def test_mixed_adapters_take_a_rank(run):
    full = tiny.start(run.workdir.path, tiny.settings(adapter__rank=0, stages=("sft",)))
    with pytest.raises(UserError, match="which takes adapters; set --config"):
        targets(full, mix="weights", preferences__kind="dirichlet")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (
            ((0.3001, 0.6999, 0.0, 0.0), (0.3, 0.7, 0.0, 0.0)),
            "two of them are P1A0.3.P1B0.7 in three digits; leave",
        ),
        (((1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)), "two of them are P1A1 in three digits; leave one out"),
        (((0.5, 0.6, 0.0, 0.0),), "not shares; none may be below 0, and their sum is 1"),
    ],
)
def test_points_that_cannot_name_policies(run, points, message):
    with pytest.raises(UserError, match=message):
        targets(run, preferences__kind="fixed", preferences__points=points)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 10**400, "a", None, [0.5]])
def test_points_are_rows_of_finite_numbers(weight):
    with pytest.raises(UserError, match=r"^preferences.points"):
        simplex_points([(weight, 0.5)], ("a", "b"), "points")
    with pytest.raises(UserError, match=r"^preferences.points"):
        simplex_points([weight], ("a", "b"), "points")


def test_names_of_policies_name_folders():
    with pytest.raises(UserError, match="is too long for the name of a folder; give objectives shorter names"):
        point_names(("a" * 90, "b" * 90, "c" * 90), [(0.3, 0.3, 0.4)])
    assert point_names(("a", "b"), [(0.3, 0.7), (0.0, 1.0)]) == ("a0.3+b0.7", "b1")
