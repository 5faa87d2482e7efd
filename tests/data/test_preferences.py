"""Preference sentences are written from ids and read back, whatever happened to their commas."""

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
    split_sentences,
)
from pjrlhf.errors import UserError

REGISTRIES = {"paper": PAPER, "synthetic": synthetic.PREFERENCES}
# As spelled in the released data of Personalized Soups, without the commas of its own prompts.
RELEASED = {
    "P2A": "Generate a response that is concise and to the point without being verbose.",
    "P2B": "Generate a response that is very informative without missing any background information.",
    "P3A": "Generate a response that is friendly witty funny and humorous like a close friend.",
}


@pytest.mark.parametrize("registry", REGISTRIES.values(), ids=REGISTRIES)
def test_eight_kinds_of_people(registry):
    assert list(dimensions(registry, registry)) == ["expertise", "informativeness", "style"]
    found = combinations(registry, registry)
    assert len(found) == len(set(found)) == 8
    assert found[0] == ("P1A", "P2A", "P3A") and found[-1] == ("P1B", "P2B", "P3B")
    assert combinations(registry, ["P3B", "P1A", "P3A"]) == [("P3B", "P1A"), ("P3A", "P1A")]


@pytest.mark.parametrize("registry", REGISTRIES.values(), ids=REGISTRIES)
def test_round_trip(registry):
    request = "What is rain, really? Tell me. Now"
    for ids in [*combinations(registry, registry), *((name,) for name in registry), ()]:
        text = f"{request} {sentences(registry, ids)}"
        assert split_sentences(registry, text) == (request, ids)
        backwards = tuple(reversed(ids))
        assert split_sentences(registry, f"{request} {sentences(registry, backwards)}")[1] == backwards


@pytest.mark.parametrize("name", RELEASED)
def test_missing_commas_are_forgiven(name):
    for sentence in (RELEASED[name], RELEASED[name].lower().rstrip("."), RELEASED[name].replace(" ", "  ")):
        assert split_sentences(PAPER, f"Explain rain. {sentence}\n") == ("Explain rain.", (name,))
    both = f"Explain rain.\n{RELEASED[name]} {PAPER['P1B'].sentence}"
    assert split_sentences(PAPER, both) == ("Explain rain.", (name, "P1B"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Explain rain.",
        f"He wrote: {PAPER['P3B'].sentence} What did he mean?",  # quoted, not stated
        f"Explain rain. {PAPER['P3B'].sentence[:-8]}",
        f"Explain rain. {PAPER['P3B'].sentence[:-1]}ism.",
        "Explain rain. Re" + PAPER["P3B"].sentence[0].lower() + PAPER["P3B"].sentence[1:],
    ],
)
def test_other_texts_state_nothing(text):
    assert split_sentences(PAPER, text) == (text, ())


def test_a_preference_without_a_sentence_is_never_found_and_adds_no_space():
    registry = {
        "short": Preference(dimension="length", sentence=""),
        "kind": Preference(dimension="tone", sentence="Be kind."),
    }
    assert sentences(registry, ["short", "kind", "short"]) == "Be kind."
    assert sentences(registry, ["short", "short"]) == ""
    assert split_sentences(registry, "Explain rain. Be kind.") == ("Explain rain.", ("kind",))


def test_the_sentences_of_one_registry_differ():
    for registry in REGISTRIES.values():
        assert len({preference.sentence for preference in registry.values()}) == len(registry) == 6


def test_weights_in_words():
    registry, ids = synthetic.PREFERENCES, ("P2A", "P2B")
    assert PreferencePrompt()(registry, ids, (1.0, 0.0)) == "keep it short ."
    assert PreferencePrompt()(registry, ids, (0.6, 0.4)) == "keep it short . tell me everything ."
    assert PreferencePrompt(form="numbers")(registry, ids, (0.25, 0.75)) == "short 0.2 everything 0.8"
    assert PreferencePrompt(form="numbers", decimals=2)(registry, ids, (0.25, 0.75)) == "short 0.25 everything 0.75"
    assert (
        PreferencePrompt(form="tally", levels=4)(registry, ids, (0.25, 0.75))
        == "short everything everything everything"
    )
    assert PreferencePrompt(form="numbers")({"a": Preference(dimension="d", sentence="")}, ["a"], [1.0]) == "a 1.0"
    with pytest.raises(UserError, match="form: 'colours' is unknown; choose one of sentences, numbers, tally"):
        PreferencePrompt(form="colours")


@pytest.mark.parametrize("levels", [4, 5, 10])
def test_the_parts_of_shares_sum_to_all_levels(levels):
    rng = np.random.default_rng(0)
    for size in (2, 3, 5):
        for weights in [*rng.dirichlet(np.ones(size), 50).tolist(), [1 / size] * size]:
            counts = parts(weights, levels)
            assert sum(counts) == levels and all(abs(c - levels * w) < 1 for c, w in zip(counts, weights, strict=True))
    assert parts([0.3, 0.7], 10) == [3, 7] and parts([1.0, 0.8], 5) == [5, 4]
