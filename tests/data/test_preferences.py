"""Preference sentences and weights in words."""

import numpy as np
import pytest

from pjrlhf.data import synthetic
from pjrlhf.data.preferences import (
    PAPER,
    Preference,
    PreferencePrompt,
    combinations,
    dimensions,
    parts,
    sentences,
)
from pjrlhf.errors import UserError

SETS = {"paper": PAPER, "synthetic": synthetic.PREFERENCES}


@pytest.mark.parametrize("preferences", SETS.values(), ids=SETS)
def test_eight_personas(preferences):
    assert list(dimensions(preferences, preferences)) == ["expertise", "informativeness", "style"]
    found = combinations(preferences, preferences)
    assert len(found) == len(set(found)) == 8
    assert found[0] == ("P1A", "P2A", "P3A") and found[-1] == ("P1B", "P2B", "P3B")
    assert combinations(preferences, ["P3B", "P1A", "P3A"]) == [("P3B", "P1A"), ("P3A", "P1A")]


def test_a_preference_without_a_sentence_adds_no_space():
    preferences = {
        "short": Preference(dimension="length", sentence=""),
        "kind": Preference(dimension="tone", sentence="Be kind."),
    }
    assert sentences(preferences, ["short", "kind", "short"]) == "Be kind."
    assert sentences(preferences, ["short", "short"]) == ""


def test_the_sentences_of_a_set_differ():
    for preferences in SETS.values():
        assert len({preference.sentence for preference in preferences.values()}) == len(preferences) == 6


def test_weights_in_words():
    preferences, ids = synthetic.PREFERENCES, ("P2A", "P2B")
    assert PreferencePrompt()(preferences, ids, (1.0, 0.0)) == "keep it short ."
    assert PreferencePrompt()(preferences, ids, (0.6, 0.4)) == "keep it short . tell me everything ."
    assert PreferencePrompt(form="numbers")(preferences, ids, (0.25, 0.75)) == "short 0.2 everything 0.8"
    assert PreferencePrompt(form="numbers", decimals=2)(preferences, ids, (0.25, 0.75)) == "short 0.25 everything 0.75"
    assert (
        PreferencePrompt(form="tally", levels=4)(preferences, ids, (0.25, 0.75))
        == "short everything everything everything"
    )
    assert PreferencePrompt(form="numbers")({"a": Preference(dimension="d", sentence="")}, ["a"], [1.0]) == "a 1.0"
    with pytest.raises(UserError, match="form: 'colours' is unknown; choose one of sentences, numbers, tally"):
        PreferencePrompt(form="colours")


@pytest.mark.parametrize("levels", [4, 5, 10])
def test_the_parts_of_weights_sum_to_all_levels(levels):
    rng = np.random.default_rng(0)
    for size in (2, 3, 5):
        for weights in [*rng.dirichlet(np.ones(size), 50).tolist(), [1 / size] * size]:
            counts = parts(weights, levels)
            assert sum(counts) == levels and all(abs(c - levels * w) < 1 for c, w in zip(counts, weights, strict=True))
    assert parts([0.3, 0.7], 10) == [3, 7] and parts([1.0, 0.8], 5) == [5, 4]
