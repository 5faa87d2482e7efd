"""LaMP: questions and outputs are joined by id; the profile is what the user wrote before."""

import json

import pytest
from support.raw_data import odd, read

from pjrlhf.errors import UserError


def folder(tmp_path, questions, golds, part="train"):
    place = tmp_path / "LaMP_4"
    place.mkdir(exist_ok=True)
    (place / f"{part}_questions.json").write_text(json.dumps(questions))
    if golds is not None:
        (place / f"{part}_outputs.json").write_text(json.dumps({"task": "LaMP_4", "golds": golds}))
    return place


def question(i="41", **changes):
    profile = [{"title": f"Headline {n}", "text": f"Story {n}.", "id": f"{i}{n}"} for n in range(12)]
    return {"id": i, "input": f"Generate a headline: story of {i}", "profile": profile, **changes}


def test_questions_get_their_outputs_and_profiles(tmp_path):
    golds = [{"id": "42", "output": "Rain tomorrow"}, {"id": "41", "output": "Sun today"}]
    place = folder(tmp_path, [question(), question("42", user_id=7)], golds)
    folder(tmp_path, [question("43")], [{"id": "43", "output": "Wind"}], "dev")
    found = read("lamp", place, profile_items=2).good
    assert [(one["completion"], one["user_id"]) for one in found] == [("Sun today", "41"), ("Rain tomorrow", "7")]
    assert found[0]["user_text"] == "title: Headline 10\ntext: Story 10.\n\ntitle: Headline 11\ntext: Story 11."
    assert len(read("lamp", place).good[0]["user_text"].split("\n\n")) == 10
    assert "user_text" not in read("lamp", place, profile_items=0).good[0]
    assert read("lamp", place, split="validation").good[0]["completion"] == "Wind"


def test_profiles_with_dates_are_in_their_order(tmp_path):
    items = [{"text": "new", "date": "2019-05-01", "id": "1"}, {"text": "old", "date": "2012-01-31", "id": "2"}]
    place = folder(tmp_path, [question(profile=items), question("42", profile=[])], [{"id": "41", "output": "x"}])
    found = read("lamp", place)
    assert found.good[0]["user_text"] == "text: old\n\ntext: new"
    assert found.dropped == {"users without a profile": 1} and not found.bad


def test_test_parts_have_no_outputs(tmp_path):
    place = folder(tmp_path, [question()], None, "test")
    (found,) = read("lamp", place, split="test", gives="prompts").good
    assert "completion" not in found and found["prompt"].startswith("Generate")
    with pytest.raises(UserError, match=r"holds no files '\*outputs'"):
        read("lamp", place, split="test")
    with pytest.raises(UserError, match=r"^data.path: is one file, without outputs; name the folder"):
        read("lamp", place / "test_questions.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": "99"}, "no output"),
        ({"id": None}, "id is null"),
        ({"input": ""}, "empty input"),
        ({"profile": None}, "profile is null"),
        ({"profile": ["Story."]}, "bad profile"),
    ],
)
def test_bad_questions_are_named(tmp_path, change, reason):
    place = folder(tmp_path, [question(), question(**change)], [{"id": "41", "output": "Sun today"}])
    found = read("lamp", place)
    assert found.bad == [("train_questions.json record 2", reason)] and len(found.good) == 1
    place = folder(tmp_path, [question()], [{"id": "41", "output": "Sun today"}, {"id": "42"}])
    assert [reason for _, reason in read("lamp", place).bad] == ["missing output"]


def test_values_of_another_type_are_bad_rows_and_no_tracebacks(tmp_path):
    questions = list(odd(question(profile=[{"text": "x", "date": "2010"}] * 2)))
    assert read("lamp", folder(tmp_path, questions, [{"id": "41", "output": "x"}])).bad
    for golds in odd([{"id": "41", "output": "Sun today"}]):
        assert read("lamp", folder(tmp_path, [question()], golds))
