"""A model folder as a judge: log-probabilities of verdicts, read without sampling."""

import gc
import json
import math
import re
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from support import tiny, tiny_llamas
from support.chat_server import ChatServer
from support.tiny_judge import CONFIG, make
from support.tiny_llamas import needs_torch

from pjrlhf.data import synthetic
from pjrlhf.data.schema import shared_length
from pjrlhf.data.tokenization import load_tokenizer
from pjrlhf.errors import UserError
from pjrlhf.feedback import comparisons
from pjrlhf.judges.judge import BothOrders, JudgeContext, ScoreJudge, agreement, judge_from
from pjrlhf.judges.templates import read_template
from pjrlhf.models.huggingface import load_params
from pjrlhf.parallel.mesh import AXES
from pjrlhf.pipeline import stages
from pjrlhf.rewards.sources import SourceContext, reward_source
from pjrlhf.runtime import devices
from pjrlhf.runtime.judges import STARTS, Continuations, ModelJudgeSettings, NextToken
from pjrlhf.training.workdir import Workdir

CRITERIA = {"long": "The response is long."}
PROMPTS = [f"request {i}" for i in range(5)]
A = ["x" * i + " and more" for i in range(5)]
B = ["Not at all.", "y", "z z", "", "x" * 4 + " and more"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def mesh():
    return devices.Devices(devices.MeshSettings(), 1)


@pytest.fixture(scope="module")
def context(mesh):
    return SourceContext(lambda: mesh)


@pytest.fixture(scope="module")
def whole(folder):
    """ids -> log-probabilities [V] of the next token, by the forward pass of that row alone."""
    params = load_params(folder)

    def logps(ids):
        tokens = np.array([ids])
        logits = np.asarray(tiny_llamas.forward(CONFIG, params, tokens, tokens >= 0)[0, -1], np.float64)
        return logits - np.logaddexp.reduce(logits)

    return logps


def judge(folder, context, **settings):
    spec = {"kind": "model", "path": str(folder), **settings}
    return judge_from(spec, JudgeContext(ScoreJudge(print), CRITERIA, sources=context))


def rendered(template, **values):
    """The text that the judge reads before its verdict, by the template of `bpe`."""
    turns = [*template.messages(values)]
    return "".join(["<s>", *(f"<{m['role']}>{m['content']}" for m in turns), "<assistant>"])


# ---- log-probabilities


@pytest.mark.slow
def test_log_probs_do_not_depend_on_padding_chunks_or_devices(folder, mesh, whole):
    rng = np.random.default_rng(0)
    rows = [tuple(rng.integers(5, 300, size).tolist()) for size in (3, 70, 12, 200, 1, 64, 65)]
    wanted = (5, 17, 299)
    model = NextToken(ModelJudgeSettings(path=str(folder), batch_size=3), mesh)
    found = model("test", rows, wanted)
    expected = np.array([whole(row)[list(wanted)] for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "make_mesh", lambda sizes: Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES))
        alone = NextToken(ModelJudgeSettings(path=str(folder)), devices.Devices(devices.MeshSettings(), 1))
    np.testing.assert_allclose(alone("test", rows, wanted), found, atol=1e-4)


@needs_torch
def test_log_probs_are_those_of_transformers(folder, mesh):
    ids = np.random.default_rng(1).integers(5, 300, (4, 40))
    logits = tiny_llamas.torch_logits(folder, ids, np.ones_like(ids, bool))[:, -1].astype(np.float64)
    expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    rows = [tuple(row) for row in ids.tolist()]
    found = NextToken(ModelJudgeSettings(path=str(folder)), mesh)("test", rows, range(300))
    np.testing.assert_allclose(found, expected, atol=1e-4)


# ---- verdicts


def by_hand(whole, tokenizer, text, labels):
    """The probability of each label, with and without a space, from the forward pass of every row alone."""

    def written(ids, before):
        total = 0.0
        for i, token in enumerate(ids):
            total += whole([*before, *ids[:i]])[token]
        return math.exp(total)

    def encode(text):
        return tokenizer.backend(text, add_special_tokens=False)["input_ids"]

    ids = {label: [encode(text + space + label) for space in ("", " ")] for label in labels}
    shared = min(shared_length(encode(text), one) for forms in ids.values() for one in forms)
    before = encode(text)[:shared]
    return {label: sum(written(one[shared:], before) for one in forms) for label, forms in ids.items()}


@pytest.mark.parametrize("prompt", ["criterion", pytest.param("self_reference", marks=pytest.mark.slow)])
def test_a_verdict_is_the_soft_preference_of_the_letters(folder, context, whole, prompt):
    found = judge(folder, context, prompt=prompt)(PROMPTS, A, B, "long")
    template, tokenizer = read_template(prompt), load_tokenizer(folder)
    start = STARTS["pair", template.answer]
    for i in (0, 2):
        values = {"prompt": PROMPTS[i], "first": A[i], "second": B[i], "criterion": CRITERIA["long"]}
        p = by_hand(whole, tokenizer, rendered(template, **values) + start, "ABT")
        assert found[i] == pytest.approx((p["A"] - p["B"]) / sum(p.values()), abs=1e-4)
    assert found[4] == 0, "identical answers are a tie"
    assert (np.abs(found) < 1).all() and len(set(found.tolist())) == 5


def test_ratings_are_expected_values_in_which_10_is_not_1(folder, context, whole):
    rate = reward_source("P2A", {"kind": "judge", "path": str(folder), "criterion": "It is long."}, context)
    assert rate.on_all_processes
    found = rate(PROMPTS[:2], A[:2])
    template, tokenizer = read_template("rating"), load_tokenizer(folder)
    values = {"prompt": PROMPTS[1], "first": A[1], "criterion": "It is long."}
    text = rendered(template, **values) + STARTS["rating", "json"]
    p = by_hand(whole, tokenizer, text, [str(n) for n in range(1, 11)])
    p["1"] -= p["10"]  # written as 1, then 0
    expected = sum(int(n) * x for n, x in p.items()) / sum(p.values())
    assert found[1] == pytest.approx(expected, abs=1e-3) and 1 < expected < 10


def test_ratings_of_a_server_are_rewards(tmp_path):
    def rule(body):
        text = body["messages"][-1]["content"]
        length = len(re.search(r"Response:\n(.*?)\n\nGive", text, re.S)[1])
        return json.dumps({"reason": "by length", "verdict": length})

    context = SourceContext(folder=tmp_path)
    server = ChatServer(rule)
    with server.running() as url:
        spec = {"kind": "judge", "model": "m", "base_url": url, "criterion": "It is long."}
        rate = reward_source("P2A", spec, context)
        np.testing.assert_array_equal(rate(["q"] * 3, ["four", "x", "x" * 11]), [4.0, 1.0, math.nan])
    assert rate.function.failures == 1 and not rate.on_all_processes
    assert len((tmp_path / "ratings.jsonl").read_text().splitlines()) == len(server.bodies) == 3 + 2
    again = reward_source("P2A", {**spec, "replay": True}, context)
    np.testing.assert_array_equal(again(["q"], ["four"]), [4.0])
    with pytest.raises(UserError, match=r"rewards\.P2A: has a path and a cache; leave out the cache"):
        reward_source("P2A", {"kind": "judge", "path": "f", "cache": "c", "criterion": "It is long."}, context)


def test_labels_of_several_tokens_and_labels_that_others_begin_with():
    forms = {"1": ((5,), (9, 5)), "10": ((5, 6), (9, 5, 6)), "2": ((7,),)}
    found = Continuations(0, forms)
    assert found.starts == ((), (5,), (9,), (9, 5)) and found.wanted == (5, 6, 7, 9)
    p = {(): {5: 0.4, 7: 0.2, 9: 0.3}, (5,): {6: 0.3}, (9,): {5: 0.5}, (9, 5): {6: 0.1}}
    logps = np.log([[p[start].get(token, 1e-30) for token in found.wanted] for start in found.starts])
    expected = {"1": 0.4 * 0.7 + 0.15 * 0.9, "10": 0.4 * 0.3 + 0.15 * 0.1, "2": 0.2}
    assert found.probabilities(logps) == pytest.approx(expected)


def test_a_model_without_chat_template_is_asked_in_plain_text(tmp_path, context):
    found = judge(make(tmp_path, chat=False), context)(PROMPTS, A, B, "long")
    assert np.isfinite(found).all() and len(set(found.tolist())) == 5


def test_what_does_not_fit_the_context_has_no_verdict_and_is_counted(folder, context):
    counted = BothOrders(judge(folder, context))
    found = counted(PROMPTS, ["x" * 1100, *A[1:]], B, "long")
    assert math.isnan(found[0]) and np.isfinite(found[1:]).all()
    report = counted.report()
    assert (report["asked"], report["judged"], report["failures"]) == (5, 4, 2)
    assert report["model"] == str(folder) and report["requests"] == 2 * 3 * 2


def test_the_same_model_is_read_once(folder, mesh):
    shared = SourceContext(lambda: mesh)
    first, second = judge(folder, shared), judge(folder, shared, prompt="helpful")
    np.testing.assert_array_equal(first(PROMPTS, A, B, "long"), judge(folder, shared)(PROMPTS, A, B, "long"))
    second(PROMPTS[:1], A[:1], B[:1], "")
    assert len(shared.shared) == 1
    assert agreement(first(PROMPTS, A, B, "long"), first(PROMPTS, A, B, "long"))["agreement"] == 1


def test_a_tokenizer_that_does_not_know_the_letters(tmp_path):
    synthetic.write_tokenizer(tmp_path, synthetic.ENVIRONMENTS["synthetic"])
    with pytest.raises(
        UserError, match=r"writes the verdicts 'A' and 'B' alike; choose another model, or a prompt with"
    ):
        Continuations.find(load_tokenizer(tmp_path), "request", "Answer:", "ABT")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "judge: names no model; set path to its folder"),
        ({"path": "f", "prompt": "rating"}, "judge prompt 'rating': is one of kind rating, not pair; choose another"),
        ({"path": "f", "temperature": 1.0}, "temperature"),
        ({"path": "f", "person": {"age": 3}}, "judge.person: has no 'age'; give about, stated and said"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(settings, message):
    with pytest.raises(UserError, match=message):
        judge_from({"kind": "model", **settings}, JudgeContext(ScoreJudge(print)))


@pytest.mark.slow
def test_the_model_of_a_judge_leaves_with_its_stage(folder, copied):
    """Unless a reward asks the same model, whose judge takes it over."""
    criteria = {"helpful": "It helps."}
    rewards = {"P2A": {"kind": "judge", "path": str(folder), "criterion": "It is brief."}}
    (copied / "config.json").unlink()
    run = tiny.start(copied, tiny.settings(rewards=rewards))
    for shared in (False, True):
        if shared:
            run.audience.sources["P2A"](PROMPTS, A)
        found = run.judge({"kind": "model", "path": str(folder), "criteria": criteria})
        found(PROMPTS, A, B, "helpful")
        (model,) = map(weakref.ref, run.judging.shared.values())
        assert len(run.context.shared) == shared
        del found
        run.end_stage()
        gc.collect()
        assert (model() is not None) == shared
    run.close()
    gc.collect()
    assert model() is None


def test_a_folder_that_is_not_there(context):
    with pytest.raises(UserError, match="nowhere"):
        judge("nowhere", context)(PROMPTS, A, B, "long")


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        ("comparisons.judge", {"kind": "model", "path": "nowhere"}),
        ("evaluate.judges", ({"kind": "model", "path": "nowhere"},)),
        ("comparisons.sampler", "nowhere"),
        ("evaluate.judge", {"kind": "reward", "source": {"kind": "judge", "path": "nowhere", "criterion": "x"}}),
        ("rewards.P2A", {"kind": "judge", "path": "nowhere", "criterion": "x"}),
    ],
)
def test_folders_that_are_not_there_are_missed_at_the_start(tmp_path, key, spec):
    config = tiny.settings()
    section, name = key.split(".")
    with config.ignore_type():
        config[section][name] = spec
    with pytest.raises(
        UserError, match=rf"{key}(\.source)?\.path: nowhere: no such file; set --config\.{key}(\.source)?\.path to one"
    ):
        stages.run(config, Workdir(tmp_path / "run"))


@pytest.mark.slow
def test_a_run_labels_its_comparisons_with_a_model(folder, copied):
    config = tiny.settings(comparisons__pairs=12)
    with config.ignore_type():
        config.comparisons.judge = {"kind": "model", "path": str(folder)}
        config.comparisons.judge["criteria"] = {"helpful": "It helps."}
    with tiny.one_device():
        found = comparisons.run(tiny.start(copied, config))
    records = [json.loads(line) for line in (copied / "comparisons" / comparisons.FILE).read_text().splitlines()]
    assert records and {record["judge"] for record in records} == {f"model {folder.parent.name}/{folder.name}"}
    assert all(0.5 < record["preference"] < 1 for record in records)
    assert not any(found["unjudged"].values()) and found["judge"]["consistency"] <= 1
