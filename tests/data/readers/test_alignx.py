"""AlignX: a persona instead of a user."""

import pytest
from support.raw_data import odd, read, write

NEUTRAL = [0.5] * 89 + [1]


def row(**changes):
    base = {
        "prompt": "Which town should I see?",
        "chosen": "Ghent.",
        "rejected": "Any.",
        "Preference Direction": NEUTRAL,
        "Demographic Information": "A retired sailor.",
        "User-Generated Content": [
            {"prompt": f"Post {i}", "comment": f"Comment {i}", "Preference Direction": NEUTRAL} for i in range(6)
        ],
        "Pair-wise Comparative Feedback": [
            {"prompt": "P", "chosen": "C", "rejected": "R", "Preference Direction": NEUTRAL},
        ],
    }
    return {**base, **changes}


def test_the_persona_is_told(tmp_path):
    path = write(tmp_path / "alignx.jsonl", [row(), row()])
    first, second = read("alignx", path, profile_items=1).good
    assert (
        first["user_text"] == "A retired sailor.\n\nPost: Post 0\nComment: Comment 0\n\nPost: P\nChosen: C\nRejected: R"
    )
    assert first["directions"] == [0.5] * 89 + [1.0] and first["user_id"] != second["user_id"]
    assert read("alignx", path).good[0]["user_text"].count("Comment:") == 4
    assert read("alignx", path, profile=("pairs",)).good[0]["user_text"] == "Post: P\nChosen: C\nRejected: R"


def test_rows_without_a_persona_and_identical_answers_are_counted(tmp_path):
    bare = {"Demographic Information": "", "User-Generated Content": [], "Pair-wise Comparative Feedback": None}
    found = read("alignx", write(tmp_path / "a.jsonl", [row(**bare), row(chosen="Any."), row()]))
    assert found.dropped == {"rows without a persona": 1, "identical answers": 1} and len(found.good) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Preference Direction": NEUTRAL[:-1]}, "bad Preference Direction"),
        ({"Preference Direction": [0.4] * 90}, "bad Preference Direction"),
        ({"Preference Direction": [[1]] * 90}, "bad Preference Direction"),
        ({"User-Generated Content": "none"}, "bad User-Generated Content"),
        ({"User-Generated Content": [{"prompt": "P"}]}, "missing comment"),
        ({"Demographic Information": ["sailor"]}, "Demographic Information is not text"),
        ({"rejected": None}, "rejected is null"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, reason):
    found = read("alignx", write(tmp_path / "a.jsonl", [row(), row(**change)]))
    assert found.bad == [("a.jsonl line 2", reason)] and len(found.good) == 1


def test_values_of_another_type_are_bad_rows_and_no_tracebacks(tmp_path):
    assert read("alignx", write(tmp_path / "a.jsonl", list(odd(row())))).bad
