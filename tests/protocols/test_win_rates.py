"""Answers of a policy against those of the pooled one, as the people judge them whose comparisons were simulated."""

import dataclasses
import types

import numpy as np
import pytest
from support import tiny, tiny_users

from pjrlhf.data.schema import Example
from pjrlhf.feedback.population import Labels
from pjrlhf.protocols.users import _win_rates

SHORT, LONG = "it holds air .", "it holds air . it can burn . it helps learning ."
PROMPTS = ("what is rain ?", "what is sun ?")
OPTIONS = {"resamples": 50, "seed": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with the rules of the synthetic environment; nothing is trained."""
    return tiny.start(tmp_path_factory.mktemp("run"), tiny_users.settings())


def people(**extra):
    """Pairs of people, of whom only the columns count."""
    examples = [
        Example(prompt=prompt, chosen=LONG, rejected=SHORT, user_id=user, extra=columns)
        for user, columns in extra.items()
        for prompt in PROMPTS
    ]
    return types.SimpleNamespace(tables={"train": types.SimpleNamespace(examples=examples)})


EXAMPLES = [Example(prompt=prompt) for prompt in PROMPTS]
BRIEF, FULL = {"persona": "P2A"}, {"persona": "P2B"}


def test_each_person_judges_by_their_own_persona(run):
    """Whoever wants it short wins with short answers; the same answers to somebody else lose; equal ones are ties."""
    pairs = people(ann=BRIEF, bob=BRIEF, cleo=FULL)
    own = {"ann": [SHORT, SHORT], "bob": [SHORT, LONG], "cleo": [SHORT, LONG]}
    others = {"cleo": [LONG, LONG], "bob": [LONG, LONG], "ann": [LONG, LONG]}  # by name, whatever the order
    found = _win_rates(run, pairs, EXAMPLES, own, others, OPTIONS)
    assert found["users"] == {"ann": 1.0, "bob": 0.75, "cleo": 0.25}
    assert found["mean"] == pytest.approx(2 / 3) and found["ties"] == pytest.approx(2 / 6) and found["n"] == 6
    assert found["low"] <= found["mean"] <= found["high"]
    groups = found["groups"]
    assert list(groups) == ["P2A", "P2B"] and groups["P2A"]["mean"] == 0.875 and groups["P2B"]["mean"] == 0.25
    turned = _win_rates(run, pairs, EXAMPLES, others, own, OPTIONS)
    assert {user: 1 - rate for user, rate in turned["users"].items()} == pytest.approx(found["users"])
    same = _win_rates(run, pairs, EXAMPLES, own, own, OPTIONS)
    assert set(same["users"].values()) == {0.5} and same["ties"] == 1.0


def test_mixed_tastes_judge_by_all_their_weights(run):
    """By the same gap as their comparisons were labelled by, whose sign the largest weight alone does not give."""
    tastes = {f"u{i}": {"P2A": w, "P2B": 1 - w} for i, w in enumerate((0.05, 0.45, 0.5, 0.55, 0.95))}
    pairs = people(**{user: {"persona": max(taste, key=taste.get), "taste": taste} for user, taste in tastes.items()})
    labels = Labels(run)
    labels.calibrate(tiny_users.TINY["population.personas"], [(one, LONG, SHORT) for one in PROMPTS])
    own, others = (dict.fromkeys(tastes, [text] * 2) for text in (SHORT, LONG))
    found = _win_rates(run, pairs, EXAMPLES, own, others, OPTIONS)
    want = {
        user: np.mean([(1 + np.sign(round(labels.gap(taste, one, SHORT, LONG), 9))) / 2 for one in PROMPTS])
        for user, taste in tastes.items()
    }
    assert found["users"] == want and want["u0"] == 0.0 and want["u4"] == 1.0
    plain = [{**one.extra, "taste": {one.extra["persona"]: 1.0}} for one in pairs.tables["train"].examples]
    alone = types.SimpleNamespace(
        examples=[
            dataclasses.replace(one, extra=extra)
            for one, extra in zip(pairs.tables["train"].examples, plain, strict=True)
        ]
    )
    pure = _win_rates(run, types.SimpleNamespace(tables={"train": alone}), EXAMPLES, own, others, OPTIONS)
    assert set(pure["users"].values()) == {0.0, 1.0}
