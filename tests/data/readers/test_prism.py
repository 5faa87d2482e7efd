"""Dialogues of PRISM: contexts, scores, what people say about themselves, and who is seen."""

import pytest
from support.raw_data import read, write

from pjrlhf.data.readers.prism import about, split_people, stated
from pjrlhf.errors import UserError

NAMES = ("values", "creativity", "fluency", "factuality", "diversity", "safety", "personalisation", "helpfulness")


def person(user_id="user0", completed=2, **more):
    prefs = {**dict(zip(NAMES, (10, 90, 20, 100, None, 30, 40, 80), strict=True)), "other": 95, "other_text": "Brevity"}
    base = {
        "user_id": user_id,
        "lm_familiarity": "Very familiar",
        "lm_usecases": {"coding": True, "other_text": None},
        "stated_prefs": prefs,
        "order_stated_prefs": {**{name: i + 1 for i, name in enumerate(NAMES)}, "other": 9},
        "self_description": "I teach\nmaths.",
        "system_string": "You are honest.",
        "age": "35-44 years old",
        "gender": "Female",
        "education": "University",
        "employment_status": "Working",
        "marital_status": "Married",
        "english_proficiency": "Fluent",
        "religion": {"self_described": None, "categorised": "None", "simplified": "No Affiliation"},
        "num_completed_conversations": completed,
    }
    return {**base, **more}


def said(turn, role, content, score=None, chosen=None, within=0):
    model = {"model_name": "m", "model_provider": "p"} if role == "model" else {"model_name": None}
    entry = {"turn": turn, "role": role, "content": content, "score": score, "if_chosen": chosen, **model}
    return {**entry, "within_turn_id": within}


HISTORY = [
    said(0, "user", "Why is the sky blue?"),
    said(0, "model", "Light scatters.", 80, True, 0),
    said(0, "model", "It is painted.", 20, False, 1),
    said(0, "model", "It is not.", 80, False, 2),
    said(0, "model", "Light scatters. ", 70, False, 3),
    said(1, "user", "And at night?"),
    said(1, "model", "No light.", 60, True, 0),
    said(1, "model", "Ask later.", 90, False, 1),
]


def dialogue(name="c1", user_id="user0", history=HISTORY, **more):
    base = {
        "conversation_id": name,
        "user_id": user_id,
        "conversation_type": "unguided",
        "opening_prompt": "Why is the sky blue?",
        "conversation_turns": 2,
        "conversation_history": history,
        "performance_attributes": {"values": 50, "fluency": 100, "safety": None},
        "choice_attributes": {"values": None},
        "open_feedback": "Good.",
        "included_in_balanced_subset": True,
    }
    return {**base, **more}


def folder(tmp_path, people, dialogues):
    write(tmp_path / "prism/survey.jsonl", people)
    write(tmp_path / "prism/conversations.jsonl", dialogues)
    write(tmp_path / "prism/utterances.jsonl", [{"utterance_id": "ut0"}])
    return tmp_path / "prism"


def test_a_turn_is_a_pair_per_worse_answer_in_its_context(tmp_path):
    last = [said(1, "user", "And at night?"), said(1, "model", "No light.", 60, True), said(1, "model", "?", 1, False)]
    found = read("prism", folder(tmp_path, [person()], [dialogue(), dialogue("c2", history=[*HISTORY[:5], *last])]))
    first, *_, second = found.good
    assert (first["prompt"], first["chosen"], first["rejected"]) == (
        [{"role": "user", "content": "Why is the sky blue?"}],
        "Light scatters.",
        "It is painted.",
    )
    assert (first["user_id"], first["group"], first["margin"]) == ("user0", "c1", 0.6)
    assert second["prompt"] == [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Light scatters."},
        {"role": "user", "content": "And at night?"},
    ]
    assert found.dropped == {
        "equal scores": 2,
        "equal answers": 2,
        "pairs whose chosen answer has the lower score": 1,
    }


def test_stated_preferences_are_the_largest_and_not_those_shown_first():
    assert stated(person()) == ["factuality", "Brevity", "creativity"]
    assert stated({"stated_prefs": None}) == []
    assert stated({"stated_prefs": {"values": 1, "safety": 1, "fluency": 0, "other": None}}) == [
        "safety",
        "values",
        "fluency",
    ]


def test_what_people_say_about_themselves(tmp_path):
    says = about(person(), ("preferences", "description", "wishes", "demographics"))
    assert says.split("\n") == [
        "What matters most to me in answers: factuality, Brevity, creativity",
        "About me: I teach maths.",
        "How I want a language model to behave: You are honest.",
        "My background: 35-44 years old; Female; University; Working; Married; Fluent",
    ]
    long = person(system_string="be kind " * 2000, self_description=None)
    assert about(long, ("description", "wishes"), 20) == "How I want a language model to behave: be kind be kind be"
    assert about(person(system_string="x" * 30), ("wishes",), 20).endswith(f": {'x' * 20}")
    found = read("prism", folder(tmp_path, [long], [dialogue()]), about=("description",))
    assert "user_text" not in found.good[0]


def test_ratings_are_rewards_of_single_answers(tmp_path):
    found = read("prism", folder(tmp_path, [person()], [dialogue()]), gives="ratings")
    assert [one["rewards"] for one in found.good] == [
        {"score": 0.8, "values": 0.5, "fluency": 1.0},
        *({"score": x} for x in (0.2, 0.8, 0.7, 0.6, 0.9)),
    ]
    assert len(found.good[-1]["prompt"]) == 3


def test_the_lowest_score_alone_and_the_longest_pair(tmp_path):
    history = [
        said(0, "user", "Why?"),
        *(said(0, "model", f"answer {i}", score, i == 0) for i, score in enumerate((90, 50, 10))),
        said(0, "model", "long " * 600, 20, False),
    ]
    path = folder(tmp_path, [person()], [dialogue(history=history)])
    found = read("prism", path)
    assert [one["rejected"] for one in found.good] == ["answer 1", "answer 2"]
    assert found.dropped == {"pairs above max_characters": 1}
    assert len(read("prism", path, max_characters=0).good) == 3
    assert [one["rejected"] for one in read("prism", path, pairs="worst").good] == ["answer 2"]


def test_people_without_dialogues_and_dialogues_without_answers(tmp_path):
    people = [person(), person("user1", completed=0)]
    silent = [*HISTORY[:5], said(1, "user", "And at night?"), said(1, "model", "", 50, True)]
    found = read("prism", folder(tmp_path, people, [dialogue(history=silent), dialogue("c2", "user9")]))
    assert len(found.good) == 1
    assert found.dropped["people without a completed dialogue"] == 1
    assert found.dropped["dialogues cut at a turn without a message or a chosen answer"] == 1
    assert found.bad == [("conversations.jsonl line 2", "unknown person")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversation_history": None}, "conversation_history is null"),
        ({"conversation_history": []}, "empty conversation_history"),
        ({"conversation_history": [{"role": "user"}]}, "missing turn"),
        ({"conversation_history": [*HISTORY[:2], said(0, "model", "x", None, False)]}, "score is null"),
        ({"conversation_id": None}, "conversation_id is null"),
    ],
)
def test_bad_dialogues_are_named(tmp_path, change, reason):
    found = read("prism", folder(tmp_path, [person()], [dialogue(), dialogue() | change]))
    assert found.bad == [("conversations.jsonl line 2", reason)] and len(found.good) == 1


def test_one_file_is_not_the_set(tmp_path):
    path = folder(tmp_path, [person()], [dialogue()])
    with pytest.raises(UserError, match=r"^data.path: is one file; name the folder"):
        read("prism", path / "survey.jsonl")


def test_the_split_of_people_has_the_published_counts():
    """1,396 people, of whom as many of the 1,256 seen first have one dialogue as make 1,234 seen and 162 unseen."""
    everyone = {f"user{i}": [f"c{i}-{j}" for j in range(6)] for i in range(1396)}
    many = split_people(everyone)
    assert len({name.partition("-")[0] for name in many["train"]}) == 1256
    seen = sorted({name.partition("-")[0][1:] for name in many["train"]}, key=int)
    for i in seen[:22]:
        everyone[f"user{i}"] = everyone[f"user{i}"][:1]
    parts = split_people(everyone)
    people = {part: {name.partition("-")[0] for name in names} for part, names in parts.items()}
    assert len(people["train"]) == 1234 == len(people["heldout"]) and len(people["unseen"]) == 162
    assert not people["train"] & people["unseen"] and sum(map(len, parts.values())) == sum(map(len, everyone.values()))
    assert not parts["train"] & parts["heldout"]


def test_parts_hold_every_dialogue_once(tmp_path):
    people = [person(f"user{i}") for i in range(20)]
    dialogues = [dialogue(f"c{i}-{j}", f"user{i}") for i in range(20) for j in range(1 + i % 3)]
    path = folder(tmp_path, people, dialogues)
    groups = {part: {one["group"] for one in read("prism", path, part=part).good} for part in ("all", "train")}
    groups |= {part: {one["group"] for one in read("prism", path, part=part).good} for part in ("heldout", "unseen")}
    assert groups["all"] == groups["train"] | groups["heldout"] | groups["unseen"]
    assert len(groups["all"]) == sum(len(groups[part]) for part in ("train", "heldout", "unseen"))
