"""The evaluation: which weights and prompts each answer is sampled with, and what is counted from the answers."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from support import tiny, tiny_judge

from pjrlhf.algorithms import banks, policy, reward
from pjrlhf.algorithms.modpo import answer_rewards
from pjrlhf.errors import UserError
from pjrlhf.evaluation.length_control import Comparisons, length_controlled
from pjrlhf.judges.judge import BothOrders
from pjrlhf.models.adapters import bank_size
from pjrlhf.models.storage import load_tree
from pjrlhf.pipeline import stages
from pjrlhf.protocols import selection
from pjrlhf.protocols import soups as evaluate
from pjrlhf.protocols.soups import Evaluation
from pjrlhf.runtime.answers import Row, sample_rows


@pytest.fixture(scope="module")
def run(finished):
    return tiny.start(finished, tiny.settings())


ADAPTERS = (*tiny.REWARDS, "pmorl")


def weight(row):
    """The row's weights by name, without zeros."""
    return {name: w for name, w in zip(ADAPTERS, row.mix, strict=True) if w}


class Stub:
    """Replaces the sampler: keeps the rows, and answers by a rule of the row in words of the synthetic environment."""

    def __init__(self, answer):
        self.answer, self.rows = answer, {}

    def __call__(self, rows, keys, name=""):
        self.rows[_bytes(keys)] = list(rows)
        return [self.answer(row) for row in rows]

    def asked(self, keys):
        """The rows that were sampled with `keys`."""
        return self.rows[_bytes(keys)]


def _bytes(keys):
    return np.asarray(jax.random.key_data(keys(0))).tobytes()


def evaluation(run, answer):
    found = Evaluation(run)
    found.sample = Stub(answer)
    return found


PLAIN, EXPERT = "it can shine .", "it exhibits luminescence ."
EVERYTHING = "tell me everything ."


def wordy(row):
    """More weight on P2B, more facts; more on P1B, more expert words; whoever is told obeys."""
    mix = weight(row)
    long = mix.get("P2B", 0) + (EVERYTHING in row.words)
    aspects = ["it holds {} .", "it is near {} .", "it can {} .", "it helps {} ."]
    words = ["water", "hills", "shine", "sleep"]
    facts = [aspect.format(word) for aspect, word in zip(aspects, words, strict=True)]
    text = " ".join(facts[: 1 + round(3 * min(long, 1))])
    return (
        text.replace("it can shine .", EXPERT) if mix.get("P1B", 0) > 0.5 or "use expert words ." in row.words else text
    )


# ---- sampling


def test_weights_zero_sample_the_base(run):
    bank, keys = banks.load(run), functools.partial(run.streams.key, "test")
    rows = [Row(request, "", (0.0,) * bank_size(bank)) for request in run.records.requests[1]]
    other = jax.tree.map(lambda x: x + 1.0, bank)
    assert sample_rows(run, bank, rows, keys) == sample_rows(run, other, rows, keys)
    soup = [Row(row.request, "", (1.0,) * bank_size(bank)) for row in rows]
    assert sample_rows(run, bank, soup, keys) != sample_rows(run, other, soup, keys)


# ---- who is compared


def test_methods_differ_in_prompt_and_weights(run):
    methods = Evaluation(run).methods(("P1A", "P2B"))
    names = {name: (words, dict(zip(ADAPTERS, mix, strict=True))) for name, (words, mix) in methods.items()}
    zero = dict.fromkeys(ADAPTERS, 0.0)
    soup = zero | {"P1A": 0.5, "P2B": 0.5}
    told = "use easy words . tell me everything ."
    assert names == {
        "base": ("", zero),
        "prompting": (told, zero),
        "rlhf": ("", zero | {"helpful": 1.0}),
        "pmorl": (told, zero | {"pmorl": 1.0}),
        "soups": (told, soup),
        "soups_untold": ("", soup),
    }


def test_win_rates_are_those_of_the_answers(run):
    found = evaluation(run, wordy)
    sections = found.people()["sections"]
    rows = iter(found.sample.asked(found.keys("evaluate/people")))
    requests = run.records.requests[1]
    answers = {
        (combo, method): {request: wordy(next(rows)) for request in requests}
        for combo in found.combos
        for method in found.methods(combo)
    }
    assert next(rows, None) is None
    pooled = []
    for combo in found.combos:
        for request in requests:
            votes = 0
            for criterion in combo:
                a, b = (
                    run.audience.score(request, answers[combo, method][request], criterion)
                    for method in ("soups", "base")
                )
                votes += (a > b) - (a < b)
            pooled.append(np.sign(votes))
    rate = sections["win_rate"]["soups"]["base"]
    wins, losses = pooled.count(1), pooled.count(-1)
    assert wins and losses != wins and pooled.count(0), "the stub decides nothing"
    assert (rate.wins, rate.losses, rate.ties) == (wins, losses, pooled.count(0))
    assert rate.rate == pytest.approx(wins / (wins + losses))
    back = sections["win_rate"]["base"]["soups"]
    assert (back.wins, back.losses, back.ties) == (losses, wins, pooled.count(0))
    others = [sections["win_rate"]["soups"][name] for name in ("base", "prompting", "rlhf", "pmorl")]
    assert sections["win_rate_average"]["soups"].wins == sum(rate.wins for rate in others)
    untold = sections["ablation"]["soups_untold"]
    assert untold.keys() == {"base", "prompting", "rlhf", "pmorl", "soups"}
    assert np.isnan(sections["position_consistency"])  # scores do not depend on the order of the answers


def test_equal_answers_are_ties(run):
    sections = evaluation(run, lambda row: PLAIN).people()["sections"]
    rate = sections["win_rate"]["soups"]["base"]
    assert (rate.wins, rate.losses, rate.ties) == (0, 0, 4 * len(run.records.requests[1]))
    assert np.isnan(rate.rate) and rate.rate_half == 0.5


def test_ingredients_are_set_against_the_base_by_their_own_criterion(run):
    found = evaluation(run, lambda row: EXPERT if weight(row) == {"P1B": 1.0} else PLAIN)
    ingredients = found.ingredients()
    count = 2 * len(run.records.requests[1])
    rates = {name: one["win_rate_vs_base"] for name, one in ingredients.items()}
    assert (rates["P1B"].wins, rates["P1B"].ties) == (count, 0)
    for name in set(tiny.REWARDS) - {"P1B"}:
        assert (rates[name].wins, rates[name].losses) == (0, 0)
    assert ingredients["P1B"]["score"] == 1 and ingredients["P1B"]["base_score"] == -1
    assert ingredients["P1B"]["length"] == 4
    kl = [row["objective/kl/P1B"] for row in tiny.lines(run.workdir.path, "policy")]
    assert ingredients["P1B"]["kl"] == pytest.approx(np.mean(kl[-policy.KL_STEPS :]))


@pytest.mark.slow
def test_the_kl_is_that_of_the_last_steps_whatever_is_logged(copied, monkeypatch):
    """More steps than are averaged, a different number of them logged, and one of the runs interrupted."""
    monkeypatch.setattr(policy, "KL_STEPS", 2)
    found = {}
    for log_every, parts in ((1, (5,)), (0, (3, 5))):
        name = f"methods/every{log_every}"
        for steps in parts:
            run = tiny.start(copied, tiny.settings(log_every=log_every))
            method = policy.method_of(run, policy.settings_of(run).replace(steps=5))
            state = run.train(method, name, steps)
        found[log_every] = method.last_kl(state)
    assert found[0] == found[1] and found[1].keys() == set(tiny.REWARDS)
    lines = tiny.lines(copied, "methods/every1")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for name, kl in found[1].items():
        assert kl == pytest.approx(np.mean([line[f"objective/kl/{name}"] for line in lines[-2:]]), rel=1e-5)


# ---- the best of several answers


@pytest.mark.parametrize("N", [1, 2, 4])
def test_the_best_of_n_has_the_expected_value_of_the_order_statistic(N):
    """Over all N-tuples of equally likely scores, E max = sum_k s_k ((k / m)^N - ((k - 1) / m)^N), s in order."""
    values = np.array([-2.0, 0.0, 0.5, 3.0, 3.5])
    scores = np.array(list(itertools.product(values, repeat=N)))
    found = np.take_along_axis(scores, selection.best_of(scores)[:, None], 1).mean()
    k, m = np.arange(1, 6), len(values)
    assert found == pytest.approx((values * ((k / m) ** N - ((k - 1) / m) ** N)).sum())
    assert selection.best_of(np.full((1, 3), -np.inf)).tolist() == [0]


def choosing(finished, N):
    return Evaluation(tiny.start(finished, tiny.settings(evaluate__best_of=N)))


@pytest.mark.slow
def test_the_best_answer_is_that_with_the_highest_rewards_of_the_person(finished):
    found = choosing(finished, 3)
    best, run, sampled = found.best_of(2), found.run, []
    asked = [request for request in found.requests * 2 for _ in range(3)]
    texts = found.sample([Row(request, "", found.weights()) for request in asked], found.keys("evaluate/best_of"))
    rewarder = reward.load(run)
    for combo in found.combos:
        for i, text in enumerate(best[combo]):
            own, request = texts[3 * i : 3 * i + 3], asked[3 * i]
            raw = answer_rewards(run, rewarder, [request] * 3, own, "test")[0]
            scaled = (raw - rewarder["mean"]) / rewarder["std"]
            total = scaled[:, [tiny.REWARDS.index(name) for name in combo]].sum(1)
            assert text in own and total[own.index(text)] == pytest.approx(np.nanmax(total), abs=1e-4)
            sampled.append(own.index(text))
    assert len(set(sampled)) == 3
    assert {kept["method"] for kept in found.answers} == {"best_of_n"}


def test_the_best_of_one_is_the_base(finished):
    found = choosing(finished, 1)
    found.sample = Stub(wordy)
    sections = found.people()["sections"]
    rate = sections["win_rate"]["best_of_n"]["base"]
    assert (rate.wins, rate.losses, rate.ties) == (0, 0, 4 * len(found.requests))
    assert {one["method"] for one in found.answers} >= {"best_of_n", "base"}
    assert sections["win_rate"]["soups"].keys() >= {"best_of_n"} and "best_of_n" in sections["combos"]["P1A+P2A"]


# ---- the sweep


def test_a_score_that_rises_with_the_weight_of_its_own_preference_has_spearman_1(run):
    found = evaluation(run, wordy)
    sweep = found.sweep()
    rows = found.sample.asked(found.keys("evaluate/sweep"))
    assert all(row.words == "" and sum(row.mix) == pytest.approx(1) for row in rows)
    part = sweep["informativeness"]
    assert (part["low"], part["high"], part["weights"]) == ("P2A", "P2B", [0, 0.5, 1])
    assert part["spearman"] == {"P2A": pytest.approx(1), "P2B": pytest.approx(1)}
    assert part["length"] == sorted(part["length"]) and part["length"][0] < part["length"][-1]
    assert part["scores"]["P2B"] == sorted(part["scores"]["P2B"])
    assert part["scores"]["P2A"] == sorted(part["scores"]["P2A"], reverse=True)


def test_a_sweep_that_runs_the_wrong_way_has_spearman_minus_1(run):
    swap = {"P2A": "P2B", "P2B": "P2A"}

    def wrong(row):
        mix = {swap.get(name, name): w for name, w in weight(row).items()}
        return wordy(Row(row.request, "", tuple(mix.get(name, 0.0) for name in ADAPTERS)))

    part = evaluation(run, wrong).sweep()["informativeness"]
    assert part["spearman"] == {"P2A": pytest.approx(-1), "P2B": pytest.approx(-1)}


def test_the_gap_to_the_chord_has_the_sign_of_the_curve(run):
    def early(row):
        return wordy(Row(row.request, "", tuple(2.0 * w for w in row.mix)))

    part = evaluation(run, early).sweep()["informativeness"]
    scores = part["scores"]["P2B"]
    expected = scores[1] - (scores[0] + scores[2]) / 2
    assert part["chord_gap"]["P2B"]["mean"] == pytest.approx(expected) and expected > 0
    assert "P2B: the soups lie on average" in evaluate._notes({"informativeness": part})[1]
    assert "above" in evaluate._notes({"informativeness": part})[1]


# ---- preferences that come later


@pytest.mark.slow
def test_two_more_styles_train_two_more_ingredients(tmp_path):
    config = tiny.catalogue("soups").get_config("styles")
    flat = {k: v for k, v in tiny.TINY.items() if not k.startswith(("objectives", "methods."))}
    config.update_from_flattened_dict(flat | {"data.max_prompt": 24, "evaluate.sweep_points": 2})
    for entry in config.methods:
        config.methods[entry].rollouts = 4
    config.policy.rollouts = 4
    folder = tiny.run(tmp_path / "run", config)
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert len(summary["combos"]) == 16 and "P1A+P2B+P3D" in summary["combos"]
    assert summary["scaling"]["new"] == ["P3C", "P3D"]
    found = summary["scaling"]["methods"]
    assert {name: one["ingredients_trained"] for name, one in found.items()} == {"soups": 2, "pmorl_16": 1}
    assert {name: one["samples"] for name, one in found.items()} == {"soups": 2 * 4 * 4, "pmorl_16": 4 * 4}
    assert set(summary["win_rate"]) == {"base", "prompting", "soups", "pmorl_8", "pmorl_16"}
    _, note = load_tree(folder / "methods" / "soups_new" / "bank.safetensors")
    assert note["adapters"] == ["P3C", "P3D"]


def test_everybody_needs_a_policy(finished):
    config = tiny.settings(stages=("evaluate",))
    del config.methods["pmorl"]
    with pytest.raises(UserError, match="nothing is trained for 'P1A'; add the stage policy"):
        Evaluation(tiny.start(finished, config))


# ---- judges


def with_judges(folder, *judges, judge="score", **changes):
    config = tiny.settings(**changes)
    with config.ignore_type():
        config.evaluate.judge, config.evaluate.judges = judge, judges
    return evaluation(tiny.start(folder, config), wordy)


def test_judges_agree_as_far_as_their_verdicts_do(finished):
    brevity = {"kind": "reward", "source": "support.toy_extensions:brevity"}
    found = with_judges(finished, "score", brevity)
    ingredients = found.ingredients()
    sections = found.panel.sections()
    assert [one["name"] for one in sections["judges"]] == ["score", "score (2)", "reward"]
    assert sections["judge"] == sections["judges"][0]
    pairs = {(one["criterion"], *one["judges"]): one for one in sections["agreement"]}
    assert len(pairs) == 3 * (len(ingredients) + 1)
    for name in ingredients:
        assert pairs[name, "score", "score (2)"]["agreement"] == 1
    # Whoever likes short answers sees every ingredient that writes more as worse.
    other = pairs["P2B", "score", "reward"]
    assert other["n"] == 2 * len(found.requests) and other["agreement"] < 0.5
    assert pairs["all", "score", "reward"]["n"] == other["n"] * len(ingredients)


def test_further_judges_judge_all_methods(finished):
    """Their verdicts are those that each would give alone, and the agreement is over all comparisons."""
    brevity = {"kind": "reward", "source": "support.toy_extensions:brevity"}
    found = with_judges(finished, brevity)
    alone = {"score": with_judges(finished), "reward": with_judges(finished, judge=brevity)}
    sections = found.people()["sections"]
    wins = {name: one.people()["sections"]["win_rate"] for name, one in alone.items()}
    assert sections["win_rate"] == wins["score"]
    rates = sections["win_rate_by_judge"]
    assert set(rates["reward"]) == {"prompting", "soups", "rlhf", "pmorl"}
    for judge, own in rates.items():
        for method, rate in own.items():
            assert dataclasses.astuple(rate) == pytest.approx(
                dataclasses.astuple(wins[judge][method]["base"]), nan_ok=True
            )
    assert rates["score"] != rates["reward"]
    found.ingredients()
    agreements = {one["criterion"]: one for one in found.panel.sections()["agreement"]}
    each = [one for criterion, one in agreements.items() if criterion != "all"]
    assert agreements["all"]["n"] == sum(one["n"] for one in each) == found.judge.judged
    assert agreements["all"]["agreement"] == pytest.approx(
        sum(one["agreement"] * one["n"] for one in each) / agreements["all"]["n"]
    )
    asked = [judge.asked for judge in found.panel.judges.values()]
    assert asked[0] == asked[1] > len(found.combos) * len(found.requests) * 10


def test_judges_are_asked_as_often_as_is_told_before(finished, monkeypatch):
    """All comparisons, those of the best of several answers and those that are asked anew, too."""
    told = []
    found = with_judges(finished, "score", evaluate__asked_twice=3, evaluate__best_of=2)
    monkeypatch.setattr(found.run, "judge", lambda spec: BothOrders(Moody()))
    found = Evaluation(found.run)
    found.sample = Stub(wordy)
    anew = found.panel._anew["score"]
    monkeypatch.setattr(BothOrders, "planned_requests", lambda judge, n: told.append(n) or [])
    found.announce()
    found.people(), found.ingredients(), found.sweep()
    asked = [judge.asked for judge in found.panel.judges.values()]
    assert told == [asked[0] + anew.asked, asked[1] + found.panel._anew["score (2)"].asked] and anew.asked


@pytest.mark.slow
def test_a_model_folder_judges_beside_the_scores(finished, tmp_path):
    folder = tiny_judge.make(tmp_path)
    model = {"kind": "model", "path": str(folder), "criteria": {"helpful": "It helps."}}
    found = with_judges(finished, model)
    with tiny.one_device():
        ingredients = found.ingredients()
    judge = found.panel.sections()["judges"][1]
    assert judge["name"] == f"model {folder.parent.name}/{folder.name}" and judge["failures"] == 0
    assert judge["asked"] == judge["judged"] == 2 * len(found.requests) * len(ingredients)
    assert 0 <= judge["consistency"] <= 1 and -1 <= judge["position_bias"] <= 1


class Moody:
    """A judge that changes its mind when it is asked anew."""

    def __init__(self, sign=1.0):
        self.sign = sign

    def __call__(self, prompts, first, second, criterion):
        return np.array([self.sign * np.sign(len(a) - len(b)) for a, b in zip(first, second, strict=True)])

    def again(self):
        return Moody(-self.sign)


def test_a_judge_is_asked_twice_as_often_as_wanted(finished, monkeypatch):
    found = with_judges(finished, evaluate__asked_twice=3)
    found.ingredients()
    assert "self_consistency" not in found.panel.sections()["judge"], "scores are the same by construction"
    monkeypatch.setattr(found.run, "judge", lambda spec: BothOrders(Moody()))
    found = Evaluation(found.run)
    found.sample = Stub(wordy)
    found.ingredients()
    twice = found.panel.sections()["judge"]["self_consistency"]
    verdicts = [first for first, _ in found.panel._twice["score"]]
    assert twice["n"] == 3 * len(set(found.names) - set(found.prompted))
    assert twice["agreement"] == np.mean(np.concatenate(verdicts) == 0), "only ties stay"


def test_rates_at_equal_lengths_are_those_of_the_verdicts(finished):
    found = with_judges(finished, evaluate__length_controlled=("P1B",))
    sections = found.people()["sections"]
    assert set(sections["length_controlled"]) == {"P1B"}
    rows = sections["length_controlled"]["P1B"]
    assert set(rows) == {"prompting", "soups", "rlhf", "pmorl", "soups_untold"}
    # Prompting writes as an expert where it writes enough, which it does where P2B is stated too.
    told = [found.methods(combo)["prompting"] for combo in found.combos if "P1B" in combo]
    texts = [wordy(Row("", words, mix)) for words, mix in told for _ in found.requests]
    base = [len(wordy(Row("", "", found.weights())))] * len(texts)
    verdicts, lengths = [float(EXPERT in text) for text in texts], [len(text) for text in texts]
    prompting = rows["prompting"]
    assert prompting["n"] == len(texts) and prompting["rate"] == (1 + np.mean(verdicts)) / 2 == 0.75
    # Each request is answered by several methods for several kinds of people, which tells its difficulty.
    assert prompting["form"] == "instructions" and prompting["low"] <= prompting["controlled"] <= prompting["high"]
    comparisons = Comparisons(verdicts, lengths, base, np.arange(len(texts)) % len(found.requests))
    alone = length_controlled({"prompting": comparisons}, resamples=2)["prompting"]
    assert prompting["controlled"] == pytest.approx(alone.controlled, abs=0.1)
    assert (prompting["length"], prompting["base_length"]) == (np.mean(lengths), base[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("P2A", "'P2A' is about length (.*), so equal lengths would take away what it asks for; leave it out"),
        ("P2B", "'P2B' is about length"),  # its opposite is
        ("P9", "'P9' is no criterion; choose from P1A"),
    ],
)
def test_equal_lengths_are_refused_where_they_say_nothing(name, message):
    with pytest.raises(UserError, match=message):
        stages.read(tiny.settings(evaluate__length_controlled=(name,)))
