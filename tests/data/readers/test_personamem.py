"""PersonaMem: the correct option over the others, and the history before the question alone."""

import json

import pytest
from support.raw_data import odd, read, write

from pjrlhf.errors import UserError

PERSONA = {"role": "system", "content": "Current user persona: Ana bakes bread."}
CHAT = [
    PERSONA,
    {"role": "user", "content": "User: I like rye."},
    {"role": "assistant", "content": "Assistant: Rye is sour."},
    {"role": "user", "content": "User: Now I like wheat."},
]


def v1(**changes):
    base = {
        "persona_id": "3",
        "question_id": "q1",
        "question_type": "recall_user_shared_facts",
        "topic": "food",
        "context_length_in_tokens": "32000",
        "user_question_or_message": "Which bread for me?",
        "correct_answer": "(b)",
        "all_options": str(["(a) Wheat.", "(b) Rye.", "(c) It's (all) bread."]),
        "shared_context_id": "c1",
        "end_index_in_shared_context": "3",
    }
    return {**base, **changes}


def write_v1(tmp_path, *rows, size="32k"):
    write(tmp_path / f"questions_{size}.csv", list(rows))
    write(tmp_path / f"shared_contexts_{size}.jsonl", [{"c1": CHAT}, {"c2": [PERSONA]}])
    return tmp_path


def test_v1_has_the_history_up_to_the_question(tmp_path):
    found = read("personamem", write_v1(tmp_path, v1()), version="v1").good
    shared = {
        "prompt": "Which bread for me?",
        "user_id": "3",
        "user_text": "User: I like rye.\n\nAssistant: Rye is sour.",
        "question": "q1",
        "question_type": "recall_user_shared_facts",
        "chosen": "Rye.",
    }
    assert found == [shared | {"rejected": "Wheat."}, shared | {"rejected": "It's (all) bread."}]
    told = read("personamem", tmp_path, version="v1", last_messages=1).good[0]["user_text"]
    assert told == "Assistant: Rye is sour."
    told = read("personamem", tmp_path, version="v1", keep_persona=True).good[0]["user_text"]
    assert told.startswith("System: Current user persona: Ana bakes bread.\n\nUser: I like rye.")


def test_v1_has_sizes(tmp_path):
    write_v1(tmp_path, v1())
    write_v1(tmp_path, v1(correct_answer="(a)"), size="1M")
    assert read("personamem", tmp_path, version="v1", size="1M").good[0]["chosen"] == "Wheat."
    with pytest.raises(UserError, match="size: v2 has no 1M; choose 32k or 128k, or version v1"):
        read("personamem", tmp_path, size="1M")
    with pytest.raises(UserError, match="holds no files 'shared_contexts_128k'"):
        read("personamem", tmp_path, version="v1", size="128k")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"correct_answer": "(d)"}, "bad correct_answer"),
        ({"correct_answer": "Rye."}, "bad correct_answer"),
        ({"all_options": "Rye, wheat"}, "bad all_options"),
        ({"all_options": str(["Rye.", "Wheat."])}, "bad all_options"),
        ({"shared_context_id": "c9"}, "unknown shared_context_id"),
        ({"shared_context_id": "c2"}, "empty history"),
        ({"end_index_in_shared_context": ""}, "bad end_index_in_shared_context"),
        ({"user_question_or_message": ""}, "empty user_question_or_message"),
    ],
)
def test_bad_questions_of_v1_are_named(tmp_path, change, reason):
    found = read("personamem", write_v1(tmp_path, v1(), v1(**change)), version="v1")
    assert found.bad == [("questions_32k.csv record 2", reason)] and len(found.good) == 2


def v2(**changes):
    base = {
        "persona_id": "3",
        "pref_type": "anti_stereotypical_pref",
        "topic_query": "Food",
        "user_query": str({"role": "user", "content": "What's for breakfast?"}),
        "correct_answer": "Rye, toasted.",
        "incorrect_answers": str(["Wheat.", "Eggs, it's early.", "Rye, toasted."]),
        "chat_history_32k_link": "data/chat_history_32k/persona3_b.json",
        "chat_history_128k_link": "data/chat_history_128k/persona3_b.json",
    }
    return {**base, **changes}


def write_v2(tmp_path, *rows, part="benchmark"):
    write(tmp_path / f"benchmark/text/{part}.csv", list(rows))
    for name, said in (("a", "I hate rye."), ("b", "I love rye.")):
        file = tmp_path / f"data/chat_history_32k/persona3_{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        chat = [PERSONA, {"role": "user", "content": said}]
        file.write_text(json.dumps({"metadata": {"persona_id": 3}, "chat_history": chat}, indent=2))
    return tmp_path


def test_v2_finds_the_history_by_its_link(tmp_path):
    found = read("personamem", write_v2(tmp_path, v2()))
    assert [one["rejected"] for one in found.good] == ["Wheat.", "Eggs, it's early."]
    assert found.dropped == {"identical answers": 1}
    assert {one["user_text"] for one in found.good} == {"User: I love rye."}
    assert (
        found.good[0]["prompt"] == "What's for breakfast?"
        and found.good[0]["question_type"] == "anti_stereotypical_pref"
    )
    assert len({one["question"] for one in found.good}) == 1
    write_v2(tmp_path, v2(correct_answer="Oats."), part="train")
    assert read("personamem", tmp_path, split="train").good[0]["chosen"] == "Oats."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chat_history_32k_link": "data/chat_history_32k/gone.json"}, "unknown history"),
        ({"user_query": "What's for breakfast?"}, "bad user_query"),
        ({"user_query": "{}"}, "missing content"),
        ({"incorrect_answers": "[]"}, "bad incorrect_answers"),
        ({"incorrect_answers": "[1]"}, "bad incorrect_answers"),
        ({"correct_answer": ""}, "empty correct_answer"),
    ],
)
def test_bad_questions_of_v2_are_named(tmp_path, change, reason):
    found = read("personamem", write_v2(tmp_path, v2(), v2(**change)))
    assert found.bad == [("benchmark/text/benchmark.csv record 2", reason)] and len(found.good) == 2


def test_one_file_is_not_enough(tmp_path):
    write_v1(tmp_path, v1())
    with pytest.raises(UserError, match=r"^data.path: questions and histories are several files"):
        read("personamem", tmp_path / "questions_32k.csv", version="v1")


def test_values_of_another_type_are_bad_rows_and_no_tracebacks(tmp_path):
    for one in odd({"c1": CHAT}):
        write(tmp_path / "shared_contexts_32k.jsonl", [one])
        write(tmp_path / "questions_32k.csv", [v1(), v1(end_index_in_shared_context="nan"), v1(all_options="[[]]")])
        assert read("personamem", tmp_path, version="v1").bad
    for query in odd({"role": "user", "content": "Hm?"}):
        read("personamem", write_v2(tmp_path, v2(user_query=str(query))))
