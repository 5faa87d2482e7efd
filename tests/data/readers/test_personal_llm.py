"""PersonalLLM: people are weights of ten reward models, and compare the answers that these score."""

import numpy as np
import pytest
import scipy.stats
from support.raw_data import read, write

from pjrlhf.data.readers.personal_llm import COST, SCALES, people


def row(prompt="Why is the sky blue?", **changes):
    """Answer i has the raw score mean + (i - 4) sd of each reward model, so that its standard score is i - 4."""
    answers = {f"response_{i}": f"Answer {i}." for i in range(1, 9)}
    scores = {
        f"response_{i}_{name}": mean + (i - 4) * deviation
        for i in range(1, 9)
        for name, (mean, deviation) in SCALES.items()
    }
    return {"prompt": prompt, **answers, **scores, **changes}


def test_people_are_those_of_the_authors():
    """scipy.stats.dirichlet.rvs with a seed, as their code draws them."""
    drawn = scipy.stats.dirichlet.rvs([0.01] * 10, size=7, random_state=100)
    np.testing.assert_array_equal(people(7, 0.01, 100), drawn)
    assert len(SCALES) == 10 and list(SCALES) == sorted(SCALES)


def test_answers_have_standardised_rewards(tmp_path):
    path = write(tmp_path / "train.parquet", [row()])
    found = read("personal_llm", path, gives="answers").good
    assert [one["completion"] for one in found] == [f"Answer {i}." for i in range(1, 9)]
    for i, one in enumerate(found, 1):
        assert one["rewards"] == pytest.approx(dict.fromkeys(SCALES, i - 4.0))
    raw = read("personal_llm", path, gives="answers", normalize=False).good[3]["rewards"]
    assert raw == pytest.approx({name: mean for name, (mean, _) in SCALES.items()})
    turned = read("personal_llm", path, gives="answers", negate_cost=True).good[0]["rewards"]
    assert turned[COST] == pytest.approx(3.0) and turned["gemma_2b"] == pytest.approx(-3.0)


def test_people_compare_their_best_and_worst_answers(tmp_path):
    path = write(tmp_path / "train.jsonl", [row(), row("Why is grass green?")])
    found = read("personal_llm", path, people=3)
    assert len(found.good) == 6 and {one["user_id"] for one in found.good} == {"person 0", "person 1", "person 2"}
    for one in found.good:
        assert (one["chosen"], one["rejected"]) == ("Answer 8.", "Answer 1.")
        assert one["margin"] == pytest.approx(7.0)
        assert sum(one["preference_weights"].values()) == pytest.approx(1.0)
    for person in range(3):
        prompts = [one["prompt"] for one in found.good if one["user_id"] == f"person {person}"]
        assert sorted(prompts) == ["Why is grass green?", "Why is the sky blue?"]


def test_a_person_prefers_by_their_own_weights(tmp_path):
    """Reward models that disagree: gemma_2b likes answer 1 alone, all others like answer 2 alone."""
    flat = {f"response_{i}_{name}": 0.0 for i in range(1, 9) for name in SCALES}
    one = row(**flat | {f"response_{1 if name == 'gemma_2b' else 2}_{name}": 1.0 for name in SCALES})
    found = read("personal_llm", write(tmp_path / "train.jsonl", [one]), people=40, normalize=False).good
    weights = people(40, 0.01, 100)[:, list(SCALES).index("gemma_2b")]
    for record in found:
        weight = weights[int(record["user_id"].split()[1])]
        assert record["chosen"] == ("Answer 1." if weight > 0.5 else "Answer 2.")
        assert record["margin"] == pytest.approx(max(weight, 1 - weight), abs=1e-6)
    assert {record["chosen"] for record in found} == {"Answer 1.", "Answer 2."}


def test_random_pairs_are_drawn_by_the_seed(tmp_path):
    path = write(tmp_path / "train.jsonl", [row(f"Question {i}?") for i in range(9)])
    settings = {"people": 4, "pair": "random", "comparisons": 5}
    first = read("personal_llm", path, **settings).good
    assert first == read("personal_llm", path, **settings).good
    assert first != read("personal_llm", path, seed=1, **settings).good
    assert len(first) == 20 and len({(one["chosen"], one["rejected"]) for one in first}) > 5
    assert all(one["chosen"] > one["rejected"] and one["margin"] > 0 for one in first)


def test_ties_and_identical_answers_are_counted(tmp_path):
    flat = {f"response_{i}_{name}": 0.5 for i in range(1, 9) for name in SCALES}
    same = {f"response_{i}": "The same." for i in range(1, 9)}
    path = write(tmp_path / "train.jsonl", [row(**flat), row(**same)])
    for pair in ("extremes", "random"):
        found = read("personal_llm", path, people=3, pair=pair)
        assert not found.good and found.dropped == {"identical answers": 3, "ties": 3}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"response_3_gemma_7b": None}, "response_3_gemma_7b is null"),
        ({"response_3_gemma_7b": "high"}, "bad response_3_gemma_7b"),
        ({"response_8": None}, "response_8 is null"),
        ({"prompt": " "}, "empty prompt"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, reason):
    found = read("personal_llm", write(tmp_path / "train.jsonl", [row(), row(**change)]), people=2)
    assert found.bad == [("train.jsonl line 2", reason)] and len(found.good) == 2
    short = {name: value for name, value in row().items() if name != "response_2_mistral_ray"}
    assert read("personal_llm", write(tmp_path / "b.jsonl", [short])).bad == [
        ("b.jsonl line 1", "missing response_2_mistral_ray")
    ]


def test_values_of_another_type_are_bad_rows_and_no_tracebacks(tmp_path):
    names = ("prompt", "response_2", "response_2_gemma_2b")
    rows = [row() | {name: value} for name in names for value in ([], {}, True)]
    assert len(read("personal_llm", write(tmp_path / "a.jsonl", rows), people=1).bad) == 9
