"""Reward models as users: every pair of columns of scores is a user."""

import pytest
from support.raw_data import read, write

from pjrlhf.data.readers.rfm import raters
from pjrlhf.errors import UserError


def row(**changes):
    base = {
        "prompt_id": "a1",
        "prompt": "Name a fruit.",
        "chosen": "An apple.",
        "rejected": "A carrot.",
        "score_chosen": "8.5",
        "score_rejected": "3.0",
        "one_RM-7B_chosen": "1.5",
        "one_RM-7B_rejected": "1.0",
        "two_RM-2B_chosen": "-2",
        "two_RM-2B_rejected": "0.25",
    }
    return {**base, **changes}


def test_every_rater_is_a_user_who_prefers_by_its_scores(tmp_path):
    assert read("rfm", write(tmp_path / "train.csv", [row()])).good == [
        {
            "prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A carrot.",
            "user_id": "one_RM-7B", "margin": 0.5,
        },
        {
            "prompt": "Name a fruit.", "chosen": "A carrot.", "rejected": "An apple.",
            "user_id": "two_RM-2B", "margin": 2.25,
        },
    ]  # fmt: skip


@pytest.mark.parametrize(
    "pattern", ["{answer}_{rater}", "{rater}.{answer}", "{rater}_{answer}_score", "{rater} - {answer}"]
)
def test_columns_of_scores_are_found_by_the_names_of_the_answers(pattern):
    names = [pattern.format(rater="RM", answer=f"response_{i}") for i in (1, 2)]
    found = raters(dict.fromkeys(["response_1", "response_2", *names, "response_1_note"]), ("response_1", "response_2"))
    assert list(found.values()) == [tuple(names)]


def test_answers_may_be_conversations_as_text(tmp_path):
    turns = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "It's a fig."}]
    found = read("rfm", write(tmp_path / "train.csv", [row(chosen=str(turns))]))
    assert found.good[0]["chosen"] == "It's a fig."
    found = read("rfm", write(tmp_path / "train.csv", [row(), row(chosen="[{'role': 'user'}\n {'role'")]))
    assert found.bad == [("train.csv record 2", "bad chosen")]


def test_ties_and_identical_answers_are_counted(tmp_path):
    rows = [row(**{"one_RM-7B_chosen": "1.0"}), row(chosen="A carrot."), row(**{"two_RM-2B_rejected": ""})]
    found = read("rfm", write(tmp_path / "train.csv", rows))
    assert found.dropped == {"ties": 1, "identical answers": 2, "no score": 1} and len(found.good) == 2
    typed = row(
        **{"one_RM-7B_chosen": 1.5, "one_RM-7B_rejected": None, "two_RM-2B_chosen": -2, "two_RM-2B_rejected": 0.25}
    )
    found = read("rfm", write(tmp_path / "train.parquet", [typed]))
    assert found.dropped == {"no score": 1} and found.good[0]["margin"] == 2.25


def test_bad_rows_and_settings_are_named(tmp_path):
    plain = {name: value for name, value in row().items() if "RM" not in name}
    found = read("rfm", write(tmp_path / "test.csv", [plain]))
    assert found.bad == [("test.csv record 1", "no scores of raters")]
    found = read("rfm", write(tmp_path / "test.csv", [row(), row(**{"one_RM-7B_chosen": "much"})]))
    assert found.bad == [("test.csv record 2", "bad one_RM-7B_chosen")]
    with pytest.raises(UserError, match=r"^data.answer_columns: .* are not two names; give two columns"):
        read("rfm", tmp_path / "test.csv", answer_columns=("a",))


def test_values_of_another_type_are_bad_rows_and_no_tracebacks(tmp_path):
    rows = [row(**{name: value}) for name in row() for value in ("", "[{", "[{}]", "x", "nan")]
    assert read("rfm", write(tmp_path / "train.csv", rows)).bad
