"""Four answers, four aspects: pairs by their mean, people per aspect, ties and answers that were not rated."""

import pytest
from support.raw_data import read, write

ORDER = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def completion(response, *scores):
    annotations = {
        aspect: {"Rating": str(score), "Rationale": "..."} for aspect, score in zip(ORDER, scores, strict=True)
    }
    annotations["truthfulness"] |= {"Type": "None", "Rationale For Rating": "..."}
    return {
        "model": "bard",
        "principle": "honesty",
        "custom_system_prompt": "...",
        "response": response,
        "annotations": annotations,
        "fine-grained_score": 4.0,
        "overall_score": 10.0,  # wrong on purpose: it is not read
        "critique": "...",
    }


def row(*completions, instruction="Why is the sky blue?"):
    return {"source": "sharegpt", "instruction": instruction, "models": ["bard"], "completions": list(completions)}


A, B = completion("Light scatters.", 5, 2, 4, 4), completion("It is painted.", 3, 4, 3, 4)
C = completion("Unknown.", 3, "N/A", 3, 4)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "sharegpt.jsonl", [row(A, B), row(B, A, instruction="And at night?"), row(A, C)])


def test_the_mean_of_the_aspects_decides(path):
    found = read("ultrafeedback", path)
    assert [one["chosen"] for one in found.good] == ["Light scatters."] * 2
    assert found.good[0]["margin"] == pytest.approx((15 - 14) / 4 / 4)
    assert found.dropped == {"pairs without all ratings": 1} and "user_id" not in found.good[0]


def test_people_prefer_by_one_aspect(path):
    found = read("ultrafeedback", path, aspect_as_user=True)
    first = {one["objective"]: one["chosen"] for one in found.good[:3]}
    assert first == {
        "helpfulness": "Light scatters.",
        "honesty": "It is painted.",
        "instruction_following": "Light scatters.",
    }
    assert [one["user_id"] for one in found.good] == ["8", "4", "2"] * 2
    assert found.dropped == {"pairs without all ratings": 1, "equal ratings": 2}
    assert len(read("ultrafeedback", path, aspect_as_user=True, ties="coin").good) == 8


def test_uf_p_2_has_the_pairs_on_which_two_people_disagree(tmp_path):
    agree = row(A, completion("No.", 1, 1, 1, 1), instruction="Really?")
    path = write(tmp_path / "a.jsonl", [row(A, B), agree])
    settings = {"aspect_as_user": True, "aspects": ("helpfulness", "honesty"), "controversial": True}
    found = read("ultrafeedback", path, **settings)
    assert [(one["user_id"], one["chosen"]) for one in found.good] == [
        ("8", "Light scatters."),
        ("4", "It is painted."),
    ]
    assert found.dropped == {"pairs on which all agree": 1}


def test_coins_are_fair_and_do_not_change(tmp_path):
    twins = [row(completion("a", 3, 3, 3, 3), completion("b", 3, 3, 3, 3), instruction=f"{i}?") for i in range(200)]
    path = write(tmp_path / "a.jsonl", twins)
    first = [one["chosen"] for one in read("ultrafeedback", path, ties="coin").good]
    assert first == [one["chosen"] for one in read("ultrafeedback", path, ties="coin").good]
    assert first != [one["chosen"] for one in read("ultrafeedback", path, ties="coin", seed=1).good]
    assert 60 < first.count("a") < 140
    assert read("ultrafeedback", path).dropped == {"equal ratings": 200}


def test_ratings_are_rewards_of_single_answers(path):
    found = read("ultrafeedback", path, gives="ratings")
    assert len(found.good) == 6 and found.good[0]["rewards"] == dict(zip(ORDER, (5.0, 2.0, 4.0, 4.0), strict=True))
    assert "honesty" not in found.good[5]["rewards"]


def test_only_the_pairs_of_the_binarized_set(tmp_path, path):
    user = {"role": "user", "content": "And at night?"}
    sides = [[user, {"role": "assistant", "content": one["response"]}] for one in (A, B)]
    binarized = {"prompt": "And at night?", "chosen": sides[0], "rejected": sides[1], "chosen-rating": 5.0}
    pairs = write(tmp_path / "binarized/train-00000.parquet", [binarized])
    found = read("ultrafeedback", path, binarized=pairs)
    assert [one["prompt"] for one in found.good] == ["And at night?"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(A, B) | {"completions": None}, "completions is null"),
        (row(A, B) | {"instruction": ""}, "empty instruction"),
        (row(A, B | {"annotations": None}), "annotations is null"),
        (row(A, completion("x", 1, 2, 3, "good")), "bad Rating"),
        ({"instruction": "a"}, "missing completions"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, reason):
    found = read("ultrafeedback", write(tmp_path / "a.jsonl", [row(A, B), bad]))
    assert found.bad == [("a.jsonl line 2", reason)] and len(found.good) == 1
