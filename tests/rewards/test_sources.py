"""Reward sources: what a config may name, and what a source may return."""

import fractions
import sys
import types

import numpy as np
import pytest
from support import toy_extensions

from pjrlhf.errors import UserError
from pjrlhf.judges.chat import Chat, ChatSettings
from pjrlhf.rewards.sources import (
    SOURCES,
    NoReply,
    RecordColumns,
    RewardSource,
    SourceContext,
    SourceFailed,
    reward_source,
)
from pjrlhf.runtime.audience import Audience

MODULE = "support.toy_extensions"
PROMPTS, ANSWERS = ["say a", "say b", "say c"], ["aa", "", "a good cat"]
BREVITY = [-2, np.nan, -10]


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        (f"{MODULE}:brevity", BREVITY),
        ({"kind": "function", "function": f"{MODULE}:brevity"}, BREVITY),
        (f"{MODULE}:patient_brevity", BREVITY),
        ({"kind": "scorer", "scorer": "words:cat"}, [0, 0, 1 / 3]),
        ({"kind": f"{MODULE}:multiple", "of": "a", "factor": 2}, [4, 0, 4]),
    ],
)
def test_a_config_names_functions_scorers_and_makers(spec, want):
    found = reward_source("P2A", spec)(PROMPTS, ANSWERS)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(want, np.float32))


@pytest.mark.parametrize("spec", ["adapter", {"kind": "adapter"}])
def test_a_reward_model_that_is_trained_here_has_no_source(spec):
    assert reward_source("P2A", spec) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("brevity", "reward function 'brevity': cannot be read; write package.module:name"),
        (f"{MODULE}:nobody", f"{MODULE} has no nobody"),
        (f"{MODULE}:__doc__", "is not a function"),
        ({"function": f"{MODULE}:brevity"}, "rewards.P2A: kind None is unknown; choose one of adapter, function"),
        ({"kind": "oracle"}, "rewards.P2A: kind 'oracle' is unknown; choose one of adapter, function, scorer"),
        ({"kind": "function"}, "rewards.P2A: kind 'function' does not take these settings"),
        ({"kind": "adapter", "rank": 3}, "rewards.P2A.rank: kind 'adapter' has no settings, it is"),
        ({"kind": "scorer", "scorer": "sour"}, "scorer 'sour': unknown"),
        ({"kind": "scorer", "scorer": 3}, "rewards.P2A.scorer: 3 is not text"),
        ({"kind": "function", "function": None}, "rewards.P2A.function: None is not text"),
        ({"kind": "judge", "criterion": 3, "model": "m"}, "rewards.P2A.criterion: 3 is not text"),
        ({"kind": "judge", "criterion": "It helps."}, "rewards.P2A: names no model; set path to its folder, or model"),
        (
            {"kind": "judge", "criterion": "x", "model": "m", "base_url": "http://h/v1", "criteria": {"P2A": "y"}},
            "rewards.P2A: has criteria; leave them out",
        ),
        (
            {"kind": "judge", "criterion": " ", "model": "m", "base_url": "http://h/v1"},
            "rewards.P2A.criterion: is empty; say what is judged",
        ),
        (None, "rewards.P2A: None is no source; name a function"),
        ({"kind": f"{MODULE}:brevity", "prompts": [], "completions": []}, "made a list; it must make a function"),
    ],
)
def test_wrong_specifications_are_refused_by_name(spec, message):
    with pytest.raises(UserError) as error:
        reward_source("P2A", spec)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "returned 2 values for 3 completions; return a list with one number or None for each"),
        (None, "returned NoneType for 3 completions"),
        (3.0, "returned float for 3 completions"),
        ([1.0, float("nan"), 2.0], "returned nan for the answer ''; return a finite number, or None to say nothing"),
        ([1.0, 2.0, float("inf")], "returned inf for the answer 'a good cat'"),
        ([1.0, "good", 2.0], "returned 'good' for the answer ''"),
        ([1.0, "2.0", 2.0], "returned '2.0' for the answer ''"),
        ("123", "returned str for 3 completions"),
        (np.ones((3, 2)), "returned array([1., 1.]) for the answer 'aa'"),
        ([10**400, 1.0, 2.0], f"returned {'1' + '0' * 56}... for the answer"),
        ([10**9000, 1.0, 2.0], "returned a int of thousands of digits for the answer"),
        ([1e39, 1.0, 2.0], "returned 1e+39 for the answer"),
        ([-1e999, 1.0, 2.0], "returned -inf for the answer"),
        (["1e999", 1.0, 2.0], "returned '1e999' for the answer"),
        ([types.SimpleNamespace(), 1.0, 2.0], "returned namespace() for the answer"),
    ],
)
def test_a_source_returns_one_number_or_none_for_each_answer(returned, message):
    with pytest.raises(UserError) as error:
        RewardSource("P2A", lambda prompts, completions: returned)(PROMPTS, ANSWERS)
    assert message in str(error.value) and "'P2A'" in str(error.value)


def test_a_function_may_change_what_it_gets():
    """Neither its rewards, nor messages, nor the records of the run change with it."""

    def consuming(prompts, completions, level):
        while completions:
            completions.pop(), prompts.pop(), level[0].append(9)
        return [float(len(one)) for one in level]

    levels = RecordColumns({"level": [[1], [2, 2], []]})
    for _ in range(2):
        found = RewardSource("P2A", consuming)(PROMPTS, ANSWERS, levels)
        assert found.tolist() == [4, 2, 0]
    assert levels.columns == {"level": [[1], [2, 2], []]}


def test_numbers_of_any_kind_are_rewards():
    for values in ([1, True, np.float32(2)], (1, 1, 2), np.array([1, 1, 2], np.int8), [fractions.Fraction(1), 1, 2]):
        found = RewardSource("P2A", lambda prompts, completions, values=values: values)(PROMPTS, ANSWERS)
        np.testing.assert_array_equal(found, [1, 1, 2])


def test_an_exception_names_the_source_and_the_answer():
    def shy(prompts, completions):
        return [1 / len(text) for text in completions]

    with pytest.raises(UserError) as error:
        RewardSource("P2A", shy)(PROMPTS, ANSWERS)
    assert str(error.value) == (
        "reward 'P2A': its source raised ZeroDivisionError: division by zero for the answer '' to 'say b'; correct the "
        "source"
    )


def test_a_function_that_ends_the_process_is_named():
    with pytest.raises(UserError, match="reward 'P2A': its source raised SystemExit: 0 for the answer 'a good cat'"):
        RewardSource("P2A", lambda prompts, completions: sys.exit(0) if "a good cat" in completions else [0.0] * 3)(
            PROMPTS, ANSWERS
        )


# ---- columns of the records

COLUMNS = RecordColumns({"solution": ["a", "b", None], "level": [1, 2, 3]}, ["data.jsonl line 4", "", ""])


def test_functions_take_the_columns_that_they_name():
    def named(prompts, completions, solution, weight=2.0):
        assert solution == ["a", "b", None] and prompts == PROMPTS
        return [weight] * 3

    def everything(completions, **columns):
        assert columns == {"prompts": PROMPTS, "solution": ["a", "b", None], "level": [1, 2, 3]}
        return [1] * 3

    class Object:
        async def __call__(self, prompts, completions, *, level):
            return level

    wants = [2, 2, 2], [1, 1, 1], [1, 2, 3], BREVITY
    for function, want in zip((named, everything, Object(), toy_extensions.brevity), wants, strict=True):
        source = RewardSource("P2A", function)
        source.check_columns(COLUMNS.columns)
        np.testing.assert_array_equal(source(PROMPTS, ANSWERS, COLUMNS), np.float32(want))
    assert RewardSource("P2A", Object()).waits and not RewardSource("P2A", named).waits


@pytest.mark.parametrize(
    ("columns", "listed"), [((), "have no columns"), (("level", "answer"), "have the columns answer, level")]
)
def test_a_parameter_that_is_no_column_is_refused(columns, listed):
    def rewards(prompts, completions, solution):
        return [0.0] * len(prompts)

    with pytest.raises(UserError) as error:
        RewardSource("P2A", rewards).check_columns(columns)
    assert str(error.value).startswith("rewards.P2A: its function takes 'solution', and the records of data.prompts ")
    assert listed in str(error.value) and "rename the parameter or the column, or give it a default" in str(error.value)


# ---- failures


def fragile(prompts, completions, **columns):
    """Fails on answers with an x, and gives the place of the others in the batch."""
    if any("x" in text for text in completions):
        raise RuntimeError("no x")
    return list(range(len(completions)))


def test_answers_that_a_source_fails_on_have_no_reward_within_the_share(caplog):
    texts = ["a", "x", "b", "xx", "c"]
    found = RewardSource("P2A", fragile, missing=0.4)(["q"] * 5, texts)
    np.testing.assert_array_equal(found, np.float32([0, np.nan, 1, np.nan, 2]))  # the others are asked together
    assert "raised RuntimeError: no x for the answer 'x' to 'q'" in caplog.text
    assert "no reward for 2 of 5 answers" in caplog.text
    with pytest.raises(SourceFailed) as error:
        RewardSource("P2A", fragile, missing=0.39)(["q"] * 5, texts)
    assert "it failed for more than rewards.P2A.missing=0.39 of 5 answers" in str(error.value)


def test_numbers_that_are_none_count_as_failures():
    def nan(prompts, completions):
        return [1.0, float("nan"), None]

    np.testing.assert_array_equal(
        RewardSource("P2A", nan, missing=0.34)(PROMPTS, ANSWERS), np.float32([1, np.nan, np.nan])
    )


def test_a_judge_without_replies_is_tolerated_and_a_used_up_budget_is_not(tmp_path):
    """Replies that came before are kept, so that each answer is asked about once more at most."""
    asked = []

    def send(body):
        text = body["messages"][-1]["content"]
        asked.append(text)
        if "down" in text:
            raise NoReply("model 'm': cannot be reached; check base_url")
        return {"choices": [{"message": {"content": "7"}, "finish_reason": "stop"}]}

    def source(missing, **limits):
        settings = ChatSettings(model="m", concurrency=1, **limits)
        chat = Chat(settings, tmp_path / f"{len(limits)}.jsonl", send)

        def rewards(prompts, completions):
            bodies = [{"model": "m", "messages": [{"role": "user", "content": text}]} for text in completions]
            return [float(reply["choices"][0]["message"]["content"]) for reply in chat("rate", bodies)]

        return RewardSource("P2A", rewards, missing)

    texts = ["a", "down", "c"]
    np.testing.assert_array_equal(source(0.34)(["q"] * 3, texts), np.float32([7, np.nan, 7]))
    assert asked.count("a") == asked.count("c") == 1
    with pytest.raises(
        UserError, match=r"^model 'm': cannot be reached; check base_url; 2 replies .*0\.jsonl; the same command"
    ):
        source(0.0)(["q"], ["down"])
    with pytest.raises(UserError, match="max_requests=1 is reached"):
        source(1.0, max_requests=1)(["q"] * 3, ["a", "b", "c"])


def test_a_source_that_fails_on_a_batch_alone_fails_on_all_of_it():
    def together(prompts, completions):
        if len(prompts) > 1:
            raise MemoryError("too many")
        return [1.0]

    with pytest.raises(UserError, match="raised MemoryError: too many; correct the source; it failed for more"):
        RewardSource("P2A", together, missing=0.5)(PROMPTS, ANSWERS)
    assert np.isnan(RewardSource("P2A", together, missing=1)(PROMPTS, ANSWERS)).all()


def test_a_failure_names_the_record_and_has_the_batch():
    with pytest.raises(SourceFailed) as error:
        RewardSource("P2A", fragile)(["q"] * 3, ["x", "b", "c"], COLUMNS)
    assert "for the answer 'x' to 'q' (data.jsonl line 4); correct the source" in str(error.value)
    assert error.value.batch[0] == {
        "reward": "P2A",
        "prompt": "q",
        "completion": "x",
        "columns": {"solution": "a", "level": 1},
        "record": "data.jsonl line 4",
    }
    assert len(error.value.batch) == 3


@pytest.mark.parametrize("missing", [-0.1, 1.5, "half", True, None])
def test_missing_is_a_fraction(missing):
    with pytest.raises(UserError, match=r"rewards\.P2A\.missing: .* is not a fraction; choose a number from 0 to 1"):
        reward_source("P2A", {"kind": "function", "function": f"{MODULE}:brevity", "missing": missing})


# ---- of an audience


def audience(sources):
    return Audience("synthetic", ("P1A", "P2A", "P2B"), "helpful", "synthetic", sources)


def test_the_sources_of_an_audience_fill_their_columns():
    people = audience({"P2A": f"{MODULE}:brevity", "helpful": {"kind": "scorer", "scorer": "long"}, "P1A": "adapter"})
    assert people.learned == ("P1A", "P2B") and set(people.sources) == {"P2A", "helpful"}
    found, nothing = people.host_rewards(PROMPTS, ANSWERS), [np.nan] * 3
    np.testing.assert_array_equal(found.T, np.array([nothing, BREVITY, nothing, [1, 0, 3]], np.float32))


def test_a_source_is_asked_for_the_answers_whose_reward_counts():
    asked = []

    def source(prompts, completions):
        asked.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(prompts)

    people = audience({"P2A": f"{MODULE}:brevity"})
    people.sources["P2A"] = RewardSource("P2A", source)
    wanted = np.zeros((3, 4), bool)
    wanted[:, 0], wanted[2, 1] = True, True
    found = people.host_rewards(PROMPTS, ANSWERS, wanted)
    assert asked == [("say c", "a good cat")]
    assert np.isnan(found).sum() == 11 and found[2, 1] == 1


def test_other_processes_ask_the_sources_on_the_mesh_alone(monkeypatch):
    def on_mesh(prompts, completions):
        return [1.0] * len(prompts)

    on_mesh.on_all_processes = True
    people = audience({"P2A": f"{MODULE}:brevity", "P1A": f"{MODULE}:brevity"})
    people.sources["P1A"] = RewardSource("P1A", on_mesh)
    monkeypatch.setattr("pjrlhf.runtime.audience.is_process_zero", lambda: False)
    found = people.host_rewards(PROMPTS, ANSWERS)
    assert (found[:, 0] == 1).all() and np.isnan(found[:, 1]).all()


def test_a_maker_gets_the_context_of_the_run(monkeypatch):
    def make(context, objective):
        return lambda prompts, completions: [context.rows + len(objective)] * len(prompts)

    monkeypatch.setitem(SOURCES._entries, "rows", make)
    people = audience({"P2A": {"kind": "rows"}})
    within = people.within(SourceContext(lambda: None, 7))
    assert people.host_rewards(PROMPTS, ANSWERS)[0, 1] == 35 and within.host_rewards(PROMPTS, ANSWERS)[0, 1] == 10


def test_a_context_closes_what_sources_hold():
    closed = []
    context = SourceContext()
    context.shared["worker"] = types.SimpleNamespace(close=lambda: closed.append("worker"))
    context.shared["weights"] = 3
    context.close()
    assert closed == ["worker"] and not context.shared


def test_a_nested_context_shares_and_closes_what_is_its_own():
    closed = []

    def held(name):
        return types.SimpleNamespace(close=lambda: closed.append(name))

    outer = SourceContext()
    inner = outer.nested()
    outer.shared["reward"] = held("reward")
    inner.shared["judge"] = held("judge")
    assert inner.shared["reward"] is outer.shared["reward"] and "judge" not in outer.shared
    inner.close()
    assert closed == ["judge"] and list(inner.shared) == ["reward"]
    outer.close()
    assert closed == ["judge", "reward"] and not inner.shared


def test_the_judge_may_be_the_sources():
    specs = {"P1A": f"{MODULE}:brevity", "P2A": f"{MODULE}:brevity"}
    people = Audience("synthetic", ("P1A", "P2A"), "", "rewards", specs)
    people.check()
    np.testing.assert_array_equal(people.scores(PROMPTS, ANSWERS, "P2A"), BREVITY)
    assert people.score(PROMPTS[0], ANSWERS[0], "P1A") == -2
    with pytest.raises(UserError, match=r"judge: rewards, but 'P3A' has no source; add one to --config.rewards"):
        people.score("p", "a", "P3A")
    with pytest.raises(UserError, match=r"judge: rewards, but 'P2A' has a reward model that this run trains"):
        Audience("synthetic", ("P1A", "P2A"), "", "rewards", {"P1A": f"{MODULE}:brevity"}).check()


@pytest.mark.parametrize(
    ("fields", "judge", "message"),
    [
        ({"sentence": 5}, {"A": "short"}, r"preferences\.A\.sentence: 5 is not text; write it in quotes"),
        ({"dimension": None}, {"A": "short"}, r"preferences\.A\.dimension: None is not text; write it in quotes"),
        ({"label": 3}, {"A": "short"}, r"preferences\.A\.label: 3 is not text; write it in quotes"),
        ({}, {"A": None}, r"judge\.A: None is not text; name a scorer"),
        ({}, {"A": ["short"]}, r"judge\.A: \['short'\] is not text; name a scorer"),
    ],
)
def test_preferences_and_scorers_are_texts(fields, judge, message):
    with pytest.raises(UserError, match=message):
        Audience({"A": {"dimension": "x", "sentence": "Be x.", **fields}}, ("A",), "", judge).check()


def test_a_source_for_no_objective_is_refused():
    with pytest.raises(
        UserError, match=r"rewards: 'P3A' is not one of P1A, P2A, P2B, helpful; add it to the objectives"
    ):
        audience({"P3A": f"{MODULE}:brevity"}).check()
